"""The board of a search on a bench: what it is asked and told, without Tune."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.contracts.events import Journal, read_events
from pipeline.search import TrialTask
from pipeline.trials.board import TrialBoard
from pipeline.trials.population import Population
from pipeline.trials.records import Trial, read_trials, trial_folder


class Bench:
    """A board, and everything that it says to others."""

    def __init__(
        self,
        folder: Path,
        *,
        waiting: Iterable[Trial] = (),
        confirms: Iterable[Trial] = (),
        earlier: Iterable[Trial] = (),
        maximise: bool = True,
        num_drawn: int = 3,
        max_failed: int = 2,
        deadline: float | None = None,
        population: Population | None = None,
    ) -> None:
        self.folder = folder
        self.told: list[Trial] = []
        self.begun: list[Trial] = []
        self.over: list[Trial] = []
        self.chosen_from: list[set[str]] = []
        self._draws = iter(range(num_drawn))
        self._confirms = list(confirms)
        self.board = TrialBoard(
            run_dir=folder,
            journal=Journal(folder / "events.jsonl"),
            total=num_drawn + len(list(waiting)) + len(list(earlier)),
            maximise=maximise,
            configure=lambda trial: f"configuration of {trial.label}",
            waiting=deque(waiting),
            draw_next=self._draw,
            tell=self.told.append,
            choose=self._choose,
            max_failed=max_failed,
            deadline=deadline,
            on_start=self.begun.append,
            on_end=self.over.append,
            trials={trial.label: trial for trial in earlier},
            population=population,
        )

    def _draw(self) -> Trial | None:
        number = next(self._draws, None)
        return None if number is None else Trial(f"{number:04d}", {"t": float(number)})

    def _choose(self, trials: Any) -> list[Trial]:
        self.chosen_from.append(set(trials))
        return self._confirms

    def begin(self) -> str:
        task = self.board.next_trial()
        assert isinstance(task, TrialTask)
        self.board.started(task.label)
        return task.label

    def finish(self, label: str, value: float | None = 0.5) -> None:
        self.leave(label, status="finished", trial_value=value)
        self.board.ended(label, None)

    def leave(self, label: str, **result: Any) -> None:
        folder = trial_folder(self.folder, label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result))

    def events(self, kind: str = "trial") -> list[dict[str, Any]]:
        return [event.data for event, _ in read_events(self.folder / "events.jsonl") if event.kind == kind]

    @property
    def stored(self) -> dict[str, Trial]:
        return {trial.label: trial for trial in read_trials(self.folder)}


def repeat(label: str, seed: int = 1) -> Trial:
    return Trial(f"{label}-s{seed}", {"t": 0.0}, seed, confirms=label)
