"""What Tune does not tell of a trial, and the board learns all the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.cluster.search import _BoardCallback


class Board:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def returned(self, label: str) -> None:
        self.told.append(("returned", label))

    def ended(self, label: str, error: str | None) -> None:
        self.told.append(("ended", label))


def make_trial(number: int, status: str) -> Any:
    return SimpleNamespace(trial_id=f"id{number}", status=status, config={"label": f"{number:04d}"}, error_file=None)


def test_a_trial_that_tune_drops_is_given_back_once() -> None:
    board = Board()
    callback = _BoardCallback(board)  # type: ignore[arg-type]
    failed, finished = make_trial(1, "ERROR"), make_trial(2, "TERMINATED")
    callback.on_trial_error(1, [], failed)
    callback.on_trial_complete(1, [], finished)
    trials = [make_trial(0, "RUNNING"), failed, finished, make_trial(3, "ERROR"), make_trial(4, "PENDING")]
    for iteration in range(2):
        callback.on_step_end(iteration, trials)
    assert board.told == [("ended", "0001"), ("ended", "0002"), ("returned", "0003")]
