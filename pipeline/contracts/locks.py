"""Lock files: one process at a time uses a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from pathlib import Path
from typing import IO, Self

_log = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file."""

_POLL_S = 0.1


class LockedError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: that process, for people.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def hold_lock(folder: Path, wait_s: float = 0.0) -> IO[str]:
    """Holds the folder's lock until the file is closed or the process ends, however it ends.

    Args:
        wait_s: how long to wait for another process to leave the folder.

    Raises:
        LockedError: another process holds it.
        OSError: the folder cannot be written.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    deadline = time.monotonic() + wait_s
    try:
        while not _try(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise LockedError(holder)
            time.sleep(_POLL_S)
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s cannot be locked (%s): make sure that no other process uses it", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


class Holding:
    """A folder that this process alone uses, until it is closed.

    Args:
        lock: of the folder, see ``hold_lock``; none: where it lies there are none.
    """

    def __init__(self, lock: IO[str] | None) -> None:
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes use the folder."""
        if self._lock is not None:
            self._lock.close()


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
