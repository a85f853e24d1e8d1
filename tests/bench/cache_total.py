"""``total``: ten epochs from the first command to the last, beside a plain loop that asks the teacher every time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from pipeline.contracts.events import read_events
from tests.bench.cache_epochs import BATCH_SIZE, CLUSTERS, THREADS, data_settings, train_plainly
from tests.bench.measure import Series, say, table, time_command, verdict, write_section
from tests.bench.workload import STUDENT_WIDTH, write_checkpoint, write_images

TEACHER = "resnet56"  # its forward pass costs about three times what the student's epoch does
EPOCHS = 10
VIEWS = (1, 4)
TRAIN_ROWS = 12_800
PLAIN_STEPS = 20

# As many processes for the teacher as the plain loop has threads.
POOLS = {"inprocess": (), "ray": (f"teacher.pool.min={THREADS}", f"teacher.pool.max={THREADS}")}


@dataclass
class _Times:
    """What one way of doing it took in each round; all but ``cpu_s`` is wall time."""

    build_s: Series = field(default_factory=Series)
    train_s: Series = field(default_factory=Series)
    work_s: Series = field(default_factory=Series)  # of both together, from before the first row to after the last
    total_s: Series = field(default_factory=Series)
    cpu_s: Series = field(default_factory=Series)


def measure(
    rounds: int,
    rows: int = TRAIN_ROWS,
    steps: int = PLAIN_STEPS,
    clusters: Sequence[str] = tuple(CLUSTERS),
    views: Sequence[int] = VIEWS,
) -> None:
    """Interleaved rounds of t, s, the inline loop and the pipeline; writes the section."""
    teacher, student, inline = Series(), Series(), _Times()
    cached = {(num_views, cluster): _Times() for num_views in views for cluster in clusters}
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        folder = Path(name)
        write_images(folder / "data", rows, BATCH_SIZE)
        write_checkpoint(folder / "teacher.safetensors", TEACHER)
        for index in range(rounds):
            with say(f"round {index + 1}: t and s"):
                teacher.add(1e6 / time_teacher(folder, steps))
                student.add(1e6 / process.submit(train_plainly, folder / "data", 1, steps).result()[0])
            with say(f"round {index + 1}: inline loop"):
                loop = _plain_loop(folder, "inline", EPOCHS * (rows // BATCH_SIZE), warmup=0)
                wall_s, cpu_s = time_command(loop, folder / "inline.txt", "\n")
            inline.total_s.add(wall_s)
            inline.cpu_s.add(cpu_s)
            for (num_views, cluster), times in cached.items():
                with say(f"round {index + 1}: {num_views} views, {cluster}"):
                    _run(folder, f"{index}-{num_views}-{cluster}", num_views, cluster, times)
    write_section("cache-total", _report(rows, teacher, student, inline, cached))


def _plain_loop(folder: Path, mode: str, steps: int, warmup: int, threads: int = THREADS) -> list[str]:
    return [
        "tests.bench.plain_loop", "--data", str(folder / "data"), "--checkpoint", str(folder / "teacher.safetensors"),
        "--teacher", TEACHER, "--batch-size", str(BATCH_SIZE), "--threads", str(threads), "--mode", mode,
        "--warmup", str(warmup), "--steps", str(steps),
    ]  # fmt: skip


def time_teacher(folder: Path, steps: int, threads: int = THREADS) -> float:
    """Samples per second of the teacher's forward pass alone."""
    command = [sys.executable, "-m", *_plain_loop(folder, "teacher", steps, warmup=4, threads=threads)]
    printed = subprocess.run(command, input="\n", text=True, stdout=subprocess.PIPE, check=True).stdout
    return float(json.loads(printed)["samples_per_s"])


