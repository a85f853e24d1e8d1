"""``make demo``: a teacher, a student distilled from it, and the same student alone, on a bundled data set.

The distilled student takes the real path (Ray Data stream, teacher pool, Ray Train workers, MLflow); the
two networks that are trained on labels alone need no Ray, so they are trained in process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.report.tables import render_table

RUNS = Path("runs")
DEMO = "experiment=digits_demo"  # data, networks and schedule: conf/experiment/digits_demo.yaml


def run(command: str, name: str, *overrides: str) -> dict[str, object]:
    """Runs a command as a user would type it; a finished run is not repeated."""
    folder = RUNS / f"demo-{name}"
    arguments = [sys.executable, "-m", "pipeline", command, f"run.dir={folder}", *overrides]
    print(f"\n$ python -m pipeline {command} run.dir={folder} {' '.join(overrides)}", flush=True)
    if subprocess.run(arguments, check=False).returncode:
        sys.exit(f"demo: the command above failed; its folder is {folder}")
    result: dict[str, object] = json.loads((folder / "result.json").read_text())
    return result


def main() -> None:
    """Trains the three networks and prints the table."""
    started = time.monotonic()
    teacher = run("train-teacher", "teacher", DEMO, "cluster=inprocess")
    checkpoint = f"teacher.checkpoint={RUNS / 'demo-teacher'}"
    student = run("distill", "student", DEMO, checkpoint)
    alone = run("distill", "alone", DEMO, "loss=cross_entropy", "cluster=inprocess")

    rows = []
    for label, result in (("teacher", teacher), ("student, distilled", student), ("student alone", alone)):
        metrics = result["metrics"]
        scores = [metrics[f"test/{name}"] for name in ("top1", "nll", "ece")]  # type: ignore[index]
        rows.append([label, *scores, result["num_parameters"], result["samples_per_s"]])
    columns = ("network", "test accuracy", "NLL", "ECE", "parameters", "samples/s")
    print("\n" + render_table("digits, one seed each: a demonstration, not a comparison", columns, rows))
    mlflow = os.path.relpath(Path(sys.executable).parent / "mlflow")
    print(f"{time.monotonic() - started:.0f} s in all. Review the runs in MLflow:")
    print(f"  {mlflow} ui --backend-store-uri sqlite:///{RUNS / 'mlflow.db'}")
    print("and open http://127.0.0.1:5000")


if __name__ == "__main__":
    main()
