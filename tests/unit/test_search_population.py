"""Population-based training: who gives way to whom, and that a search that is killed decides nothing twice."""

from __future__ import annotations

import errno
import math
import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.search import Space, TrialTask
from pipeline.training.state import STATE_FILE, read_state
from pipeline.trials.population import Population, checkpoint_of_copy
from pipeline.trials.records import Trial, read_trials, trial_folder, unfinished
from tests.unit.boards import Bench, repeat

SPACE = Space.parse(
    {
        "loss": {
            "distribution": "choice",
            "options": {
                "kd": {"temperature": {"distribution": "loguniform", "low": 1, "high": 16}},
                "cmkd": {
                    "pearson_weight": {"distribution": "uniform", "low": 0, "high": 8},
                    "difficulty": {"distribution": "choice", "options": ["entropy", "label", "margin", "constant"]},
                },
            },
        },
    }
)
KD, TEMPERATURE = {"loss": "kd"}, "loss=kd: loss.temperature"
NUM_EPOCHS = 9  # a pause after each but the last


def population(folder: Path, maximise: bool = True, num_epochs: int = NUM_EPOCHS, seed: int = 0) -> Population:
    return Population(folder, SPACE, num_epochs, maximise, seed)


def paused(folder: Path, values: Mapping[str, float], epoch: int = 1) -> dict[str, Trial]:
    """Trials that have come so far, each with a checkpoint of its own."""
    for label in values:
        leave_checkpoint(folder, label, epoch, values[label])
    return {
        label: Trial(label, draw(2.0 + number), state="paused", curve=((epoch, value),))
        for number, (label, value) in enumerate(values.items())
    }


def draw(temperature: float) -> dict[str, bool | int | float | str]:
    return {**KD, TEMPERATURE: temperature}


def leave_checkpoint(folder: Path, label: str, epoch: int, value: float) -> None:
    last = trial_folder(folder, label) / "checkpoints" / "last"
    last.mkdir(parents=True, exist_ok=True)
    torch.save({"label": label, "epoch": epoch, "value": value, "best": value}, last / STATE_FILE)


# --- who gives way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maximise", "best", "worst"),
    [(True, {"0003", "0005"}, {"0000", "0006"}), (False, {"0000", "0006"}, {"0003", "0005"})],
)
def test_the_worst_quarter_gives_way_to_copies_of_the_best(
    tmp_path: Path, maximise: bool, best: set[str], worst: set[str]
) -> None:
    values = (0.1, 0.4, 0.5, 0.9, 0.6, 0.8, 0.2, 0.3)
    trials = paused(tmp_path, {f"{number:04d}": value for number, value in enumerate(values)})
    one = population(tmp_path, maximise)
    one.evolve(trials)
    ended = one.settle(trials)
    assert {trial.label for trial in ended} == worst == {name for name, one in trials.items() if one.state == "pruned"}
    copies = [trials[label] for label in ("0008", "0009")]
    assert len(trials) == 10
    for copy, replaced in zip(copies, ended, strict=True):
        assert copy.copy_of in best
        assert (copy.state, copy.curve) == ("waiting", ())
        assert replaced.message == f"gave way to {copy.label}, a copy of {copy.copy_of}"
        assert replaced.value == replaced.curve[0][1]
        kept = read_state(checkpoint_of_copy(tmp_path, copy.label))
        assert (kept["label"], kept["epoch"], kept["best"]) == (copy.copy_of, 1, None)
        left = read_state(trial_folder(tmp_path, copy.copy_of) / "checkpoints" / "last")
        assert left["best"] == left["value"]
    assert one.settle(trials) == []


@pytest.mark.parametrize(("number", "copies"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (9, 3)])
def test_a_quarter_is_rounded_up_and_never_more_than_half(tmp_path: Path, number: int, copies: int) -> None:
    trials = paused(tmp_path, {f"{index:04d}": float(index) for index in range(number)})
    one = population(tmp_path)
    one.evolve(trials)
    assert len(one.settle(trials)) == copies


def test_what_is_no_number_is_the_worst(tmp_path: Path) -> None:
    for maximise in (True, False):
        folder = tmp_path / str(maximise)
        trials = paused(folder, {"0000": 0.5, "0001": math.nan, "0002": 0.25, "0003": 0.75})
        one = population(folder, maximise)
        one.evolve(trials)
        assert [trial.label for trial in one.settle(trials)] == ["0001"]


def test_trials_that_are_over_and_confirming_runs_are_no_members(tmp_path: Path) -> None:
    trials = paused(tmp_path, {"0000": 0.5, "0001": 0.25})
    trials |= {
        "0002": Trial("0002", draw(1.0), state="failed", curve=((1, 0.1),)),
        "0000-s1": Trial("0000-s1", draw(1.0), 1, "0000", state="finished", value=0.9),
    }
    one = population(tmp_path)
    one.evolve(trials)
    assert [trial.label for trial in one.settle(trials)] == ["0001"]
    assert trials["0003"].copy_of == "0000"


