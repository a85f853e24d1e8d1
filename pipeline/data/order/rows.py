"""Which rows a split holds, and the permutations everything random about rows is drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.contracts.columns import SplitName
from pipeline.errors import DataError

# First word of a permutation's key: keeps the draws for different purposes apart, whatever the seeds are.
ORDER_KEY = 1
CARVE_KEY = 2
GROUP_KEY = 3


@lru_cache(maxsize=4)
def permutation(num_rows: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of ``range(num_rows)`` that depends on nothing but its arguments.

    The sorted order of 64 random bits a row, and not ``Generator.permutation``: NumPy promises that the raw bits of
    a bit generator never change (NEP 19), and promises nothing about what ``Generator`` makes of them. Runs are
    resumed, and caches of teacher logits are shared, across NumPy versions.

    Args:
        num_rows: length.
        key: numbers >= 0. Trailing zeros do not count, so keys of one purpose must have one length.

    Returns:
        (num_rows,) int64, read-only (the last few are kept per process).
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(num_rows)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class RowSet:
    """The rows of one split: a rule instead of an array, so that tasks which carry it stay small.

    Positions ``start`` to ``stop`` of a permutation of the source's rows drawn by ``seed``.

    Attributes:
        num_source_rows: rows of the split's source files.
        seed: of the permutation.
        start: first position that belongs to the split.
        stop: position after the last one.
    """

    num_source_rows: int
    seed: int
    start: int
    stop: int

    @classmethod
    def whole(cls, num_source_rows: int) -> RowSet:
        """Every row of the source files."""
        return cls(num_source_rows, 0, 0, num_source_rows)

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def ids(self) -> np.ndarray:
        """Sample ids of the split: int64, ascending, read-only."""
        return _sorted_ids(self)


@lru_cache(maxsize=8)
def _sorted_ids(rows: RowSet) -> np.ndarray:
    if rows.num_rows == rows.num_source_rows:
        ids = np.arange(rows.num_source_rows, dtype=np.int64)
    else:
        ids = np.sort(permutation(rows.num_source_rows, (CARVE_KEY, rows.seed))[rows.start : rows.stop])
    ids.flags.writeable = False
    return ids


def carve(num_rows: int, fractions: Mapping[SplitName, float], seed: int) -> dict[SplitName, RowSet]:
    """Draws splits that have no files of their own out of the rows of the train files.

    Validation is drawn first, so its rows are the same whether or not test is drawn too.

    Args:
        num_rows: rows of the train files.
        fractions: of those rows, for each of validation and test that is to be drawn; at least one row each.
        seed: ``data.split_seed``.

    Returns:
        The rows of each split named in ``fractions``, and of train: all the others.

    Raises:
        DataError: no row would be left for train.
    """
    splits: dict[SplitName, RowSet] = {}
    start = 0
    names: tuple[SplitName, ...] = ("validation", "test")
    for name in names:
        if name in fractions:
            stop = start + max(1, round(num_rows * fractions[name]))
            splits[name] = RowSet(num_rows, seed, start, stop)
            start = stop
    if start >= num_rows:
        wanted = " and ".join(f"{splits[name].num_rows} for {name}" for name in splits)
        raise DataError(
            f"the train files hold {num_rows} rows, too few to carve {wanted} out of and keep one for "
            "train; add rows, or files for the missing splits."
        )
    splits["train"] = RowSet(num_rows, seed, start, num_rows)
    return splits


def divide(
    num_rows: Mapping[SplitName, int], fractions: Mapping[SplitName, float], seed: int
) -> dict[SplitName, RowSet]:
    """The rows of all splits: all that a split has of its own, or else what is carved out of train.

    Args:
        num_rows: of each split that has rows of its own; of train at least.
        fractions: as of ``carve``, for validation and test.
        seed: ``data.split_seed``.

    Raises:
        DataError: no row would be left for train.
    """
    whole = {split: RowSet.whole(number) for split, number in num_rows.items()}
    missing = {split: fraction for split, fraction in fractions.items() if split not in num_rows}
    return whole | carve(num_rows["train"], missing, seed) if missing else whole


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The row groups of a split's files, in the order of sample ids.

    Attributes:
        file: (G,) number of the file.
        index: (G,) number of the group within its file.
        first_row: (G,) int64 sample id of the group's first row.
        num_rows: (G,) int64 rows of the group, whether or not they belong to the split.
        num_bytes: (G,) int64 encoded bytes of the whole group: what reading any of it brings into memory.
    """

    file: np.ndarray
    index: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.first_row)

    def bounds(self, rows: RowSet) -> np.ndarray:
        """(G + 1,) positions in ``rows.ids``: group i holds ``rows.ids[bounds[i]:bounds[i + 1]]``."""
        return np.searchsorted(rows.ids, np.append(self.first_row, rows.num_source_rows))
