"""Reading a search space out of what a file says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.registry import Params
from pipeline.search.axes import Axis, Branch, Choice, Number, Value

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
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"expected a step of at most {self.high - self.low:g}, high less low, got {self.step:g}")
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

    @model_validator(mode="after")
    def _check_options(self) -> _ChoiceSpec:
        seen = [(type(option), option) for option in self.options]
        if len(set(seen)) < len(seen):
            raise ValueError("two options are the same; leave one out")
        return self


def parse_axes(raw: Mapping[str, Any], path: str = "", condition: str = "") -> Iterator[Axis]:
    """The axes below ``path``.

    Args:
        condition: the option that they depend on, as in ``loss=kd``; empty: none.

    Raises:
        ValueError: a sentence with the path of what is wrong.
    """
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
            yield from parse_axes(value, place, condition)


def _parse_axis(raw: Mapping[str, Any], path: str, condition: str) -> Axis:
    kinds = ("uniform", "loguniform", "integer", "choice")
    if raw[_KEY] not in kinds:
        raise ValueError(f"{path}.distribution: expected one of {', '.join(kinds)}, got {raw[_KEY]!r}")
    name = f"{condition}: {path}" if condition else path
    model: type[Params] = _ChoiceSpec if raw[_KEY] == "choice" else _NumberSpec
    try:
        spec = model.model_validate_json(json.dumps(dict(raw)), strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join([name, *(str(part) for part in detail["loc"] if part in raw or part in model.model_fields)])
        texts = {
            "extra_forbidden": f"unknown key; known here: {', '.join(model.model_fields)}",
            "missing": "must be given",
            "value_error": str(detail.get("ctx", {}).get("error")),
        }
        raise ValueError(f"{where}: {texts.get(detail['type'], detail['msg'])}") from None
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
        options = {
            option: tuple(parse_axes(axes or {}, path, f"{path}={option}")) for option, axes in spec.options.items()
        }
        return Branch(name, path, options)
    return Choice(name, path, spec.options)
