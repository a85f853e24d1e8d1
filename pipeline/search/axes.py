"""Axes of a search space, each at the path of a configuration key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Value = bool | int | float | str
Draw = dict[str, Value]
"""Name of an axis to the value that a trial has on it; axes of options that were not taken are absent."""


@dataclass(frozen=True)
class Number:
    """A numeric axis.

    Attributes:
        name: its path, with the option that it depends on in front.
        path: of the configuration key.
        points: values in a grid search.
    """

    name: str
    path: str
    low: float
    high: float
    log: bool
    integer: bool
    step: float | None
    points: int

    @property
    def middle(self) -> Value:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return self.nearest(middle)

    @property
    def grid(self) -> list[Value]:
        """``points`` values at equal distances, ends included, or every value where there are no more than that."""
        step = self.step
        if step is not None:
            count = round((self.high - self.low) / step) + 1
            chosen = range(count) if count <= self.points else _spread(count, self.points)
            return [self.cast(self.low + index * step) for index in chosen]
        shares = [index / (self.points - 1) for index in range(self.points)]
        if self.log:
            return [min(self.low * (self.high / self.low) ** share, self.high) for share in shares]
        return [self.low + (self.high - self.low) * share for share in shares]

    def cast(self, value: float) -> int | float:
        return round(value) if self.integer else float(value)

    def admits(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose(self.nearest(value), value, rel_tol=1e-9, abs_tol=1e-12)

    def nearest(self, value: float) -> int | float:
        """The value of the axis that is closest; the lower of two."""
        value = min(max(value, self.low), self.high)
        if self.step is not None:
            value = self.low + self.step * math.ceil((value - self.low) / self.step - 0.5 - 1e-9)
        return self.cast(value)

    def show(self) -> str:
        kind = "integer" if self.integer else "loguniform" if self.log else "uniform"
        step = f" by {self.step:g}" if self.step is not None and not (self.integer and self.step == 1) else ""
        return f"{kind} {self.low:g} to {self.high:g}{step}"


@dataclass(frozen=True)
class Choice:
    """An axis with a few values."""

    name: str
    path: str
    options: tuple[Value, ...]

    @property
    def middle(self) -> Value:
        return self.options[0]

    @property
    def grid(self) -> list[Value]:
        return list(self.options)

    def admits(self, value: Any) -> bool:
        return any(value == option and type(value) is type(option) for option in self.options)

    def show(self) -> str:
        return f"one of {', '.join(str(option) for option in self.options)}"


@dataclass(frozen=True)
class Branch:
    """A choice of a configuration group; each option brings axes of its own.

    Attributes:
        path: the group, such as ``loss``.
        options: name of a choice to its axes.
    """

    name: str
    path: str
    options: Mapping[str, tuple[Axis, ...]]

    @property
    def middle(self) -> Value:
        return next(iter(self.options))

    @property
    def grid(self) -> list[Value]:
        return list(self.options)

    def admits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.options

    def show(self) -> str:
        return f"one of {', '.join(self.options)}"


Axis = Number | Choice | Branch


class Chooser(Protocol):
    """Who says what a trial has on an axis."""

    def choose(self, axis: Axis) -> Value: ...


def _spread(count: int, points: int) -> list[int]:
    return [round(index * (count - 1) / (points - 1)) for index in range(points)]
