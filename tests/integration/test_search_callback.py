"""What Tune does not tell of a trial, and the board learns all the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.search import ConcurrencyLimiter

from pipeline.cluster.search import _BoardCallback, _BoardSearcher
from pipeline.search import TrialTask


class Board:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def started(self, label: str) -> None:
        self.told.append(("started", label))

    def retried(self, label: str) -> None:
        self.told.append(("retried", label))

    def returned(self, label: str) -> None:
        self.told.append(("returned", label))

    def ended(self, label: str, error: str | None) -> None:
        self.told.append(("ended", label))


class Searcher:
    def __init__(self) -> None:
        self.completed: list[str] = []

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.completed.append(trial_id)


def make_trial(number: int, status: str) -> Any:
    return SimpleNamespace(trial_id=f"id{number}", status=status, config={"label": f"{number:04d}"}, error_file=None)


def test_a_trial_that_tune_drops_is_given_back_once() -> None:
    board = Board()
    searcher = Searcher()
    callback = _BoardCallback(board, searcher)  # type: ignore[arg-type]
    failed, finished = make_trial(1, "ERROR"), make_trial(2, "TERMINATED")
    callback.on_trial_start(1, [], failed)
    callback.on_trial_error(1, [], failed)
    callback.on_trial_complete(1, [], finished)
    trials = [make_trial(0, "RUNNING"), failed, finished, make_trial(3, "ERROR"), make_trial(4, "PENDING")]
    for iteration in range(2):
        callback.on_step_end(iteration, trials)
    assert board.told == [("started", "0001"), ("ended", "0001"), ("ended", "0002"), ("returned", "0003")]
    assert searcher.completed == ["id3"]  # of the others Tune tells it


def test_a_trial_whose_process_was_lost_before_it_began_is_given_back_twice() -> None:
    board = Board()
    callback = _BoardCallback(board, Searcher())  # type: ignore[arg-type]
    for number in range(3):
        trial = make_trial(1, "ERROR")
        trial.trial_id = f"attempt{number}"
        callback.on_trial_recover(number, [], trial)
        callback.on_trial_error(number, [], trial)
        callback.on_step_end(number, [trial])
    assert board.told == [("returned", "0001"), ("returned", "0001"), ("ended", "0001")]


def test_a_dropped_trial_gives_its_place_to_another() -> None:
    """Tune's own limiter, which asks nobody as long as it believes that enough trials run."""

    class Waiting(Board):
        def must_stop(self) -> bool:
            return False

        def next_trial(self) -> TrialTask:
            return TrialTask("0001", "{}", judged=True)

    board = Waiting()
    limiter = ConcurrencyLimiter(_BoardSearcher(board), 1)  # type: ignore[arg-type]
    callback = _BoardCallback(board, limiter)  # type: ignore[arg-type]
    trial = make_trial(1, "ERROR")
    assert limiter.suggest(trial.trial_id)["label"] == "0001"
    assert limiter.suggest("id2") is None
    callback.on_step_end(1, [trial])
    assert limiter.suggest("id3")["label"] == "0001"
