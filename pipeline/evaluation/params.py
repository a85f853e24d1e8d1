"""Parameters of evaluation."""

from __future__ import annotations

from pydantic import Field

from pipeline.registry import Params


class EvaluationParams(Params):
    """How a network is evaluated."""

    test: bool = True
    """Evaluate the kept checkpoint once on the test split, when training is over."""
    batch_size: int = Field(default=256, ge=1)
    """Rows of one forward pass on validation and test."""
