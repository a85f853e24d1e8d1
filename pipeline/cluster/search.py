"""Trials on Ray Tune: which runs where and how long; what they are is said by a board that the driver keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.search import ConcurrencyLimiter

from pipeline.cluster.preflight import cluster_capacity
from pipeline.cluster.ray_internals import (
    ENVIRONMENT_OF_TRIALS,
    ENVIRONMENT_OF_TUNE,
    Searcher,
    TrialScheduler,
    set_defaults,
)
from pipeline.cluster.team import Team
from pipeline.search import TrialTask
from pipeline.search.study import PastTrial

EPOCH, VALUE = "epoch", "value"
_UNJUDGED = "unjudged_value"  # schedulers pass over results without the value that they judge by
_LABEL = "label"
_MAX_RETURNS = 2  # a process that never starts is a failure

Report = Callable[[int, float], None]


class Board(Protocol):
    """Says which trials there are, and is told what comes of them; called from one thread."""

    def next_trial(self) -> TrialTask | Literal["wait"] | None:
        """The next trial; ``wait``: that depends on those that run; none: there is no further one."""
        ...

    def started(self, label: str) -> None: ...

    def reported(self, label: str, epoch: int, value: float) -> None: ...

    def retried(self, label: str) -> None:
        """Its process died; it is tried once more."""
        ...

    def ended(self, label: str, error: str | None) -> None:
        """It came to its end, was stopped early, or failed for good."""
        ...

    def ends(self, label: str, epoch: int) -> bool:
        """Whether a trial is to end at this evaluation, for a while or for good."""
        ...

    def returned(self, label: str) -> None:
        """It was not begun: the process that was to run it was still busy."""
        ...

    def must_stop(self) -> bool:
        """Whether the whole search is to end."""
        ...


@dataclass(frozen=True)
class TrialsPlan:
    """How trials are carried out.

    Attributes:
        bundle: resources of a worker.
        num_workers: of a trial.
        max_concurrent: most trials at a time.
        scheduler: which trials are stopped early.
        num_epochs: of a whole trial.
        mode: which way values are better.
        storage: a folder for what Tune writes.
    """

    bundle: dict[str, float]
    num_workers: int
    max_concurrent: int
    scheduler: Literal["none", "asha", "median"]
    num_epochs: int
    mode: Literal["max", "min"]
    storage: Path


def count_concurrent(bundle: Mapping[str, float], num_workers: int, limit: int | None, num_trials: int) -> int:
    """How many trials the cluster holds at a time, at least 1 and at most ``limit``."""
    capacity = cluster_capacity()
    held = [int(capacity.get(name, 0.0) / (amount * num_workers) + 1e-9) for name, amount in bundle.items() if amount]
    return max(1, min([*held, limit or num_trials, num_trials]))


def run_trials(
    function: Callable[[Any, TrialTask, Report, Team | None], None],
    inputs: Any,
    board: Board,
    plan: TrialsPlan,
    past: Iterable[PastTrial] = (),
) -> None:
    """Runs the board's trials to their end.

    Args:
        function: called in a trial's process with ``inputs``, the trial, a function that takes epoch and value of an
            evaluation and raises SystemExit where the trial is to end, and, where a trial has several workers, the
            others.
        inputs: the same for all trials; sent to each node once.
        past: trials of earlier starts, by which the scheduler judges too.
    """
    set_defaults(ENVIRONMENT_OF_TUNE)
    # A reference, which a trial passes on to its other workers.
    shared = {"function": function, "inputs": ray.put(inputs), "size": plan.num_workers, "bundle": plan.bundle}
    with_inputs = tune.with_parameters(_run_trial, shared=shared)
    bundles = [dict(plan.bundle)] * plan.num_workers
    trainable = tune.with_resources(with_inputs, tune.PlacementGroupFactory(bundles))
    searcher = ConcurrencyLimiter(_BoardSearcher(board), plan.max_concurrent)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_make_scheduler(plan, past),
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config[_LABEL],
            trial_name_creator=lambda trial: trial.config[_LABEL],
        ),
        run_config=tune.RunConfig(
            name=plan.storage.name,
            storage_path=str(plan.storage.parent),
            failure_config=tune.FailureConfig(max_failures=1),
            callbacks=[_BoardCallback(board, searcher)],
            stop=_BoardStopper(board),
            verbose=0,
        ),
    )
    tuner.fit()


def _run_trial(config: dict[str, Any], shared: dict[str, Any]) -> None:
    set_defaults(ENVIRONMENT_OF_TRIALS)
    task = TrialTask(**config)
    name = VALUE if task.judged else _UNJUDGED

    def report(epoch: int, value: float) -> None:
        tune.report({EPOCH: epoch, name: value})

    shared["function"](ray.get(shared["inputs"]), task, report, _find_team(shared))


_TEAMS: dict[Any, Team] = {}  # of this process, for the next trials in it


def _find_team(shared: dict[str, Any]) -> Team | None:
    if shared["size"] == 1:
        return None
    return _TEAMS.setdefault(shared["inputs"], Team(shared["size"], shared["bundle"], shared["inputs"]))


def _make_scheduler(plan: TrialsPlan, past: Iterable[PastTrial]) -> TrialScheduler:
    first = max(1, plan.num_epochs // 9)
    scheduler: TrialScheduler
    if plan.scheduler == "none" or plan.num_epochs < 2:
        return FIFOScheduler()
    if plan.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr=EPOCH, metric=VALUE, mode=plan.mode, max_t=plan.num_epochs, grace_period=first, reduction_factor=3
        )
    else:
        # A trial is stopped or goes on; pausing it would need a checkpoint that Tune knows of.
        scheduler = MedianStoppingRule(
            time_attr=EPOCH, metric=VALUE, mode=plan.mode, grace_period=first, min_time_slice=10**9
        )
    for trial in past:
        _replay(scheduler, trial)
    return scheduler


def _replay(scheduler: TrialScheduler, past: PastTrial) -> None:
    """A scheduler keeps nothing over a restart, so it sees the curves of earlier trials again."""
    if not past.curve:
        return
    trial: Any = _Past(past.label)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    for epoch, value in past.curve:
        scheduler.on_trial_result(None, trial, {EPOCH: epoch, VALUE: value})  # type: ignore[arg-type]


class _Past:
    """What schedulers ask of a trial."""

    def __init__(self, label: str) -> None:
        self.trial_id = label


class _AtBoard:
    """Tune pickles what it is given, to restore a search from; ours is resumed from the board's own files."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _BoardSearcher(_AtBoard, Searcher):
    """Gives Tune the board's trials."""

    def suggest(self, trial_id: str) -> Any:
        trial = None if self._board.must_stop() else self._board.next_trial()
        if trial is None:
            return Searcher.FINISHED
        return None if trial == "wait" else trial._asdict()

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        pass

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _BoardCallback(_AtBoard, tune.Callback):
    """Tells the board what Tune sees."""

    def __init__(self, board: Board, searcher: Searcher) -> None:
        super().__init__(board)
        self._searcher = searcher
        self._begun: set[str] = set()  # ids of trials
        self._told: set[str] = set()  # of those whose end the board knows
        self._num_returned: Counter[str] = Counter()  # by label

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        # Tune drops a trial without a word when the process that it wants to use again has not left the last one.
        for trial in trials:
            if trial.status == "ERROR" and trial.trial_id not in self._told:
                self._searcher.on_trial_complete(trial.trial_id, error=True)  # or it would count as running for ever
                self._return(trial)

    def _return(self, trial: Any) -> None:
        label = trial.config[_LABEL]
        self._told.add(trial.trial_id)
        self._num_returned[label] += 1
        self._board.returned(label)

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._begun.add(trial.trial_id)
        self._num_returned.pop(trial.config[_LABEL], None)
        self._board.started(trial.config[_LABEL])

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if EPOCH in result:
            value = result[VALUE] if VALUE in result else result[_UNJUDGED]
            self._board.reported(trial.config[_LABEL], int(result[EPOCH]), float(value))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if trial.trial_id in self._begun:
            self._board.retried(trial.config[_LABEL])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._told.add(trial.trial_id)
        self._board.ended(trial.config[_LABEL], None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        # An idle process that was lost unseen takes the trial with it that was to be its next.
        if trial.trial_id not in self._begun and self._num_returned[trial.config[_LABEL]] < _MAX_RETURNS:
            self._return(trial)
            return
        self._told.add(trial.trial_id)
        self._board.ended(trial.config[_LABEL], _last_line(trial))


def _last_line(trial: Any) -> str:
    file = trial.error_file
    try:
        text = Path(file).read_text() if file else ""
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its process died"


class _BoardStopper(_AtBoard, tune.Stopper):
    """Ends the whole search when the board says so."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._board.ends(result["config"][_LABEL], result.get(EPOCH, 0))

    def stop_all(self) -> bool:
        return self._board.must_stop()
