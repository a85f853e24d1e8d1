"""A storage service that fails when it is told to, over a local folder; and time that passes only when it is waited."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow.fs as pafs
import pytest

from pipeline.data import storage, waiting
from pipeline.data.cache import folder
from pipeline.data.sources import image_files, parquet_files

SLOW_DOWN = "When reading key 'x' in bucket 'y': AWS Error SLOW_DOWN during GetObject operation: please"
DENIED = "When reading key 'x' in bucket 'y': AWS Error ACCESS_DENIED during GetObject operation: no"
REFUSED = (
    "When reading key 'x' in bucket 'y': AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Could "
    "not connect to server; Details: Failed to connect to 127.0.0.1 port 9 after 0 ms"
)


class Time:
    """Passes while somebody sleeps.

    Attributes:
        now: seconds.
        pauses: how long each sleep was.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
        self.now = 1_000.0
        self.pauses: list[float] = []
        monkeypatch.setattr(waiting, "PATIENCE", waiting.Patience(clock=lambda: self.now, sleep=self.sleep, **changes))
        monkeypatch.setattr(waiting, "_known", set())
        monkeypatch.setattr(waiting, "_told", waiting._Told())

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


Plan = Callable[[str, str, int], bool]
"""Whether an operation fails: by its name, its path, and how often it was tried on that before."""


def never(operation: str, path: str, number: int) -> bool:
    return False


def always(operation: str, path: str, number: int) -> bool:
    return True


def twice(operation: str, path: str, number: int) -> bool:
    """Each operation on each path, before it goes well for the third time and fails again."""
    return number % 3 < 2


class Unsteady(pafs.FileSystemHandler):  # type: ignore[misc]
    """A local folder behind a service; see ``fail``.

    Attributes:
        num_failed: operations that failed.
    """

    def __init__(self) -> None:
        self._local = pafs.LocalFileSystem()
        self._lock = threading.Lock()
        self.fail(never)

    def fail(self, plan: Plan, text: str = SLOW_DOWN) -> None:
        """From now on operations fail for which ``plan`` says so.

        Args:
            text: of the error.
        """
        self._plan, self._text, self.num_failed = plan, text, 0
        self._numbers: Counter[tuple[str, str]] = Counter()

    def _do(self, operation: str, what: Any, **options: Any) -> Any:
        path = str(getattr(what, "base_dir", what))
        with self._lock:
            number = self._numbers[operation, path]
            self._numbers[operation, path] += 1
            if self._plan(operation, path, number):
                self.num_failed += 1
                raise OSError(self._text)
        return getattr(self._local, operation)(what, **options)

    def get_type_name(self) -> str:
        return "unsteady"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._do("get_file_info", paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._do("get_file_info", selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do("create_dir", path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._do("delete_dir", path)

    def delete_file(self, path: str) -> None:
        self._do("delete_file", path)

    def open_input_file(self, path: str) -> Any:
        return self._do("open_input_file", path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._do("open_output_stream", path)

    def _unused(self, *arguments: Any) -> Any:
        raise AssertionError("nothing of this is asked of object storage")

    delete_dir_contents = delete_root_dir_contents = move = copy_file = open_input_stream = open_append_stream = _unused


def put_before(handler: Unsteady, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is opened by its path from now on lies behind the service."""

    def open_storage(path: str) -> tuple[pafs.FileSystem, str]:
        return pafs.PyFileSystem(handler), storage.open_storage(path)[1]

    for module in (image_files, parquet_files, folder):
        monkeypatch.setattr(module, "open_storage", open_storage)
