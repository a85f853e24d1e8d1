"""Whether coefficients chosen by one-hot labels bring a teacher nearer to what people say: CIFAR-10H.

    DISTILL_DATA=FOLDER python -m tests.bench.cifar10h [--splits 20]

``FOLDER/cifar10h`` holds the votes of some 50 people for each CIFAR-10 test image, and the logits of four networks. In
every split a random half of the images chooses temperature and coefficients by its labels alone; on the other half
the distance to the people's distribution is measured, which no choice has seen. Replaces its part of
tests/bench/RESULTS.md; twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.evaluation.perturbation_selection import select_perturbation
from pipeline.evaluation.proxy_teacher import log_probabilities, proxy_teacher
from pipeline.evaluation.selection import Selection, SelectionParams
from tests.bench.measure import say, table, write_section

SCOPES = {
    "shared": SelectionParams(),
    "by confidence": SelectionParams(scope="group"),
    "by class": SelectionParams(scope="class"),
    "shared after temperature": SelectionParams(fit_temperature=True),
    "shared, plain norm": SelectionParams(score="norm"),
}
DISTANCES = ("squared L2", "L2", "total variation", "KL")
Distances = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cifar10h", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=20, help="random halves")
    arguments = parser.parse_args()
    if "DISTILL_DATA" not in os.environ:
        parser.error("set DISTILL_DATA to the folder that holds cifar10h/")
    folder = Path(os.environ["DISTILL_DATA"]) / "cifar10h"
    counts = np.array(pq.read_table(folder / "human_counts.parquet")["human_counts"].to_pylist(), dtype=np.float64)
    people = counts / counts.sum(axis=1, keepdims=True)
    networks = pq.read_table(folder / "teacher_logits.parquet")
    labels = networks["label"].to_numpy()
    rows, kept_rows = [], []
    for name in networks.column_names:
        if name == "label":
            continue
        logits = np.array(networks[name].to_pylist(), dtype=np.float64)
        with say(name):
            found, kept = _study(logits, labels, people, arguments.splits)
        rows += [
            [name, predictor, *(_show([split[predictor][distance] for split in found]) for distance in DISTANCES)]
            for predictor in found[0]
        ]
        kept_rows.append([name, *(f"{count} of {arguments.splits}" for count in kept.values())])
    write_section("cifar10h", _report(rows, kept_rows, arguments.splits))


def _study(
    logits: np.ndarray, labels: np.ndarray, people: np.ndarray, num_splits: int
) -> tuple[list[dict[str, Distances]], dict[str, int]]:
    """Distances of every predictor in every split; and in how many splits each scope beat zero."""
    splits, kept = [], dict.fromkeys(SCOPES, 0)
    for split in range(num_splits):
        order = np.random.default_rng(split).permutation(len(labels))
        chosen, others = np.split(order, 2)
        found = {"teacher": _measure(log_probabilities(logits[others]), people[others])}
        for scope, params in SCOPES.items():
            selection = select_perturbation(logits[chosen], labels[chosen], params.model_copy(update={"seed": split}))
            kept[scope] += selection.beats_zero
            if scope == "shared":
                scaled = log_probabilities(logits[others] / selection.scaling_temperature)
                found["temperature-scaled"] = _measure(scaled, people[others])
            found[f"proxy, {scope}"] = _measure(_proxy(selection, logits[others]), people[others])
        splits.append(found)
    return splits, kept


def _proxy(selection: Selection, logits: np.ndarray) -> np.ndarray:
    coefficients = selection.perturbation.for_rows(torch.from_numpy(logits)).numpy()
    return proxy_teacher(logits / selection.perturbation.teacher_temperature, coefficients)


def _measure(log_q: np.ndarray, people: np.ndarray) -> Distances:
    """Means over the images: squared norm, norm and total variation of the difference, and KL(people || q) in nats."""
    difference = people - np.exp(log_q)
    surprise = np.where(people > 0, people * (np.log(np.maximum(people, 1e-12)) - log_q), 0)
    return {
        "squared L2": float((difference**2).sum(axis=1).mean()),
        "L2": float(np.linalg.norm(difference, axis=1).mean()),
        "total variation": float(np.abs(difference).sum(axis=1).mean() / 2),
        "KL": float(surprise.sum(axis=1).mean()),
    }


def _show(values: list[float]) -> str:
    """Mean, and what 95 % of splits lie between."""
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{statistics.mean(values):.4f} ({low:.4f} to {high:.4f})"


def _report(rows: list[list[str]], kept_rows: list[list[str]], num_splits: int) -> str:
    return "\n\n".join(
        [
            f"Four networks trained on CIFAR-10, 10,000 test images, {num_splits} random halves of 5,000: one chooses "
            "by its labels, on the other the mean distance to the votes of some 50 people an image is measured. "
            "Smaller is better; KL(people || predictor) in nats. Means over the splits, in brackets what 95 % of the "
            "splits lie between. Temperature fitted by Brier; selection with its defaults otherwise.",
            table(("network", "predictor", *DISTANCES), rows),
            "In how many splits the coefficients beat zero (otherwise the proxy teacher is the teacher, or the "
            "temperature-scaled one where a temperature is fitted):",
            table(("network", *SCOPES), kept_rows),
        ]
    )


if __name__ == "__main__":
    main()
