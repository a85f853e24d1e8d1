"""Parameters of a search."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.registry import Params
from pipeline.search.space import Space


class ConfirmParams(Params):
    """The best trials are trained again, so that what was lucky once does not win."""

    top: int = Field(default=3, ge=1)
    """How many of the best trials; the configuration that the search began from is trained beside them."""
    seeds: int = Field(default=3, ge=1)
    """Fresh seeds of each."""


class SearchParams(Params):
    """What a search varies, how it chooses, and when it stops."""

    space: dict[str, Any]
    """Distributions at the paths of configuration keys below ``loss``, ``student`` and ``train``."""
    start: tuple[dict[str, Any], ...] = ()
    """Points to begin with, after the configuration itself; what a point leaves out is drawn."""
    start_from_selection: bool = False
    """Also begin with the coefficients that select-perturbation chooses (axes ``loss.perturbation.0`` and so on)."""
    options: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """What the choices of a group in ``space`` begin with; filled in from the files of the group."""
    num_trials: int = Field(default=16, ge=1)
    """Points that are tried; a grid tries all of its own. With ``resume=``, ``+N`` adds N."""
    time_budget_s: float | None = Field(default=None, gt=0)
    """Seconds after which, in each start of the command, no trial is begun and those that run end at their next
    evaluation; the best are then confirmed. None: no limit."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Most trials at a time; none: as many as the cluster holds."""
    metric: str = "val/top1"
    """What trials are compared by, that of the checkpoint each would keep; validation only."""
    mode: Literal["max", "min"] | None = None
    """Which way is better; none: as the metric says."""
    searcher: Literal["random", "grid", "optuna"] = "optuna"
    """How points are chosen: ``optuna``, a tree-structured Parzen estimator; ``random``; ``grid``, every
    combination."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "asha"
    """Which trials are stopped early: ``asha``: those below the best third after a ninth and a third of the epochs;
    ``median``: those below the median of the others' averages; ``pbt``: after each ninth of the epochs (at
    least one) the worst quarter, in whose place changed copies of the best go on; ``none``: none."""
    confirm: ConfirmParams = ConfirmParams()
    """How the best trials are trained again."""

    @field_validator("space")
    @classmethod
    def _check_space(cls, value: dict[str, Any]) -> dict[str, Any]:
        Space.parse(value)
        return value
