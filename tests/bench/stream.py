"""Speed and memory of the stream.

    python -m tests.bench.stream SECTION [--rounds 5]

Run from the root of the repository, on a machine that does nothing else. Each section prints its
figures and replaces its part of tests/bench/RESULTS.md.

  steady     samples/s of a balanced pair beside a plain PyTorch loop
  simulated  1 to 8 teachers and 1 to 4 students that wait instead of computing
  epochs     the pause between epochs
  start      from fit to the first step; which processes import torch
  memory     growth between epochs 5 and 20; what the driver reads
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# What each section's repetitions are, and how many are affordable in ten minutes on two cores.
_MODULES = {
    "steady": ("steady", 5),
    "simulated": ("simulated_scaling", 1),
    "epochs": ("epochs", 2),
    "start": ("start", 5),
    "memory": ("memory", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=tuple(_MODULES))
    parser.add_argument("--rounds", type=int, help="repetitions (default: 5, or what is affordable in ten minutes)")
    parser.add_argument(
        "--teachers", type=int, nargs="+", help="steady: sizes of the pool; simulated: all of these by --students"
    )
    parser.add_argument("--students", type=int, nargs="+", help="simulated: numbers of workers")
    arguments = parser.parse_args()
    # torch would take every core in every process.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    name, rounds = _MODULES[arguments.section]
    module = importlib.import_module(f"tests.bench.{name}")
    print(f"{arguments.section}:", file=sys.stderr)
    options = {}
    if arguments.section == "steady" and arguments.teachers:
        options["pool_sizes"] = tuple(arguments.teachers)
    if arguments.section == "simulated" and (arguments.teachers or arguments.students):
        options["grid"] = tuple(
            (teachers, students)
            for students in arguments.students or module.STUDENTS
            for teachers in arguments.teachers or module.TEACHERS
        )
    module.measure(arguments.rounds or rounds, **options)


if __name__ == "__main__":
    main()
