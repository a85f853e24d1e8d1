"""Looking after caches: which there are, whether their files are whole, and removing them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.contracts.locks import LOCK
from pipeline.data.cache.build import lock_folder
from pipeline.data.cache.encoding import IDS, column_array, decode_logits
from pipeline.data.cache.folder import NUM_READERS, TEMPORARY, CacheFolder, open_folder
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.manifest import BUILD, MANIFEST, Manifest, read_build, read_manifest
from pipeline.data.cache.parts import PartRecord, due_ids, read_part
from pipeline.errors import CacheError

_DIGEST = re.compile("[0-9a-f]{16}")
_PART = re.compile(r"view-\d{4,}/part-\d{6,}\.arrow")
_FILLED = re.compile(r"fill-[^/]+/view-\d{4,}/block-\d{10,}\.arrow")

CacheState = Literal["complete", "incomplete", "damaged", "foreign"]


@dataclass(frozen=True)
class CacheEntry:
    """Something below ``cache.path``.

    Attributes:
        name: of the folder or file.
        state: complete: it has a manifest. incomplete: its build is under way, or was interrupted. damaged: its
            manifest cannot be used. foreign: nothing that a build has made.
        num_parts: files of logits.
        num_bytes: of all its files.
        key: if known.
        manifest: of a complete one.
        problem: what is wrong with a damaged one.
    """

    name: str
    state: CacheState
    num_parts: int
    num_bytes: int
    key: CacheKey | None = None
    manifest: Manifest | None = None
    problem: str = ""


def list_caches(path: str) -> list[CacheEntry]:
    """What lies below ``cache.path``, by name. Only manifests are read.

    Raises:
        CacheError: the folder cannot be read.
    """
    top = open_folder(path)
    folders: dict[str, dict[str, int]] = {}
    for file, size in sorted(top.list_files().items()):
        name, _, rest = file.partition("/")
        folders.setdefault(name, {})[rest] = size
    return [_describe(top.below(name), name, files) for name, files in folders.items()]


def _describe(folder: CacheFolder, name: str, files: dict[str, int]) -> CacheEntry:
    num_parts, num_bytes = sum(_PART.fullmatch(file) is not None for file in files), sum(files.values())
    if not _DIGEST.fullmatch(name) or not (num_parts or {MANIFEST, BUILD, LOCK} & files.keys()):
        return CacheEntry(name, "foreign", num_parts, num_bytes)
    try:
        if MANIFEST in files:
            manifest = read_manifest(folder)
            return CacheEntry(name, "complete", num_parts, num_bytes, manifest.key, manifest)
        build = read_build(folder)
    except CacheError as error:
        return CacheEntry(name, "damaged", num_parts, num_bytes, problem=error.message)
    return CacheEntry(name, "incomplete", num_parts, num_bytes, None if build is None else build.key)


def verify_files(folder: CacheFolder) -> list[str]:
    """Reads every file of a cache and checks it against the manifest.

    Returns:
        A sentence for each file that is missing, damaged or does not belong there; none where all is well.
    """
    try:
        manifest = read_manifest(folder)
        files = folder.list_files()
    except CacheError as error:
        return [error.message]
    layout = manifest.layout

    def check(record: PartRecord) -> str | None:
        try:
            read_part(folder, manifest.key, record, due_ids(layout, record))
        except CacheError as error:
            return error.message
        return None

    with ThreadPoolExecutor(NUM_READERS) as pool:
        problems = [problem for problem in pool.map(check, manifest.parts) if problem is not None]
    return problems + _name_foreign(folder, manifest, files)


def _name_foreign(folder: CacheFolder, manifest: Manifest, files: dict[str, int]) -> list[str]:
    known = {MANIFEST, LOCK, *(part.name for part in manifest.parts)}
    problems = []
    for name in sorted(files.keys() - known):
        if _FILLED.fullmatch(name):
            problems.append(f"{folder.show(name)} was left by a run that filled it; go on with that run, or delete it.")
        elif name.endswith(TEMPORARY) or name == BUILD:
            problems.append(f"{folder.show(name)} was left by a build that was interrupted; delete it.")
        else:
            problems.append(f"{folder.show(name)} is no file of this cache; move it elsewhere, or delete it.")
    return problems


def remove_cache(path: str, name: str) -> list[str]:
    """Deletes a cache, complete or not; the manifest first, so that what is left of it is never taken for one.

    Args:
        path: ``cache.path``.
        name: of its folder.

    Returns:
        Files in its folder that no build has made, which are left.

    Raises:
        CacheError: there is no such cache; it is being built; a file cannot be deleted.
    """
    entries = {entry.name: entry for entry in list_caches(path)}
    if name not in entries or entries[name].state == "foreign":
        known = ", ".join(entry.name for entry in entries.values() if entry.state != "foreign") or "none"
        raise CacheError(f"cache.path={path} holds no cache {name}; there are: {known}.")
    folder = open_folder(path).below(name)
    lock = lock_folder(folder) if folder.local else None
    try:
        folder.delete(MANIFEST)
        left = []
        for file in sorted(folder.list_files()):
            if file in (BUILD, LOCK) or file.endswith(TEMPORARY) or _PART.fullmatch(file) or _FILLED.fullmatch(file):
                folder.delete(file)
            else:
                left.append(file)
        if not left:
            folder.delete_folder()
        return left
    finally:
        if lock is not None:
            lock.close()


# Largest deviation of a logit that rounding explains, as a share of the range of its row's logits: of sums that another
# machine adds up in another order, of what is stored in half precision, of a network that computes in bfloat16.
_COMPUTED = {"fp32": 1e-4, "bf16": 2**-6}
_STORED = {"float32": 0.0, "float16": 2**-11}


def tolerance(key: CacheKey) -> float:
    """Largest deviation of a logit that rounding explains, as a share of the range of its row's logits."""
    return _COMPUTED[key.precision] + _STORED[key.dtype]


def find_deviations(stored: pa.Table, logits: np.ndarray, key: CacheKey) -> np.ndarray:
    """Largest difference in each row between a logit that is stored and the same one now.

    Args:
        stored: B rows as of ``LogitsReader.read``.
        logits: (B, C) float32 of the live teacher.
        key: of the cache.

    Returns:
        (B,) float32; of the classes that are kept.
    """
    differences = np.abs(decode_logits(stored, key.num_classes, 1.0) - logits)
    if key.k is not None:
        kept = column_array(stored[IDS]).astype(np.int64)
        differences = np.take_along_axis(differences, kept, axis=1)
    largest: np.ndarray = differences.max(axis=1)
    return largest
