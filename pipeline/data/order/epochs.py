"""The order of training: which samples every block of a run holds, as a function of the configuration alone.

This order is a contract. Resuming, caches of teacher logits and comparisons between runs rely on it, so a change to
it is a change of results; a test holds golden values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.order.rows import GROUP_KEY, ORDER_KEY, permutation
from pipeline.data.sources.source import SplitReader
from pipeline.errors import DataError


@dataclass(frozen=True, eq=False)
class _Windows:
    """The windows of one epoch.

    Attributes:
        groups: the row groups of each window, ascending.
        starts: (num_windows + 1,) position in the epoch at which each window starts.
        bounds: ``RowGroups.bounds``.
    """

    groups: list[np.ndarray]
    starts: np.ndarray
    bounds: np.ndarray


class EpochOrder:
    """The order of a split's rows in every epoch.

    The rows of window w, in the order of their ids, are permuted by the key (seed, epoch, w). A split in memory is
    one window. Otherwise the split's row groups are permuted, by the key (seed, epoch), and consecutive ones form a
    window as long as they fit in ``window_bytes``. A window holds whole groups, so reading it touches no other; and
    where a single one holds all groups, the order is that of the split in memory.

    Pickles without any permutation: rows and groups are kept as rules and small arrays.

    Args:
        reader: of the train split; not kept.
        seed: of the run, >= 0.
        window_bytes: largest window; one larger group is a window by itself. None: all rows are one window, as they
            are where the reader has no row groups.
    """

    def __init__(self, reader: SplitReader, seed: int, window_bytes: int | None = None) -> None:
        self._rows = reader.rows
        self._groups = None if window_bytes is None else reader.groups
        self._seed = seed
        self._window_bytes = window_bytes
        self._last: tuple[int, _Windows] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample ids at positions ``start`` to ``stop`` of an epoch.

        Returns:
            (stop - start,) int64.
        """
        if self._groups is None:
            order = permutation(self.num_rows, (ORDER_KEY, self._seed, epoch, 0))
            ids: np.ndarray = self._rows.ids[order[start:stop]]
            return ids
        windows = self._windows(epoch)
        first, last = np.searchsorted(windows.starts, [start, stop - 1], side="right") - 1
        parts = [self._window_ids(windows, epoch, window) for window in range(first, last + 1)]
        offset = int(windows.starts[first])
        return np.concatenate(parts)[start - offset : stop - offset]

    def _window_ids(self, windows: _Windows, epoch: int, window: int) -> np.ndarray:
        bounds = windows.bounds
        ids = np.concatenate([self._rows.ids[bounds[g] : bounds[g + 1]] for g in windows.groups[window]])
        shuffled: np.ndarray = ids[permutation(len(ids), (ORDER_KEY, self._seed, epoch, int(window)))]
        return shuffled

    def _windows(self, epoch: int) -> _Windows:
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._make_windows(epoch))
        return self._last[1]

    def _make_windows(self, epoch: int) -> _Windows:
        assert self._groups is not None  # both for the type checker
        assert self._window_bytes is not None
        bounds = self._groups.bounds(self._rows)
        group_rows = np.diff(bounds)
        order = permutation(len(self._groups), (GROUP_KEY, self._seed, epoch))
        order = order[group_rows[order] > 0]  # a group may have lost all of its rows to validation and test
        cuts, window_bytes = [], 0
        for position, num_bytes in enumerate(self._groups.num_bytes[order].tolist()):
            if position and window_bytes + num_bytes > self._window_bytes:
                cuts.append(position)
                window_bytes = 0
            window_bytes += num_bytes
        groups = [np.sort(window) for window in np.split(order, cuts)]
        sizes = [int(group_rows[window].sum()) for window in groups]
        return _Windows(groups, np.concatenate([[0], np.cumsum(sizes)]), bounds)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """One block of the run.

    Attributes:
        position: of the block in the run, from 0.
        epoch: it belongs to.
        view: of its samples.
        sample_ids: (batch_size,) int64.
    """

    position: int
    epoch: int
    view: int
    sample_ids: np.ndarray


class BlockPlanner:
    """Cuts epochs, one after the other and without padding, into blocks of ``batch_size`` rows.

    The rows left over at the end of an epoch (fewer than a block) sit that epoch out; the next one draws anew.

    Args:
        order: of the train split.
        num_rows: of the train split.
        batch_size: rows of a block.
        num_views: the view is the epoch modulo this; none: the epoch.

    Raises:
        DataError: the split has fewer rows than one block.
    """

    def __init__(self, order: EpochOrder, num_rows: int, batch_size: int, num_views: int | None) -> None:
        self.order = order
        self.batch_size = batch_size
        self.num_views = num_views
        self.blocks_per_epoch = num_rows // batch_size
        if self.blocks_per_epoch == 0:
            raise DataError(
                f"train.batch_size={batch_size} is larger than the train split of {num_rows} rows; "
                f"set train.batch_size to {num_rows} or less."
            )

    def epoch_of(self, position: int) -> int:
        """The epoch that a block belongs to."""
        return position // self.blocks_per_epoch

    def block(self, position: int) -> BlockPlan:
        """The plan of one block."""
        epoch, index = divmod(position, self.blocks_per_epoch)
        view = epoch if self.num_views is None else epoch % self.num_views
        start = index * self.batch_size
        return BlockPlan(position, epoch, view, self.order.ids(epoch, start, start + self.batch_size))

    def blocks(self, start: int, stop: int) -> Iterator[BlockPlan]:
        """The plans of blocks ``start`` to ``stop``."""
        return (self.block(position) for position in range(start, stop))
