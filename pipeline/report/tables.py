"""Tables for the terminal: results, who needs what, what to repair."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 100
_MISSING = "-"


def render_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as plain text, at most 100 characters wide; long cells are folded.

    Args:
        title: stands above the table; may be empty.
        columns: headings.
        rows: one value for each column; see ``format_cell``. Columns of numbers are aligned right.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {row!r}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, heading in enumerate(columns):
        values = [row[index] for row in rows]
        is_numeric = any(map(_is_number, values)) and all(value is None or _is_number(value) for value in values)
        table.add_column(Text(heading), justify="right" if is_numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_cell(value)) for value in row))
    console = Console(file=io.StringIO(), width=MAX_WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        if title:
            console.print(Text(title), end="\n\n")
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"


def format_cell(value: object) -> str:
    """``1234567`` as ``1,234,567``, floats with four digits, None as a dash, all else as it is."""
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return format_number(value)
    return str(value)


def format_number(value: float) -> str:
    """Four significant digits, without an exponent where a person can do without."""
    if value == 0 or 1e-3 <= abs(value) < 1:
        return f"{value:.4f}"
    if 1 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 4 - len(str(int(abs(value)))))}f}"
    return f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
