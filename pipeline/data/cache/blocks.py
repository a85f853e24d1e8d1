"""The rows of parts that are still to be computed, as blocks for the teacher, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.cache.parts import PartLayout, PartWriter
from pipeline.data.order.epochs import BlockPlan


@dataclass(frozen=True)
class PartBlocks:
    """Full blocks of the rows of parts, view by view and within a view in the order of their ids.

    The last block of a view is filled up with its last row: a stream has blocks of one size, and one view each.

    Attributes:
        layout: which rows make up each part.
        places: view and number of each part, by view and then by number.
        batch_size: rows of a block.
    """

    layout: PartLayout
    places: tuple[tuple[int, int], ...]
    batch_size: int

    @property
    def num_rows(self) -> int:
        """Without those that fill up."""
        return sum(len(ids) for _, ids in self._views)

    @property
    def num_blocks(self) -> int:
        return int(self._ends[-1]) if self._views else 0

    def plans(self, first: int, stop: int) -> Iterator[BlockPlan]:
        """The plans of blocks ``first`` to ``stop``."""
        for position in range(first, stop):
            number = int(np.searchsorted(self._ends, position, side="right"))
            view, ids = self._views[number]
            begin = self.batch_size * (position - (int(self._ends[number - 1]) if number else 0))
            chosen = np.minimum(np.arange(begin, begin + self.batch_size), len(ids) - 1)
            yield BlockPlan(position, view, view, ids[chosen])

    @cached_property
    def _views(self) -> list[tuple[int, np.ndarray]]:
        by_view: dict[int, list[np.ndarray]] = {}
        for view, index in self.places:
            by_view.setdefault(view, []).append(self.layout.ids(index))
        return [(view, np.concatenate(parts)) for view, parts in by_view.items()]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Block after the last one of each view."""
        return np.cumsum([-(-len(ids) // self.batch_size) for _, ids in self._views])


class PartAssembler:
    """Puts the logits of consecutive blocks together into parts, and writes each as soon as it is whole.

    Args:
        blocks: what is computed.
        writer: of the cache.
    """

    def __init__(self, blocks: PartBlocks, writer: PartWriter) -> None:
        self._writer = writer
        self._places = list(blocks.places)
        self._left_of_view: dict[int, int] = {}
        for view, index in blocks.places:
            self._left_of_view[view] = self._left_of_view.get(view, 0) + len(blocks.layout.ids(index))
        self._sizes = [len(blocks.layout.ids(index)) for _, index in blocks.places]
        self._next = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, sample_ids: np.ndarray, logits: np.ndarray) -> int:
        """Takes the next block; returns how many of its rows were due, those that fill up not counted.

        Args:
            sample_ids: (B,) int64; NO_SAMPLE for rows that could not be decoded.
            logits: (B, C) float32.
        """
        view = self._places[self._next][0]
        due = min(len(sample_ids), self._left_of_view[view])
        self._left_of_view[view] -= due
        self._pending.append((sample_ids[:due], logits[:due]))
        num_pending = sum(len(ids) for ids, _ in self._pending)
        if num_pending >= self._sizes[self._next]:
            ids, values = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
            begin = 0
            while self._next < len(self._places) and num_pending - begin >= self._sizes[self._next]:
                end = begin + self._sizes[self._next]
                self._writer.write(*self._places[self._next], ids[begin:end], values[begin:end])
                begin, self._next = end, self._next + 1
            self._pending = [(ids[begin:], values[begin:])]
        return due

    @property
    def is_done(self) -> bool:
        """Whether every part is written."""
        return self._next == len(self._places)
