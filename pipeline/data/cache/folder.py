"""The files of a cache: a local folder or object storage, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.storage import explain_s3, open_storage, show_path
from pipeline.errors import CacheError, DataError

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
        with self._explain(self.shown, "cannot be read", "make it readable"):
            found = self.filesystem.get_file_info(selector)
        start = len(self.root) + 1
        return {info.path[start:]: info.size for info in found if info.type == pafs.FileType.File}

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        with self._explain(self.show(name), "cannot be read", "make it readable"):
            return self.filesystem.get_file_info(f"{self.root}/{name}").type == pafs.FileType.File

    def read(self, name: str) -> pa.Buffer:
        """A file's content, in memory: one that is mapped could still change after it was checked.

        Raises:
            CacheError: it is missing or cannot be read.
        """
        try:
            with (
                self._explain(self.show(name), "cannot be read", "make it readable"),
                self.filesystem.open_input_file(f"{self.root}/{name}") as file,
            ):
                return file.read_buffer()
        except FileNotFoundError as error:
            raise CacheError(f"{self.show(name)} is missing from the cache; {MISSING_ADVICE}.") from error

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes a file such that a reader finds all of it or none, and a power cut leaves all or none.

        Raises:
            CacheError: the disk is full, or refuses.
        """
        path = f"{self.root}/{name}"
        with self._explain(self.show(name), "cannot be written", "make room there, or set another cache.path"):
            if self.local:
                _write_local(path, content)
            else:  # an object is there once it is complete
                if self.filesystem.type_name != "s3":  # which has no folders
                    self.filesystem.create_dir(os.path.dirname(path), recursive=True)
                with self.filesystem.open_output_stream(path) as file:
                    file.write(content)

    def delete(self, name: str) -> None:
        """Removes a file, if it is there."""
        with (
            self._explain(self.show(name), "cannot be deleted", "make the folder writable"),
            contextlib.suppress(FileNotFoundError),
        ):
            self.filesystem.delete_file(f"{self.root}/{name}")

    def delete_folder(self) -> None:
        """Removes the folder with all that is in it."""
        with self._explain(self.shown, "cannot be deleted", "make the folder above it writable"):
            self.filesystem.delete_dir(self.root)

    @contextlib.contextmanager
    def _explain(self, what: str, problem: str, advice: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
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
