"""Lock files: one process at a time uses a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
from pathlib import Path
from typing import IO

_log = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file."""


class LockedError(Exception):
    """Another process holds the lock.

    Attributes:
        holder: that process, for people.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


def hold_lock(folder: Path) -> IO[str]:
    """Holds the folder's lock until the file is closed or the process ends, however it ends.

    Raises:
        LockedError: another process holds it.
        OSError: the folder cannot be written.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise LockedError(holder) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s cannot be locked (%s): make sure that no other process uses it", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
