"""What a search has come to, for people: a table, a CSV file, the verdict on its winner."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.bootstrap import Interval
from pipeline.report.live import format_duration
from pipeline.report.tables import render_table

_MAX_ROWS = 30


@dataclass(frozen=True)
class TrialRow:
    """A trial, as tables show it.

    Attributes:
        values: name of an axis to the value on it.
        value: of the metric; none: there was none.
        seed: none: that of the search.
        confirms: label of the trial that it repeats; empty: none.
        copy_of: label of the trial with whose weights it began; empty: none.
    """

    label: str
    state: str
    value: float | None
    epochs: int
    seconds: float
    values: Mapping[str, Any]
    seed: int | None = None
    confirms: str = ""
    message: str = ""
    copy_of: str = ""


@dataclass(frozen=True)
class Candidate:
    """A point that was trained again over fresh seeds.

    Attributes:
        label: of its trial, or ``defaults``.
        first: its value in the search; none: it was no trial.
        mean: over the seeds.
        gain: over the defaults, seed by seed; positive is better.
    """

    label: str
    first: float | None
    num_seeds: int
    mean: Interval
    gain: Interval | None


def render_trials(title: str, rows: Sequence[TrialRow], metric: str, maximise: bool) -> str:
    """Trials, the best first, with the axes on which they differ; the longest tables are cut."""
    ordered = sort_rows(rows, maximise)
    axes = list(dict.fromkeys(name for row in ordered for name in row.values))
    paths = [name.rpartition(": ")[2] for name in axes]
    cells = [
        [_label(row), row.state, row.value, row.epochs, format_duration(row.seconds), _values(row, axes, paths)]
        for row in ordered[:_MAX_ROWS]
    ]
    table = render_table(title, ("trial", "state", metric, "epochs", "time", "values"), cells)
    rest = len(ordered) - _MAX_ROWS
    return table if rest <= 0 else f"{table}\n({rest} more in search/trials.csv)"


def sort_rows(rows: Sequence[TrialRow], maximise: bool) -> list[TrialRow]:
    """Finished ones by their value, then pruned ones by theirs, then the others by name."""
    rank = {"finished": 0, "pruned": 1}

    def key(row: TrialRow) -> tuple[int, float, str]:
        value = math.inf if row.value is None else (-row.value if maximise else row.value)
        return rank.get(row.state, 2), value, row.label

    return sorted(rows, key=key)


def _label(row: TrialRow) -> str:
    return f"{row.label} from {row.copy_of}" if row.copy_of else row.label


def _values(row: TrialRow, axes: Sequence[str], paths: Sequence[str]) -> str:
    parts = []
    for name, path in zip(axes, paths, strict=True):
        if name in row.values:
            value = row.values[name]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{path.removeprefix('loss.')} {shown}")
    return ", ".join(parts) or row.message or "as configured"


def trials_csv(rows: Sequence[TrialRow]) -> str:
    """One line a trial, in the order of their names; a column for each axis."""
    axes = list(dict.fromkeys(name for row in rows for name in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "value", "epochs", "seconds", "seed", "confirms", "copy_of", *axes, "message"])
    for row in rows:
        value = "" if row.value is None else repr(row.value)
        seed = "" if row.seed is None else row.seed
        cells = [row.values.get(name, "") for name in axes]
        facts = [row.label, row.state, value, row.epochs, f"{row.seconds:.2f}", seed, row.confirms, row.copy_of]
        writer.writerow([*facts, *cells, row.message])
    return text.getvalue()


def render_candidates(candidates: Sequence[Candidate], metric: str) -> str:
    """Those that were confirmed, the best first."""
    cells = [
        [
            candidate.label,
            candidate.first,
            candidate.num_seeds,
            show_interval(candidate.mean),
            "" if candidate.gain is None else show_interval(candidate.gain),
        ]
        for candidate in candidates
    ]
    columns = ("trial", "in the search", "fresh seeds", f"{metric}, mean and 95 %", "better than the defaults by")
    return render_table("confirmed over fresh seeds", columns, cells)


def show_interval(interval: Interval) -> str:
    """``0.9312 (0.9290 to 0.9334)``; the mean alone where one seed gives no bounds."""
    return interval.show() if math.isfinite(interval.low) else f"{interval.mean:.4f}"
