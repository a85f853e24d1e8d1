"""Time of selecting PTLoss's coefficients from 10,000 rows of 100 classes, by scope.

    python -m tests.bench.selection [--rounds 3]

It replaces its part of tests/bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from pipeline.evaluation import SelectionParams
from pipeline.evaluation.perturbation_selection import select_perturbation
from tests.bench.measure import Series, say, table, verdict, write_section

NUM_ROWS, NUM_CLASSES = 10_000, 100
SCOPES = ("shared", "group", "class")
LIMIT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logits, labels = _teacher()
    wall, cpu = ({scope: Series() for scope in SCOPES} for _ in range(2))
    for number in range(arguments.rounds):
        for scope in SCOPES:
            with say(f"{scope}, round {number + 1}"):
                began, used = time.perf_counter(), time.process_time()
                select_perturbation(logits, labels, SelectionParams(scope=scope))
                wall[scope].add(time.perf_counter() - began)
                cpu[scope].add(time.process_time() - used)
    rows = [
        [scope, wall[scope].show(1), cpu[scope].show(1), f"{LIMIT_S:g} s: {verdict(wall[scope].median <= LIMIT_S)}"]
        for scope in SCOPES
    ]
    text = (
        f"An overconfident teacher's logits on {NUM_ROWS:,} rows of {NUM_CLASSES} classes, with the default settings, "
        f"{arguments.rounds} interleaved rounds. Median and range."
    )
    write_section("selection", f"{text}\n\n{table(('scope', 's', 'CPU s', 'at most'), rows)}")


def _teacher() -> tuple[np.ndarray, np.ndarray]:
    """Logits that are 1.6 times too large and a little noisy, and labels drawn from the true probabilities."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(NUM_ROWS, NUM_CLASSES))
    # The largest of logits with Gumbel noise is a draw from their softmax.
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    return (1.6 * logits + 0.3 * generator.normal(size=logits.shape)).astype(np.float32), labels


if __name__ == "__main__":
    main()
