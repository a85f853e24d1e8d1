"""What a cache of the teacher's logits saves, and what it costs.

    python -m tests.bench.cache SECTION [--rounds 5]

Run from the root of the repository, on a machine that does nothing else. Each section prints its
figures and replaces its part of tests/bench/RESULTS.md.

  epochs    samples/s of cached epochs beside the student alone, and beside a plain loop with logits in memory
  total     ten epochs from the first command to the last, beside a plain loop that asks the teacher every time
  reading   time to read a row of 100 classes; memory of who reads from a cache ten times larger
  cifar100  CIFAR-100 in 4 views, dense and top-10: sizes, errors, times. Needs DISTILL_DATA, the folder that holds
            cifar100/, and the teacher of `python -m tests.bench.cifar100`
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

# What each section's repetitions are, and which options it takes; what is not given is as the section has it.
_MODULES = {
    "epochs": ("cache_epochs", 5, ("rows", "steps", "clusters")),
    "total": ("cache_total", 5, ("rows", "steps", "clusters", "views")),
    "reading": ("cache_reading", 5, ("rows",)),
    "cifar100": ("cache_cifar100", 1, ("teacher", "views", "clusters")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=tuple(_MODULES))
    parser.add_argument("--rounds", type=int, help="repetitions (default: 5; cifar100: 1)")
    parser.add_argument("--rows", type=int, help="of the data (reading: of the smaller cache)")
    parser.add_argument("--steps", type=int, help="epochs (a multiple of 5), total: steps of a window that is timed")
    parser.add_argument("--clusters", nargs="+", choices=("inprocess", "ray"), help="ways to run the pipeline")
    parser.add_argument("--views", type=int, nargs="+", help="total, cifar100: views of an image")
    parser.add_argument("--teacher", type=Path, help="cifar100: its run folder (default: runs/cifar100/teacher)")
    arguments = parser.parse_args()
    if arguments.section == "cifar100" and "DISTILL_DATA" not in os.environ:
        parser.error("set DISTILL_DATA to the folder that holds cifar100/")
    # torch would take every core in every process.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    name, rounds, options = _MODULES[arguments.section]
    given = {option: getattr(arguments, option, None) for option in options}
    module = importlib.import_module(f"tests.bench.{name}")
    print(f"{arguments.section}:", file=sys.stderr)
    module.measure(arguments.rounds or rounds, **{option: value for option, value in given.items() if value})


if __name__ == "__main__":
    main()
