"""``memory``: does anything grow with the epochs, and what does the driver read of the object store?"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.contracts.events import Event
from tests.bench.measure import Series, memory_of, process_tree, say, table, verdict, write_section
from tests.bench.runs import Watcher, distill, local_ray
from tests.bench.workload import PAIR, STUDENT_WIDTH, TEACHER, write_checkpoint, write_images

BATCH_SIZE = 64
BLOCKS_PER_EPOCH = 40
EARLY, LATE = 5, 20
STORE = "object store"


def measure(rounds: int) -> None:
    """One run of 21 epochs whatever ``rounds``: samples of epochs 6 and 21 are compared. Writes the section."""
    del rounds
    samples: dict[int, list[dict[tuple[str, int], float]]] = {EARLY: [], LATE: []}
    epoch = [0]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", BLOCKS_PER_EPOCH * BATCH_SIZE, 2 * BATCH_SIZE)
        checkpoint = write_checkpoint(folder / "teacher.safetensors", TEACHER)
        run_dir = folder / "runs" / "memory"
        with (
            local_ray(4, folder / "ray.log"),
            say(f"{LATE + 1} epochs"),
            _count_reads() as reads,
            Watcher(run_dir, lambda event: _note_epoch(event, epoch)),
            _sampling(epoch, samples),
        ):
            distill(run_dir, _overrides(folder, checkpoint))
    write_section("memory", _report(samples, reads))


def _overrides(folder: Path, checkpoint: Path) -> list[str]:
    return [
        "data=parquet", f"data.path={folder / 'data'}", "data.augment.crop_padding=4", "data.augment.flip=true",
        f"teacher={TEACHER}", f"teacher.checkpoint={checkpoint}", "student=small_cnn", f"student.width={STUDENT_WIDTH}",
        f"train.batch_size={BATCH_SIZE}", f"train.epochs={LATE + 1}", "train.log_every=5",
        "train.optimizer.lr=0.01", "evaluation.test=false",
    ]  # fmt: skip


def _note_epoch(event: Event, epoch: list[int]) -> None:
    if event.kind == "evaluation" and event.data["split"] == "validation":
        epoch[0] = event.data["epoch"]


@contextlib.contextmanager
def _sampling(epoch: list[int], samples: dict[int, list[dict[tuple[str, int], float]]]) -> Iterator[None]:
    """Looks at memory twice a second while one of the two epochs runs."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(0.5):
            if (now := epoch[0]) in samples:
                samples[now].append(_look())

    thread = threading.Thread(target=run, name="memory", daemon=True)
    thread.start()
    yield
    stopped.set()
    thread.join()


def _look() -> dict[tuple[str, int], float]:
    looked: dict[tuple[str, int], float] = {(STORE, 0): _store_bytes()}
    for process in process_tree():
        size = memory_of(process.pid)
        if size is not None:
            looked[process.role, process.pid] = float(size)
    return looked


def _store_bytes() -> float:
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address
    return float(get_memory_info_reply(get_state_from_address(address)).store_stats.object_store_bytes_used)


@contextlib.contextmanager
def _count_reads() -> Iterator[list[int]]:
    """Counts what ``ray.get`` gives this process; small objects that came inline count too."""
    from ray._private.worker import Worker

    counted = [0, 0, 0]  # reads, bytes, the largest
    original = Worker.deserialize_objects

    def counting(self: Any, serialized_objects: Any, *arguments: Any, **keywords: Any) -> Any:
        for data, *_ in serialized_objects:
            size = 0 if data is None else len(data)
            counted[:] = [counted[0] + 1, counted[1] + size, max(counted[2], size)]
        return original(self, serialized_objects, *arguments, **keywords)

    Worker.deserialize_objects = counting  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        Worker.deserialize_objects = original  # type: ignore[method-assign]


def _report(samples: dict[int, list[dict[tuple[str, int], float]]], reads: list[int]) -> str:
    early, late = _medians(samples[EARLY]), _medians(samples[LATE])
    rows: list[list[object]] = []
    reached = True
    for key in sorted(early.keys() & late.keys(), key=lambda key: -late[key]):
        growth = late[key] / max(early[key], 1.0) - 1
        grown = late[key] - early[key]
        # One MB is where pages that come and go are told from growth.
        good = growth <= 0.05 or grown < 2**20
        reached = reached and good
        rows.append([key[0], f"{early[key] / 1e6:,.1f}", f"{late[key] / 1e6:,.1f}", f"{100 * growth:+.1f} %"])
    came = sorted({role for role, _ in late.keys() - early.keys()})
    total = {name: sum(values.values()) for name, values in (("early", early), ("late", late))}
    rows.append(["sum", f"{total['early'] / 1e6:,.1f}", f"{total['late'] / 1e6:,.1f}",
                 f"{100 * (total['late'] / total['early'] - 1):+.1f} %"])  # fmt: skip
    return "\n\n".join(
        [
            f"{PAIR}, one worker and one actor, {LATE + 1} epochs of {BLOCKS_PER_EPOCH} blocks of {BATCH_SIZE} rows, "
            "validation and a checkpoint each. A process's memory is its PSS without shared memory; "
            f"medians of {len(samples[EARLY])} samples after epoch {EARLY} and {len(samples[LATE])} after epoch "
            f"{LATE}, half a second apart, for every process that lived at both.",
            table(("process", f"MB after epoch {EARLY}", f"MB after epoch {LATE}", "growth"), rows),
            f"Within 5 % (or 1 MB) everywhere: {verdict(reached)}."
            + (f" Processes that only lived at the later one: {', '.join(came)}." if came else ""),
            f"The driver read {reads[1] / 1e6:.3f} MB with {reads[0]} ray.get (largest {reads[2] / 1e3:.1f} kB), "
            "counted by wrapping the function that turns what ray.get fetched into values, from the start of the run "
            f"to its end, small inline objects included. Under 1 MB: {verdict(reads[1] < 1e6)}.",
        ]
    )


def _medians(samples: list[dict[tuple[str, int], float]]) -> dict[tuple[str, int], float]:
    series: dict[tuple[str, int], Series] = {}
    for sample in samples:
        for key, value in sample.items():
            series.setdefault(key, Series()).add(value)
    # A process that lived for a moment has no memory to speak of.
    return {key: values.median for key, values in series.items() if 2 * len(values.values) > len(samples)}
