"""What a search gains: its winner beside the defaults and beside random search of the same budget, over fresh seeds.

    DISTILL_DATA=FOLDER python -m tests.bench.search_gain [--runs runs/search-gain] [--only digits]

``FOLDER/cifar100`` holds the Parquet files, of which ten classes are taken. A run that is finished is not repeated, one
that was stopped goes on, so the command may be interrupted; it replaces its part of tests/bench/RESULTS.md. On two
cores without a GPU it takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.stored import read_json
from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.seeds import mean_over_seeds
from pipeline.trials.configs import describe_draw
from tests.bench.measure import say, table, write_section

NUM_CLASSES = 10  # of CIFAR-100's
NUM_SEEDS = 5
METRIC = "test/top1"
CROP_AND_FLIP = ("data.augment.crop_padding=4", "data.augment.flip=true")
SPACES = {"temperature": "kd", "ptloss": "ptloss", "cmkd": "cmkd"}
# The starting points of a space are part of the search; random search has none but the defaults, which both try first.
SEARCHERS: dict[str, tuple[str, ...]] = {
    "search": (),
    "random": ("search.searcher=random", "search.start=[]", "search.start_from_selection=false"),
}


@dataclass(frozen=True)
class _Task:
    """A data set with its networks, known before any run: nothing here was tuned."""

    title: str
    teacher: tuple[str, ...]
    teaching: tuple[str, ...]
    student: tuple[str, ...]
    num_trials: int


TASKS = {
    "digits": _Task(
        "digits: small_cnn(width=64) teaches mlp(32), 10 epochs",
        ("data=digits", "teacher=small_cnn", "teacher.width=64"),
        ("train.epochs=20", "train.optimizer.lr=0.05", "train.optimizer.warmup_epochs=1"),
        ("student=mlp", "student.hidden=[32]", "train.epochs=10", "train.optimizer.lr=0.05"),
        24,
    ),
    "cifar": _Task(
        f"{NUM_CLASSES} classes of CIFAR-100: small_cnn(width=48) teaches small_cnn(width=8), 6 epochs, 4 cached views",
        ("data=parquet", *CROP_AND_FLIP, "teacher=small_cnn", "teacher.width=48"),
        ("train.epochs=20", "train.optimizer.lr=0.05", "train.optimizer.warmup_epochs=1"),
        ("student=small_cnn", "student.width=8", "train.epochs=6", "train.optimizer.lr=0.05", "data.num_views=4"),
        16,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/search-gain"), help="where the run folders go")
    parser.add_argument("--only", choices=TASKS, help="one of the data sets, without writing the results")
    arguments = parser.parse_args()
    if "DISTILL_DATA" not in os.environ and arguments.only != "digits":
        parser.error("set DISTILL_DATA to the folder that holds cifar100/")
    runs = arguments.runs.absolute()
    rows: list[list[str]] = []
    texts: list[str] = []
    for name in [arguments.only] if arguments.only else TASKS:
        task, folder = TASKS[name], runs / name
        folder.mkdir(parents=True, exist_ok=True)
        data: tuple[str, ...] = ()
        if name == "cifar":
            _write_subset(Path(os.environ["DISTILL_DATA"]) / "cifar100", folder / "data")
            data = (f"data.path={folder / 'data'}",)
        teacher = _run(
            folder, "teacher", "train-teacher", *task.teacher, *data, *task.teaching, "cluster=inprocess",
            f"train.num_threads={os.cpu_count()}",
        )  # fmt: skip
        texts.append(
            f"{task.title}, {task.num_trials} trials. The teacher's {METRIC}: {teacher['metrics'][METRIC]:.4f}."
        )
        for space, loss in SPACES.items():
            for searcher, options in SEARCHERS.items():
                _run(
                    folder, f"{space}-{searcher}", "search", f"search={space}", f"loss={loss}", *task.teacher, *data,
                    *task.student, f"teacher.checkpoint={folder / 'teacher'}", f"cache.path={folder / 'cache'}",
                    f"search.num_trials={task.num_trials}", "search.confirm.top=2",
                    f"search.confirm.seeds={NUM_SEEDS}", "cluster.address=local", "search.max_concurrent=2", *options,
                )  # fmt: skip
            rows.append([name, space, *_compare(folder / f"{space}-search", folder / f"{space}-random")])
    report = _report(texts, rows)
    print(report)
    if not arguments.only:
        write_section("search-gain", report)


def _run(folder: Path, name: str, command: str, *overrides: str) -> dict[str, Any]:
    """Carries out a command as a user would type it; its ``result.json``."""
    place = folder / name
    with say(f"{folder.name}: {name}"), (folder / f"{name}.txt").open("a") as output:
        arguments = [sys.executable, "-m", "pipeline", command, *overrides, f"run.dir={place}"]
        code = subprocess.run(arguments, stdout=output, stderr=output, check=False).returncode
    if code:
        sys.exit(f"{name} ended with {code}; see {folder / name}.txt")
    result: dict[str, Any] = json.loads((place / "result.json").read_text())
    return result


def _write_subset(source: Path, place: Path) -> None:
    """The images of the first classes, as files of the same kind."""
    place.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.parquet")):
        rows = pq.read_table(path, columns=["image", "label"])
        part = place / f"{path.name}.part"
        pq.write_table(rows.filter(pc.less(rows["label"], NUM_CLASSES)).replace_schema_metadata(None), part)
        part.rename(place / path.name)


def _compare(search: Path, random: Path) -> list[str]:
    """The winner's values, its metric on test, and what it gains over the defaults and over random search's."""
    result, test, other = (
        read_json(search / "result.json"), read_json(search / "search" / "test.json"),
        read_json(random / "search" / "test.json"),
    )  # fmt: skip
    own, defaults, theirs = (
        _by_seed(found, label)
        for found, label in ((test, test["winner"]), (test, "defaults"), (other, other["winner"]))
    )
    return [
        describe_draw(result["winner_values"]).replace("loss.", ""),
        _show(mean_over_seeds(list(own.values()))),
        _show(mean_over_seeds(list(defaults.values()))),
        _show(mean_over_seeds(list(theirs.values()))),
        _gain(own, defaults),
        _gain(own, theirs),
    ]


def _by_seed(found: dict[str, Any], label: str) -> dict[str, float]:
    return {seed: metrics[METRIC] for seed, metrics in found["metrics"][label].items()}


def _gain(own: dict[str, float], others: dict[str, float]) -> str:
    return _show(mean_over_seeds([own[seed] - others[seed] for seed in sorted(own)]), sign="+")


def _show(interval: Interval, sign: str = "") -> str:
    return f"{interval.mean:{sign}.4f} ({interval.low:{sign}.4f} to {interval.high:{sign}.4f})"


def _report(texts: list[str], rows: list[list[str]]) -> str:
    columns = ("data", "space", "winner", "winner", "defaults", "random's winner", "over defaults", "over random")
    return "\n\n".join(
        [
            *texts,
            "Each space is searched twice with the same number of trials, ASHA both times: as shipped (Optuna's Parzen "
            "estimator, the space's starting points; PTLoss's with the selected coefficients) and at random, from no "
            "starting points. Both try the defaults first, and draw with the same seed: the estimator's first ten "
            "points are random ones too, so the two share some. The best two of each are trained again over "
            f"{NUM_SEEDS} fresh seeds, the winner by that mean, on validation. The table is on test, opened once a "
            f"search: {METRIC}, mean and 95 % interval by Student's t over those seeds; gains are paired by seed.",
            table(columns, rows),
        ]
    )


if __name__ == "__main__":
    main()
