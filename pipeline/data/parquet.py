"""Parquet files of images or feature vectors with labels: the format in which users bring their own data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.contracts.columns import InputSpec, SplitName
from pipeline.data.augment import check_augment
from pipeline.data.decode import Decoder, name_row
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.parquet_column import ImageColumn, detect_column
from pipeline.data.parquet_files import FileFooter, find_files, fingerprint_footers, lay_out, read_footers
from pipeline.data.parquet_reader import ParquetReader
from pipeline.data.rows import RowSet, carve
from pipeline.data.source import DataSource, describe_carved
from pipeline.errors import DataError
from pipeline.registry import Params


class FilesParams(Params):
    """Files of each split: names or globs below ``data.path``. Splits that are not named are carved out of train."""

    train: str | tuple[str, ...]
    validation: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None

    def patterns(self) -> dict[SplitName, tuple[str, ...]]:
        """The patterns of each split that has some."""
        named: dict[SplitName, str | tuple[str, ...] | None] = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {
            split: (value,) if isinstance(value, str) else value for split, value in named.items() if value is not None
        }


@DATASETS.register
class ParquetParams(DataParams):
    """Parquet files with a column of images or features and a column of labels."""

    name: Literal["parquet"] = "parquet"
    path: str
    """A folder, or one file that all splits are carved out of; local, or a URI (s3://...)."""
    files: FilesParams | None = None
    """None: train*.parquet, validation*.parquet (also valid*, val*) and test*.parquet of the folder."""
    image_column: str = "image"
    """Encoded images, raw pixels (uint8) or feature vectors (floats)."""
    label_column: str = "label"
    """Class numbers from 0."""
    image_size: tuple[int, int] | None = None
    """Height and width of raw pixels stored as flat lists."""
    num_classes: int | None = Field(default=None, ge=2)
    """None: as many as the files' metadata name, otherwise the highest label of train + 1."""

    def open(self) -> ParquetSource:
        return ParquetSource(self)


class ParquetSource(DataSource):
    """An opened set of Parquet files. Footers, labels and the first image have been read and checked.

    Args:
        params: where the files are and how to read them.

    Raises:
        DataError: files or columns are missing, or a label or the image column is not what it must be.
        ConfigError: parameters that do not go together.
    """

    def __init__(self, params: ParquetParams) -> None:
        self._params = params
        self.memory_bytes = params.memory_bytes
        self._filesystem, infos = find_files(params.path, params.files.patterns() if params.files else None)
        self._footers = {split: read_footers(self._filesystem, found) for split, found in infos.items()}
        for split, footers in self._footers.items():
            self._check_files(split, footers)
        self._column = self._detect_column()
        labels = {split: self._read_labels(footers) for split, footers in self._footers.items()}
        class_names = self._name_classes(int(labels["train"].max()) + 1)
        for split, values in labels.items():
            self._check_labels(split, values, len(class_names))
        self.spec = InputSpec(self._column.kind, self._column.shape, class_names)
        check_augment(params.augment, self.spec)
        self.fingerprint = fingerprint_footers(self._footers, self._column)
        self._rows = self._divide_rows({split: len(values) for split, values in labels.items()})
        self.carved = {split: describe_carved(rows) for split, rows in self._rows.items() if split not in self._footers}

    def split(self, name: SplitName) -> ParquetReader:
        footers = self._files_of(name)
        names, groups = lay_out(footers, self._column)
        return ParquetReader(
            filesystem=self._filesystem,
            files=tuple(footer.file for footer in footers),
            names=names,
            groups=groups,
            rows=self._rows[name],
            column=self._column,
            label_column=self._params.label_column,
            cache_bytes=2 * self._params.window_bytes,
        )

    def decoder(self, name: SplitName) -> Decoder:
        names, _ = lay_out(self._files_of(name), self._column)
        return Decoder(self.spec.kind, self.spec.shape, names)

    def _files_of(self, name: SplitName) -> list[FileFooter]:
        return self._footers[name if name in self._footers else "train"]

    def _divide_rows(self, num_rows: dict[SplitName, int]) -> dict[SplitName, RowSet]:
        fractions: dict[SplitName, float] = {
            "validation": self._params.validation_fraction,
            "test": self._params.test_fraction,
        }
        missing = {split: fraction for split, fraction in fractions.items() if split not in num_rows}
        rows = carve(num_rows["train"], missing, self._params.split_seed) if missing else {}
        return {split: RowSet.whole(number) for split, number in num_rows.items()} | rows

    def _check_files(self, split: SplitName, footers: Sequence[FileFooter]) -> None:
        first = self._footers["train"][0].schema
        for footer in footers:
            for key in ("image_column", "label_column"):
                name = getattr(self._params, key)
                _check_column(footer, name, f"data.{key}")
                if footer.schema.field(name).type != first.field(name).type:
                    raise DataError(
                        f"{footer.name}: column {name!r} has type {footer.schema.field(name).type}, expected "
                        f"{first.field(name).type} as in the first train file; write all files with one schema."
                    )
        if sum(footer.metadata.num_rows for footer in footers) == 0:
            raise DataError(f"{footers[0].name}: the files of split {split!r} hold no rows; remove them or fill them.")

    def _detect_column(self) -> ImageColumn:
        footer = next(footer for footer in self._footers["train"] if footer.metadata.num_rows)
        name = self._params.image_column
        with pq.ParquetFile(footer.file.path, filesystem=self._filesystem) as parquet:
            batch = next(batch for batch in parquet.iter_batches(batch_size=1, columns=[name]) if batch.num_rows)
        arrow_type = footer.schema.field(name).type
        return detect_column(name, arrow_type, batch.column(0), self._params.image_size, footer.name)

    def _read_labels(self, footers: Sequence[FileFooter]) -> np.ndarray:
        """(N,) int64 labels of the files, in order."""
        parts = [_read_labels(self._filesystem, footer, self._params.label_column) for footer in footers]
        return np.concatenate(parts)

    def _name_classes(self, num_labels: int) -> tuple[str, ...]:
        footer = self._footers["train"][0]
        names = _stored_class_names(footer.schema, self._params.label_column)
        wanted = self._params.num_classes
        if names is not None and wanted not in (None, len(names)):
            raise DataError(
                f"{footer.name} names {len(names)} classes in its metadata, but data.num_classes={wanted}; "
                "remove data.num_classes or correct it."
            )
        if names is None:
            names = tuple(str(number) for number in range(wanted or num_labels))
        if len(names) < 2:
            raise DataError(f"{footer.name}: train has one class only, expected two or more; set data.num_classes.")
        return names

    def _check_labels(self, split: SplitName, labels: np.ndarray, num_classes: int) -> None:
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong):
            files, _ = lay_out(self._footers[split], self._column)
            raise DataError(
                f"{name_row(files, int(wrong[0]))} has label {labels[wrong[0]]}, expected 0 to {num_classes - 1}; "
                "correct the labels (classes count from 0) or set data.num_classes."
            )


