"""``result.json``: what a command leaves for other programs to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.stored import RunStatus, read_json, write_text


def write_result(
    path: Path,
    run_dir: Path,
    config_hash: str,
    status: RunStatus,
    metrics: Mapping[str, float],
    extra: Mapping[str, Any],
) -> None:
    """Writes a ``result.json``.

    Args:
        metrics: by full name (``val/top1``); not-a-number and infinity become null.
        extra: further keys.
    """
    result = {
        "status": status,
        "run_dir": str(run_dir),
        "mlflow_run_id": read_run_id(run_dir),
        "config_hash": config_hash,
        "metrics": dict(metrics),
        **extra,
    }
    write_json(path, result)


def read_run_id(run_dir: Path) -> str | None:
    """MLflow's id of a run; none before it has one."""
    path = run_dir / "tracking.json"
    return read_json(path).get("run_id") if path.exists() else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file of a run folder so that a reader finds it whole; not-a-number and infinity become null."""
    write_text(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
