"""Rows that cannot be used, with ``data.on_bad_row=skip``: what stands in their place, and how they are told of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from pipeline.contracts.events import Emitter, Event
from pipeline.errors import DataError

NO_SAMPLE = -1
"""Sample id in place of a bad row's, where its place is kept and nothing stands in for it."""


def find_substitutes(num_rows: int, bad: Iterable[int]) -> np.ndarray:
    """For each row of a block, the row to use: itself, or the next good one, going on from the start at the end.

    Args:
        num_rows: of the block.
        bad: positions of its bad rows; not all.

    Returns:
        (num_rows,) int64 positions.
    """
    good = np.setdiff1d(np.arange(num_rows), list(bad))
    substitutes: np.ndarray = good[np.searchsorted(good, np.arange(num_rows)) % len(good)]
    return substitutes


def refuse_all_bad(num_rows: int, bad: Mapping[int, str], position: int) -> None:
    """Refuses a training block in which nothing is good.

    Raises:
        DataError: with what is wrong with the first row.
    """
    if len(bad) == num_rows:
        raise DataError(
            f"all {num_rows} rows of block {position} are bad, so none can stand in for the others, although "
            f"data.on_bad_row=skip; the first: {bad[min(bad)]}"
        )


def report_bad_rows(emitter: Emitter | None, split: str, rows: Mapping[int, str]) -> None:
    """Records rows that were left out; the same ones may be recorded any number of times.

    Args:
        emitter: where to; none: nowhere.
        split: they are of.
        rows: sample id to what is wrong with it.
    """
    if emitter is not None and rows:
        message = next(iter(rows.values()))
        told = {str(sample_id): problem for sample_id, problem in rows.items()}
        emitter.emit(Event("warning", {"message": message, "split": split, "bad_rows": told}))
