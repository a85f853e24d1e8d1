"""Drawing the points of a search: Ray Tune's OptunaSearch, told again what earlier starts have found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import optuna

from pipeline.cluster.ray_internals import OptunaSearch
from pipeline.search import Axis, Draw, Number, Space, Value
from pipeline.search.study import STUDY, PastTrial, freeze, make_study

_VALUE = "value"
_START_UP = 10  # draws before the sampler learns from what it sees: Optuna's own default


class Sampler:
    """Draws points of a space, knowing what came of the earlier ones.

    Args:
        kind: ``optuna``: a tree-structured Parzen estimator that keeps to the conditions of the space; otherwise
            independent draws (a grid has its points as ``start``).
        mode: which way values are better.
        start: points to begin with; what a point leaves out is drawn.
        past: of earlier starts, in order.
        num_drawn: by earlier starts, those that are not over included.
    """

    def __init__(
        self,
        space: Space,
        kind: Literal["random", "grid", "optuna"],
        mode: Literal["max", "min"],
        seed: int,
        start: Sequence[Draw] = (),
        past: Sequence[PastTrial] = (),
        num_drawn: int = 0,
    ) -> None:
        self._space = space
        # A sampler that began at the same seed again would draw the same points again.
        seed = (seed * 1_000_003 + num_drawn) % 2**31
        sampler: optuna.samplers.BaseSampler
        if kind == "optuna":
            # One group for each condition; a point that is being tried is no good place for the next.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # these options may change in a later Optuna; the lock file pins it
                sampler = optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=_START_UP
                )
        else:
            sampler = optuna.samplers.RandomSampler(seed=seed)
        self._study, storage = make_study(space, past, mode)
        self._asked: set[str] = set()
        self._search = OptunaSearch(
            self._suggest,
            metric=_VALUE,
            mode=mode,
            points_to_evaluate=[dict(point) for point in start] or None,
            sampler=sampler,
            storage=storage,
            study_name=STUDY,
        )

    def ask(self, label: str) -> Draw:
        """The next point, for the trial of this name."""
        self._asked.add(label)
        return dict(self._search.suggest(label) or {})

    def tell(self, label: str, draw: Draw, value: float | None) -> None:
        """What came of a point; none: its trial failed."""
        if label not in self._asked:  # an earlier start asked for it
            self._study.add_trial(freeze(self._space, PastTrial(label, draw, value)))
            return
        result = None if value is None else {_VALUE: value}
        self._search.on_trial_complete(label, result, error=value is None)

    def _suggest(self, trial: Any) -> None:
        self._space.draw(_OptunaChooser(trial))


class _OptunaChooser:
    """Asks Optuna, axis by axis."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def choose(self, axis: Axis) -> Value:
        found: Value
        if not isinstance(axis, Number):
            found = self._trial.suggest_categorical(axis.name, axis.grid)
        elif axis.integer:
            found = self._trial.suggest_int(axis.name, int(axis.low), int(axis.high), step=int(axis.step or 1))
        else:
            found = self._trial.suggest_float(axis.name, axis.low, axis.high, step=axis.step, log=axis.log)
        return found
