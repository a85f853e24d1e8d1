"""The live view of a run: one calm panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.contracts.events import Event
from pipeline.report.display import Display
from pipeline.report.state import RunState
from pipeline.report.tables import MAX_WIDTH, format_number

_STEP_LINE_EVERY_S = 10.0
_WAIT_LINE_EVERY_S = 20.0  # of one service, whatever the number of processes that wait for it
_METRICS_SHOWN = ("top1", "nll", "ece", "agreement")
_REFRESHES_PER_S = 4
_NOT_IN_LINES = ("train/lr", "train/grad_norm")


class LiveView(Display[Live]):
    """Shows a run's events as they come.

    Args:
        title: name of the run.
        folder: the run folder.
        with_teacher: whether waiting for data means waiting for the teacher.
        console: where to write; stdout unless given.
    """

    def __init__(self, title: str, folder: Path, *, with_teacher: bool, console: Console | None = None) -> None:
        super().__init__(console)
        self._title = title
        self._folder = folder
        self._state = RunState(with_teacher)
        self._lock = threading.Lock()  # the panel is drawn from another thread
        self._last_step_line: float | None = None
        self._stage_starts: dict[str, float] = {}
        self._wait_lines: dict[str, float] = {}

    def _make_moving(self) -> Live:
        return Live(console=self._console, get_renderable=self._render, refresh_per_second=_REFRESHES_PER_S)

    def show(self, event: Event) -> None:
        """Takes the next event in; may be called from any thread."""
        with self._lock:
            self._state.update(event)
            line = None if self._moving else self._describe(event)
        if line:
            self._print_line(line, event.time)

    def _describe(self, event: Event) -> str | None:
        """The line for an event, if it deserves one."""
        data = event.data
        if event.kind == "stage":
            return self._describe_stage(event)
        if event.kind == "evaluation":
            return _summarise(data) + (" (best so far)" if data.get("best") else "")
        if event.kind == "figures":
            return str(data.get("message", ""))
        if event.kind == "wait":
            return self._describe_wait(event)
        if event.kind == "warning":
            return f"warning: {data.get('message', '')}"
        if event.kind == "status":
            message = f": {data['message']}" if data.get("message") else ""
            return f"{data.get('status', '')}{message}"
        if event.kind in ("step", "rows"):
            return self._describe_step(event)
        if event.kind == "trial" and data.get("state") != "running":
            return f"{_describe_trial(data)}; {self._state.trials.count()}{self._trials_left()}"
        return None

    def _trials_left(self) -> str:
        left = self._state.time_left_s
        return "" if not left else f", {format_duration(left)} left"

    def _describe_stage(self, event: Event) -> str:
        name, state = str(event.data.get("name", "")), str(event.data.get("state", ""))
        detail = f": {event.data['detail']}" if event.data.get("detail") else ""
        if state == "started":
            self._stage_starts[name] = event.time
        elif name in self._stage_starts:
            state += f" after {format_duration(event.time - self._stage_starts.pop(name))}"
        return f"{name} {state}{detail}"

    def _describe_wait(self, event: Event) -> str | None:
        name = str(event.data.get("name", ""))
        last = self._wait_lines.get(name)
        if event.data.get("waiting"):
            if last is not None and event.time - last < _WAIT_LINE_EVERY_S:
                return None
            self._wait_lines[name] = event.time
        elif self._wait_lines.pop(name, None) is None:
            return None
        return str(event.data.get("message", ""))

    def _describe_step(self, event: Event) -> str | None:
        if self._last_step_line is not None and event.time - self._last_step_line < _STEP_LINE_EVERY_S:
            return None
        self._last_step_line = event.time
        state = self._state
        left = state.time_left_s
        # A line has to fit where logs are read: the rate and the norm of the gradient are in the journal.
        losses = {name: value for name, value in state.losses.items() if name not in _NOT_IN_LINES}
        parts = [self._position(), *self._speed(), _join(_name_values(losses)), state.bottleneck]
        if left is not None:
            parts.append(f"{format_duration(left)} left")
        return ", ".join(part for part in parts if part)

    def _position(self) -> str:
        state = self._state
        if state.rows is not None:
            return f"{state.rows[0]:,} of {state.rows[1]:,} rows"
        of_steps = f"/{state.num_steps:,}" if state.num_steps else ""
        of_epochs = f" of {state.num_epochs}" if state.num_epochs else ""
        return f"step {state.step:,}{of_steps}, {state.epoch}{of_epochs} epochs done"

    def _speed(self) -> list[str]:
        rate = self._state.samples_per_s
        unit = "samples" if self._state.rows is None else "rows"
        return [] if rate is None else [f"{rate:,.0f} {unit}/s"]

    def _render(self) -> RenderableType:
        with self._lock:
            rows = self._rows()
            progress = self._progress_bar()
            warnings, num_warnings = list(self._state.warnings), self._state.num_warnings
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(name, Text(value))
            if name in ("progress", "trials") and progress:
                grid.add_row("", progress)
        parts: list[RenderableType] = [grid]
        for message in warnings:
            parts.append(Text(f"warning: {message}", style="yellow", overflow="ellipsis", no_wrap=True))
        if num_warnings > len(warnings):
            parts.append(Text(f"({num_warnings} warnings in all, see events.jsonl)", style="dim"))
        return Panel(Group(*parts), title=Text(self._title), width=min(self._console.width, MAX_WIDTH))

    def _rows(self) -> list[tuple[str, str]]:
        """(name, value) of everything that is known; what is not has no line."""
        state = self._state
        left = state.time_left_s
        rows = [
            ("stage", f"{state.stage} {state.stage_detail}".strip()),
            ("storage", state.waiting),
            ("progress", self._position() if state.num_steps or state.step or state.rows else ""),
            ("trials", state.trials.count() if state.trials.phase else ""),
            ("best so far", "" if state.trials.best is None else _describe_trial({**state.trials.best, "best": False})),
            ("speed", _join([*self._speed(), state.bottleneck])),
            ("time left", "" if left is None else format_duration(left)),
            ("losses", _join(_losses(state))),
            ("last", _summarise(state.evaluation)),
            ("best", _summarise(state.best)),
            ("teacher pool", state.pool),
            ("teacher's share", _percent(state.trials.teacher_share if state.trials.phase else None)),
            ("status", state.status),
            ("folder", str(self._folder)),
        ]
        return [(name, value) for name, value in rows if value]

    def _progress_bar(self) -> ProgressBar | None:
        if self._state.rows is not None:
            return ProgressBar(total=self._state.rows[1], completed=self._state.rows[0], width=40)
        if self._state.trials.phase:
            return ProgressBar(total=self._state.trials.num_trials, completed=self._state.trials.num_done, width=40)
        if not self._state.num_steps:
            return None
        return ProgressBar(total=self._state.num_steps, completed=self._state.step, width=40)


def _describe_trial(data: Mapping[str, Any]) -> str:
    value = "" if data.get("value") is None else f" {format_number(data['value'])}"
    best = " (best so far)" if data.get("best") else ""
    values = ", ".join(
        f"{name.rpartition(': ')[2]} {format_number(value) if isinstance(value, float) else value}"
        for name, value in data.get("draw", {}).items()
    )
    parts = [
        f"trial {data['label']} {data['state']}{value}{best} after {data['epochs']} epochs, "
        f"{format_duration(data['seconds'])}",
        values,
        str(data.get("message") or ""),
    ]
    return ": ".join(part for part in parts if part)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} % of the time of teacher and trials"


def format_duration(seconds: float) -> str:
    """``7 s``, ``2 min 10 s``, ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _join(parts: list[str]) -> str:
    return ", ".join(part for part in parts if part)


def _losses(state: RunState) -> list[str]:
    return _name_values(state.losses)


def _scores(data: Mapping[str, Any]) -> list[str]:
    """The metrics worth a line, in a fixed order; all of them if none of these is there."""
    metrics = {name.rpartition("/")[2]: value for name, value in (data.get("metrics") or {}).items()}
    chosen = {name: metrics[name] for name in _METRICS_SHOWN if name in metrics}
    return _name_values(chosen or metrics)


def _name_values(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name.removeprefix('train/')} {format_number(value)}"
        for name, value in values.items()
        if isinstance(value, int | float)
    ]


def _summarise(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return ""
    where = ", ".join(f"{name} {data[name]:,}" for name in ("epoch", "step") if isinstance(data.get(name), int))
    return f"{data.get('split', 'evaluation')} after {where or '?'}: {_join(_scores(data))}"
