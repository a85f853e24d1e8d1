"""Opening a cache: the one of this key and these rows, or what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.cache.folder import MISSING_ADVICE, CacheFolder, open_folder
from pipeline.data.cache.key import CacheKey, show_differences
from pipeline.data.cache.manifest import MANIFEST, Manifest, read_build, read_manifest
from pipeline.data.cache.parts import PartLayout
from pipeline.data.order.rows import RowSet
from pipeline.data.sources.source import SplitReader
from pipeline.errors import CacheError

_BUILD_ADVICE = "build it with `python -m pipeline cache build` and the same configuration"


@dataclass(frozen=True)
class Cache:
    """A cache that serves the rows it was opened for.

    Attributes:
        folder: its files.
        manifest: what is in it.
        rows: of the split it was opened for.
    """

    folder: CacheFolder
    manifest: Manifest
    rows: RowSet


def open_cache(path: str, key: CacheKey, reader: SplitReader) -> Cache:
    """Opens the cache of a key for the rows of a split.

    Args:
        path: ``cache.path``.
        key: of the logits that are wanted.
        reader: of the train split. The cache may hold more rows, unless images are mixed.

    Raises:
        CacheError: there is none of this key, with what differs in the nearest one; it is not complete, or damaged; it
            lacks rows.
    """
    folder = open_folder(path).below(key.digest)
    if not folder.exists(MANIFEST):
        raise _explain_absence(path, key, reader)
    manifest = read_manifest(folder)
    check_rows(folder, manifest, reader)
    return Cache(folder, manifest, reader.rows)


def open_manifest(path: str, name: str) -> tuple[CacheFolder, Manifest]:
    """A complete cache by its name.

    Args:
        path: ``cache.path``.
        name: of its folder.

    Raises:
        CacheError: there is no complete cache of that name, or its manifest is damaged.
    """
    top = open_folder(path)
    folder = top.below(name)
    if "/" in name or not folder.exists(MANIFEST):
        known = ", ".join(found for found in find_folders(top) if top.below(found).exists(MANIFEST)) or "none"
        raise CacheError(f"cache.path={path} holds no complete cache {name!r}; there are: {known}.")
    return folder, read_manifest(folder)


def check_rows(folder: CacheFolder, manifest: Manifest, reader: SplitReader) -> None:
    """Refuses a cache that does not serve these rows.

    Raises:
        CacheError: it lacks rows; or images are mixed, and it is of other rows.
    """
    stored, wanted, where = manifest.rows.row_set, reader.rows, f"the cache {folder.shown}"
    if stored.num_source_rows != wanted.num_source_rows:
        raise CacheError(
            f"{where} was built of files of {stored.num_source_rows} rows, but the train files have "
            f"{wanted.num_source_rows}; restore the data, or {_BUILD_ADVICE}."
        )
    if stored == wanted:
        return
    if manifest.key.mixes and not np.array_equal(stored.ids, wanted.ids):
        raise CacheError(
            f"{where} was built for a train split of {stored.num_rows} rows, and the partners that images are mixed "
            f"with depend on them, but the train split now has {wanted.num_rows}, others or in other number; "
            f"{_BUILD_ADVICE}, or split the data as it was."
        )
    lacking = wanted.ids[~np.isin(wanted.ids, stored.ids, assume_unique=True)]
    if len(lacking):
        raise CacheError(
            f"{where} lacks {len(lacking)} of the {wanted.num_rows} rows of the train split, the first sample "
            f"{lacking[0]}: it was built for another split; {_BUILD_ADVICE}, or split the data as it was.",
            num_rows=len(lacking),
            sample_id=int(lacking[0]),
        )


def _explain_absence(path: str, key: CacheKey, reader: SplitReader) -> CacheError:
    top = open_folder(path)
    folders = find_folders(top)
    if key.digest in folders:
        layout = PartLayout.of(reader)
        num_due = key.num_views * len(layout.indexes)
        num_parts = sum(name.endswith(".arrow") for name in folders[key.digest])
        return CacheError(
            f"the cache {top.show(key.digest)} is not complete: it has {num_parts} of {num_due} parts and no "
            f"{MANIFEST}; {MISSING_ADVICE}."
        )
    nearest = _find_nearest(top, list(folders), key)
    if nearest is None:
        return CacheError(f"cache.path={path} holds no cache; {_BUILD_ADVICE}.")
    name, state, found = nearest
    differences = found.differences(key)
    return CacheError(
        f"cache.path={path} holds no cache of these logits: the nearest, {name}{state}, differs in "
        f"{show_differences(differences)}; {_BUILD_ADVICE}, or go back to what that one was built with.",
        differences=[list(difference) for difference in differences],
        nearest=name,
    )


def find_folders(top: CacheFolder) -> dict[str, list[str]]:
    """The files in each folder below ``cache.path``, by their paths there."""
    folders: dict[str, list[str]] = {}
    for path in sorted(top.list_files()):
        name, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(name, []).append(rest)
    return folders


def _find_nearest(top: CacheFolder, names: list[str], key: CacheKey) -> tuple[str, str, CacheKey] | None:
    """The folder whose key has the fewest differences, of complete caches if there are any."""
    candidates = []
    for name in names:
        found = read_key(top.below(name))
        if found is not None:
            stored, complete = found
            candidates.append((not complete, len(stored.differences(key)), name, stored))
    if not candidates:
        return None
    incomplete, _, name, stored = min(candidates, key=lambda candidate: candidate[:3])
    return name, " (not complete)" if incomplete else "", stored


def read_key(folder: CacheFolder) -> tuple[CacheKey, bool] | None:
    """The key of a folder, and whether it is a complete cache; none where neither manifest nor build says."""
    try:
        if folder.exists(MANIFEST):
            return read_manifest(folder).key, True
        build = read_build(folder)
    except CacheError:
        return None
    return None if build is None else (build.key, False)
