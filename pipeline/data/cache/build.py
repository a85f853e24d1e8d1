"""Building a cache: what is missing, one builder at a time, and the manifest at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from pipeline.contracts.locks import Holding, LockedError, hold_lock
from pipeline.data.cache.folder import NUM_READERS, TEMPORARY, CacheFolder, open_folder
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.manifest import (
    BUILD,
    MANIFEST,
    BuildRecord,
    Manifest,
    StoredRows,
    read_build,
    read_manifest,
    write_build,
    write_manifest,
)
from pipeline.data.cache.opened import Cache, check_rows
from pipeline.data.cache.params import check_classes
from pipeline.data.cache.parts import PartLayout, PartWriter, inspect_part, part_name
from pipeline.data.sources.source import SplitReader
from pipeline.errors import CacheError

_log = logging.getLogger(__name__)


class CacheBuild(Holding):
    """A build that this process holds; see ``open_build``.

    Attributes:
        folder: of the cache.
        key: of the cache.
        layout: which rows make up each part.
        cache: the finished cache, where there is one for these rows already; nothing is left to do then.
    """

    def __init__(
        self, folder: CacheFolder, key: CacheKey, layout: PartLayout, cache: Cache | None, lock: IO[str] | None
    ) -> None:
        super().__init__(lock)
        self.folder = folder
        self.key = key
        self.layout = layout
        self.cache = cache

    @property
    def writer(self) -> PartWriter:
        """Writes parts, in any process."""
        return PartWriter(self.folder, self.key, self.layout)

    def find_missing_parts(self) -> list[tuple[int, int]]:
        """View and number of each part that is still to be written, by view and then by number."""
        return [] if self.cache else find_missing_parts(self.folder, self.layout, self.key.num_views)

    def seal(self, teacher_accuracy: float | None, recorded: Mapping[str, Any]) -> Cache:
        """As ``seal``, for the rows of this build."""
        return Cache(
            self.folder, seal(self.folder, self.key, self.layout, teacher_accuracy, recorded), self.layout.rows
        )


def open_build(path: str, key: CacheKey, reader: SplitReader) -> CacheBuild:
    """Begins the build of a cache, or goes on with one.

    Locally one process at a time holds a build. Object storage has no locks: there, of two builders of one part the
    first wins, so that both end with the same cache.

    Args:
        path: ``cache.path``.
        key: of the cache.
        reader: of the train split.

    Raises:
        CacheError: another process holds it; its manifest is damaged; the folder cannot be written.
        ConfigError: the encoding does not fit the number of classes.
    """
    check_classes(key, key.num_classes)
    folder, layout = open_folder(path).below(key.digest), PartLayout.of(reader)
    lock = lock_folder(folder) if folder.local else None
    try:
        cache = _find_finished(folder, reader)
        if cache is None:
            _prepare(folder, key, layout)
        return CacheBuild(folder, key, layout, cache, lock)
    except BaseException:
        if lock is not None:
            lock.close()
        raise


def _find_finished(folder: CacheFolder, reader: SplitReader) -> Cache | None:
    if not folder.exists(MANIFEST):
        return None
    manifest, files = read_manifest(folder), folder.list_files()
    whole = all(files.get(part.name) == part.num_bytes for part in manifest.parts)
    try:
        check_rows(folder, manifest, reader)
    except CacheError:  # of other rows: this build takes its place
        whole = False
    return Cache(folder, manifest, reader.rows) if whole else None


def _prepare(folder: CacheFolder, key: CacheKey, layout: PartLayout) -> None:
    """Leaves only parts that are good for this build."""
    build = BuildRecord.of(key, layout)
    folder.delete(MANIFEST)
    files, known = folder.list_files(), read_build(folder) == build
    for name in files:
        if name.endswith(TEMPORARY):  # of a build that was killed: nobody else holds the lock
            folder.delete(name)
    if not known:
        present = [place for place in _places(layout, key.num_views) if part_name(*place) in files]
        for view, index in present:
            try:
                inspect_part(folder, key, view, index, layout.ids(index))
            except CacheError as error:
                _log.info("computed again: %s", error.message)
                folder.delete(part_name(view, index))
        write_build(folder, build)


def find_missing_parts(folder: CacheFolder, layout: PartLayout, num_views: int) -> list[tuple[int, int]]:
    """View and number of each part that has no file, by view and then by number."""
    files = folder.list_files()
    return [place for place in _places(layout, num_views) if part_name(*place) not in files]


def seal(
    folder: CacheFolder,
    key: CacheKey,
    layout: PartLayout,
    teacher_accuracy: float | None,
    recorded: Mapping[str, Any],
) -> Manifest:
    """Reads every part, checks it, and writes the manifest, which makes the folder a cache.

    Args:
        layout: of the rows that it was built for.
        teacher_accuracy: on the validation split, if known.
        recorded: versions, device, time; JSON-serialisable.

    Raises:
        CacheError: a part is missing, damaged or another one.
    """
    missing = find_missing_parts(folder, layout, key.num_views)
    if missing:
        raise CacheError(
            f"the cache {folder.shown} lacks {len(missing)} parts, the first {part_name(*missing[0])}; run `python -m "
            "pipeline cache build` again, which computes only what is missing."
        )

    def inspect(place: tuple[int, int]) -> Any:
        return inspect_part(folder, key, *place, layout.ids(place[1]))

    with ThreadPoolExecutor(NUM_READERS) as pool:
        parts = tuple(pool.map(inspect, _places(layout, key.num_views)))
    manifest = Manifest(
        key=key,
        rows=StoredRows.of(layout.rows),
        first_rows=tuple(layout.first_rows.tolist()),
        parts=parts,
        num_rows=sum(part.num_rows for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        teacher_accuracy=teacher_accuracy,
        recorded=dict(recorded),
    )
    write_manifest(folder, manifest)
    folder.delete(BUILD)
    return manifest


def _places(layout: PartLayout, num_views: int) -> list[tuple[int, int]]:
    return [(view, index) for view in range(num_views) for index in layout.indexes]


def lock_folder(folder: CacheFolder) -> IO[str]:
    """Holds ``.lock`` of a local cache until it is closed or the process ends, however it ends.

    Raises:
        CacheError: another process holds it, or the folder cannot be written.
    """
    try:
        Path(folder.root).mkdir(parents=True, exist_ok=True)
        return hold_lock(Path(folder.root))
    except LockedError as error:
        raise CacheError(
            f"the cache {folder.shown} is being built by {error.holder}; wait for it to end, then run this again.",
            in_use=True,
        ) from None
    except OSError as error:
        raise CacheError(
            f"cache.path: {folder.shown} cannot be written ({error.strerror}); set one that is writable."
        ) from error
