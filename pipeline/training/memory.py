"""The C library's heap while a network trains on the CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, by its header.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NEVER = 1 << 30  # bytes
_GROWS_BY = 64 << 20  # bytes; all that a thread's heap can hold


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one; elsewhere nothing happens.

    A thread's heap otherwise goes back to the system once the activations of a step are freed, and every page of it is
    taken and zeroed again in the next step: 5 % of the time of a small network. The process stays as large as its
    largest step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        for parameter, value in ((_MMAP_THRESHOLD, _NEVER), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROWS_BY)):
            mallopt(parameter, value)
