"""Loads a model of MLflow's and asks it: a script for a process of its own, which has nothing of ours but the model.

    python -P fresh.py MODEL INPUTS.npy OUTPUTS.npy REASON.txt

REASON.txt says why, where there are no outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def ask(model: str, inputs: str, outputs: str) -> None:
    """Writes what the model says of ``inputs``."""
    import mlflow.pyfunc

    np.save(outputs, mlflow.pyfunc.load_model(model).predict(np.load(inputs)))


def find_reason(error: BaseException) -> str:
    """What an error comes of: its type, and the first line of what it says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": .")


if __name__ == "__main__":
    try:
        ask(*sys.argv[1:4])
    except Exception as error:
        Path(sys.argv[4]).write_text(find_reason(error), encoding="utf-8")
        raise
