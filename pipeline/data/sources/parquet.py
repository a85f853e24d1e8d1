"""Parquet files of images or feature vectors with labels: the format in which users bring their own data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from itertools import islice
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.contracts.columns import InputSpec, SplitName
from pipeline.data.order.rows import RowSet, divide
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.pixels.augment import check_augment
from pipeline.data.pixels.decode import Decoder, SourceFile, describe_wrong_label, name_row, offer_skipping
from pipeline.data.sources.parquet_column import ImageColumn, detect_column
from pipeline.data.sources.parquet_files import (
    FileFooter,
    find_all_files,
    find_files,
    fingerprint_footers,
    lay_out,
    read_footers,
)
from pipeline.data.sources.parquet_reader import ParquetReader
from pipeline.data.sources.source import DataSource, Unlabelled, check_fits, describe_carved, find_unlabelled
from pipeline.data.storage import read_storage
from pipeline.errors import ConfigError, DataError
from pipeline.registry import Params

# Of this many rows, one must have a readable image where bad ones are skipped.
_TRIES = 100
_DAMAGED = "the file is damaged or is being changed: copy it again"


class FilesParams(Params):
    """Files of each split: names or globs below ``data.path``. Splits that are not named are carved out of train."""

    train: str | tuple[str, ...]
    """Files of the train split."""
    validation: str | tuple[str, ...] | None = None
    """Files of the validation split; none: its rows are carved out of train."""
    test: str | tuple[str, ...] | None = None
    """Files of the test split; none: its rows are carved out of train."""

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
    """Class numbers from 0. Rows of train may have none (null, or no such column) where the loss needs none."""
    image_size: tuple[int, int] | None = None
    """Height and width that images are resized to; of raw pixels stored as flat lists, those that they have. None:
    all images have those of the first."""
    num_classes: int | None = Field(default=None, ge=2)
    """None: as many as the files' metadata name, otherwise the highest label of train (of validation, where train has
    none) + 1."""

    def open(self) -> ParquetSource:
        return ParquetSource(self)

    def open_rows(self, spec: InputSpec) -> tuple[ParquetReader, Decoder]:
        """Every ``*.parquet`` below the folder in the order of their paths, whatever their names; or the one file."""
        filesystem, infos = find_all_files(self.path)
        footers = read_footers(filesystem, infos)
        _check_images(footers, footers[0].schema, self.image_column)
        if not any(footer.metadata.num_rows for footer in footers):
            raise DataError(f"data.path={self.path}: the files hold no rows; give files that hold some.")
        column = _detect_column(filesystem, footers, self)
        shape = _shape_of(column, self)
        check_fits(spec, column.kind, shape, footers[0].name, encoded=column.storage in ("encoded", "struct"))
        num_rows = sum(footer.metadata.num_rows for footer in footers)
        reader = _make_reader(filesystem, footers, RowSet.whole(num_rows), column, None, self)
        return reader, _make_decoder(self, spec, column, lay_out(footers, column)[0])


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
        self._column = _detect_column(self._filesystem, self._footers["train"], params)
        labels = {split: self._read_labels(footers) for split, footers in self._footers.items()}
        class_names = self._name_classes(labels)
        if params.on_bad_row == "error":
            for split, values in labels.items():
                self._check_labels(split, values, len(class_names))
        shape = _shape_of(self._column, params)
        self.spec = InputSpec(self._column.kind, shape, class_names)
        check_augment(params.augment, self.spec)
        resized = None if shape == self._column.shape else shape
        self.fingerprint = fingerprint_footers(self._footers, self._column, resized)
        fractions: dict[SplitName, float] = {"validation": params.validation_fraction, "test": params.test_fraction}
        self._rows = divide({split: len(values) for split, values in labels.items()}, fractions, params.split_seed)
        self.carved = {split: describe_carved(rows) for split, rows in self._rows.items() if split not in self._footers}
        self.unlabelled = self._find_unlabelled(labels)

    def split(self, name: SplitName) -> ParquetReader:
        footers = self._files_of(name)
        label = self._params.label_column if self._has_labels(footers) else None
        return _make_reader(self._filesystem, footers, self._rows[name], self._column, label, self._params)

    def decoder(self, name: SplitName) -> Decoder:
        names, _ = lay_out(self._files_of(name), self._column)
        return _make_decoder(self._params, self.spec, self._column, names, self.spec.num_classes)

    def _files_of(self, name: SplitName) -> list[FileFooter]:
        return self._footers[name if name in self._footers else "train"]

    def _check_files(self, split: SplitName, footers: Sequence[FileFooter]) -> None:
        _check_images(footers, self._footers["train"][0].schema, self._params.image_column)
        if self._has_labels(footers):
            for footer in footers:
                _check_column(footer, self._params.label_column, "data.label_column")
        if sum(footer.metadata.num_rows for footer in footers) == 0:
            raise DataError(f"{footers[0].name}: the files of split {split!r} hold no rows; remove them or fill them.")

    def _has_labels(self, footers: Sequence[FileFooter]) -> bool:
        return any(self._params.label_column in footer.schema.names for footer in footers)

    def _read_labels(self, footers: Sequence[FileFooter]) -> pa.Array:
        """(N,) int64 labels of the files, in order; null where there is none."""
        if not self._has_labels(footers):
            return pa.nulls(sum(footer.metadata.num_rows for footer in footers), pa.int64())
        name = self._params.label_column
        return pa.concat_arrays([_read_labels(self._filesystem, footer, name) for footer in footers])

    def _find_unlabelled(self, labels: dict[SplitName, pa.Array]) -> dict[SplitName, Unlabelled]:
        found = {}
        for split, rows in self._rows.items():
            footers = self._files_of(split)
            reason = "" if self._has_labels(footers) else _describe_missing(footers[0], self._params.label_column)
            missing = labels[split if split in labels else "train"].is_null().to_numpy(zero_copy_only=False)
            unlabelled = find_unlabelled(missing, rows, lay_out(footers, self._column)[0], reason)
            if unlabelled is not None:
                found[split] = unlabelled
        return found

    def _name_classes(self, labels: dict[SplitName, pa.Array]) -> tuple[str, ...]:
        owners = [self._footers[split][0] for split in ("train", "validation") if split in self._footers]
        stored = [(footer, _stored_class_names(footer.schema, self._params.label_column)) for footer in owners]
        footer, names = next((pair for pair in stored if pair[1] is not None), stored[0])
        wanted = self._params.num_classes
        if names is not None and wanted not in (None, len(names)):
            raise DataError(
                f"{footer.name} names {len(names)} classes in its metadata, but data.num_classes={wanted}; "
                "remove data.num_classes or correct it."
            )
        if names is None:
            names = tuple(str(number) for number in range(wanted or self._count_classes(labels)))
        if len(names) < 2:
            raise DataError(f"{footer.name}: train has one class only, expected two or more; set data.num_classes.")
        return names

    def _count_classes(self, labels: dict[SplitName, pa.Array]) -> int:
        highest = [pc.max(labels[split]).as_py() for split in ("train", "validation") if split in labels]
        number = next((label for label in highest if label is not None), None)
        if number is None:
            footer, name = self._footers["train"][0], self._params.label_column
            _check_column(footer, name, "data.label_column")
            raise DataError(
                f"{footer.name}: column {name!r} holds nothing but nulls, so the classes cannot be counted; fill it "
                "in, or give labelled files in data.files.validation."
            )
        return int(number) + 1

    def _check_labels(self, split: SplitName, labels: pa.Array, num_classes: int) -> None:
        wrong = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, num_classes))  # null where the label is
        first = pc.index(wrong, True).as_py()
        if first >= 0:
            files, _ = lay_out(self._footers[split], self._column)
            problem = describe_wrong_label(labels[first].as_py(), num_classes)
            raise DataError(offer_skipping(f"{name_row(files, first)} {problem}"))


def _check_images(footers: Sequence[FileFooter], first: pa.Schema, name: str) -> None:
    """Every file has the image column, and of one type."""
    for footer in footers:
        _check_column(footer, name, "data.image_column")
        if footer.schema.field(name).type != first.field(name).type:
            raise DataError(
                f"{footer.name}: column {name!r} has type {footer.schema.field(name).type}, expected "
                f"{first.field(name).type} as in the first file; write all files with one schema."
            )


def _detect_column(filesystem: pafs.FileSystem, footers: Sequence[FileFooter], params: ParquetParams) -> ImageColumn:
    """The format of the image column by its first row, or by the first good one where bad ones are skipped."""
    footer = next(footer for footer in footers if footer.metadata.num_rows)
    name = params.image_column
    arrow_type = footer.schema.field(name).type

    def detect() -> ImageColumn:
        first_error: DataError | None = None
        with pq.ParquetFile(footer.file.path, filesystem=filesystem) as parquet:
            batches = (batch for batch in parquet.iter_batches(batch_size=1, columns=[name]) if batch.num_rows)
            for batch in islice(batches, _TRIES if params.on_bad_row == "skip" else 1):
                try:
                    return detect_column(name, arrow_type, batch.column(0), params.image_size, footer.name)
                except DataError as error:
                    first_error = first_error or error
        assert first_error is not None  # for the type checker: the file has rows
        raise first_error

    return read_storage(filesystem, footer.file.path, detect, f"{footer.name}: column {name!r}", _DAMAGED)


def _shape_of(column: ImageColumn, params: ParquetParams) -> tuple[int, ...]:
    """(C, H, W) or (F,) of a decoded row."""
    if params.image_size is None:
        return column.shape
    if column.kind == "features":
        raise ConfigError(
            f"data.image_size is for images, but column {column.name!r} holds feature vectors; remove data.image_size."
        )
    return (column.shape[0], *params.image_size)


def _make_reader(
    filesystem: pafs.FileSystem,
    footers: Sequence[FileFooter],
    rows: RowSet,
    column: ImageColumn,
    label_column: str | None,
    params: ParquetParams,
) -> ParquetReader:
    names, groups = lay_out(footers, column)
    return ParquetReader(
        filesystem=filesystem,
        files=tuple(footer.file for footer in footers),
        names=names,
        groups=groups,
        rows=rows,
        column=column,
        label_column=label_column,
        cache_bytes=2 * params.window_bytes,
        skip_bad=params.on_bad_row == "skip",
    )


def _make_decoder(
    params: ParquetParams,
    spec: InputSpec,
    column: ImageColumn,
    names: tuple[SourceFile, ...],
    num_classes: int | None = None,
) -> Decoder:
    return Decoder(
        spec.kind,
        spec.shape,
        names,
        image_size=params.image_size,
        num_classes=num_classes,
        skip_bad=params.on_bad_row == "skip",
        stored_size=column.shape[1:] if column.storage == "pixels" else None,
    )


def _check_column(footer: FileFooter, name: str, key: str) -> None:
    if name not in footer.schema.names:
        near = difflib.get_close_matches(name, footer.schema.names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(
            f"{footer.name} has no column {name!r} ({key}), only {', '.join(footer.schema.names)}; set {key}{hint}"
        )


def _describe_missing(footer: FileFooter, name: str) -> str:
    """That a file has no label column, to follow the name of one of its rows."""
    near = difflib.get_close_matches(name, footer.schema.names, n=1, cutoff=0.5)
    hint = f": set data.label_column={near[0]}?" if near else " (data.label_column)"
    return f"which has no column {name!r}, only {', '.join(footer.schema.names)}{hint}"


def _read_labels(filesystem: pafs.FileSystem, footer: FileFooter, name: str) -> pa.Array:
    arrow_type = footer.schema.field(name).type
    if not (pa.types.is_integer(arrow_type) or pa.types.is_null(arrow_type)):
        raise DataError(
            f"{footer.name}: label column {name!r} has type {arrow_type}, expected integers (class numbers from 0); "
            "store numbers, or name another column in data.label_column."
        )

    def read() -> pa.ChunkedArray:
        with pq.ParquetFile(footer.file.path, filesystem=filesystem) as parquet:
            return parquet.read(columns=[name], use_threads=False)[name]

    column = read_storage(filesystem, footer.file.path, read, f"{footer.name}: column {name!r}", _DAMAGED)
    return column.cast(pa.int64()).combine_chunks()


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
