"""Finding the Parquet files of each split, and reading their footers."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.contracts.columns import SPLITS, SplitName
from pipeline.data.order.rows import RowGroups
from pipeline.data.pixels.decode import SourceFile
from pipeline.data.sources.parquet_column import ImageColumn
from pipeline.data.sources.parquet_reader import ParquetFile
from pipeline.data.storage import check_exists, explain_s3, open_storage, read_storage
from pipeline.data.waiting import ask_storage
from pipeline.errors import ConfigError, DataError

# Beginnings of file names, where the configuration names no files.
PREFIXES: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}


@dataclass(frozen=True)
class FileFooter:
    """A file whose footer has been read.

    Attributes:
        file: path and version.
        name: path for messages.
        metadata: the footer.
        schema: its Arrow schema.
    """

    file: ParquetFile
    name: str
    metadata: pq.FileMetaData
    schema: pa.Schema


def find_files(
    path: str, patterns: dict[SplitName, tuple[str, ...]] | None
) -> tuple[pafs.FileSystem, dict[SplitName, list[pafs.FileInfo]]]:
    """Finds the files of each split, sorted by path.

    Args:
        path: ``data.path``: a folder or one file, local or as a URI (``s3://...``).
        patterns: file names or globs below the folder for each split; none: by the beginnings of file names. One
            file alone is train.

    Returns:
        The file system, and the files of each split that has some; train always has.

    Raises:
        DataError: nothing at ``path``, or no files for train or for a pattern.
        ConfigError: one file in two splits, or patterns where ``path`` is a file.
    """
    filesystem, root = open_storage(path)
    info = check_exists(filesystem, root, path, "a folder of Parquet files, or one such file")
    if info.type == pafs.FileType.File:
        if patterns is not None:
            raise ConfigError(f"data.files picks files out of a folder, but data.path={path} is a file; remove one.")
        return filesystem, {"train": [info]}
    selector = pafs.FileSelector(root, recursive=patterns is not None)
    infos = read_storage(filesystem, root, lambda: filesystem.get_file_info(selector), f"data.path={path}")
    found = {
        posixpath.relpath(info.path, root): info
        for info in infos
        if info.type == pafs.FileType.File and not info.base_name.startswith((".", "_"))
    }
    if patterns is None:
        splits = _match_prefixes(found, path)
    else:
        splits = {split: _match_patterns(found, patterns[split], split, path) for split in SPLITS if split in patterns}
    _refuse_shared(splits)
    return filesystem, {split: [found[name] for name in names] for split, names in splits.items()}


def find_all_files(path: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    """Every ``*.parquet`` below a folder, sorted by path; or the one file that ``path`` is.

    Raises:
        DataError: nothing at ``path``, or no such file below it.
    """
    filesystem, root = open_storage(path)
    info = check_exists(filesystem, root, path, "a folder of Parquet files, or one such file")
    if info.type == pafs.FileType.File:
        return filesystem, [info]
    selector = pafs.FileSelector(root, recursive=True)
    infos = read_storage(filesystem, root, lambda: filesystem.get_file_info(selector), f"data.path={path}")
    found = {posixpath.relpath(info.path, root): info for info in infos if info.type == pafs.FileType.File}
    shown = [name for name in sorted(found) if not any(part.startswith((".", "_")) for part in name.split("/"))]
    chosen = [found[name] for name in shown if name.endswith(".parquet")]
    if not chosen:
        raise DataError(
            f"data.path={path} holds no *.parquet ({_list_names(shown)}); give a folder of Parquet files, or one such "
            "file."
        )
    return filesystem, chosen


def _match_prefixes(found: dict[str, pafs.FileInfo], path: str) -> dict[SplitName, list[str]]:
    names = sorted(name for name in found if name.endswith(".parquet"))
    splits = {
        split: [name for name in names if name.lower().startswith(prefixes)] for split, prefixes in PREFIXES.items()
    }
    if not splits["train"]:
        raise DataError(
            f"data.path={path} holds no train*.parquet ({_list_names(names)}); rename the files or name them in "
            "data.files.train."
        )
    return {split: files for split, files in splits.items() if files}


def _match_patterns(found: dict[str, pafs.FileInfo], patterns: Sequence[str], split: SplitName, path: str) -> list[str]:
    names: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(found, pattern)
        if not matches:
            raise DataError(
                f"data.files.{split}={pattern!r} matches no file below {path} ({_list_names(sorted(found))}); "
                "correct the pattern."
            )
        names.update(matches)
    return sorted(names)


def _refuse_shared(splits: dict[SplitName, list[str]]) -> None:
    owners: dict[str, SplitName] = {}
    for split, names in splits.items():
        for name in names:
            if name in owners:
                raise ConfigError(
                    f"{name} is in both data.files.{owners[name]} and data.files.{split}; a file belongs to one split."
                )
            owners[name] = split


def _list_names(names: Sequence[str]) -> str:
    if not names:
        return "it holds none at all"
    return "it holds " + ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_footers(filesystem: pafs.FileSystem, infos: Sequence[pafs.FileInfo]) -> list[FileFooter]:
    """Reads the footers of a split's files.

    Raises:
        DataError: not a Parquet file, or a damaged one.
        StorageError: see ``ask_storage``.
    """

    def read(info: pafs.FileInfo) -> FileFooter:
        with pq.ParquetFile(info.path, filesystem=filesystem) as parquet:
            file = ParquetFile(info.path, (info.size, info.mtime_ns))
            return FileFooter(file, info.path, parquet.metadata, parquet.schema_arrow)

    footers = []
    for info in infos:
        try:
            footers.append(ask_storage(filesystem, info.path, partial(read, info)))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                explain_s3(error, info.path)
                or f"{info.path} is not a readable Parquet file ({str(error).splitlines()[0]}); it may be cut short: "
                "copy it again or take it out of the folder."
            ) from error
    return footers


def lay_out(footers: Sequence[FileFooter], column: ImageColumn) -> tuple[tuple[SourceFile, ...], RowGroups]:
    """The files of a split with their first sample ids, and the layout of their row groups."""
    names, rows = [], []
    first_row = 0
    for number, footer in enumerate(footers):
        names.append(SourceFile(footer.name, first_row))
        for index in range(footer.metadata.num_row_groups):
            group = footer.metadata.row_group(index)
            num_bytes = sum(chunk.total_uncompressed_size for chunk in _image_chunks(group, column))
            if column.row_bytes is not None:  # dictionaries and levels make the stored size misleading
                num_bytes = group.num_rows * column.row_bytes
            rows.append((number, index, first_row, group.num_rows, num_bytes))
            first_row += group.num_rows
    table = np.array(rows, np.int64).reshape(-1, 5)
    return tuple(names), RowGroups(*(np.ascontiguousarray(values) for values in table.T))


def fingerprint_footers(
    splits: dict[SplitName, list[FileFooter]], column: ImageColumn, resized: tuple[int, ...] | None = None
) -> str:
    """Hash of what a teacher sees, as far as footers tell.

    Covers, for every split and file in order: the number of rows, and of every row group the rows and the stored
    sizes of the image column. Neither names nor labels: moving or relabelling a data set keeps the fingerprint, which
    whole-file sizes and footers as such would not (they hold the label column's sizes and statistics). Pixels
    exchanged for others of exactly the same stored sizes go unnoticed; only reading the content would tell.

    Args:
        resized: shape of rows that do not keep their own.
    """
    files: dict[str, list[Any]] = {}
    for split, footers in splits.items():
        files[split] = []
        for footer in footers:
            groups = [footer.metadata.row_group(index) for index in range(footer.metadata.num_row_groups)]
            sizes = [
                [group.num_rows]
                + [
                    (chunk.physical_type, chunk.total_uncompressed_size, chunk.total_compressed_size)
                    for chunk in _image_chunks(group, column)
                ]
                for group in groups
            ]
            files[split].append([footer.metadata.num_rows, sizes])
    content = {"storage": column.storage, "shape": column.shape, "files": files}
    if resized is not None:
        content["resized"] = resized
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _image_chunks(group: pq.RowGroupMetaData, column: ImageColumn) -> list[pq.ColumnChunkMetaData]:
    chunks = [group.column(index) for index in range(group.num_columns)]
    return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column.leaf}.")]
