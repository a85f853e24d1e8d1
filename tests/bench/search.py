"""What one pass of the teacher saves a search.

    python -m tests.bench.search [--rounds 5]

Run from the root of the repository, on a machine that does nothing else; a round takes a quarter of an hour. Prints its
figures and replaces its part of tests/bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from pipeline.contracts.events import Event, read_events
from pipeline.stages.search_board import read_trials, trial_folder
from tests.bench.cache_epochs import BATCH_SIZE, data_settings, train_plainly
from tests.bench.cache_total import TEACHER, time_teacher
from tests.bench.measure import Series, say, table, verdict, write_section
from tests.bench.workload import STUDENT_WIDTH, write_checkpoint, write_images

CONCURRENT = 2
VIEWS = 1
PLAIN_STEPS = 20


@dataclass
class _Times:
    """Seconds of each round."""

    teacher: Series = field(default_factory=Series)  # us a sample
    student: Series = field(default_factory=Series)
    documented_wall: Series = field(default_factory=Series)
    documented_train: Series = field(default_factory=Series)
    wall: Series = field(default_factory=Series)
    train: Series = field(default_factory=Series)
    gaps: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2_560)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    rows, trials, epochs = arguments.rows, arguments.trials, arguments.epochs
    times = _Times()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        folder = Path(name)
        write_images(folder / "data", rows, BATCH_SIZE)
        write_checkpoint(folder / "teacher.safetensors", TEACHER)
        for index in range(arguments.rounds):
            with say(f"round {index + 1}: t and s"):
                times.teacher.add(1e6 / time_teacher(folder, PLAIN_STEPS, threads=1))
                plain = process.submit(train_plainly, folder / "data", 1, PLAIN_STEPS)
                times.student.add(1e6 / plain.result()[0])
            with say(f"round {index + 1}: a TorchTrainer for each trial"):
                _run_documented(folder, trials, epochs, times)
            with say(f"round {index + 1}: search"):
                _run_search(folder, f"search-{index}", trials, epochs, times)
    write_section("search", _report(rows, trials, epochs, times))


def _run_documented(folder: Path, trials: int, epochs: int, times: _Times) -> None:
    command = [
        "tests.bench.search_baseline", "--data", str(folder / "data"), "--checkpoint",
        str(folder / "teacher.safetensors"), "--teacher", TEACHER, "--student-width", str(STUDENT_WIDTH),
        "--batch-size", str(BATCH_SIZE), "--trials", str(trials), "--concurrent", str(CONCURRENT),
        "--epochs", str(epochs),
    ]  # fmt: skip
    began = time.time()
    ended = subprocess.run([sys.executable, "-m", *command], text=True, capture_output=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr[-3000:])
    times.documented_wall.add(time.time() - began)
    times.documented_train.add(sum(json.loads(ended.stdout.splitlines()[-1])["train_s"]))


def _run_search(folder: Path, name: str, trials: int, epochs: int, times: _Times) -> None:
    """The command as a user types it; what confirms its best trials, which the other way lacks, is left out."""
    run_dir = folder / "runs" / name
    run_dir.parent.mkdir(exist_ok=True)
    command = [
        "pipeline", "search", "search=temperature", *data_settings(folder / "data", VIEWS),
        f"teacher={TEACHER}", f"teacher.checkpoint={folder / 'teacher.safetensors'}", "student=small_cnn",
        f"student.width={STUDENT_WIDTH}", f"train.epochs={epochs}", "train.optimizer.lr=0.01", "train.log_every=1",
        "search.searcher=random", "search.scheduler=none", f"search.num_trials={trials}",
        f"search.max_concurrent={CONCURRENT}", "search.confirm.top=1", "search.confirm.seeds=1",
        "cluster.address=local", f"teacher.pool.max={CONCURRENT}", f"cache.path={folder / 'cache' / name}",
        f"run.dir={run_dir}", "evaluation.test=false",
    ]  # fmt: skip
    began = time.time()
    with (folder / f"{name}.txt").open("w") as file:
        subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=file, check=True)
    wall = time.time() - began
    stages = {
        (event.data["name"], event.data["state"]): event.time
        for event, _ in read_events(run_dir / "events.jsonl")
        if event.kind == "stage"
    }
    times.wall.add(wall - (stages["confirm", "finished"] - stages["confirm", "started"]))
    own = [trial for trial in read_trials(run_dir) if not trial.confirms]
    journals = {trial.label: _read(trial_folder(run_dir, trial.label)) for trial in own}
    trained = sum(events[-1].time - events[0].time for events in journals.values())
    times.train.add(stages["logits", "finished"] - stages["logits", "started"] + trained)
    times.gaps += _gaps(run_dir, journals)


def _read(folder: Path) -> list[Event]:
    return [event for event, _ in read_events(folder / "events.jsonl")]


def _gaps(run_dir: Path, journals: dict[str, list[Event]]) -> Iterator[float]:
    """Seconds from the end of a trial to the first step of the next one in the same process."""
    by_process: dict[int, list[list[Event]]] = {}
    for label, events in journals.items():
        pid = json.loads((trial_folder(run_dir, label) / "status.json").read_text())["pid"]
        by_process.setdefault(pid, []).append(events)
    for served in by_process.values():
        served.sort(key=lambda events: events[0].time)
        for before, after in itertools.pairwise(served):
            ended = max(event.time for event in before if event.kind == "status")
            yield next(event.time for event in after if event.kind == "step") - ended


def _report(rows: int, trials: int, epochs: int, times: _Times) -> str:
    allowed = Series(
        [
            trials * epochs * (t + s) / (VIEWS * t + trials * epochs * s)
            for t, s in zip(times.teacher.values, times.student.values, strict=True)
        ]
    )
    train = Series([a / b for a, b in zip(times.documented_train.values, times.train.values, strict=True)])
    share = Series([a / b for a, b in zip(train.values, allowed.values, strict=True)])
    wall = Series([a / b for a, b in zip(times.documented_wall.values, times.wall.values, strict=True)])
    starts = Series(
        [
            1 - trained / CONCURRENT / whole
            for trained, whole in zip(times.documented_train.values, times.documented_wall.values, strict=True)
        ]
    )
    gaps = Series(times.gaps)
    body = [
        ["a TorchTrainer for each trial", times.documented_train.show(), times.documented_wall.show()],
        ["search", times.train.show(), times.wall.show()],
    ]
    return "\n\n".join(
        [
            f"{trials} trials of {epochs} epochs of {rows:,} PNG images of 32 x 32, {CONCURRENT} at a time with one "
            f"thread each, {TEACHER} and small_cnn(width={STUDENT_WIDTH}), blocks of {BATCH_SIZE}, {VIEWS} view. The "
            "trials of Ray's documentation: a function that makes a TorchTrainer of one worker, which asks the teacher "
            "inline. The search: the command, its cache built first, none stopped early; confirming its best is left "
            "out. Median and range over the rounds.",
            f"t, the teacher's forward pass: {times.teacher.show()} us a sample; s, an epoch without a teacher: "
            f"{times.student.show()}. Arithmetic allows N E (t + s) / (V t + N E s) = {allowed.show(2)}.",
            table(("", "training s, sum over trials", "wall s, all starts"), body),
            f"Training: {train.show(2)} times less, {share.show(2)} of what arithmetic allows, at least 0.85: "
            f"{verdict(share.median >= 0.85)}. Wall: {wall.show(2)} times less, at least 4: "
            f"{verdict(wall.median >= 4)}; starts are {starts.show(2)} of the other's wall time (under a third: "
            f"{verdict(starts.median < 1 / 3)}). From a trial's end to the next one's first step in the process: "
            f"{gaps.show(2)} s, under 2 s: {verdict(gaps.median < 2)}.",
        ]
    )


if __name__ == "__main__":
    main()
