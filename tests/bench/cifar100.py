"""CIFAR-100 from Parquet the whole way: a teacher, students distilled from it by several losses, and alone.

    DISTILL_DATA=FOLDER python -m tests.bench.cifar100 [--runs runs/cifar100] [--seeds 3]

``FOLDER/cifar100`` holds the Parquet files. A run that is finished is not repeated, one that was
stopped goes on, so the command may be interrupted; it replaces its part of tests/bench/RESULTS.md.
On two cores without a GPU it takes about an hour and a half.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.seeds import mean_over_seeds
from tests.bench.measure import CpuClock, say, table, write_section

TEACHER_EPOCHS, STUDENT_EPOCHS = 8, 6
NUM_WORKERS, NUM_TEACHERS = 2, 2
DATA = ("data=parquet", "data.augment.crop_padding=4", "data.augment.flip=true")
TEACHER = ("teacher=resnet20",)
STUDENT = ("student=small_cnn", "student.width=16")
# Known before any run, and the same for both students: nothing here was tuned.
RECIPE = ("train.optimizer.lr=0.1", "train.optimizer.nesterov=true", "train.optimizer.warmup_epochs=0.5")
METRICS = ("top1", "nll", "ece")
# As shipped, but that PTLoss's coefficients are selected before it begins.
LOSSES = {
    "distilled": ("student, kd", ("loss=kd",)),
    "ptloss": ("student, ptloss (selected)", ("loss=ptloss", "loss.perturbation_from=auto")),
    "cmkd": ("student, cmkd", ("loss=cmkd",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cifar100",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar100"), help="where the run folders go")
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind")
    arguments = parser.parse_args()
    if "DISTILL_DATA" not in os.environ:
        parser.error("set DISTILL_DATA to the folder that holds cifar100/")
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2, or there is no interval")
    bench = _Bench(arguments.runs.absolute(), Path(os.environ["DISTILL_DATA"]).absolute() / "cifar100")
    teacher = bench.run(
        "train-teacher", "teacher", *TEACHER, "cluster=inprocess", "train.batch_size=128",
        f"train.epochs={TEACHER_EPOCHS}", f"train.num_threads={os.cpu_count()}",
    )  # fmt: skip
    students: dict[str, list[dict[str, Any]]] = {name: [] for name in (*LOSSES, "alone")}
    for seed in range(arguments.seeds):
        shared = (
            *STUDENT, f"train.epochs={STUDENT_EPOCHS}", f"cluster.num_workers={NUM_WORKERS}", f"run.seed={seed}"
        )  # fmt: skip
        taught = (
            *TEACHER, f"teacher.checkpoint={bench.runs / 'teacher'}",
            f"teacher.pool.min={NUM_TEACHERS}", f"teacher.pool.max={NUM_TEACHERS}",
        )  # fmt: skip
        for name, (_, loss) in LOSSES.items():
            students[name].append(bench.run("distill", f"{name}-{seed}", *taught, *loss, *shared))
        students["alone"].append(bench.run("distill", f"alone-{seed}", "loss=cross_entropy", *shared))
    selection = (bench.runs / "ptloss-0" / "selection" / "selection.txt").read_text()
    write_section("cifar100", _report(teacher, students, selection))


class _Bench:
    def __init__(self, runs: Path, data: Path) -> None:
        self.runs, self._data = runs, data

    def run(self, command: str, name: str, *overrides: str) -> dict[str, Any]:
        """Carries out a command as a user would type it; its ``result.json``, with what it cost under ``cost``."""
        folder = self.runs / name
        cost_path = self.runs / f"{name}.cost.json"
        # A Ray of its own: one that happens to run here would be joined, and its processes not be counted.
        own_ray = ("cluster.address=local",)
        arguments = [*DATA, f"data.path={self._data}", *RECIPE, *own_ray, *overrides, f"run.dir={folder}"]
        self.runs.mkdir(parents=True, exist_ok=True)
        began = time.time()
        with say(name), CpuClock() as clock, (self.runs / f"{name}.txt").open("a") as output:
            code = subprocess.run(
                [sys.executable, "-m", "pipeline", command, *arguments], stdout=output, stderr=output, check=False
            ).returncode
        if code:
            sys.exit(f"{name} ended with {code}; see {self.runs / name}.txt")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        if not cost_path.exists():  # a second call finds the run finished and costs nothing
            ended = time.time()
            cpu_s = sum(clock.used(began, ended).values())
            cost_path.write_text(json.dumps({"wall_s": ended - began, "cpu_s": cpu_s}))
        return {**result, "cost": json.loads(cost_path.read_text())}


def _report(teacher: dict[str, Any], students: dict[str, list[dict[str, Any]]], selection: str) -> str:
    rows = [_row("teacher, resnet20", [teacher])]
    rows += [_row(title, students[name]) for name, (title, _) in LOSSES.items()]
    rows.append(_row("student alone", students["alone"]))
    pairs = [(name, "alone") for name in LOSSES] + [(name, "distilled") for name in LOSSES if name != "distilled"]
    differences = [
        [_title(first), _title(second)]
        + [
            _interval([a[key] - b[key] for a, b in _metric_pairs(students[first], students[second])], 4)
            for key in (f"test/{metric}" for metric in METRICS)
        ]
        for first, second in pairs
    ]
    columns = ("network", "parameters", "val/top1", "test/top1", "test/nll", "test/ece", "samples/s", "wall s", "CPU s")
    return "\n\n".join(
        [
            f"Teacher: resnet20, {TEACHER_EPOCHS} epochs on labels, in process, blocks of 128. Student: "
            f"small_cnn(width=16), {STUDENT_EPOCHS} epochs, {NUM_WORKERS} Ray Train workers with blocks of 64 each, "
            f"from {NUM_TEACHERS} teacher actors, by losses as shipped: `kd` (0.9 KD + 0.1 CE, temperature 4), "
            "`ptloss` (temperature 1, no labels; `perturbation_from=auto`) and `cmkd`; alone by `loss=cross_entropy`. "
            "All: SGD with Nesterov, peak rate 0.1, half an epoch of warm-up, cosine; "
            "crop and flip; 45,000 images to train on, 5,000 carved out of train for validation, which chooses the "
            "checkpoint and the coefficients; test opened once a run. Nothing was tuned. Means over "
            f"{len(students['alone'])} seeds, lowest to highest in brackets.",
            table(columns, rows),
            "First minus second on test, paired by seed: mean and 95 % interval by Student's t.",
            table(("first", "second", *METRICS), differences),
            f"What the selection printed (the same for all seeds):\n\n```text\n{selection.rstrip()}\n```",
            "Wall time and CPU seconds are of whole commands: start, training, validation, test. "
            "They depend on what else the machine did; the accuracies do not.",
        ]
    )


def _title(name: str) -> str:
    return LOSSES[name][0] if name in LOSSES else "student alone"


def _metric_pairs(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    return [(a["metrics"], b["metrics"]) for a, b in zip(first, second, strict=True)]


def _row(name: str, results: Sequence[dict[str, Any]]) -> list[str]:
    def show(values: Sequence[float], digits: int) -> str:
        text = f"{statistics.mean(values):,.{digits}f}"
        return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"

    scores = [
        show([result["metrics"][key] for result in results], 4)
        for key in ("val/top1", "test/top1", "test/nll", "test/ece")
    ]
    costs = [show([result["cost"][key] for result in results], 0) for key in ("wall_s", "cpu_s")]
    speed = show([result["samples_per_s"] for result in results], 0)
    return [name, f"{results[0]['num_parameters']:,}", *scores, speed, *costs]


def _interval(values: Sequence[float], digits: int) -> str:
    found = mean_over_seeds(values)
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


if __name__ == "__main__":
    main()
