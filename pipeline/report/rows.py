"""How far a command that goes once over rows has got: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.report.display import Display
from pipeline.report.live import format_duration

_LINE_EVERY_S = 10.0


class RowProgress(Display[Progress]):
    """Shows rows done, rows a second and the time left.

    Args:
        num_rows: to be done.
        console: where to write; stdout unless given.
    """

    def __init__(self, num_rows: int, console: Console | None = None) -> None:
        super().__init__(console)
        self._num_rows = num_rows
        self._num_done = 0
        self._started: float | None = None  # when the first rows were done: starting up is no measure of speed
        self._num_started = 0
        self._now = self._last_line = time.monotonic()

    def _make_moving(self) -> Progress:
        bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self._console)
        bar.add_task(self._describe(), total=self._num_rows)
        return bar

    @property
    def rows_per_s(self) -> float | None:
        """Speed from the first rows that were done to the last; none before there are others than the first."""
        if self._started is None or self._num_done == self._num_started:
            return None
        return (self._num_done - self._num_started) / max(self._now - self._started, 1e-9)

    def advance(self, num_rows: int) -> None:
        """Takes in that ``num_rows`` more are done."""
        self._now = time.monotonic()
        self._num_done += num_rows
        if self._started is None:
            self._started, self._num_started = self._now, self._num_done
        if self._moving:
            self._moving.update(self._moving.task_ids[0], completed=self._num_done, description=self._describe())
        elif self._now - self._last_line >= _LINE_EVERY_S:
            self._last_line = self._now
            self._print_line(self._describe())

    def _describe(self) -> str:
        parts = [f"{self._num_done:,} of {self._num_rows:,} rows"]
        rate = self.rows_per_s
        if rate:
            left = format_duration((self._num_rows - self._num_done) / rate)
            parts += [f"{rate:,.0f} rows/s", f"{left} left"]
        return ", ".join(parts)
