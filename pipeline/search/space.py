"""A search space: axes by the path of a configuration key, some of them only under one option of another."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError, model_validator

from pipeline.registry import Params

Value = bool | int | float | str
Draw = dict[str, Value]
"""Name of an axis to the value that a trial has on it; axes of options that were not taken are absent."""

_KEY = "distribution"


class _NumberSpec(Params):
    """A number from ``low`` to ``high``, both included; ``integer``: a whole one."""

    distribution: Literal["uniform", "loguniform", "integer"]
    low: float
    high: float
    step: float | None = Field(default=None, gt=0)
    """``uniform`` and ``integer``: only ``low``, ``low + step``, ... are drawn."""
    points: int = Field(default=5, ge=2)
    """Values of it in a grid search."""

    @model_validator(mode="after")
    def _check_range(self) -> _NumberSpec:
        if self.low >= self.high:
            raise ValueError(f"expected low below high, got low {self.low:g} and high {self.high:g}")
        if self.distribution == "loguniform" and self.low <= 0:
            raise ValueError(f"loguniform expects low above 0, got {self.low:g}")
        if self.distribution == "loguniform" and self.step is not None:
            raise ValueError("loguniform has no step; leave it out, or use uniform")
        if self.distribution == "integer" and any(
            number is not None and number != int(number) for number in (self.low, self.high, self.step)
        ):
            raise ValueError("integer expects whole numbers for low, high and step")
        return self


class _ChoiceSpec(Params):
    """One of several values; or, with keys, one choice of a configuration group, each with axes of its own."""

    distribution: Literal["choice"]
    options: tuple[Value, ...] | dict[str, dict[str, Any] | None] = Field(min_length=1)


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


@dataclass(frozen=True)
class Space:
    """All axes of a search.

    Attributes:
        axes: those that every trial has.
    """

    axes: tuple[Axis, ...]

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Space:
        """Reads ``{"loss": {"temperature": {"distribution": "uniform", "low": 1, "high": 8}}}``.

        Raises:
            ValueError: a sentence with the path of what is wrong.
        """
        axes = tuple(_parse(raw, "", ""))
        if not axes:
            raise ValueError("expected at least one key with a distribution, got none")
        return cls(axes)

    def draw(self, chooser: Chooser) -> Draw:
        """One point of the space, axis by axis."""
        draw: Draw = {}
        _choose(self.axes, chooser, draw)
        return draw

    def all_axes(self) -> Iterator[Axis]:
        """Every axis, those of all options included."""
        yield from _walk(self.axes)

    def assignments(self, draw: Draw) -> Iterator[tuple[Axis, Value]]:
        """The axes that a draw is on, the choice of an option before what depends on it."""
        yield from _assignments(self.axes, draw)

    def probes(self) -> Iterator[Draw]:
        """Both ends of every axis, and every option, with the other axes in their middle."""
        for draw in _probes(self.axes):
            yield dict(draw)

    def grid(self) -> list[Draw]:
        """Every combination of every axis's grid."""
        return [dict(draw) for draw in _grid(self.axes)]

    def project(self, values: Mapping[str, Any]) -> Draw:
        """The draw that has these values of configuration keys, by path; axes whose value is not there are absent.

        Raises:
            ValueError: a value lies outside its axis, or a key is no axis.
        """
        draw: Draw = {}
        used = set(_project(self.axes, values, draw))
        if unknown := sorted(values.keys() - used):
            known = ", ".join(dict.fromkeys(axis.path for axis in self.all_axes()))
            raise ValueError(f"{unknown[0]}: no axis of the space, which has {known}")
        return draw