def test_pauses_come_after_each_ninth_of_the_epochs_but_not_at_the_end(tmp_path: Path) -> None:
    one = population(tmp_path, num_epochs=18)
    assert [epoch for epoch in range(1, 19) if one.pauses(epoch)] == list(range(2, 18))
    # Where evaluations are rare, a pause comes with the first one after it is due, and the next one counts from there.
    one.evolve(paused(tmp_path, {"0000": 0.5, "0001": 0.25}, epoch=5))
    assert [epoch for epoch in range(1, 19) if one.pauses(epoch)] == list(range(7, 18))


def test_a_disk_that_is_full_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = torch.save, []

    def refuse(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 2:  # with the first copy there is room
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    trials = paused(tmp_path, {f"{number:04d}": float(number) for number in range(8)})
    one = population(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", refuse)
        with pytest.raises(CheckpointError, match=r"No space left on device.*make room, then resume"):
            one.evolve(trials)
    for again in (one, population(tmp_path)):
        assert again.settle(trials) == []
        assert again.pauses(1)
    one.evolve(trials)
    assert [trial.label for trial in one.settle(trials)] == ["0001", "0000"]
    assert sorted(trials) == [f"{number:04d}" for number in range(10)]


# --- the values of copies -----------------------------------------------------------------------------------------


def test_values_of_a_copy_lie_near_its_source_s_or_are_drawn_anew(tmp_path: Path) -> None:
    source = {"loss": "cmkd", "loss=cmkd: loss.pearson_weight": 2.0, "loss=cmkd: loss.difficulty": "label"}
    weights, kinds = [], []
    for seed in range(400):
        folder = tmp_path / str(seed)
        trials = paused(folder, {"0000": 0.5, "0001": 0.25})
        trials["0000"] = Trial("0000", source, state="paused", curve=((1, 0.5),))
        one = population(folder, seed=seed)
        one.evolve(trials)
        one.settle(trials)
        found = trials["0002"].draw or {}
        assert found["loss"] == "cmkd"  # with another loss its own axes would have no source
        weights.append(float(found["loss=cmkd: loss.pearson_weight"]))
        kinds.append(found["loss=cmkd: loss.difficulty"])
    near = [weight for weight in weights if weight in (1.6, 2.4)]
    assert 260 < len(near) < 340  # three in four
    assert 0.4 < near.count(1.6) / len(near) < 0.6
    assert all(0 <= weight <= 8 for weight in weights)
    assert kinds.count("entropy") > 100
    assert kinds.count("margin") > 100
    assert 5 < kinds.count("constant") < 60  # drawn anew only


def test_values_stay_within_their_axes(tmp_path: Path) -> None:
    for seed in range(50):
        folder = tmp_path / str(seed)
        trials = paused(folder, {"0000": 0.5, "0001": 0.25})
        trials["0000"] = Trial("0000", draw(15.9), state="paused", curve=((1, 0.5),))
        one = population(folder, seed=seed)
        one.evolve(trials)
        one.settle(trials)
        assert 1 <= float((trials["0002"].draw or {})[TEMPERATURE]) <= 16


# --- on the board, to the end, through kills ----------------------------------------------------------------------


class Killed(Exception):
    """The driver dies."""


class Simulated:
    """Trains two trials at a time, an epoch each in turn; a trial's value depends on its point and its epoch.

    Args:
        patience: steps until the driver is killed; none: it is not.
    """

    def __init__(self, folder: Path, patience: int | None = None) -> None:
        self.folder, self.patience = folder, patience
        one = population(folder)
        trials = {trial.label: trial for trial in read_trials(folder)}
        for trial in one.settle(trials):
            trial.save(folder)
        own = [trial for trial in trials.values() if not trial.confirms]
        drawn = sum(not trial.copy_of for trial in own)
        going_on = list(unfinished(own, one.pauses))
        over = [trial for trial in trials.values() if trial.state in ("finished", "pruned")]
        self.bench = Bench(
            folder,
            confirms=[] if any(trial.confirms for trial in over) else [repeat("0000")],
            earlier=[*over, *(trial for trial in going_on if trial.state == "paused")],
            num_drawn=8 - drawn,
            population=one,
        )
        self.board = self.bench.board
        self.board.waiting = deque(trial for trial in going_on if trial.state == "waiting")
        draws = iter([Trial(f"{number:04d}", draw(1.5 + number)) for number in range(drawn, 8)])
        self.board.draw_next = lambda: next(draws, None)
        self.running: list[TrialTask] = []

    def run(self) -> None:
        while (task := self.next_task()) is not None or self.running:
            if task is not None:
                self.running.append(task)
                self.board.started(task.label)
                self.tell(task)
            for running in list(self.running):
                self.train(running)

    def next_task(self) -> TrialTask | None:
        if len(self.running) == 2:
            return None
        task = self.board.next_trial()
        return task if isinstance(task, TrialTask) else None

    def train(self, task: TrialTask) -> None:
        """One epoch, as a trial's process does it: what it evaluated is in a checkpoint before anybody hears of it."""
        if task not in self.running:
            return
        epoch = self.last_evaluation(task)[0] + 1
        value = random.Random(f"{self.board.trials[task.label].draw} {epoch}").random()
        leave_checkpoint(self.folder, task.label, epoch, value)
        self.tick()
        self.tell(task)

    def tell(self, task: TrialTask) -> None:
        """Of its own checkpoint that it has come to, or goes on from."""
        epoch, value = self.last_evaluation(task, own=True)
        if epoch == 0:
            return
        ends = self.board.ends(task.label, epoch)
        self.board.reported(task.label, epoch, value)
        self.tick()
        if epoch == NUM_EPOCHS:
            self.running.remove(task)
            self.bench.finish(task.label, self.board.trials[task.label].best_value(maximise=True))
        elif ends:
            self.running.remove(task)
            self.board.ended(task.label, None)
        self.tick()

    def last_evaluation(self, task: TrialTask, own: bool = False) -> tuple[int, float]:
        places = [trial_folder(self.folder, task.label) / "checkpoints" / "last"]
        places += [Path(task.start_from)] if task.start_from and not own else []
        found = [read_state(place) for place in places if place.exists()]
        return max(((state["epoch"], state["value"]) for state in found), default=(0, 0.0))

    def tick(self) -> None:
        if self.patience is not None:
            self.patience -= 1
            if self.patience < 0:
                raise Killed

    def summary(self) -> dict[str, tuple[object, ...]]:
        return {
            trial.label: (trial.draw, trial.copy_of, trial.state, trial.value, trial.message, trial.curve)
            for trial in read_trials(self.folder)
            if not trial.confirms
        }


def test_a_population_keeps_its_size_to_the_end(tmp_path: Path) -> None:
    search = Simulated(tmp_path)
    search.run()
    trials = [trial for trial in search.bench.stored.values() if not trial.confirms]
    states = [trial.state for trial in trials]
    assert (states.count("finished"), states.count("pruned")) == (8, 8 * 2)  # eight pauses, two copies at each
    assert search.board.total == 1  # by now of the runs that confirm
    assert search.board.max_failed == 8  # a third of 24
    assert search.bench.stored["0000-s1"].state == "finished"
    for trial in trials:
        if trial.state == "finished":
            assert trial.curve[-1][0] == NUM_EPOCHS
        if trial.copy_of:
            source = search.bench.stored[trial.copy_of]
            assert trial.curve[0][0] - 1 in [epoch for epoch, _ in source.curve]
            assert trial.value == max(value for _, value in trial.curve)
    assert not any((tmp_path / "search" / "copies").iterdir())  # of those that are over
    paused_events = [event for event in search.bench.events() if event["state"] == "paused"]
    assert len(paused_events) == 8 * 8


@pytest.mark.parametrize("seed", range(6))
def test_a_search_that_is_killed_again_and_again_comes_to_the_same(tmp_path: Path, seed: int) -> None:
    undisturbed = Simulated(tmp_path / "undisturbed")
    undisturbed.run()
    folder, chance, kills = tmp_path / "killed", random.Random(seed), 0
    while True:
        search = Simulated(folder, patience=chance.randrange(3, 60))
        try:
            search.run()
        except Killed:
            kills += 1
            continue
        break
    assert kills > 3
    assert search.summary() == undisturbed.summary()
    assert search.bench.stored["0000-s1"].state == "finished"


def test_what_was_decided_before_a_kill_is_carried_out_after_it(tmp_path: Path) -> None:
    trials = paused(tmp_path, {"0000": 0.5, "0001": 0.25})
    population(tmp_path).evolve(trials)
    again = population(tmp_path)
    ended = again.settle(trials)
    assert [trial.label for trial in ended] == ["0001"]
    assert population(tmp_path).settle(trials) == []
    # Who has come to the pause that is behind everybody goes on, and who comes to the next one waits.
    assert [trial.state for trial in unfinished(trials.values(), again.pauses)] == ["waiting", "waiting"]
    later = paused(tmp_path, {"0000": 0.5}, epoch=2)
    assert [trial.state for trial in unfinished(later.values(), again.pauses)] == ["paused"]
    assert [trial.state for trial in unfinished(later.values())] == ["waiting"]