def _run(folder: Path, name: str, num_views: int, cluster: str, times: _Times) -> None:
    """``cache build``, then ``distill``: two commands, as a user types them."""
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    shared = [
        *data_settings(folder / "data", num_views), *CLUSTERS[cluster], *POOLS[cluster],
        f"teacher={TEACHER}", f"teacher.checkpoint={folder / 'teacher.safetensors'}",
        f"cache.path={folder / 'cache' / name}",
    ]  # fmt: skip
    student = [
        "teacher.source=cached", "student=small_cnn", f"student.width={STUDENT_WIDTH}", f"train.epochs={EPOCHS}",
        f"train.evaluate_every={EPOCHS}", "train.optimizer.lr=0.01", "evaluation.test=false",
    ]  # fmt: skip
    build, train = runs / f"{name}-build", runs / f"{name}-train"
    output = folder / f"{name}.txt"
    built = time_command(["pipeline", "cache", "build", *shared, f"run.dir={build}"], output)
    trained = time_command(["pipeline", "distill", *shared, *student, f"run.dir={train}"], output)
    times.build_s.add(built[0])
    times.train_s.add(trained[0])
    times.work_s.add(_stage_s(build, "logits") + _stage_s(train, "training"))
    times.total_s.add(built[0] + trained[0])
    times.cpu_s.add(built[1] + trained[1])


def _stage_s(run_dir: Path, name: str) -> float:
    times = {
        event.data["state"]: event.time
        for event, _ in read_events(run_dir / "events.jsonl")
        if event.kind == "stage" and event.data["name"] == name
    }
    return times["finished"] - times["started"]


def _report(
    num_rows: int, teacher: Series, student: Series, inline: _Times, cached: dict[tuple[int, str], _Times]
) -> str:
    by_hand = Series([1e-6 * num_rows * EPOCHS * (t + s) for t, s in zip(teacher.values, student.values, strict=True)])
    rows = [["inline loop", "", "", "", inline.total_s.show(), inline.cpu_s.show(), "", "", ""]]
    verdicts = []
    for (num_views, cluster), times in cached.items():
        allowed = Series(
            [
                EPOCHS * (t + s) / (num_views * t + EPOCHS * s)
                for t, s in zip(teacher.values, student.values, strict=True)
            ]
        )
        gained = Series([a / b for a, b in zip(inline.total_s.values, times.total_s.values, strict=True)])
        share = Series([a / b for a, b in zip(gained.values, allowed.values, strict=True)])
        label = f"V={num_views}, {cluster}"
        parts = (times.build_s, times.train_s, times.work_s, times.total_s, times.cpu_s)
        rows.append([label, *(part.show() for part in parts), *(part.show(2) for part in (gained, allowed, share))])
        verdicts.append(f"{label} {share.show(2)}, {verdict(share.median >= 0.85)}")
    columns = ("", "cache build s", "distill s", "of both in rows and steps s", "in all s", "CPU s, all processes",
               "x inline loop", "arithmetic allows", "share of it")  # fmt: skip
    costs = Series([t / s for t, s in zip(teacher.values, student.values, strict=True)])
    return "\n\n".join(
        [
            f"{TEACHER} and small_cnn(width={STUDENT_WIDTH}), {EPOCHS} epochs of {num_rows:,} PNG images of 32 x 32 "
            f"with crop and flip in V views, blocks of {BATCH_SIZE}. Each is measured from the start of its first "
            "process to the end of its last: the plain loop with the teacher inline; `cache build` and `distill "
            f"teacher.source=cached`, which validate, keep a checkpoint and record in MLflow besides. {THREADS} torch "
            f"threads; on Ray {THREADS} teacher actors and one worker, and each command starts a Ray of its own. "
            "Median and range over the rounds.",
            f"t, the teacher's forward pass: {teacher.show()} us a sample. s, an epoch without a teacher (plain loop "
            f"with logits in memory, reading and augmenting included): {student.show()} us a sample. "
            f"t / s: {costs.show(2)}. E (t + s) = {by_hand.show()} s; arithmetic allows E (t + s) / (V t + E s).",
            table(columns, rows),
            f"At least 0.85 of what arithmetic allows: {'; '.join(verdicts)}.",
        ]
    )
