"""Schedules: numbers of a loss that change during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.registry import Params


class Schedule(Params):
    """How a number goes from the value that the loss has to another one, by the share of training that is done."""

    to: float = Field(allow_inf_nan=False)
    """The value at the end."""
    begin: float = Field(default=0.0, ge=0, le=1)
    """Share of training before which nothing changes."""
    end: float = Field(default=1.0, ge=0, le=1)
    """Share of training after which it stays at ``to``."""
    shape: Literal["linear", "cosine"] = "linear"
    """How it gets there: in a straight line, or by half a cosine, slowly at both ends."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin={self.begin:g} must be before end={self.end:g}; both are shares of training")
        return self

    def value(self, start: float, progress: float) -> float:
        """The number after a share ``progress`` of training, ``start`` at the beginning."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + (self.to - start) * share


def check_schedules(params: Params, schedules: Mapping[str, Schedule]) -> None:
    """Refuses schedules of what is no number of ``params``, or that lead out of its range; ValueError."""
    known = [key for key, field in type(params).model_fields.items() if field.annotation is float]
    for key, schedule in schedules.items():
        if key not in known:
            raise ValueError(f"schedule.{key}: expected one of {', '.join(known) or 'no key at all'}")
        # The range of a number has no gaps, so what is right at both ends is right between them.
        values = {**params.model_dump(), "schedule": {}, key: schedule.to}
        try:
            type(params).model_validate(values)
        except ValidationError as error:
            for problem in error.errors():
                if problem["loc"] == (key,):
                    raise ValueError(f"schedule.{key}.to={schedule.to:g}: {problem['msg']}") from None
