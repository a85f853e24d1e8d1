"""``train-teacher``: train the network of the group ``teacher`` on labels."""

from __future__ import annotations

from pipeline.config.request import Request
from pipeline.execution.training import run_training


def train_teacher(request: Request) -> int:
    """Returns the exit code; see ``pipeline.execution.training``."""
    return run_training(request, defaults=("loss=cross_entropy",))
