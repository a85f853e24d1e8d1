"""Which trial of a search is next, and what became of each: what Ray Tune asks and tells."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.stored import read_json
from pipeline.contracts.events import Event, Journal
from pipeline.search import TrialTask
from pipeline.trials.population import Population, checkpoint_of_copy
from pipeline.trials.records import Trial, trial_folder

FAILED_SHARE = 1 / 3  # of the trials of a search, which ends it


@dataclass
class TrialBoard:
    """What Tune asks and tells; see ``pipeline.cluster.search.Board``.

    Trials of the search come first, and when all of them are over those that confirm the best of them, so that
    processes that have started serve both.

    Attributes:
        run_dir: of the search.
        journal: of the search.
        total: trials of the search.
        maximise: whether more of the metric is better.
        configure: the configuration of a trial, as JSON.
        waiting: trials to be run before others are drawn.
        draw_next: draws a further trial of the search; none: there is none.
        tell: is told of a trial of the search that is over, to draw the next ones by it.
        choose: the runs that confirm the best trials, once all are over.
        max_failed: the search ends when so many of its trials have failed.
        deadline: when the time of the search is up; none: never.
        on_start: told of a trial when it begins; ``on_end`` when it is over.
        trials: by label; those of earlier starts that are over, or wait for others, included.
        population: says which trials go on after a pause; none: no trial pauses.
    """

    run_dir: Path
    journal: Journal
    total: int
    maximise: bool
    configure: Callable[[Trial], str]
    waiting: deque[Trial]
    draw_next: Callable[[], Trial | None]
    tell: Callable[[Trial], None]
    choose: Callable[[Mapping[str, Trial]], list[Trial]]
    max_failed: int
    deadline: float | None
    on_start: Callable[[Trial], None]
    on_end: Callable[[Trial], None]
    trials: dict[str, Trial] = field(default_factory=dict)
    population: Population | None = None
    confirms: bool = False
    _started: dict[str, float] = field(default_factory=dict)

    def next_trial(self) -> TrialTask | Literal["wait"] | None:
        trial = None
        if self.confirms or not self._is_late:
            trial = self.waiting.popleft() if self.waiting else None if self.confirms else self.draw_next()
        if trial is not None:
            self._forget_failure(trial.label)
            self._keep(trial)
            start = str(checkpoint_of_copy(self.run_dir, trial.label)) if trial.copy_of else ""
            return TrialTask(trial.label, self.configure(trial), judged=not self.confirms, start_from=start)
        rest = [other for other in self.trials.values() if not other.is_over]
        if any(other.state != "paused" for other in rest):
            return "wait"
        if rest:
            self._evolve()
            return self.next_trial()
        if self.confirms:
            return None
        self.confirms = True
        missing = self.choose(self.trials)
        self.total = len(missing) + sum(bool(other.confirms) for other in self.trials.values())
        self.waiting = deque(missing)
        return self.next_trial()

    def _evolve(self) -> None:
        assert self.population is not None  # or none would have paused
        self.population.evolve(self.trials)
        for trial in self.population.settle(self.trials):
            self.total += 1
            self._end(trial)
        self.max_failed = max(self.max_failed, math.ceil(self.total * FAILED_SHARE))
        for trial in [other for other in self.trials.values() if not other.is_over]:
            self._keep(replace(trial, state="waiting", value=None))
            self.waiting.append(self.trials[trial.label])

    def ends(self, label: str, epoch: int) -> bool:
        return not self.trials[label].confirms and (self._is_late or self._pauses(epoch))

    def _pauses(self, epoch: int) -> bool:
        return self.population is not None and self.population.pauses(epoch)

    @property
    def _is_late(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline

    def started(self, label: str) -> None:
        if label not in self._started:
            self._started[label] = time.time()
            self._keep(replace(self.trials[label], state="running"))
            self.on_start(self.trials[label])
            self._tell_event(label)

    def reported(self, label: str, epoch: int, value: float) -> None:
        trial = self.trials[label]
        # A trial that goes on after its process was lost repeats what came after its last checkpoint.
        curve = (*(point for point in trial.curve if point[0] < epoch), (epoch, value))
        self._keep(replace(trial, curve=curve, seconds=self._seconds(trial)))

    def retried(self, label: str) -> None:
        self._keep(replace(self.trials[label], retries=self.trials[label].retries + 1))
        message = f"trial {label} lost its process and is tried once more"
        self.journal.emit(Event("warning", {"message": message}))

    def ended(self, label: str, error: str | None) -> None:
        trial = self._judge(self.trials[label], error)
        trial = replace(trial, seconds=self._seconds(trial))
        self._started.pop(label, None)
        if trial.is_over:
            self._end(trial)
        else:
            self._keep(trial)
            self._tell_event(label)

    def _end(self, trial: Trial) -> None:
        if not trial.confirms:
            self.tell(trial)
        self._keep(trial)
        if self.population is not None:
            self.population.forget(trial)
        self.on_end(trial)
        self._tell_event(trial.label)

    def returned(self, label: str) -> None:
        # Not among the trials until it is given out again, which after the deadline it is not.
        self.waiting.appendleft(self.trials.pop(label))

    def must_stop(self) -> bool:
        return len(self.failed) >= self.max_failed

    @property
    def failed(self) -> list[Trial]:
        """Trials of the search that have failed."""
        return [trial for trial in self.trials.values() if trial.state == "failed" and not trial.confirms]

    def _judge(self, trial: Trial, error: str | None) -> Trial:
        """What became of a trial, by what it left in its folder."""
        path = trial_folder(self.run_dir, trial.label) / "result.json"
        result: Mapping[str, Any] = read_json(path) if path.exists() else {}
        if result.get("status") == "finished":
            return replace(trial, state="finished", value=result["trial_value"])
        if result.get("status") == "failed":
            error = str(result.get("error", error))
        if error is not None:
            return replace(trial, state="failed", message=error)
        paused = bool(trial.curve) and self._pauses(trial.curve[-1][0])
        return replace(trial, state="paused" if paused else "pruned", value=trial.best_value(self.maximise))

    def _forget_failure(self, label: str) -> None:
        """What a trial failed of in an earlier start says nothing about this one."""
        path = trial_folder(self.run_dir, label) / "result.json"
        if path.exists() and read_json(path).get("status") == "failed":
            path.unlink()

    def _seconds(self, trial: Trial) -> float:
        began = self._started.get(trial.label)
        if began is None:
            return trial.seconds
        now = time.time()
        self._started[trial.label] = now
        return trial.seconds + now - began

    def _phase(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if bool(trial.confirms) == self.confirms]

    def _keep(self, trial: Trial) -> None:
        self.trials[trial.label] = trial
        trial.save(self.run_dir)

    def _is_best(self, trial: Trial) -> bool:
        others = [other.value for other in self._phase() if other.is_over and other.label != trial.label]
        value = trial.value
        return (
            trial.state == "finished"
            and value is not None
            and all(other is None or (value > other if self.maximise else value < other) for other in others)
        )

    def _tell_event(self, label: str) -> None:
        trial = self.trials[label]
        done = sum(other.is_over for other in self._phase())
        data = {
            "label": label,
            "state": trial.state,
            "value": trial.value,
            "epochs": trial.curve[-1][0] if trial.curve else 0,
            "seconds": trial.seconds,
            "draw": trial.draw or {},
            "best": self._is_best(trial),
            "message": trial.message,
            "phase": "confirm" if self.confirms else "search",
            "num_done": done,
            "num_trials": self.total,
        }
        self.journal.emit(Event("trial", data))
