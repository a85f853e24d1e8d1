"""The files of a cache: a local folder or object storage, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.storage import explain_s3, open_storage, show_path
from pipeline.data.waiting import ask_storage
from pipeline.errors import CacheError, DataError

T = TypeVar("T")

TEMPORARY = ".tmp"

NUM_READERS = 8
"""Files that are read at once: storage takes its time to answer, and hashing leaves the interpreter to others."""

REBUILD = (
    "delete it and run `python -m pipeline cache build` with the same configuration, which computes only what is "
    "missing; `python -m pipeline cache verify` names every damaged file"
)


@dataclass(frozen=True)
class CacheFolder:
    """A folder, with what can be done to the files below it; pickles small.

    Everything that asks object storage raises StorageError where that is not available for minutes, and may be done
    again: it is whole or not done at all.

    Attributes:
        filesystem: it is on.
        root: its path there.
        shown: its path as the user gave it, without settings.
    """

    filesystem: pafs.FileSystem = field(hash=False)
    root: str
    shown: str

    @property
    def local(self) -> bool:
        """Whether it is on a file system of this machine."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def below(self, name: str) -> CacheFolder:
        """A folder within it."""
        return replace(self, root=f"{self.root}/{name}", shown=f"{self.shown}/{name}")

    def show(self, name: str) -> str:
        """A file's path, for messages."""
        return f"{self.shown}/{name}"

    def list_files(self) -> dict[str, int]:
        """Size in bytes of every file below it, by its path from here; of none where there is no such folder.

        Raises:
            CacheError: the folder cannot be read.
        """
        selector = pafs.FileSelector(self.root, allow_not_found=True, recursive=True)
        found = self._ask(self.root, lambda: self.filesystem.get_file_info(selector))
        start = len(self.root) + 1
        return {info.path[start:]: info.size for info in found if info.type == pafs.FileType.File}

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        path = f"{self.root}/{name}"
        info = self._ask(path, lambda: self.filesystem.get_file_info(path))
        return bool(info.type == pafs.FileType.File)

    def read(self, name: str) -> pa.Buffer:
        """A file's content, in memory: one that is mapped could still change after it was checked.

        Raises:
            CacheError: it is missing or cannot be read.
        """
        path = f"{self.root}/{name}"

        def read() -> pa.Buffer:
            with self.filesystem.open_input_file(path) as file:
                return file.read_buffer()

        try:
            return self._ask(path, read)
        except FileNotFoundError as error:
            raise CacheError(f"{self.show(name)} is missing from the cache; {MISSING_ADVICE}.") from error

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes a file such that a reader finds all of it or none, and a power cut leaves all or none.

        Raises:
            CacheError: the disk is full, or refuses.
        """
        path = f"{self.root}/{name}"

        def write() -> None:
            if self.local:
                _write_local(path, content)
            else:  # an object is there once it is complete
                if self.filesystem.type_name != "s3":  # which has no folders
                    self.filesystem.create_dir(os.path.dirname(path), recursive=True)
                with self.filesystem.open_output_stream(path) as file:
                    file.write(content)

        self._ask(path, write, "cannot be written", "make room there, or set another cache.path")

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        path = f"{self.root}/{name}"
        with contextlib.suppress(FileNotFoundError):
            self._ask(path, lambda: self.filesystem.delete_file(path), "cannot be deleted", "make the folder writable")

    def delete_folder(self) -> None:
        """Removes the folder with all that is in it, if it is there."""
        advice = "make the folder above it writable"
        with contextlib.suppress(FileNotFoundError):
            self._ask(self.root, lambda: self.filesystem.delete_dir(self.root), "cannot be deleted", advice)

    def _ask(
        self, path: str, action: Callable[[], T], problem: str = "cannot be read", advice: str = "make it readable"
    ) -> T:
        """As ``ask_storage``, with errors as sentences, but for FileNotFoundError."""
        try:
            return ask_storage(self.filesystem, path, action)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            what = self.shown + path.removeprefix(self.root)
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            message = explain_s3(error, what) or f"{what} {problem} ({reason.splitlines()[0]}); {advice}."
            raise CacheError(message) from error


MISSING_ADVICE = "run `python -m pipeline cache build` with the same configuration, which computes only what is missing"


def open_folder(path: str) -> CacheFolder:
    """The folder that holds caches; it need not be there.

    Args:
        path: ``cache.path``: a local folder, or ``s3://bucket/folder`` as for data.

    Raises:
        CacheError: an address that cannot be understood, or holds a secret.
    """
    try:
        filesystem, root = open_storage(path)
    except DataError as error:
        raise CacheError(error.message.replace("data.path", "cache.path")) from error
    return CacheFolder(filesystem, root.rstrip("/"), show_path(path))


def _write_local(path: str, content: bytes | pa.Buffer) -> None:
    folder, name = os.path.dirname(path), os.path.basename(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name is on the disk too
    finally:
        os.close(handle)
