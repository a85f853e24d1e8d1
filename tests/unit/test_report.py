"""The live view on a terminal and elsewhere, and tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from pipeline.contracts.events import Event
from pipeline.report import LiveView, render_table
from pipeline.report.live import format_duration
from pipeline.report.state import RunState
from pipeline.report.tables import format_number

START = 1_700_000_000.0
FOLDER = Path("/data/runs/20250101-120000-digits")


def step_event(step: int, time: float, **changes: Any) -> Event:
    data = {
        "step": step,
        "epoch": step // 100,
        "samples": 64 * step,
        "metrics": {"train/loss": 0.5, "train/kd": 0.25},
        "samples_per_s": 1234.5,
        "data_wait": 0.43,
    }
    return Event("step", data | changes, time=START + time)


def evaluation_event(step: int, top1: float, time: float = 0.0, best: bool = False) -> Event:
    metrics = {"val/top1": top1, "val/nll": 0.3, "val/num_rows": 100}
    data = {"split": "validation", "step": step, "epoch": step // 100, "metrics": metrics, "best": best}
    return Event("evaluation", data, time=START + time)


def run_events() -> list[Event]:
    """A short run with everything in it, in order."""
    return [
        Event("status", {"status": "running", "message": ""}, time=START),
        Event("stage", {"name": "training", "state": "started", "detail": "2 workers, 3 teacher actors"}, time=START),
        Event("plan", {"num_epochs": 4, "num_steps": 400, "steps_per_epoch": 100, "start_step": 0}, time=START),
        *[step_event(step, time=step / 10) for step in range(10, 210, 10)],
        Event("pool", {"actor": "a", "rows": 900, "rows_per_s": 450.0, "busy": 1.0}, time=START + 20),
        Event("pool", {"actor": "b", "rows": 900, "rows_per_s": 550.0, "busy": 0.5}, time=START + 20),
        evaluation_event(100, 0.75, time=20, best=True),
        evaluation_event(200, 0.5, time=21),
        Event("warning", {"message": "[bold]the cache was made by another version " + "x" * 200}, time=START + 21),
    ]


def show_plain(events: list[Event], with_teacher: bool = True) -> list[str]:
    output = io.StringIO()
    with LiveView("a run", FOLDER, with_teacher=with_teacher, console=Console(file=output, width=100)) as view:
        for event in events:
            view.show(event)
    return output.getvalue().splitlines()


def test_plain_lines_tell_the_run() -> None:
    end = Event("stage", {"name": "training", "state": "finished", "detail": "400 steps"}, time=START + 130)
    lines = show_plain([*run_events(), end])
    text = [line[9:] for line in lines]  # without the time of day
    assert text[0] == "running"
    assert text[1] == "training started: 2 workers, 3 teacher actors"
    assert "validation after epoch 1, step 100: top1 0.7500, nll 0.3000 (best so far)" in text
    assert "validation after epoch 2, step 200: top1 0.5000, nll 0.3000" in text
    assert any(line.startswith("warning: [bold]the cache") and line.endswith("x" * 200) for line in text)
    assert text[-1] == "training finished after 2 min 10 s: 400 steps"


def wait_event(time: float, waiting: bool = True) -> Event:
    message = f"waiting for s3://flowers: answered 503 for {time:.0f} s" if waiting else "s3://flowers answers again"
    return Event("wait", {"name": "s3://flowers", "waiting": waiting, "message": message}, time=START + time)


def test_a_service_that_many_processes_wait_for_has_a_line_now_and_then() -> None:
    waits = [wait_event(time + process / 10) for time in (10, 40) for process in range(9)]
    ends = [wait_event(50, waiting=False), wait_event(50.5, waiting=False)]
    assert [line[9:] for line in show_plain([*waits, *ends])] == [
        "waiting for s3://flowers: answered 503 for 10 s",
        "waiting for s3://flowers: answered 503 for 40 s",
        "s3://flowers answers again",
    ]
    state = RunState(with_teacher=False)
    state.update(waits[-1])
    assert state.waiting == "waiting for s3://flowers: answered 503 for 41 s"
    state.update(step_event(10, time=120))  # whoever waited was lost
    assert state.waiting == ""
    state.update(wait_event(121))
    state.update(wait_event(122, waiting=False))
    assert state.waiting == ""


def test_plain_step_lines_come_at_most_every_ten_seconds() -> None:
    lines = [line for line in show_plain(run_events()) if "samples/s" in line]
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["10", "110"]
    expected = (
        "step 110/400, 1 of 4 epochs done, 1,234 samples/s, loss 0.5000, kd 0.2500, "
        "teacher-bound (student waits 43 %), 29 s left"
    )
    assert lines[1][9:] == expected


@pytest.mark.parametrize(
    ("data_wait", "with_teacher", "expected"),
    [
        (0.43, True, "teacher-bound (student waits 43 %)"),
        (0.43, False, "input-bound (student waits 43 %)"),
        (0.15, True, "student-bound"),
        (0.0, False, "student-bound"),
        (None, True, ""),
    ],
)
def test_who_waits_for_whom(data_wait: float | None, with_teacher: bool, expected: str) -> None:
    state = RunState(with_teacher)
    state.update(step_event(1, 0.0, data_wait=data_wait))
    assert state.bottleneck == expected


def test_time_left_follows_the_recent_rate() -> None:
    state = RunState(with_teacher=False)
    state.update(Event("plan", {"num_steps": 1000}, time=START))
    assert state.time_left_s is None
    for step in range(1, 101):  # a slow start, one step in ten seconds
        state.update(step_event(step, time=10.0 * step))
    for step in range(101, 301):  # then ten steps in a second, for longer than the view looks back
        state.update(step_event(step, time=1000.0 + (step - 100)))
    assert state.time_left_s == pytest.approx(700.0)


def test_a_resumed_plan_does_not_count_the_pause() -> None:
    state = RunState(with_teacher=False)
    state.update(Event("plan", {"num_steps": 100}, time=START))
    state.update(step_event(50, 5.0))
    state.update(Event("plan", {"num_steps": 100, "start_step": 40}, time=START + 500))
    assert state.step == 40
    assert state.time_left_s is None


def test_actors_that_fell_silent_are_left_out() -> None:
    state = RunState(with_teacher=True)
    state.update(Event("pool", {"actor": "old", "rows_per_s": 100.0, "busy": 1.0}, time=START))
    state.update(Event("pool", {"actor": "new", "rows_per_s": 20.0, "busy": 0.5}, time=START + 100))
    assert state.pool == "1 actor, 20 rows/s, 50 % busy"


def show_panel(events: list[Event], width: int = 100) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, height=50, force_terminal=True, color_system=None)
    with LiveView("digits/small_cnn<-resnet20/kd/s0", FOLDER, with_teacher=True, console=console) as view:
        for event in events:
            view.show(event)
    return output.getvalue()


def test_panel_shows_what_matters() -> None:
    panel = show_panel(run_events())
    for expected in (
        "digits/small_cnn<-resnet20/kd/s0",
        "training 2 workers, 3 teacher actors ",
        "step 200/400, 2 of 4 epochs done",
        "1,234 samples/s, teacher-bound (student waits 43 %)",
        "20 s",
        "loss 0.5000, kd 0.2500",
        "validation after epoch 2, step 200: top1 0.5000",
        "validation after epoch 1, step 100: top1 0.7500",
        "2 actors, 1,000 rows/s, 75 % busy",
        "warning: [bold]the cache was made by another version",
        str(FOLDER),
    ):
        assert expected in panel


@pytest.mark.parametrize("width", [60, 100, 200])
def test_panel_keeps_to_its_width(width: int) -> None:
    lines = show_panel(run_events(), width).replace("\r", "\n").split("\n")
    visible = [line.replace("\x1b[2K", "").replace("\x1b[1A", "").replace("\x1b[?25l", "") for line in lines]
    assert max(cell_len(line.replace("\x1b[?25h", "")) for line in visible) <= min(width, 100)


@pytest.mark.parametrize("show", [show_plain, show_panel])
def test_events_without_their_data_are_survived(show: Any) -> None:
    kinds = ["status", "stage", "plan", "step", "evaluation", "checkpoint", "pool", "system", "warning", "artifact"]
    assert show([Event(kind, {}, time=START) for kind in [*kinds, "model", "unheard-of"]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(6.6, "7 s"), (59.6, "1 min 00 s"), (130, "2 min 10 s"), (11_100, "3 h 05 min")]
)
def test_durations_are_for_people(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.91234, "0.9123"), (0.0, "0.0000"), (12.3456, "12.35"), (1234.56, "1,235"), (1e-5, "1e-05"), (-0.5, "-0.5000"),
     (float("nan"), "nan"), (2.5e7, "2.5e+07"), (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_are_for_people(value: float, expected: str) -> None:
    assert format_number(value) == expected


def test_table_aligns_and_names_everything() -> None:
    rows = [["teacher", 0.97, 1_712_345, None], ["student [kd]", 0.9512, 9_876, True]]
    table = render_table("digits", ["model", "accuracy", "parameters", "kept"], rows).splitlines()
    assert table[0] == "digits"
    header = next(line for line in table if "accuracy" in line)
    teacher, student = (next(line for line in table if line.startswith(name)) for name in ("teacher", "student"))
    assert teacher.split() == ["teacher", "0.9700", "1,712,345", "-"]
    assert student.split() == ["student", "[kd]", "0.9512", "9,876", "yes"]
    # numbers end in the same column, words start in the same one
    assert header.index("parameters") + len("parameters") == teacher.index("1,712,345") + len("1,712,345")
    assert student.index("9,876") + len("9,876") == teacher.index("1,712,345") + len("1,712,345")


def test_table_folds_instead_of_overflowing_or_cutting() -> None:
    advice = "set " + "long-" * 60 + "end"
    table = render_table("", ["check", "state", "what to do"], [["ray", "ok", ""], ["disk", "fix", advice]])
    assert max(map(cell_len, table.splitlines())) <= 100
    assert "".join(advice.split()) in "".join(table.replace("disk", "").replace("fix", "").split())


def test_table_refuses_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        render_table("", ["a", "b", "c"], [[1, 2]])
