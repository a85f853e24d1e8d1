"""Several losses at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, field_validator
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.losses.cross_entropy import label_term
from pipeline.losses.objective import LOSSES, LossParams, Signals, TeacherNeed, Term
from pipeline.losses.perturbation import Perturbation

# Validated like what is given.
_DEFAULT_PARTS: Any = {"kd": {}, "cmkd": {}}


@LOSSES.register
class CombinedParams(LossParams):
    """The sum of several losses, each by its name with its own parameters and weights.

    ``loss=combined 'loss.parts={kd: {temperature: 2}, cmkd: {}}'``. The cross-entropy with the labels belongs to the
    whole: that of the parts is off unless a part sets its ``ce_weight``.
    """

    name: Literal["combined"] = "combined"
    parts: dict[str, SerializeAsAny[LossParams]] = Field(default=_DEFAULT_PARTS)
    """Name of a loss to its parameters, as in ``conf/loss``."""
    ce_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy with the labels; 0: no labels are needed, but for what a part needs."""

    @field_validator("parts", mode="before")
    @classmethod
    def _build_parts(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"expected at least one loss by name, as in {{kd: {{}}, cmkd: {{}}}}, got {value!r}")
        return {name: _build_part(name, values) for name, values in value.items()}

    @property
    def needs(self) -> frozenset[TeacherNeed]:
        return frozenset().union(*(part.needs for part in self.parts.values()))

    @property
    def topk_temperatures(self) -> frozenset[float]:
        return frozenset().union(*(part.topk_temperatures for part in self.parts.values()))

    @property
    def couples_batch(self) -> bool:
        return any(part.couples_batch for part in self.parts.values())

    @property
    def wants_perturbation(self) -> bool:
        return any(part.wants_perturbation for part in self.parts.values())

    def with_perturbation(self, perturbation: Perturbation) -> Self:
        parts = {name: part.with_perturbation(perturbation) for name, part in self.parts.items()}
        return self.model_copy(update={"parts": parts})

    @property
    def changes(self) -> bool:
        return bool(self.schedule) or any(part.changes for part in self.parts.values())

    def scheduled(self, progress: float) -> dict[str, float]:
        own = super().scheduled(progress)
        for name, part in self.parts.items():
            own |= {f"{name}/{key}": value for key, value in part.scheduled(progress).items()}
        return own

    def at(self, progress: float) -> Self:
        parts = {name: part.at(progress) for name, part in self.parts.items()}
        return self.model_copy(update={**super().scheduled(progress), "parts": parts})

    def terms(self) -> tuple[Term, ...]:
        def ce(signals: Signals) -> Tensor:
            return label_term(signals, "ce")

        terms = [_prefix(name, term) for name, part in self.parts.items() for term in part.terms()]
        return *terms, Term("ce", self.ce_weight, ce, labels="pair")


def _build_part(name: str, values: Any) -> LossParams:
    if isinstance(values, LossParams):
        return values
    try:
        params = LOSSES.get(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if params is CombinedParams:
        raise ValueError("combined cannot be a part of itself: name its parts side by side")
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: expected the parameters of a loss, {{}} for its defaults, got {values!r}")
    own_labels = {"ce_weight": 0.0} if "ce_weight" in params.model_fields else {}
    try:
        return params.model_validate_json(json.dumps({**own_labels, **values}), strict=True)
    except ValidationError as error:
        problems = (".".join(map(str, (name, *problem["loc"]))) + f": {problem['msg']}" for problem in error.errors())
        raise ValueError("; ".join(problems)) from None


def _prefix(name: str, term: Term) -> Term:
    """The term under a name that no other part has."""
    diagnostics = None if term.diagnostics is None else partial(_diagnose, name, term.diagnostics)
    return Term(f"{name}/{term.name}", term.weight, term.function, term.labels, diagnostics)


def _diagnose(name: str, diagnostics: Any, signals: Signals) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in diagnostics(signals).items()}
