"""Sealing a cache that was filled while training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.contracts.columns import INPUT, SAMPLE_ID
from pipeline.data.cache import CacheBuild, FillWriter, open_build, rewrite_blocks
from pipeline.data.order.blocks import decode_block, read_blocks
from pipeline.data.order.epochs import BlockPlan
from pipeline.data.pixels.augment import AugmentParams
from pipeline.data.pixels.decode import Decoder
from pipeline.data.sources.source import SplitReader
from pipeline.errors import CacheError

_LONGEST_WAIT_S = 1_800.0


@dataclass(frozen=True)
class SealPlan:
    """All that is needed to seal what was filled, in any process.

    Attributes:
        path: ``cache.path``.
        writer: that kept the blocks.
        decoder: of the train split.
        augment: of the run.
        seed: of the augmentation.
        batch_size: rows of a block.
        teacher_accuracy: on the validation split, if known.
        recorded: see ``CacheBuild.seal``.
    """

    path: str
    writer: FillWriter
    decoder: Decoder
    augment: AugmentParams
    seed: int
    batch_size: int
    teacher_accuracy: float | None
    recorded: dict[str, Any]


def seal_fill(
    plan: SealPlan, reader: SplitReader, open_teacher: Callable[[], Callable[[np.ndarray], np.ndarray]]
) -> int:
    """Rewrites what was filled as parts and writes the manifest; what was filled is deleted then.

    Args:
        reader: of the train split.
        open_teacher: called if rows have to be computed; what it returns takes a block's inputs.

    Returns:
        Rows that had to be computed.

    Raises:
        CacheError: see ``rewrite_blocks`` and ``CacheBuild.seal``; another run is still building the cache.
    """

    def compute(view: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        teacher = open_teacher() if len(ids) else None
        for start in range(0, len(ids), plan.batch_size):
            block = BlockPlan(0, view, view, ids[start : start + plan.batch_size])
            table = read_blocks(reader, [block], plan.augment, plan.seed)
            rows = decode_block(table, plan.decoder, plan.augment, plan.seed, substitute=False)
            assert teacher is not None
            yield rows[SAMPLE_ID], teacher(rows[INPUT])

    num_computed = 0
    with _wait_for_build(plan, reader) as build:
        if build.cache is None:
            num_computed = rewrite_blocks(plan.writer, build, compute)
            build.seal(plan.teacher_accuracy, plan.recorded)
        plan.writer.remove()
    return num_computed


def _wait_for_build(plan: SealPlan, reader: SplitReader) -> CacheBuild:
    """Another run may be sealing the same cache; then there is nothing left to do."""
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while True:
        try:
            return open_build(plan.path, plan.writer.key, reader)
        except CacheError as error:
            if not error.details.get("in_use") or time.monotonic() > deadline:
                raise
            time.sleep(1.0)  # between two looks
