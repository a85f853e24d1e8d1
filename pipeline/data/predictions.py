"""Predictions as a Parquet file: written while they arrive, and there only once it is complete."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.columns import LABEL, SAMPLE_ID
from pipeline.data.pixels.decode import SourceFile
from pipeline.errors import DataError

ROW_GROUP_BYTES = 32 * 2**20


class PredictionWriter:
    """Writes predictions row group by row group to a temporary file beside ``path``, renamed at the end.

    The columns:

    * ``sample_id`` int64; where the source has files also ``file`` and ``row``, the row's place in it;
    * ``label`` int32, the most probable class; ``class_name`` and ``probability`` of it;
    * ``probabilities``, float32 of every class. For a row that could not be decoded, this and the three before it
      hold nulls.

    Used as a context manager; leaving it by an error leaves nothing behind. Where the disk refuses to take it, entering
    it, leaving it and ``write`` raise DataError.

    Args:
        path: of the file; its folder exists.
        class_names: in the order of the logits.
        files: the source's files in order (``Decoder.files``); empty where it has none.
        metadata: goes into the file's schema, beside ``class_names`` as a JSON list.

    Attributes:
        class_counts: (C,) int64 how many rows each class was predicted for so far.
        num_rows: written so far.
    """

    def __init__(
        self, path: Path, class_names: Sequence[str], files: Sequence[SourceFile], metadata: Mapping[str, str]
    ) -> None:
        self.class_counts = np.zeros(len(class_names), np.int64)
        self.num_rows = 0
        self._path = path
        self._names = pa.array(class_names, pa.string())
        self._paths = pa.array([file.path for file in files], pa.string())
        self._first_rows = np.array([file.first_row for file in files], np.int64)
        self._schema = _schema(len(class_names), bool(files)).with_metadata(
            {"class_names": json.dumps(list(class_names)), **metadata}
        )
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Self:
        repeated = [name for name in ("file", "class_name") if name in self._schema.names]
        with self._named():
            self._writer = pq.ParquetWriter(self._temporary, self._schema, compression="zstd", use_dictionary=repeated)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                with self._named():
                    self._writer.close()
                    os.replace(self._temporary, self._path)
            else:
                with contextlib.suppress(Exception):  # the error that ends this is the one to tell
                    self._writer.close()
        finally:
            self.discard()

    def discard(self) -> None:
        """Removes what was written, unless it is complete. Needed only where the process ends without unwinding."""
        self._temporary.unlink(missing_ok=True)

    def write(self, sample_ids: np.ndarray, logits: np.ndarray, missing: np.ndarray) -> None:
        """Adds rows.

        Args:
            sample_ids: (B,) int64.
            logits: (B, C) float32; what stands in missing rows does not matter.
            missing: (B,) bool, rows without a prediction.
        """
        labels = logits.argmax(axis=1)
        self.class_counts += np.bincount(labels[~missing], minlength=len(self.class_counts))
        self.num_rows += len(sample_ids)
        table = self._make_table(sample_ids, labels, softmax(logits), missing)
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _make_table(
        self, sample_ids: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, missing: np.ndarray
    ) -> pa.Table:
        numbers = pa.array(labels.astype(np.int32), mask=missing)
        values = pa.array(probabilities.reshape(-1), mask=np.repeat(missing, probabilities.shape[1]))
        columns = {
            SAMPLE_ID: pa.array(sample_ids, pa.int64()),
            LABEL: numbers,
            "class_name": pa.DictionaryArray.from_arrays(numbers, self._names),
            "probability": pa.array(probabilities[np.arange(len(labels)), labels], mask=missing),
            # Nulls as items: readers of Parquet refuse a fixed-size list that is itself null.
            "probabilities": pa.FixedSizeListArray.from_arrays(values, probabilities.shape[1]),
        }
        if len(self._paths):
            owners = np.searchsorted(self._first_rows, sample_ids, side="right") - 1
            columns["file"] = self._paths.take(pa.array(owners))
            columns["row"] = pa.array(sample_ids - self._first_rows[owners], pa.int64())
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)

    def _flush(self) -> None:
        if self._waiting:
            with self._named():
                self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
            self._waiting, self._waiting_bytes = [], 0

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error).split("\n")[0]
            raise DataError(
                f"{self._path}: cannot be written ({reason}); make room there or name another file"
            ) from error


def _schema(num_classes: int, has_files: bool) -> pa.Schema:
    place = [("file", pa.string()), ("row", pa.int64())] if has_files else []
    return pa.schema(
        [
            (SAMPLE_ID, pa.int64()),
            *place,
            (LABEL, pa.int32()),
            ("class_name", pa.dictionary(pa.int32(), pa.string())),
            ("probability", pa.float32()),
            ("probabilities", pa.list_(pa.float32(), num_classes)),
        ]
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float32 (B, C), of logits (B, C); summed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: np.ndarray = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities
