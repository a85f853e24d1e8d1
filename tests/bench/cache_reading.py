"""``reading``: time to read a row of 100 classes, and the memory of who reads from a larger cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import SAMPLE_ID
from pipeline.data import BlockPlanner, EpochOrder, TableReader
from pipeline.data.cache import (
    Cache,
    CacheKey,
    LogitsReader,
    WindowedLogits,
    decode_logits,
    load_logits,
    open_build,
    open_cache,
    row_bytes,
)
from pipeline.data.order.rows import RowGroups, RowSet
from tests.bench.measure import Series, say, table, verdict, write_section

NUM_CLASSES = 100
GROUP_ROWS = 2_500
IMAGE_BYTES = 2_200  # of a row of CIFAR in the source: how many rows a window has
WINDOW_BYTES = 2**25
NUM_ROWS = 60_000  # several windows
GROWTH = 10  # of the cache whose reader's memory is compared
MEASURED = "dense, float16"
ROWS_AT_ONCE = (64, 256, 1024)

FORMATS: dict[str, dict[str, object]] = {
    "dense, float16": {"dtype": "float16"},
    "dense, float32": {"dtype": "float32"},
    "top-10, float16": {"format": "topk", "k": 10},
}
# The mass of the classes that are left out is stored at 4, and interpolated at 6.
TEMPERATURES = {"dense, float16": (4.0,), "dense, float32": (4.0,), "top-10, float16": (4.0, 6.0)}


_Way = tuple[str, str, int | None]  # format, how it is read, rows at once (none: all)


@dataclass
class _Speed:
    """us a row in each round: reading and decoding, CPU of the process, decoding alone."""

    wall: Series = field(default_factory=Series)
    cpu: Series = field(default_factory=Series)
    decode: Series = field(default_factory=Series)

    def add(self, wall_s: float, cpu_s: float, decode_s: float, num_rows: int) -> None:
        for series, seconds in ((self.wall, wall_s), (self.cpu, cpu_s), (self.decode, decode_s)):
            series.add(1e6 * seconds / num_rows)


def measure(rounds: int, rows: int = NUM_ROWS) -> None:
    """Interleaved rounds of every format and way to read, then the memory; writes the section."""
    speeds: dict[_Way, _Speed] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        reader = _make_reader(rows)
        with say(f"{len(FORMATS)} caches of {rows:,} rows"):
            caches = {label: _build(folder / "small", _make_key(label), reader) for label in FORMATS}
        for index in range(rounds):
            with say(f"round {index + 1}"):
                for label, cache in caches.items():
                    _time_formats(label, cache, reader, speeds)
        with say(f"a cache of {GROWTH * rows:,} rows"):
            larger = _build(folder / "large", _make_key(MEASURED), _make_reader(GROWTH * rows))
        peaks: dict[tuple[str, bool], Series] = {}
        for index in range(rounds):
            with say(f"round {index + 1}: memory"):
                for path, num_rows in (("small", rows), ("large", GROWTH * rows)):
                    for reads in (False, True):
                        peak = _measure_peak(folder / path, num_rows, reads)
                        peaks.setdefault((path, reads), Series()).add(peak / 1e6)
        sizes = {"small": caches[MEASURED].manifest.num_bytes / 1e6, "large": larger.manifest.num_bytes / 1e6}
    write_section("cache-reading", _report(rows, speeds, peaks, sizes))


def _time_formats(label: str, cache: Cache, reader: TableReader, speeds: dict[_Way, _Speed]) -> None:
    began, cpu_began = time.perf_counter(), time.process_time()
    loaded = load_logits(cache)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    speeds.setdefault((label, "into memory, once", None), _Speed()).add(wall, cpu, 0.0, reader.num_rows)
    for temperature in TEMPERATURES[label]:
        suffix = f" at T={temperature:g}" if label.startswith("top") else ""
        for size in ROWS_AT_ONCE:
            windowed = WindowedLogits(cache, _limit_bytes(cache.manifest.key))
            ways: dict[str, tuple[LogitsReader, int | None]] = {
                f"loaded{suffix}": (loaded, None), f"windowed{suffix}": (windowed, WINDOW_BYTES)
            }  # fmt: skip
            for how, (logits, window_bytes) in ways.items():
                speed = speeds.setdefault((label, how, size), _Speed())
                _time_epoch(logits, list(_blocks(reader, size, window_bytes)), temperature, speed)


def _time_epoch(logits: LogitsReader, blocks: list[np.ndarray], temperature: float, speed: _Speed) -> None:
    decode_s = 0.0
    began, cpu_began = time.perf_counter(), time.process_time()
    for ids in blocks:
        stored = logits.read(0, ids)
        decode_began = time.perf_counter()
        decode_logits(stored, NUM_CLASSES, temperature)
        decode_s += time.perf_counter() - decode_began
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    speed.add(wall, cpu, decode_s, sum(len(ids) for ids in blocks))


def _blocks(reader: TableReader, size: int, window_bytes: int | None) -> Iterator[np.ndarray]:
    """The rows of an epoch in the order of training."""
    planner = BlockPlanner(EpochOrder(reader, 0, window_bytes), reader.num_rows, size, None)
    return (planner.block(position).sample_ids for position in range(planner.blocks_per_epoch))


def _limit_bytes(key: CacheKey) -> int:
    """As a run has it: two windows, each with half as much again."""
    return 2 * int(1.5 * WINDOW_BYTES / IMAGE_BYTES) * row_bytes(NUM_CLASSES, key)


def _measure_peak(path: Path, num_rows: int, reads: bool) -> float:
    """Most memory in bytes that a fresh process had after an epoch; without ``reads``, of its order alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_go_through, str(path), num_rows, reads).result()


