"""Whether a model can be loaded where nothing is but the model, and says there what it says here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.contracts.own_code import CODE_FOLDER, list_files
from pipeline.errors import ModelError
from pipeline.tracking import fresh
from pipeline.tracking.model import save_pyfunc

_TIMEOUT_S = 600.0
_TOLERANCE = 1e-4  # of a probability: sums in another order, but no other network
_NAMED = 4


def check_loads(folder: Path, inputs: np.ndarray, expected: np.ndarray) -> None:
    """Loads the model of ``folder`` as MLflow does, in a fresh process and an empty folder, and asks it.

    Args:
        folder: holds ``model.safetensors``, ``model.json`` and the user's modules in ``code/``.
        inputs: a few rows, as the network takes them.
        expected: probabilities, float32 (rows, num_classes), that the network gives here.

    Raises:
        ModelError: it cannot be loaded there, or says something else.
    """
    modules = list(list_files(folder / CODE_FOLDER))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "empty").mkdir()
        save_pyfunc(place / "model", folder)
        np.save(place / "inputs.npy", inputs)
        reason = _ask(place, modules)
        if reason:
            raise ModelError(
                f"the network of your own cannot be loaded from its model alone ({reason}): with it go the modules "
                f"that import statements name, here {_show(modules)}, and nothing else; import what is missing by its "
                "name from beside them, install it as a package, or put data into kwargs or a module."
            )
        found: np.ndarray = np.load(place / "outputs.npy")
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not difference <= _TOLERANCE:
        raise ModelError(
            "the network of your own gives other probabilities once it is loaded from its model alone (by up to "
            f"{difference:.2g} in {len(inputs)} rows): let it depend on its weights and kwargs only; keep what else it "
            "computes with in parameters or buffers, and chance in training."
        )


def _ask(place: Path, modules: list[str]) -> str:
    """Runs the fresh process; returns why it has no answer, empty where it has one."""
    files = [str(place / name) for name in ("model", "inputs.npy", "outputs.npy", "reason.txt")]
    command = [sys.executable, "-P", fresh.__file__, *files]
    try:
        ended = subprocess.run(
            command, cwd=place / "empty", env=_environment(modules), capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {_TIMEOUT_S:g} s"
    if ended.returncode == 0:
        return ""
    told = place / "reason.txt"
    last_line = (ended.stderr.strip().splitlines() or ["no word"])[-1]
    return told.read_text(encoding="utf-8") if told.exists() else f"exit code {ended.returncode}: {last_line}"


def _environment(modules: list[str]) -> dict[str, str]:
    """This one's, without the folders in which Python would find the user's modules where they come from."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [entry for entry in given if entry and not any(Path(entry, module).is_file() for module in modules)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(others), "MLFLOW_DISABLE_TELEMETRY": "true"}


def _show(modules: list[str]) -> str:
    more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
    return ", ".join(modules[:_NAMED]) + more or "none"
