"""Trials that are over, as Optuna keeps them: what its samplers learn from and its charts draw."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.search.axes import Axis, Draw, Number
from pipeline.search.space import Space

STUDY = "search"


@dataclass(frozen=True)
class PastTrial:
    """A trial that is over.

    Attributes:
        value: none: it failed.
        curve: (epoch, value) of every evaluation.
        pruned: whether it was stopped early.
    """

    label: str
    draw: Draw
    value: float | None
    curve: tuple[tuple[int, float], ...] = ()
    pruned: bool = False


def make_study(
    space: Space, past: Sequence[PastTrial], mode: Literal["max", "min"]
) -> tuple[optuna.Study, optuna.storages.InMemoryStorage]:
    """A study in memory with these trials, in their order; its name is ``STUDY``."""
    optuna.logging.set_verbosity(logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    direction = optuna.study.StudyDirection.MAXIMIZE if mode == "max" else optuna.study.StudyDirection.MINIMIZE
    study = optuna.create_study(storage=storage, study_name=STUDY, direction=direction)
    study.add_trials([freeze(space, trial) for trial in past])
    return study, storage


def freeze(space: Space, trial: PastTrial) -> FrozenTrial:
    """A trial that is over, in Optuna's terms."""
    used: Mapping[str, Axis] = {axis.name: axis for axis, _ in space.assignments(trial.draw)}
    ended = TrialState.PRUNED if trial.pruned else TrialState.COMPLETE
    return create_trial(
        state=TrialState.FAIL if trial.value is None else ended,
        value=trial.value,
        params=dict(trial.draw),
        distributions={name: _distribution(axis) for name, axis in used.items()},
        intermediate_values=dict(trial.curve),
    )


def _distribution(axis: Axis) -> BaseDistribution:
    if not isinstance(axis, Number):
        return CategoricalDistribution(tuple(axis.grid))
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)