class RandomChooser:
    """Independent draws from each axis's own distribution."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, axis: Axis) -> Value:
        if not isinstance(axis, Number):
            return self._random.choice(axis.grid)
        if axis.step is not None:
            return axis.cast(axis.low + axis.step * self._random.randint(0, round((axis.high - axis.low) / axis.step)))
        if axis.log:
            drawn = math.exp(self._random.uniform(math.log(axis.low), math.log(axis.high)))
            return min(max(drawn, axis.low), axis.high)
        return self._random.uniform(axis.low, axis.high)


def flatten_start(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"loss": {"name": "kd", "temperature": 4}}`` to ``{"loss": "kd", "loss.temperature": 4}``."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten_start(value, f"{path}.")
        elif key == "name" and prefix:
            flat[prefix.removesuffix(".")] = value
        elif isinstance(value, list | tuple):
            flat |= {f"{path}.{index}": item for index, item in enumerate(value)}
        else:
            flat[path] = value
    return flat


# --- reading ------------------------------------------------------------------------------------------------------


def _parse(raw: Mapping[str, Any], path: str, condition: str) -> Iterator[Axis]:
    for key, value in raw.items():
        place = f"{path}.{key}" if path else str(key)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{place}: expected a distribution, as in {{distribution: uniform, low: 0, high: 1}}, "
                f"got {value!r}; a value that does not vary belongs in the configuration"
            )
        if _KEY in value:
            yield _parse_axis(value, place, condition)
        else:
            yield from _parse(value, place, condition)


def _parse_axis(raw: Mapping[str, Any], path: str, condition: str) -> Axis:
    kinds = ("uniform", "loguniform", "integer", "choice")
    if raw[_KEY] not in kinds:
        raise ValueError(f"{path}.distribution: expected one of {', '.join(kinds)}, got {raw[_KEY]!r}")
    name = f"{condition}: {path}" if condition else path
    model: type[Params] = _ChoiceSpec if raw[_KEY] == "choice" else _NumberSpec
    try:
        spec = model.model_validate(dict(raw))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in detail["loc"] if part in raw or part in model.model_fields)
        text = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
        raise ValueError(f"{path}{'.' if where else ''}{where}: {text}") from None
    if isinstance(spec, _NumberSpec):
        kind = spec.distribution
        step = spec.step or (1 if kind == "integer" else None)
        # The last value of a step is the end: nothing beyond it is ever drawn.
        high = spec.high
        if step is not None:
            low, width = Decimal(str(spec.low)), Decimal(str(step))  # 3 x 0.3 is 0.9, which binary fractions miss
            high = float(low + (Decimal(str(spec.high)) - low) // width * width)
        return Number(name, path, spec.low, high, kind == "loguniform", kind == "integer", step, spec.points)
    assert isinstance(spec, _ChoiceSpec)
    if isinstance(spec.options, dict):
        if condition:
            raise ValueError(f"{path}: a choice with axes of its own cannot stand under another one ({condition})")
        options = {option: tuple(_parse(axes or {}, path, f"{path}={option}")) for option, axes in spec.options.items()}
        return Branch(name, path, options)
    return Choice(name, path, spec.options)


# --- going over the axes ------------------------------------------------------------------------------------------


def _walk(axes: Sequence[Axis]) -> Iterator[Axis]:
    for axis in axes:
        yield axis
        if isinstance(axis, Branch):
            for option in axis.options.values():
                yield from _walk(option)


def _choose(axes: Sequence[Axis], chooser: Chooser, draw: Draw) -> None:
    for axis in axes:
        draw[axis.name] = chooser.choose(axis)
        if isinstance(axis, Branch):
            _choose(axis.options[str(draw[axis.name])], chooser, draw)


def _assignments(axes: Sequence[Axis], draw: Draw) -> Iterator[tuple[Axis, Value]]:
    for axis in axes:
        yield axis, draw[axis.name]
        if isinstance(axis, Branch):
            yield from _assignments(axis.options[str(draw[axis.name])], draw)


def _middles(axes: Sequence[Axis]) -> Draw:
    draw: Draw = {}
    for axis in axes:
        draw[axis.name] = axis.middle
        if isinstance(axis, Branch):
            draw |= _middles(axis.options[str(axis.middle)])
    return draw


def _probes(axes: Sequence[Axis]) -> Iterator[Draw]:
    rest = _middles(axes)
    yield rest
    for axis in axes:
        if isinstance(axis, Branch):
            others = _middles([other for other in axes if other is not axis])
            for option, below in axis.options.items():
                for draw in _probes(below):
                    yield {**others, axis.name: option, **draw}
        else:
            ends = [axis.cast(axis.low), axis.cast(axis.high)] if isinstance(axis, Number) else axis.grid
            yield from ({**rest, axis.name: end} for end in ends)


def _grid(axes: Sequence[Axis]) -> list[Draw]:
    columns: list[list[Draw]] = []
    for axis in axes:
        if isinstance(axis, Branch):
            columns.append(
                [{axis.name: option, **draw} for option, below in axis.options.items() for draw in _grid(below)]
            )
        else:
            columns.append([{axis.name: value} for value in axis.grid])
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*columns)]


def _project(axes: Sequence[Axis], values: Mapping[str, Any], draw: Draw) -> Iterator[str]:
    for axis in axes:
        if axis.path not in values:
            continue
        value = values[axis.path]
        if isinstance(axis, Number) and isinstance(value, int) and not isinstance(value, bool):
            value = axis.cast(value)
        if not axis.admits(value):
            raise ValueError(f"{axis.path}: {value!r} is not within {axis.show()}")
        draw[axis.name] = value
        yield axis.path
        if isinstance(axis, Branch):
            yield from _project(axis.options[value], values, draw)


def _spread(count: int, points: int) -> list[int]:
    return [round(index * (count - 1) / (points - 1)) for index in range(points)]
