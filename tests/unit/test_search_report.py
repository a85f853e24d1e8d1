"""What a search shows people: tables, CSV, charts, importances and the live view."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.contracts.events import Event
from pipeline.evaluation.bootstrap import Interval
from pipeline.report.live import LiveView
from pipeline.report.search import (
    Candidate,
    TrialRow,
    render_candidates,
    render_trials,
    show_interval,
    sort_rows,
    trials_csv,
)
from pipeline.report.search_charts import importances, render_charts
from pipeline.report.state import TrialsState
from pipeline.report.tables import MAX_WIDTH
from pipeline.search import Space
from pipeline.search.study import PastTrial, make_study

START = 1_700_000_000.0
NO_BOUNDS = Interval(mean=0.5, low=math.nan, high=math.nan)
SPACE = Space.parse(
    {
        "loss": {"temperature": {"distribution": "loguniform", "low": 1, "high": 16}},
        "train": {"batch_size": {"distribution": "integer", "low": 8, "high": 64, "step": 8}},
        "student": {"act": {"distribution": "choice", "options": ["relu", "gelu"]}},
    }
)
BRANCHED = Space.parse(
    {
        "loss": {
            "distribution": "choice",
            "options": {
                "kd": {"temperature": {"distribution": "uniform", "low": 1, "high": 9}},
                "dist": {"weight": {"distribution": "uniform", "low": 0, "high": 1, "step": 0.25}},
                "plain": {},
            },
        }
    }
)


def row(label: str, state: str = "finished", value: float | None = 0.5, **changes: Any) -> TrialRow:
    values: dict[str, Any] = {"epochs": 3, "seconds": 61.0, "values": {"loss.temperature": 4.0}}
    return TrialRow(label, state, value, **(values | changes))


def lines_with(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_best_come_first_and_failures_last() -> None:
    rows = [
        row("0005", "waiting", None),
        row("0004", "failed", None),
        row("0003", "pruned", 0.9),
        row("0002", "finished", 0.25),
        row("0001", "finished", 0.75),
        row("0000", "finished", None),
    ]
    assert [found.label for found in sort_rows(rows, True)] == ["0001", "0002", "0000", "0003", "0004", "0005"]
    assert [found.label for found in sort_rows(rows, False)] == ["0002", "0001", "0000", "0003", "0004", "0005"]


def test_equals_stand_by_their_names() -> None:
    assert [found.label for found in sort_rows([row("0002"), row("0001")], True)] == ["0001", "0002"]


def test_a_table_has_what_was_varied() -> None:
    rows = [
        row("0000", value=0.25, values={"loss": "kd", "loss=kd: loss.temperature": 3.14159}),
        row("0001", value=0.75, values={"loss": "dist", "loss=dist: loss.weight": 0.5}),
        row("0002", "failed", None, values={}, message="it broke", epochs=0),
        row("0003", "pruned", 0.5, values={}),
    ]
    table = render_trials("4 trials", rows, "val/top1", True)
    assert table.startswith("4 trials\n")
    assert [line.split()[0] for line in table.splitlines() if line[:4].isdigit()] == ["0001", "0000", "0003", "0002"]
    (kd,) = lines_with(table, "0000")
    assert re.search(r"finished +0\.2500 +3 +1 min 01 s +loss kd, temperature 3\.142$", kd)
    assert lines_with(table, "0002")[0].endswith("it broke")
    assert lines_with(table, "0003")[0].endswith("as configured")


def test_a_copy_is_shown_with_the_trial_that_it_came_from() -> None:
    rows = [row("0000"), row("0004", copy_of="0000")]
    table = render_trials("2 trials", rows, "val/top1", True)
    assert [line.split("  ")[0] for line in table.splitlines()[-2:]] == ["0000", "0004 from 0000"]
    assert [found["copy_of"] for found in csv.DictReader(io.StringIO(trials_csv(rows)))] == ["", "0000"]


def test_tables_fit_a_terminal() -> None:
    values = {f"train.optimizer.a_long_name_{index}": 0.123456789 for index in range(9)}
    rows = [row(f"{index:04d}", value=index / 100, values=values) for index in range(40)]
    table = render_trials("40 trials", rows, "val/teacher_kl", True)
    assert max(map(len, table.splitlines())) <= MAX_WIDTH
    assert table.endswith("(10 more in search/trials.csv)")
    assert "0039" in table
    assert "0009" not in table
    wide = Interval(mean=-123.4567, low=-1234.5678, high=1234.5678)
    candidates = [Candidate("0000", 0.5, 3, wide, wide), Candidate("defaults", None, 3, wide, None)]
    assert max(map(len, render_candidates(candidates, "val/teacher_kl").splitlines())) <= MAX_WIDTH


def test_candidates_have_their_gain_over_the_defaults() -> None:
    mean, gain = Interval(mean=0.9312, low=0.929, high=0.9334), Interval(mean=0.01, low=-0.01, high=0.03)
    table = render_candidates(
        [Candidate("0007", 0.94, 3, mean, gain), Candidate("defaults", None, 1, NO_BOUNDS, None)], "m"
    )
    (best,), (defaults,) = lines_with(table, "0007"), lines_with(table, "0.5000")
    assert " ".join(best.split()) == "0007 0.9400 3 0.9312 (0.9290 to 0.9334) 0.0100 (-0.0100 to 0.0300)"
    assert defaults.split() == ["defaults", "-", "1", "0.5000"]


def test_an_interval_without_bounds_is_its_mean() -> None:
    assert show_interval(NO_BOUNDS) == "0.5000"
    assert show_interval(Interval(mean=0.5, low=0.25, high=0.75)) == "0.5000 (0.2500 to 0.7500)"


def test_csv_reads_back() -> None:
    rows = [
        row("0000", value=1 / 3, values={"loss": "kd", "loss=kd: loss.temperature": 2.5}),
        row("0001", "failed", None, values={"loss": "plain"}, message='it said "no", then\nbroke'),
        row("0000-s1", values={"loss": "kd"}, seed=1, confirms="0000", seconds=1.234),
    ]
    first, second, third = csv.DictReader(io.StringIO(trials_csv(rows)))
    assert float(first["value"]) == 1 / 3
    assert (first["loss"], first["loss=kd: loss.temperature"], first["seed"]) == ("kd", "2.5", "")
    assert (second["value"], second["loss=kd: loss.temperature"]) == ("", "")
    assert second["message"] == 'it said "no", then\nbroke'
    assert (third["trial"], third["seed"], third["confirms"], third["seconds"]) == ("0000-s1", "1", "0000", "1.23")


def test_csv_of_no_trials_has_its_heading() -> None:
    (heading,) = csv.reader(io.StringIO(trials_csv([])))
    assert heading[:3] == ["trial", "state", "value"]


# --- charts -------------------------------------------------------------------------------------------------------


def plain_trials(count: int) -> list[PastTrial]:
    """Of which only the temperature matters."""
    trials = []
    for index in range(count):
        temperature = 1.0 + 15 * ((index * 7) % count) / count
        draw = {
            "loss.temperature": temperature,
            "train.batch_size": 8 + 8 * (index % 5),
            "student.act": ("relu", "gelu")[index % 2],
        }
        value = -((temperature - 5) ** 2) / 100
        trials.append(PastTrial(f"{index:04d}", draw, value, ((1, value - 0.1), (2, value))))
    return trials


def branched_trials(count: int) -> list[PastTrial]:
    draws: list[Any] = [
        {"loss": "kd", "loss=kd: loss.temperature": 3.0},
        {"loss": "dist", "loss=dist: loss.weight": 0.25},
        {"loss": "plain"},
        {"loss": "kd", "loss=kd: loss.temperature": 5.0},
    ]
    return [PastTrial(f"{index:04d}", draws[index % 4], 0.1 * index, ((1, 0.1 * index),)) for index in range(count)]


@pytest.mark.parametrize("branched", [False, True], ids=["plain", "branched"])
@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_charts_are_a_page_that_needs_no_network(count: int, branched: bool) -> None:
    space, past = (BRANCHED, branched_trials(count)) if branched else (SPACE, plain_trials(count))
    study, _ = make_study(space, past, "max")
    page = render_charts("digits <- a & b", "val/top1", study)
    assert "digits &lt;- a &amp; b" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=.{0,2}http", page)
    if count < 2:
        assert "Fewer than two trials have finished" in page
        assert "Plotly" not in page
    else:
        assert page.count("<script") > page.count("<h2>") >= 4
        assert page.count("plotly.js v") == 1
        assert len(page) < 8_000_000


def test_without_plotlys_script_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError("plotly.min.js")

    monkeypatch.setattr("plotly.offline.get_plotlyjs", missing)
    study, _ = make_study(SPACE, plain_trials(4), "max")
    page = render_charts("a search", "val/top1", study)
    assert "No charts: this installation of plotly lacks its script" in page
    assert "<script" not in page


def test_charts_of_trials_that_were_stopped_or_failed() -> None:
    past = [
        *plain_trials(8),
        PastTrial("0008", plain_trials(1)[0].draw, 0.1, ((1, 0.1),), pruned=True),
        PastTrial("0009", plain_trials(1)[0].draw, None, ((1, 0.1),)),
        PastTrial("0010", plain_trials(1)[0].draw, None, pruned=True),
    ]
    study, _ = make_study(SPACE, past, "min")
    assert [trial.state.name for trial in study.trials[8:]] == ["PRUNED", "FAIL", "FAIL"]
    assert study.best_value == min(trial.value for trial in past[:8] if trial.value is not None)
    assert "Curves" in render_charts("a search", "val/nll", study)


@pytest.mark.parametrize(
    "axis",
    [
        {"distribution": "uniform", "low": 0, "high": 1, "step": 0.3},
        {"distribution": "integer", "low": 0, "high": 10, "step": 3},
    ],
)
def test_a_study_takes_steps_that_do_not_meet_the_end(axis: dict[str, Any]) -> None:
    space = Space.parse({"a": axis})
    past = [PastTrial(str(index), draw, 0.1 * index) for index, draw in enumerate(space.grid())]
    study, _ = make_study(space, past, "max")
    assert [trial.params for trial in study.trials] == [trial.draw for trial in past]


# --- importances --------------------------------------------------------------------------------------------------


def test_importances_name_what_matters() -> None:
    study, _ = make_study(SPACE, plain_trials(24), "max")
    shares = importances(study)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.keys() == {axis.name for axis in SPACE.axes}
    assert next(iter(shares)) == "loss.temperature"
    assert shares["loss.temperature"] > 0.7
    assert "Importance" in render_charts("a search", "val/top1", study)


def test_importances_are_over_what_every_trial_has() -> None:
    study, _ = make_study(BRANCHED, branched_trials(12), "max")
    assert importances(study).keys() <= {"loss"}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_trials_have_no_importances(count: int) -> None:
    assert importances(make_study(SPACE, plain_trials(count), "max")[0]) == {}


def test_equal_trials_have_no_importances() -> None:
    past = [PastTrial(trial.label, trial.draw, 0.5) for trial in plain_trials(8)]
    assert importances(make_study(SPACE, past, "max")[0]) == {}


# --- the live view ------------------------------------------------------------------------------------------------


def trial_event(label: str, state: str, num_done: int, at: float, **changes: Any) -> Event:
    data: dict[str, Any] = {
        "label": label, "state": state, "value": None, "epochs": 0, "seconds": 10.0, "draw": {}, "best": False,
        "message": "", "phase": "search", "num_done": num_done, "num_trials": 4,
    }  # fmt: skip
    return Event("trial", data | changes, time=START + at)


def test_a_run_that_is_no_search_has_no_trials() -> None:
    state = TrialsState()
    assert state.phase == ""
    assert state.time_left_s(START) is None
    assert state.teacher_share is None


def test_the_rest_takes_as_long_as_what_is_done() -> None:
    """Of a search that goes on with one trial done, that one says nothing about the others."""
    state = TrialsState()
    state.update(trial_event("0001", "running", 1, 0))
    assert state.time_left_s(START + 10) is None
    state.update(trial_event("0001", "pruned", 2, 30))
    assert state.time_left_s(START + 30) == pytest.approx(60)
    assert state.count() == "2 of 4 done, 1 pruned"


def test_where_trials_wait_for_each_other_those_that_are_over_say_nothing_of_the_rest() -> None:
    state = TrialsState()
    state.update(trial_event("0001", "paused", 0, 10))
    assert state.count() == "0 of 4 done, 1 paused"
    state.update(trial_event("0001", "pruned", 1, 20))
    assert state.time_left_s(START + 20) is None
    for label, num_done in (("0001-s1", 0), ("0001-s2", 1)):
        state.update(trial_event(label, "finished", num_done, 30 + 10 * num_done, phase="confirm", num_trials=2))
    assert state.time_left_s(START + 40) == pytest.approx(10)


def test_confirming_begins_anew() -> None:
    state = TrialsState()
    state.update(trial_event("0000", "finished", 1, 0, best=True, value=0.9))
    state.update(trial_event("0001", "failed", 2, 0))
    assert state.best is not None
    state.update(trial_event("0000-s1", "running", 0, 40, phase="confirm", num_trials=6))
    assert (state.phase, state.count()) == ("confirm", "0 of 6 done, 1 running")
    assert state.best is None
    state.update(trial_event("0000-s1", "finished", 1, 50, phase="confirm", num_trials=6))
    assert state.time_left_s(START + 50) == pytest.approx(50)


def test_the_teachers_share_is_of_its_stages_and_all_trials() -> None:
    state = TrialsState()
    for name, begins, at in (
        ("logits", True, 0),
        ("training", True, 1),
        ("logits", False, 20),
        ("training", False, 90),
    ):
        state.note_stage(name, begins, START + at)
    state.update(trial_event("0000", "finished", 1, 0, seconds=30.0))
    state.update(trial_event("0000-s1", "finished", 1, 0, seconds=30.0, phase="confirm"))
    assert state.teacher_share == pytest.approx(0.25)


def show(*events: Event, terminal: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, highlight=False, color_system=None)
    with LiveView("a search", Path("runs/s"), with_teacher=True, console=console) as view:
        for event in events:
            view.show(event)
    return text.getvalue()


EVENTS = (
    Event("stage", {"name": "search", "state": "started", "detail": "4 trials, 0 over"}, time=START),
    trial_event("0000", "running", 0, 0),
    trial_event("0001", "running", 0, 0),
    trial_event(
        "0000", "finished", 1, 60, seconds=60.0, value=0.875, epochs=3, best=True,
        draw={"loss": "kd", "loss=kd: loss.temperature": 2.71828},
    ),
    trial_event("0001", "failed", 2, 90, seconds=5.0, message="it broke"),
)  # fmt: skip


def test_each_trial_that_is_over_has_a_line() -> None:
    lines = [line.partition(" ")[2] for line in show(*EVENTS).splitlines()]
    assert lines == [
        "search started: 4 trials, 0 over",
        "trial 0000 finished 0.8750 (best so far) after 3 epochs, 1 min 00 s: loss kd, loss.temperature 2.718; "
        "1 of 4 done, 1 running, 3 min 00 s left",
        "trial 0001 failed after 0 epochs, 5 s: it broke; 2 of 4 done, 1 failed, 1 min 30 s left",
    ]


def test_the_panel_shows_how_far_the_search_is() -> None:
    panel = show(*EVENTS, terminal=True)
    for name, text in (
        ("trials", "2 of 4 done, 1 failed"),
        ("best so far", "trial 0000 finished 0.8750"),
        ("time left", "1 min 30 s"),
        ("teacher's share", "0 % of the time of teacher and trials"),
    ):
        assert re.search(rf"{re.escape(name)} +{re.escape(text)}", panel), name
