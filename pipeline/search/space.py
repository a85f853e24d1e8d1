"""A search space: axes by the path of a configuration key, some of them only under one option of another."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.search.axes import Axis, Branch, Chooser, Draw, Number, Value
from pipeline.search.reading import parse_axes


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
        axes = tuple(parse_axes(raw))
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
