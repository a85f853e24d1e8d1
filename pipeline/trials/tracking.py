"""A tracker's run for every trial of a search, below the run of the search."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.results import read_run_id
from pipeline.config.runs import Run
from pipeline.config.stored import read_run
from pipeline.contracts.events import Event, Journal
from pipeline.errors import PipelineError
from pipeline.tracking import Tracker, has_unsent
from pipeline.trials.records import Trial, trial_folder

_LOOK_S = 1.0
_CLOSE_S = 20.0
_AWAY_S = 3.0


class TrialTrackers:
    """Sends the journals of trials from a thread of its own, each to a run below that of the search.

    Args:
        run: of the search; trials are sent once the server has it.
        dataset: as the search's own run has it.
    """

    def __init__(self, run: Run, dataset: Mapping[str, Any]) -> None:
        self._run, self._dataset = run, dataset
        self._waiting: list[Path] = []
        self._copies: dict[Path, str] = {}  # to the trial that it was copied from
        self._trackers: dict[Path, Tracker] = {}
        self._ended: list[Path] = []
        self._unsent: list[Path] = []
        self._over: set[Path] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="trial-trackers", daemon=True)
        self._thread.start()

    def follow(self, trial: Trial) -> None:
        """A trial began, or an earlier one has something that was not sent."""
        folder = trial_folder(self._run.dir, trial.label)
        if trial.copy_of:
            self._copies[folder] = trial.copy_of
        with self._lock:
            if folder not in self._waiting and folder not in self._trackers:
                self._waiting.append(folder)

    def end(self, trial: Trial) -> None:
        """A trial is over: what its process could not write is written, and all of it sent."""
        folder = trial_folder(self._run.dir, trial.label)
        self._over.add(folder)
        if trial.state == "pruned":
            message = f"stopped early after {trial.curve[-1][0]} epochs" if trial.curve else "stopped early"
            message += f": {trial.message}" if trial.message else ""
            self._write(folder, {"status": "finished", "message": message, "outcome": "pruned"})
        elif trial.state == "failed":
            self._write(folder, {"status": "failed", "message": trial.message, "outcome": "failed"})
        else:
            self._write(folder, {"status": "finished", "message": "", "outcome": "finished"})
        with self._lock:
            self._ended.append(folder)

    def kill(self) -> None:
        """The search is being killed: what runs is recorded as killed."""
        for folder, tracker in list(self._trackers.items()):
            if folder not in self._over:
                self._write(folder, {"status": "killed", "message": "the search was stopped"})
                tracker.flush(0.3)

    def close(self) -> str:
        """Sends what is left; returns a sentence on what could not be sent, empty where all was."""
        self._stopped.set()
        self._thread.join(timeout=_CLOSE_S)
        self._waiting += self._unsent
        self._open_waiting()
        problems = []
        for folder, tracker in self._trackers.items():
            if not tracker.close(_AWAY_S if tracker.is_away else _CLOSE_S):
                problems.append(f"{folder.name}: {tracker.problem}")
        problems += [f"{folder.name}: the server does not have the search yet" for folder in self._waiting]
        return f"not all of {len(problems)} trials was sent (the first: {problems[0]})" if problems else ""

    def _write(self, folder: Path, status: dict[str, str]) -> None:
        if folder.exists():
            Journal(folder / "events.jsonl").emit(Event("status", status))

    def _loop(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            self._open_waiting()
            with self._lock:
                ended, self._ended = self._ended, []
            for folder in ended:
                if folder not in self._trackers:
                    with self._lock:
                        self._ended.append(folder)  # not open yet: the server is behind
                elif not self._trackers.pop(folder).close(_AWAY_S):
                    self._unsent.append(folder)

    def _open_waiting(self) -> None:
        parent = read_run_id(self._run.dir)
        if parent is None:
            return
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for folder in waiting:
            if (folder / "run.json").exists():
                self._trackers[folder] = self._open(folder, parent)
            elif not self._stopped.is_set():
                with self._lock:
                    self._waiting.append(folder)

    def _open(self, folder: Path, parent: str) -> Tracker:
        stored = read_run(folder)
        tracking = self._run.config.tracking
        tags = {"command": stored.command, "config_hash": stored.config_hash, "trial": folder.name}
        if folder in self._copies:
            tags["copy_of"] = self._copies[folder]
        return Tracker.open(
            tracking.uri or "",
            tracking.experiment,
            folder,
            stored.name,
            required=False,
            params=stored.raw,
            tags=tags,
            dataset=self._dataset,
            parent_run_id=parent,
        )


def list_unsent(run: Run, trials: Iterable[Trial]) -> list[Trial]:
    """The trials of which the server lacks something."""
    uri = run.config.tracking.uri or ""
    unsent = []
    for trial in trials:
        try:
            if has_unsent(trial_folder(run.dir, trial.label), uri):
                unsent.append(trial)
        except PipelineError:  # a damaged record of what was sent: it is sent again
            unsent.append(trial)
    return unsent
