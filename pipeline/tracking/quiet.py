"""Imports mlflow without its usage statistics, progress bars, printed links and log output."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from typing import Any

_LOGGERS = ("mlflow", "alembic", "huey", "sqlalchemy.engine")
# Said about MLflow's own code (the last: about a real picture as JSON), so nothing that our users could act on.
_WARNINGS = (
    ("The ``noload`` loader strategy is deprecated", DeprecationWarning),
    (".*Any type hint is inferred as AnyType", UserWarning),
    (".*An input example was not provided", UserWarning),
)
_lock = threading.Lock()


def import_mlflow() -> Any:
    """The mlflow module, silenced.

    Settings become the defaults of MLflow's variables: what the user set in the environment wins,
    and nothing is left there for other processes to inherit.
    """
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    with _lock:
        is_first = "mlflow" not in sys.modules
        was_set = "MLFLOW_DISABLE_TELEMETRY" in os.environ
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read while importing
        try:
            import mlflow
            from mlflow import environment_variables as variables
        finally:
            if not was_set:
                os.environ.pop("MLFLOW_DISABLE_TELEMETRY", None)
        variables.MLFLOW_DISABLE_TELEMETRY.default = True
        variables.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.default = False
        variables.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.default = True
        variables.MLFLOW_UV_AUTO_DETECT.default = False  # a model's requirements are not those of the current folder
        variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.default = 0  # the sender does the waiting, and can be stopped
        if is_first:
            for name in _LOGGERS:  # importing gave each its own output to stderr
                logger = logging.getLogger(name)
                logger.handlers.clear()
                logger.propagate = True
                logger.setLevel(logging.WARNING)
    return mlflow
