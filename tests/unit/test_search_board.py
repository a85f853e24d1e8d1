"""The board of a search: which trials run, what is judged of them, and what stands in their files at each moment."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from pipeline.search import TrialTask
from pipeline.search.study import PastTrial
from pipeline.trials.records import (
    Trial,
    best_trials,
    past_trials,
    read_trials,
    unfinished,
)
from tests.unit.boards import Bench, repeat

# --- order --------------------------------------------------------------------------------------------------------


def test_those_that_wait_come_before_those_that_are_drawn(tmp_path: Path) -> None:
    bench = Bench(tmp_path, waiting=[Trial("0007", {"t": 7.0})], num_drawn=2)
    assert [bench.begin() for _ in range(3)] == ["0007", "0000", "0001"]


def test_a_task_has_the_configuration_of_its_trial(tmp_path: Path) -> None:
    bench = Bench(tmp_path, confirms=[repeat("0000")], num_drawn=1)
    assert bench.board.next_trial() == TrialTask("0000", "configuration of 0000", judged=True)
    bench.finish("0000")
    assert bench.board.next_trial() == TrialTask("0000-s1", "configuration of 0000-s1", judged=False)


def test_the_best_are_confirmed_once_every_trial_is_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path, confirms=[repeat("0000", 1), repeat("0000", 2)], num_drawn=2)
    first, second = bench.begin(), bench.begin()
    assert bench.board.next_trial() == "wait"
    bench.finish(first)
    assert bench.board.next_trial() == "wait"
    assert bench.chosen_from == []
    bench.finish(second)
    assert [bench.begin(), bench.begin()] == ["0000-s1", "0000-s2"]
    assert bench.chosen_from == [{"0000", "0001"}]
    assert bench.board.next_trial() == "wait"
    bench.finish("0000-s1")
    bench.finish("0000-s2")
    assert bench.board.next_trial() is None
    assert len(bench.chosen_from) == 1


def test_a_trial_that_was_not_begun_is_given_out_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first = bench.board.next_trial()
    assert isinstance(first, TrialTask)
    bench.board.returned(first.label)
    assert bench.board.next_trial() == first
    assert [trial.state for trial in read_trials(tmp_path)] == ["waiting"]
    assert bench.over == []


def test_a_trial_that_was_given_out_counts_as_running(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_drawn=1)
    bench.board.next_trial()
    assert bench.board.next_trial() == "wait"
    assert bench.stored["0000"].state == "waiting"


# --- what became of a trial ---------------------------------------------------------------------------------------


def test_a_finished_trial_has_the_value_of_its_result(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    label = bench.begin()
    bench.board.reported(label, 1, 0.9)
    bench.finish(label, 0.7)
    trial = bench.stored[label]
    assert (trial.state, trial.value, trial.curve, trial.message) == ("finished", 0.7, ((1, 0.9),), "")
    assert bench.told == bench.over == [trial]


@pytest.mark.parametrize(("maximise", "best"), [(True, 0.75), (False, 0.25)])
def test_a_pruned_trial_has_the_best_of_its_curve(tmp_path: Path, maximise: bool, best: float) -> None:
    bench = Bench(tmp_path, maximise=maximise)
    label = bench.begin()
    for epoch, value in enumerate((0.5, 0.25, 0.75, 0.6), start=1):
        bench.board.reported(label, epoch, value)
    bench.board.ended(label, None)
    assert (bench.stored[label].state, bench.stored[label].value) == ("pruned", best)


def test_a_trial_that_ends_before_an_evaluation_has_no_value(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    label = bench.begin()
    bench.board.ended(label, None)
    assert (bench.stored[label].state, bench.stored[label].value) == ("pruned", None)


def test_a_trial_that_says_why_it_failed(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    label = bench.begin()
    bench.leave(label, status="failed", error="loss: it is not finite")
    bench.board.ended(label, None)
    assert (bench.stored[label].state, bench.stored[label].message) == ("failed", "loss: it is not finite")
    assert bench.told[0].state == "failed"


def test_a_process_that_died_failed_but_not_after_its_result(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    first, second = bench.begin(), bench.begin()
    bench.board.ended(first, "its process died")
    bench.leave(second, status="finished", trial_value=0.5)
    bench.board.ended(second, "its process died")
    assert (bench.stored[first].state, bench.stored[first].message) == ("failed", "its process died")
    assert (bench.stored[second].state, bench.stored[second].value) == ("finished", 0.5)


def test_what_an_earlier_start_failed_of_does_not_judge_this_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, waiting=[Trial("0007", {"t": 7.0})])
    bench.leave("0007", status="failed", error="the disk was full")
    label = bench.begin()
    bench.board.reported(label, 1, 0.5)
    bench.board.ended(label, None)
    assert (bench.stored["0007"].state, bench.stored["0007"].value) == ("pruned", 0.5)


def test_a_lost_process_repeats_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    label = bench.begin()
    for epoch, value in ((1, 0.1), (2, 0.2), (3, 0.3)):
        bench.board.reported(label, epoch, value)
    bench.board.retried(label)
    bench.board.started(label)
    bench.board.reported(label, 2, 0.25)
    assert bench.stored[label].curve == ((1, 0.1), (2, 0.25))
    assert (bench.stored[label].retries, bench.stored[label].state) == (1, "running")
    assert len(bench.begun) == 1
    assert bench.events("warning") == [{"message": "trial 0000 lost its process and is tried once more"}]


def test_a_value_that_is_no_number_damages_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    label = bench.begin()
    bench.board.reported(label, 1, math.nan)
    bench.board.reported(label, 2, 0.5)
    bench.board.ended(label, None)
    assert bench.stored[label].state == "pruned"
    assert bench.board.trials[label].value == 0.5


def test_seconds_add_up_over_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    bench = Bench(tmp_path, waiting=[Trial("0007", {"t": 7.0}, seconds=5.0)])
    label = bench.begin()
    now[0] += 2.0
    bench.board.reported(label, 1, 0.5)
    assert bench.stored[label].seconds == pytest.approx(7.0)
    now[0] += 3.0
    bench.finish(label)
    assert bench.stored[label].seconds == pytest.approx(10.0)


# --- when it ends -------------------------------------------------------------------------------------------------


def test_after_the_deadline_what_runs_ends_and_the_best_are_confirmed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, confirms=[repeat("0000")], deadline=time.time() + 1000)
    label = bench.begin()
    assert not bench.board.ends(label, 1)
    bench.board.deadline = time.time() - 1
    assert bench.board.ends(label, 1)
    assert bench.board.next_trial() == "wait"
    bench.finish(label)
    confirming = bench.begin()
    assert confirming == "0000-s1"
    assert not bench.board.ends(confirming, 1)


def test_after_the_deadline_no_trial_of_an_earlier_start_is_begun(tmp_path: Path) -> None:
    bench = Bench(tmp_path, waiting=[Trial("0007", {"t": 7.0})], confirms=[repeat("0000")], deadline=time.time() - 1)
    bench.finish(bench.begin())
    assert (bench.board.next_trial(), list(bench.stored)) == (None, ["0000-s1"])


def test_too_many_failures_end_the_search(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_failed=2)
    bench.board.ended(bench.begin(), "it broke")
    assert not bench.board.must_stop()
    bench.board.ended(bench.begin(), "it broke again")
    assert bench.board.must_stop()
    assert [trial.message for trial in bench.board.failed] == ["it broke", "it broke again"]


def test_failures_of_confirming_runs_do_not_count(tmp_path: Path) -> None:
    bench = Bench(tmp_path, confirms=[repeat("0000", seed) for seed in (1, 2)], num_drawn=1, max_failed=1)
    bench.finish(bench.begin())
    for _ in range(2):
        bench.board.ended(bench.begin(), "it broke")
    assert not bench.board.must_stop()
    assert len(bench.told) == 1  # samplers learn from the search alone


# --- files --------------------------------------------------------------------------------------------------------


def test_files_are_what_the_board_knows_at_each_moment(tmp_path: Path) -> None:
    bench = Bench(tmp_path, confirms=[repeat("0001")], num_drawn=2)
    states = []

    def look() -> None:
        assert bench.stored == bench.board.trials
        states.append({label: trial.state for label, trial in bench.stored.items()})

    bench.board.next_trial()
    look()
    bench.board.started("0000")
    look()
    bench.begin()
    bench.board.reported("0001", 1, 0.25)
    look()
    bench.finish("0001")
    bench.board.ended("0000", "it broke")
    look()
    bench.begin()
    look()
    assert states == [
        {"0000": "waiting"},
        {"0000": "running"},
        {"0000": "running", "0001": "running"},
        {"0000": "failed", "0001": "finished"},
        {"0000": "failed", "0001": "finished", "0001-s1": "running"},
    ]


def test_a_search_goes_on_with_what_came_to_nothing() -> None:
    trials = [
        Trial("0000", {}, state="finished", value=0.5),
        Trial("0001", {}, state="pruned", value=0.5),
        Trial("0002", {}, state="failed", message="it broke", seconds=3.0),
        Trial("0003", {}, state="running", curve=((1, 0.5),)),
        Trial("0004", {}),
    ]
    again = list(unfinished(trials))
    assert [(trial.label, trial.state, trial.message) for trial in again] == [
        ("0002", "waiting", ""), ("0003", "waiting", ""), ("0004", "waiting", ""),
    ]  # fmt: skip
    assert again[0].seconds == 3.0


def test_the_best_are_finished_trials_of_the_search_itself() -> None:
    trials = [
        Trial("0000", {}, state="finished", value=0.5),
        Trial("0001", {}, state="finished", value=0.75),
        Trial("0002", {}, state="pruned", value=0.9),
        Trial("0003", {}, state="finished", value=0.5),
        Trial("0001-s1", {}, 1, "0001", state="finished", value=0.95),
        Trial("0004", {}, state="finished"),
    ]
    assert [trial.label for trial in best_trials(trials, True)] == ["0001", "0000", "0003"]
    assert [trial.label for trial in best_trials(trials, False)] == ["0000", "0003", "0001"]


def test_what_samplers_are_told_of_earlier_starts() -> None:
    trials = [
        Trial("0000", {"t": 1.0}, state="finished", value=0.5, curve=((1, 0.5),)),
        Trial("0001", {"t": 2.0}, state="pruned", value=0.25),
        Trial("0002", {"t": 3.0}, state="failed", value=0.9),
        Trial("0003", {"t": 4.0}, state="running"),
        Trial("0000-s1", {"t": 1.0}, 1, "0000", state="finished", value=0.5),
    ]
    assert past_trials(trials) == [
        PastTrial("0000", {"t": 1.0}, 0.5, ((1, 0.5),)),
        PastTrial("0001", {"t": 2.0}, 0.25, (), pruned=True),
        PastTrial("0002", {"t": 3.0}, None),
    ]


# --- events -------------------------------------------------------------------------------------------------------


def test_events_tell_of_each_trial_and_how_far_the_search_is(tmp_path: Path) -> None:
    earlier = Trial("0009", {"t": 9.0}, state="finished", value=0.6)
    bench = Bench(tmp_path, earlier=[earlier], confirms=[repeat("0001")], num_drawn=3)
    for _ in range(3):
        bench.begin()
    bench.board.reported("0000", 1, 0.1)
    bench.board.reported("0000", 2, 0.2)
    bench.finish("0000", 0.5)
    bench.finish("0001", 0.75)
    bench.board.ended("0002", "it broke")
    bench.begin()
    bench.finish("0001-s1", 0.1)
    events = bench.events()
    names = ("label", "state", "value", "epochs", "best", "phase", "num_done", "num_trials")
    assert [tuple(event[name] for name in names) for event in events] == [
        ("0000", "running", None, 0, False, "search", 1, 4),
        ("0001", "running", None, 0, False, "search", 1, 4),
        ("0002", "running", None, 0, False, "search", 1, 4),
        ("0000", "finished", 0.5, 2, False, "search", 2, 4),
        ("0001", "finished", 0.75, 0, True, "search", 3, 4),
        ("0002", "failed", None, 0, False, "search", 4, 4),
        ("0001-s1", "running", None, 0, False, "confirm", 0, 1),
        ("0001-s1", "finished", 0.1, 0, True, "confirm", 1, 1),
    ]
    assert events[5]["message"] == "it broke"
    assert events[0]["draw"] == {"t": 0.0}


@pytest.mark.parametrize(("maximise", "expected"), [(True, [True, False, True]), (False, [True, True, False])])
def test_the_best_so_far_is_marked(tmp_path: Path, maximise: bool, expected: list[bool]) -> None:
    bench = Bench(tmp_path, maximise=maximise)
    for value in (0.5, 0.25, 0.75):
        bench.finish(bench.begin(), value)
    assert [event["best"] for event in bench.events() if event["state"] == "finished"] == expected


def test_confirming_runs_of_earlier_starts_count(tmp_path: Path) -> None:
    earlier = [
        Trial("0000", {"t": 0.0}, state="finished", value=0.5),
        Trial("0000-s1", {"t": 0.0}, 1, "0000", state="finished", value=0.5),
    ]
    bench = Bench(tmp_path, earlier=earlier, confirms=[repeat("0000", 2)], num_drawn=0)
    bench.finish(bench.begin())
    assert [(event["num_done"], event["num_trials"]) for event in bench.events()] == [(1, 2), (2, 2)]
