"""``distill``: train a student from a teacher, or on labels alone."""

from __future__ import annotations

from pipeline.config.request import Request
from pipeline.execution.training import run_training


def distill(request: Request) -> int:
    """Returns the exit code; see ``pipeline.execution.training``."""
    return run_training(request)
