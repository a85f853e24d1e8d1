"""The manifest: what is in a cache. It is written last; a folder without one is no cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.data.cache.folder import CacheFolder
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.parts import PartLayout, PartRecord, hash_ids
from pipeline.data.order.rows import RowSet
from pipeline.errors import CacheError
from pipeline.registry import Params

MANIFEST = "manifest.json"
BUILD = "build.json"
"""What a build that is under way is for."""

# To be raised when older code could no longer read a cache, or would read it wrongly.
SCHEMA_VERSION = 1


class StoredRows(Params):
    """Which rows a cache holds: those of a split, as the rule they were drawn by."""

    num_source_rows: int
    seed: int
    start: int
    stop: int
    digest: str
    """Of the sample ids that the rule gives."""

    @classmethod
    def of(cls, rows: RowSet) -> StoredRows:
        """The rows of a split."""
        return cls(
            num_source_rows=rows.num_source_rows,
            seed=rows.seed,
            start=rows.start,
            stop=rows.stop,
            digest=hash_ids(rows.ids),
        )

    @property
    def row_set(self) -> RowSet:
        """As the split has them."""
        return RowSet(self.num_source_rows, self.seed, self.start, self.stop)


class Manifest(Params):
    """What is in a cache, but for its own checksum."""

    schema_version: int = SCHEMA_VERSION
    key: CacheKey
    rows: StoredRows
    first_rows: tuple[int, ...]
    """Sample id of the first row of each part, as of ``PartLayout``."""
    parts: tuple[PartRecord, ...]
    num_rows: int
    """Rows of all parts and views."""
    num_bytes: int
    """Of all parts."""
    teacher_accuracy: float | None
    """On the validation split."""
    recorded: dict[str, Any]
    """Where the cache comes from: versions, device, time. Nothing is checked against it."""

    @property
    def checksum(self) -> str:
        """Over everything in it."""
        return _checksum(self.model_dump(mode="json"))

    @property
    def layout(self) -> PartLayout:
        """Which rows make up each part."""
        return PartLayout(self.rows.row_set, np.array(self.first_rows, np.int64))

    @property
    def absent(self) -> np.ndarray:
        """Sample ids that are missing in some view, ascending: these rows could not be decoded."""
        return np.unique(np.array([row for part in self.parts for row in part.absent], np.int64))


class BuildRecord(Params):
    """What a build is for: parts of an earlier one of the same are good for it too."""

    key: CacheKey
    rows: StoredRows
    first_rows: tuple[int, ...]

    @classmethod
    def of(cls, key: CacheKey, layout: PartLayout) -> BuildRecord:
        """The build of a cache for the rows of a layout."""
        return cls(key=key, rows=StoredRows.of(layout.rows), first_rows=tuple(layout.first_rows.tolist()))


def write_build(folder: CacheFolder, build: BuildRecord) -> None:
    """Records what a build is for."""
    folder.write(BUILD, _dump(build.model_dump(mode="json")))


def read_build(folder: CacheFolder) -> BuildRecord | None:
    """What the build under way is for; none where there is no record that can be read."""
    if not folder.exists(BUILD):
        return None
    try:
        return BuildRecord.model_validate_json(folder.read(BUILD).to_pybytes())
    except ValidationError:
        return None


def write_manifest(folder: CacheFolder, manifest: Manifest) -> None:
    """Writes the manifest, which makes the folder a cache."""
    values = manifest.model_dump(mode="json")
    folder.write(MANIFEST, _dump(values | {"checksum": _checksum(values)}))


def read_manifest(folder: CacheFolder) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        CacheError: missing, edited, damaged, or of a newer version.
    """
    content, where = folder.read(MANIFEST).to_pybytes(), folder.show(MANIFEST)
    rebuild = "delete it and run `python -m pipeline cache build`, which writes it anew from the parts that are whole"
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CacheError(f"{where} is damaged: it is not JSON ({error}); {rebuild}.") from error
    if not isinstance(values, Mapping):
        raise CacheError(f"{where} is damaged: it holds no JSON object; {rebuild}.")
    version = values.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CacheError(
            f"{where} was written by a newer version of this package (schema version {version}, expected at most "
            f"{SCHEMA_VERSION}); update the package, or set another cache.path."
        )
    missing = [name for name in (*Manifest.model_fields, "checksum") if name not in values]
    if missing:
        raise CacheError(f"{where} has no {' and no '.join(missing)}: it was edited or damaged; {rebuild}.")
    rest = {name: value for name, value in values.items() if name != "checksum"}
    # The text too: JSON leaves open how it is written, and nothing in the file may change unnoticed.
    if values["checksum"] != _checksum(rest) or content != _dump(values):
        raise CacheError(f"{where} was edited or damaged: it does not fit its checksum; {rebuild}.")
    try:
        manifest = Manifest.model_validate_json(_dump(rest))
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(str(step) for step in problem["loc"])
        raise CacheError(f"{where} cannot be understood: {path}: {problem['msg']}; {rebuild}.") from error
    _check(manifest, folder, where, rebuild)
    return manifest


def _check(manifest: Manifest, folder: CacheFolder, where: str, rebuild: str) -> None:
    if hash_ids(manifest.rows.row_set.ids) != manifest.rows.digest:
        raise CacheError(f"{where}: the rule of its rows gives other rows than it did; {rebuild}.")
    due = {(view, index) for view in range(manifest.key.num_views) for index in manifest.layout.indexes}
    if due != {(part.view, part.index) for part in manifest.parts}:
        raise CacheError(f"{where} does not list the {len(due)} parts that are due; {rebuild}.")
    name = folder.root.rsplit("/", 1)[-1]
    if name != manifest.key.digest:
        raise CacheError(
            f"{where} belongs to the folder {manifest.key.digest}, expected in one named {name}; rename it back."
        )


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(values)).hexdigest()


def _dump(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
