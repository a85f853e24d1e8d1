"""Checks every path of the product that runs on a GPU, and says how fast it is.

    python -m tests.gpu [--only losses,rates] [--device cpu] [--budget-s 480] [--out runs/gpu.json]

Each check prints a line when it ends, and its figures are in the file from then on. None can stop the others. The exit
code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gpu.registry import Check, choose
from tests.gpu.worker import Outcome, Worker

_LEAST_S = 3.0  # with less time left no check is begun


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        worker = Worker(options.device, Path(folder))
        try:
            worker.start()
            chosen = choose(worker.checks, options.only.split(","))
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        else:
            if options.list:
                width = max(len(one.name) for one in chosen)
                print("\n".join(f"{one.name:<{width}}  {one.summary}" for one in chosen))
                return 0
            return carry_out(chosen, worker, options.device, began + options.budget_s, options.out)
        finally:
            worker.end()


def carry_out(checks: Sequence[Check], worker: Worker, device: str, deadline: float, out: Path) -> int:
    """Makes the checks in their order; returns the exit code.

    Args:
        worker: started.
        deadline: of ``time.monotonic``; those that are not made by then are listed as not reached.
        out: file for the figures, replaced after every check.
    """
    began, machine = time.monotonic(), worker.machine
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    outcomes: dict[str, Outcome] = {}
    width = max(len(one.name) for one in checks)
    for one in checks:
        outcome = _make(one, worker, device, deadline - time.monotonic())
        outcomes[one.name] = outcome
        seconds = f"{outcome.seconds:6.1f} s" if outcome.seconds else " " * 8
        print(f"{one.name:<{width}}  {outcome.state:<11}{seconds}  {_show(outcome)}", flush=True)
        _write(out, machine, device, outcomes)
    counts = Counter(outcome.state for outcome in outcomes.values())
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"{summary}; {time.monotonic() - began:.0f} s; figures in {out}", flush=True)
    return 1 if counts["failed"] else 0


def _make(check: Check, worker: Worker, device: str, left_s: float) -> Outcome:
    if device == "cuda" and "gpu" not in worker.machine:
        return Outcome("skipped", reason="torch finds no CUDA on this machine")
    if device == "cpu" and not check.on_cpu:
        return Outcome("skipped", reason="it is about CUDA alone")
    if left_s < _LEAST_S:
        return Outcome("not reached", reason="the time was up")
    outcome = worker.make(check, min(check.limit_s, left_s))
    if outcome.state == "failed" and outcome.seconds >= left_s:
        return Outcome("not reached", outcome.seconds, reason="the time was up before it had ended")
    return outcome


def _show(outcome: Outcome) -> str:
    def show(value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"

    return outcome.reason or ", ".join(f"{name} {show(value)}" for name, value in outcome.figures.items())


def _write(out: Path, machine: dict[str, Any], device: str, outcomes: dict[str, Outcome]) -> None:
    content = {
        "machine": machine,
        "device": device,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checks": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="NAMES", help="checks whose names begin so, separated by commas")
    parser.add_argument("--list", action="store_true", help="say which checks there are, and make none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same at tiny sizes")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for all checks together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="file for the figures")
    return parser.parse_args(arguments)
