"""Rows out of image files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.order.rows import RowSet
from pipeline.data.sources.image_files import ImageFiles
from pipeline.data.sources.source import SplitReader, make_table, positions_of
from pipeline.data.storage import explain_s3
from pipeline.data.waiting import ask_storage
from pipeline.errors import DataError

# Reading waits, for a disk or a network, much longer than it computes.
NUM_THREADS = 8


class ImageReader(SplitReader):
    """Reads the files of a split, each when it is asked for.

    It has no row groups, so the whole split is shuffled, whether or not it fits into memory. Groups of neighbouring
    files would be read no faster, and as files are sorted by class, a window would hold a few classes only.

    Args:
        filesystem: the files are on.
        files: of the source.
        rows: of them that belong to the split.
    """

    def __init__(self, filesystem: pafs.FileSystem, files: ImageFiles, rows: RowSet) -> None:
        self.rows = rows
        self._filesystem = filesystem
        self._files = files

    @property
    def encoded_bytes(self) -> int:
        return int(self._files.sizes[self.sample_ids].sum())

    def read(self, sample_ids: np.ndarray) -> pa.Table:
        positions_of(sample_ids, self.sample_ids)  # raises for ids of another split
        sizes = self._files.sizes[sample_ids]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        # Files are read to where they end up: a split that just fits into memory does so without copies.
        content = np.empty(offsets[-1], np.uint8)

        def read_share(first: int) -> None:
            for row in range(first, len(sample_ids), NUM_THREADS):
                self._read_file(int(sample_ids[row]), content[offsets[row] : offsets[row + 1]])

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(read_share, range(min(NUM_THREADS, len(sample_ids)))))  # raises what they raise
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
        encoded = pa.Array.from_buffers(pa.large_binary(), len(sample_ids), buffers)
        return make_table(sample_ids, encoded, pa.array(self._files.labels[sample_ids]))

    def _read_file(self, sample_id: int, into: np.ndarray) -> None:
        """Reads one file into memory of exactly its size."""
        name = self._files.names[sample_id].path
        path = f"{self._files.root}/{self._files.names.paths[sample_id].as_py()}"

        def read() -> int:
            with self._filesystem.open_input_file(path) as file:
                size = int(file.size())
                if size == len(into):
                    file.readinto(into)
            return size

        try:
            size = ask_storage(self._filesystem, path, read)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                explain_s3(error, name)
                or f"{name} cannot be read ({str(error).splitlines()[0]}); it was removed or damaged since the run "
                "began: restore it.",
                sample_id=sample_id,
            ) from error
        if size != len(into):
            raise DataError(
                f"{name} has {size} bytes, expected {len(into)}; it has changed since the run began: restore it or "
                "start a new run.",
                sample_id=sample_id,
            )
