"""What one pass of the teacher saves a search.

    python -m tests.bench.search [--rounds 5] [--keep runs/bench-search.json]

Run from the root of the repository, on a machine that does nothing else; a round takes twenty minutes. What each round
measured is kept, so the command may be interrupted, and goes on with the rounds that are missing. Prints its figures
and replaces its part of tests/bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from pipeline.contracts.events import Event, read_events
from pipeline.trials.records import read_trials, trial_folder
from tests.bench.cache_epochs import BATCH_SIZE, data_settings, train_plainly
from tests.bench.cache_total import TEACHER, time_teacher
from tests.bench.measure import Series, ratio, say, table, verdict, write_section
from tests.bench.workload import STUDENT_WIDTH, write_checkpoint, write_images

CONCURRENT = 2
VIEWS = 1
PLAIN_STEPS = 20


@dataclass(frozen=True)
class _Round:
    """What one round measured, in seconds.

    Attributes:
        teacher_us, student_us: t and s, microseconds a sample, beside another of its kind.
        gaps: from a trial's end to the next one's first step.
        waits: parts of the search's wall time that are no training.
        note: what was particular about it.
        rss_mb: resident memory of a process at the end of its first trial, and of its last.
    """

    teacher_us: float
    student_us: float
    documented_wall: float
    documented_train: float
    wall: float
    train: float
    gaps: list[float]
    waits: dict[str, float]
    rss_mb: list[tuple[float, float]]
    note: str = ""


_Searched = tuple[float, float, list[float], dict[str, float], list[tuple[float, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2_560)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--keep", type=Path, default=Path("runs/bench-search.json"), help="file of the rounds")
    arguments = parser.parse_args()
    rows, trials, epochs, keep = arguments.rows, arguments.trials, arguments.epochs, arguments.keep
    size = {"rows": rows, "trials": trials, "epochs": epochs}
    kept = json.loads(keep.read_text()) if keep.exists() else {}
    rounds = [_Round(**values) for values in kept["rounds"]] if kept.get("size") == size else []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", rows, BATCH_SIZE)
        write_checkpoint(folder / "teacher.safetensors", TEACHER)
        for index in range(len(rounds), arguments.rounds):
            with say(f"round {index + 1}: t and s"):
                teacher, student = time_sample(folder)
            with say(f"round {index + 1}: a TorchTrainer for each trial"):
                documented = _run_documented(folder, trials, epochs)
            with say(f"round {index + 1}: search"):
                searched = _run_search(folder, f"search-{index}", trials, epochs)
            rounds.append(_Round(teacher, student, *documented, *searched))
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_text(json.dumps({"size": size, "rounds": [asdict(one) for one in rounds]}))
    write_section("search", _report(rows, trials, epochs, rounds))


def time_sample(folder: Path) -> tuple[float, float]:
    """t and s in microseconds, of as many plain loops at a time as there are trials at a time."""
    with ProcessPoolExecutor(CONCURRENT, mp_context=get_context("spawn")) as processes:
        teachers = [processes.submit(time_teacher, folder, PLAIN_STEPS, 1) for _ in range(CONCURRENT)]
        rates = [future.result() for future in teachers]
        students = [
            processes.submit(train_plainly, folder / "data", 1, PLAIN_STEPS, threads=1) for _ in range(CONCURRENT)
        ]
        student_rates = [future.result()[0] for future in students]
    return 1e6 / statistics.mean(rates), 1e6 / statistics.mean(student_rates)


def _run_documented(folder: Path, trials: int, epochs: int) -> tuple[float, float]:
    """Seconds of the whole command, and of training in all trials."""
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
    return time.time() - began, sum(json.loads(ended.stdout.splitlines()[-1])["train_s"])


def _run_search(folder: Path, name: str, trials: int, epochs: int) -> _Searched:
    """The command as a user types it; what confirms its best trials, which the other way lacks, is left out.

    Returns:
        seconds of the whole command; of the teacher and of training in all trials; ``gaps``, ``waits``, ``rss_mb``.
    """
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
    return read_search(run_dir, began, time.time())


def read_search(run_dir: Path, began: float, ended: float) -> _Searched:
    """See ``_run_search``; of a search that ran from ``began`` to ``ended``."""
    stages = {
        (event.data["name"], event.data["state"]): event.time
        for event, _ in read_events(run_dir / "events.jsonl")
        if event.kind == "stage"
    }
    wall = ended - began - (stages["confirm", "finished"] - stages["confirm", "started"])
    own = [trial for trial in read_trials(run_dir) if not trial.confirms]
    journals = {trial.label: _read(trial_folder(run_dir, trial.label)) for trial in own}
    trained = sum(events[-1].time - events[0].time for events in journals.values())
    first_step = min(event.time for events in journals.values() for event in events if event.kind == "step")
    waits = {
        "imports": stages["ray", "started"] - began,
        "Ray": stages["ray", "finished"] - stages["ray", "started"],
        "the teacher's logits, its pool's start included": stages["search", "started"] - stages["ray", "finished"],
        "to the first step of a trial": first_step - stages["search", "started"],
        "after the last run": ended - stages["confirm", "finished"],
    }
    teacher = stages["logits", "finished"] - stages["logits", "started"]
    served = _by_process(run_dir, journals)
    rss = [(_rss_mb(process[0]), _rss_mb(process[-1])) for process in served if len(process) > 1]
    return wall, teacher + trained, list(_gaps(served)), waits, rss


def _read(folder: Path) -> list[Event]:
    return [event for event, _ in read_events(folder / "events.jsonl")]


def _by_process(run_dir: Path, journals: dict[str, list[Event]]) -> list[list[list[Event]]]:
    """The trials of each process, in their order."""
    by_process: dict[int, list[list[Event]]] = {}
    for label, events in journals.items():
        pid = json.loads((trial_folder(run_dir, label) / "status.json").read_text())["pid"]
        by_process.setdefault(pid, []).append(events)
    return [sorted(served, key=lambda events: events[0].time) for served in by_process.values()]


def _rss_mb(events: list[Event]) -> float:
    return [event.data["rss_bytes"] for event in events if event.kind == "system"][-1] / 1e6


def _gaps(processes: list[list[list[Event]]]) -> Iterator[float]:
    """Seconds from the end of a trial to the first step of the next one in the same process."""
    for served in processes:
        for before, after in itertools.pairwise(served):
            ended = max(event.time for event in before if event.kind == "status")
            yield next(event.time for event in after if event.kind == "step") - ended


def _report(rows: int, trials: int, epochs: int, rounds: list[_Round]) -> str:
    def over_rounds(value: Callable[[_Round], float]) -> Series:
        return Series([value(one) for one in rounds])

    def allow(one: _Round) -> float:
        t, s = one.teacher_us, one.student_us
        return trials * epochs * (t + s) / (VIEWS * t + trials * epochs * s)

    documented_train, documented_wall = (
        over_rounds(lambda one: one.documented_train), over_rounds(lambda one: one.documented_wall),
    )  # fmt: skip
    own_train, own_wall = over_rounds(lambda one: one.train), over_rounds(lambda one: one.wall)
    allowed, train, wall = over_rounds(allow), ratio(documented_train, own_train), ratio(documented_wall, own_wall)
    share = ratio(train, allowed)
    starts = over_rounds(lambda one: 1 - one.documented_train / CONCURRENT / one.documented_wall)
    gaps = Series([gap for one in rounds for gap in one.gaps])
    first, last = (Series([pair[index] for one in rounds for pair in one.rss_mb]) for index in (0, 1))
    waits = [f"{name} {over_rounds(lambda one, name=name: one.waits[name]).show()}" for name in rounds[0].waits]
    body = [
        ["a TorchTrainer for each trial", documented_train.show(), documented_wall.show()],
        ["search", own_train.show(), own_wall.show()],
    ]
    return "\n\n".join(
        [
            f"{trials} trials of {epochs} epochs of {rows:,} PNG images of 32 x 32, {CONCURRENT} at a time with one "
            f"thread each, {TEACHER} and small_cnn(width={STUDENT_WIDTH}), blocks of {BATCH_SIZE}, {VIEWS} view. The "
            "trials of Ray's documentation: a function that makes a TorchTrainer of one worker, which asks the teacher "
            "inline. The search: the command, its cache built first, none stopped early; confirming its best is left "
            f"out. Median and range over {len(rounds)} round{'s' * (len(rounds) != 1)}.",
            f"t, the teacher's forward pass: {over_rounds(lambda one: one.teacher_us).show()} us a sample; s, an epoch "
            f"without a teacher, {CONCURRENT} at a time as well: {over_rounds(lambda one: one.student_us).show()}. "
            f"Arithmetic allows N E (t + s) / (V t + N E s) = {allowed.show(2)}.",
            table(("", "training s, sum over trials", "wall s, all starts"), body),
            f"Training: {train.show(2)} times less, {share.show(2)} of what arithmetic allows, at least 0.85: "
            f"{verdict(share.median >= 0.85)}. Wall: {wall.show(2)} times less, at least 4: "
            f"{verdict(wall.median >= 4)}; starts are {starts.show(2)} of the other's wall time (under a third: "
            f"{verdict(starts.median < 1 / 3)}). From a trial's end to the next one's first step in the process: "
            f"{gaps.show(2)} s, under 2 s: {verdict(gaps.median < 2)}.",
            f"Seconds of the search's wall time in which no trial trains: {'; '.join(waits)}.",
            f"Resident memory of a trial's process, MB: {first.show()} at the end of its first trial, {last.show()} at "
            f"that of its last, {trials // CONCURRENT} or so trials later.",
            *(f"Round {number}: {one.note}." for number, one in enumerate(rounds, start=1) if one.note),
        ]
    )


if __name__ == "__main__":
    main()