def _go_through(path: str, num_rows: int, reads: bool) -> float:
    key, reader = _make_key(MEASURED), _make_reader(num_rows)
    logits = WindowedLogits(open_cache(path, key, reader), _limit_bytes(key)) if reads else None
    for ids in _blocks(reader, 256, WINDOW_BYTES):
        if logits is not None:
            decode_logits(logits.read(0, ids), NUM_CLASSES, 4.0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def _make_reader(num_rows: int) -> TableReader:
    """Rows without pixels, in row groups."""
    num_groups = num_rows // GROUP_ROWS
    numbers = np.arange(num_groups, dtype=np.int64)
    sizes = np.full(num_groups, GROUP_ROWS)
    groups = RowGroups(np.zeros(num_groups, np.int64), numbers, numbers * GROUP_ROWS, sizes, sizes * IMAGE_BYTES)
    rows = RowSet.whole(num_groups * GROUP_ROWS)
    return TableReader(pa.table({SAMPLE_ID: pa.array(rows.ids)}), rows, groups)


def _make_key(label: str) -> CacheKey:
    values = {"teacher": label, "architecture": {}, "preprocessing": {}, "precision": "fp32", "data": "", "augment": {}}
    shape = {"seed": None, "num_views": 1, "num_classes": NUM_CLASSES}
    return CacheKey.model_validate(values | shape | FORMATS[label])


def _build(path: Path, key: CacheKey, reader: TableReader) -> Cache:
    random = np.random.default_rng(0)
    with open_build(str(path), key, reader) as build:
        for view, index in build.find_missing_parts():
            logits = 3 * random.standard_normal((GROUP_ROWS, NUM_CLASSES), dtype=np.float32)
            build.writer.write(view, index, build.layout.ids(index), logits)
        return build.seal(None, {})


def _report(
    num_rows: int,
    speeds: dict[_Way, _Speed],
    peaks: dict[tuple[str, bool], Series],
    sizes: dict[str, float],
) -> str:
    rows = []
    for (label, how, size), speed in speeds.items():
        shown = "all" if size is None else f"{size:,}"
        decoding = "" if size is None else speed.decode.show(2)
        figures = [speed.wall.show(2), decoding, speed.cpu.show(2), verdict(speed.wall.median < 1)]
        rows.append([label, how, shown, *figures])
    own = {path: _minus(peaks[path, True], peaks[path, False]) for path in sizes}
    memory = [
        [f"{sizes[path]:,.1f}", peaks[path, False].show(1), peaks[path, True].show(1), own[path].show(1)]
        for path in sizes
    ]
    grown, cache_grown = _minus(own["large"], own["small"]), sizes["large"] - sizes["small"]
    return "\n\n".join(
        [
            f"{num_rows:,} rows of {NUM_CLASSES} classes in parts of {GROUP_ROWS:,}; rows in the order of an epoch, "
            "read and decoded so many at once. Loaded: from memory, shuffled as a whole; bringing them there, once a "
            "run, by eight threads and with every part hashed, stands in the line above. Windowed: from the files, "
            f"shuffled by windows of {WINDOW_BYTES // IMAGE_BYTES:,} rows, opening, reading and hashing every part "
            "included (the files are in the system's page cache). Top-10 is decoded for a temperature at which the "
            "others' mass is stored (4), and for one between (6). Median and range over the rounds.",
            table(("cache", "how", "rows at once", "us a row", "of it decoding", "CPU us a row", "under 1 us"), rows),
            f"Most memory (VmHWM) of a fresh process that goes through an epoch by windows, {MEASURED}; beside it one "
            "that draws the same order and reads nothing: ids of rows are not the cache's.",
            table(("cache, MB", "order only, MB", "reading, MB", "difference, MB"), memory),
            f"The cache is {cache_grown:,.1f} MB larger, what reading it takes {grown.show(1)} MB. Within 5 % of what "
            f"the cache grew by: {verdict(grown.median <= 0.05 * cache_grown)}.",
        ]
    )


def _minus(first: Series, second: Series) -> Series:
    """Round by round."""
    return Series([a - b for a, b in zip(first.values, second.values, strict=True)])
