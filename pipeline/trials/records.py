"""The trials of a search: a small file of each in the run folder, which is what the search is resumed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.config.results import write_json
from pipeline.config.stored import read_json
from pipeline.search import Draw
from pipeline.search.study import PastTrial

TrialState = Literal["waiting", "running", "paused", "finished", "pruned", "failed"]
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
        state: ``pruned``: stopped early, by the scheduler or when the time was up; ``paused``: it waits for the rest of
            its population.
        value: of the checkpoint that it keeps; of a pruned or paused one the best so far; none before there is one.
        curve: (epoch, value) of every evaluation.
        seconds: from its start to its end, earlier starts included.
        message: what it failed of, or gave way to.
        retries: how often its process was lost.
        copy_of: label of the trial with whose weights it began, in the middle of training; empty: it began anew.
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
    copy_of: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    def best_value(self, maximise: bool) -> float | None:
        """The best of its evaluations so far; none before one is finite."""
        values = [value for _, value in self.curve if math.isfinite(value)]
        return (max if maximise else min)(values, default=None)

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


def best_trials(trials: Iterable[Trial], maximise: bool) -> list[Trial]:
    """Finished trials of the search itself, the best first; of equals the earlier."""
    finished = [trial for trial in trials if trial.state == "finished" and not trial.confirms]
    sign = -1.0 if maximise else 1.0
    valued = [trial for trial in finished if trial.value is not None]
    return sorted(valued, key=lambda trial: (sign * (trial.value or 0), trial.label))


def unfinished(trials: Iterable[Trial], pauses: Callable[[int], bool] | None = None) -> Iterator[Trial]:
    """Those that were begun and have come to nothing yet; what one failed of may be gone by now.

    Args:
        pauses: whether a trial waits for others after so many epochs; none: it never does.
    """
    for trial in trials:
        if trial.state not in ("finished", "pruned"):
            paused = pauses is not None and trial.curve and pauses(trial.curve[-1][0])
            yield replace(trial, state="paused" if paused else "waiting", message="")


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
