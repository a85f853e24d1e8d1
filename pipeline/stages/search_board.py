"""The trials of a search: a small file of each in the run folder, which is what the search is resumed from."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.results import write_json
from pipeline.config.stored import read_json
from pipeline.contracts.events import Event, Journal
from pipeline.search import Draw, TrialTask
from pipeline.search.study import PastTrial

TrialState = Literal["waiting", "running", "finished", "pruned", "failed"]
_OVER = ("finished", "pruned", "failed")
_FOLDER = Path("search", "trials")


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        label: name of its run folder under ``trials/``.
        draw: its point; none: the search's own configuration.
        seed: none: the search's.
        confirms: label of the trial that it repeats with another seed; empty: it is one of the search itself;
            ``"defaults"``: it repeats the search's own configuration.
        state: ``pruned``: stopped early, by the scheduler or when the time was up.
        value: of the checkpoint that it keeps; of a pruned one the best so far; none before there is one.
        curve: (epoch, value) of every evaluation.
        seconds: from its start to its end, earlier starts included.
        message: what it failed of.
        retries: how often its process was lost.
    """

    label: str
    draw: Draw | None
    seed: int | None = None
    confirms: str = ""
    state: TrialState = "waiting"
    value: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    message: str = ""
    retries: int = 0

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    def save(self, run_dir: Path) -> None:
        folder = run_dir / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.label}.json", asdict(self))


def read_trials(run_dir: Path) -> list[Trial]:
    """Every trial that a search has begun, in the order of their names.

    Raises:
        RunError: the file of one is damaged.
    """
    return [_load(path) for path in sorted((run_dir / _FOLDER).glob("*.json"))]


def _load(path: Path) -> Trial:
    values = read_json(path)
    # JSON has no NaN: what was none is null there.
    values["curve"] = tuple((int(epoch), math.nan if value is None else value) for epoch, value in values["curve"])
    return Trial(**values)


def trial_folder(run_dir: Path, label: str) -> Path:
    """The run folder of a trial."""
    return run_dir / "trials" / label


@dataclass
class TrialBoard:
    """What Tune asks and tells; see ``pipeline.cluster.search.Board``.

    Trials of the search come first, and when all of them are over those that confirm the best of them, so that
    processes that have started serve both.

    Attributes:
        run_dir: of the search.
        journal: of the search.
        total: trials of the search.
        better: whether the first value is better than the second.
        configure: the configuration of a trial, as JSON.
        waiting: trials to be run before others are drawn.
        draw_next: draws a further trial of the search; none: there is none.
        tell: is told of a trial of the search that is over, to draw the next ones by it.
        choose: the runs that confirm the best trials, once all are over.
        max_failed: the search ends when so many of its trials have failed.
        deadline: when the time of the search is up; none: never.
        on_start: told of a trial when it begins; ``on_end`` when it is over.
        trials: by label; those of earlier starts that are over included.
    """

    run_dir: Path
    journal: Journal
    total: int
    better: Callable[[float, float], bool]
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
    confirms: bool = False
    _started: dict[str, float] = field(default_factory=dict)

    def next_trial(self) -> TrialTask | Literal["wait"] | None:
        trial = None
        if self.confirms or not self._is_late:
            trial = self.waiting.popleft() if self.waiting else None if self.confirms else self.draw_next()
        if trial is not None:
            self._forget_failure(trial.label)
            self._keep(trial)
            return TrialTask(trial.label, self.configure(trial), judged=not self.confirms)
        if any(not other.is_over for other in self.trials.values()):
            return "wait"
        if self.confirms:
            return None
        self.confirms = True
        missing = self.choose(self.trials)
        self.total = len(missing) + sum(bool(other.confirms) for other in self.trials.values())
        self.waiting = deque(missing)
        return self.next_trial()

    def is_late(self, label: str) -> bool:
        return self._is_late and not self.trials[label].confirms

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
        if not trial.confirms:
            self.tell(trial)
        self._keep(trial)
        self._started.pop(label, None)
        self.on_end(trial)
        self._tell_event(label)

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
        best: float | None = None
        for _, value in trial.curve:
            if math.isfinite(value):
                best = value if best is None or self.better(value, best) else best
        return replace(trial, state="pruned", value=best)

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
            and all(other is None or self.better(value, other) for other in others)
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


def best_trials(trials: Iterable[Trial], maximise: bool) -> list[Trial]:
    """Finished trials of the search itself, the best first; of equals the earlier."""
    finished = [trial for trial in trials if trial.state == "finished" and not trial.confirms]
    sign = -1.0 if maximise else 1.0
    return sorted((trial for trial in finished if trial.value is not None), key=lambda trial: sign * (trial.value or 0))


def unfinished(trials: Iterable[Trial]) -> Iterator[Trial]:
    """Those that were begun and have come to nothing yet; what one failed of may be gone by now."""
    return (
        replace(trial, state="waiting", message="") for trial in trials if trial.state not in ("finished", "pruned")
    )


def past_trials(trials: Iterable[Trial]) -> list[PastTrial]:
    """The search's own trials that are over, for samplers, schedulers and charts."""
    return [
        PastTrial(
            trial.label,
            trial.draw or {},
            None if trial.state == "failed" else trial.value,
            trial.curve,
            trial.state == "pruned",
        )
        for trial in trials
        if trial.is_over and not trial.confirms
    ]