def _check_column(footer: FileFooter, name: str, key: str) -> None:
    if name not in footer.schema.names:
        near = difflib.get_close_matches(name, footer.schema.names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(
            f"{footer.name} has no column {name!r} ({key}), only {', '.join(footer.schema.names)}; set {key}{hint}"
        )


def _read_labels(filesystem: pafs.FileSystem, footer: FileFooter, name: str) -> np.ndarray:
    arrow_type = footer.schema.field(name).type
    if not pa.types.is_integer(arrow_type):
        raise DataError(
            f"{footer.name}: label column {name!r} has type {arrow_type}, expected integers (class numbers from 0); "
            "store numbers, or name another column in data.label_column."
        )
    with pq.ParquetFile(footer.file.path, filesystem=filesystem) as parquet:
        column = parquet.read(columns=[name], use_threads=False)[name]
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{footer.name}: row {row} has no label (null); fill it in or remove the row.")
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    return labels


def _stored_class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Class names in a file's metadata: a JSON list under ``class_names``, or Hugging Face's description."""
    metadata = schema.metadata or {}
    try:
        if b"class_names" in metadata:
            names = json.loads(metadata[b"class_names"])
        else:
            features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            names = features.get(label_column, {}).get("names")
    except (ValueError, AttributeError):  # metadata that others wrote in a form of their own: as if there were none
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
