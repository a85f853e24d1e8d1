"""Blocks: rows read in training order, then decoded and augmented. Shared by Ray tasks and the in-process iterator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import BLOCK, INPUT, LABEL, SAMPLE_ID, VIEW
from pipeline.data.augment import AugmentParams, augment
from pipeline.data.order import BlockPlan
from pipeline.data.source import RowDecoder, SplitReader
from pipeline.errors import StreamError


def read_blocks(reader: SplitReader, plans: Iterable[BlockPlan]) -> pa.Table:
    """Reads the rows of several blocks, still encoded, in one go.

    Args:
        reader: of the train split.
        plans: the blocks, usually consecutive ones; at least one.

    Returns:
        The blocks' rows one after the other: ``sample_id``, ``encoded``, ``label``, ``view`` int32, ``block`` int64.
    """
    plans = list(plans)
    sizes = [len(plan.sample_ids) for plan in plans]
    table = reader.read(np.concatenate([plan.sample_ids for plan in plans]))
    views = np.repeat(np.array([plan.view for plan in plans], np.int32), sizes)
    positions = np.repeat(np.array([plan.position for plan in plans], np.int64), sizes)
    return table.append_column(VIEW, pa.array(views)).append_column(BLOCK, pa.array(positions))


def decode_block(table: pa.Table, decoder: RowDecoder, params: AugmentParams, seed: int) -> dict[str, np.ndarray]:
    """Decodes and augments one block.

    Args:
        table: the rows of one block, as ``read_blocks`` gives them.
        decoder: of the train split.
        params: augmentation.
        seed: of the run.

    Returns:
        ``sample_id`` int64, ``view`` int32, ``block`` int64, ``label`` int64, each (B,), and ``input``: uint8
        (B, C, H, W) or float32 (B, F). All writable.

    Raises:
        StreamError: the rows belong to more than one block.
        DataError: a row cannot be decoded.
    """
    views, positions = table[VIEW].to_numpy(), table[BLOCK].to_numpy()
    if (positions != positions[0]).any() or (views != views[0]).any():
        raise StreamError(
            f"{len(positions)} rows of blocks {positions.min()} to {positions.max()} arrived as one block, expected "
            "rows of one; the stream has merged or cut blocks. Please report this.",
        )
    sample_ids = table[SAMPLE_ID].to_numpy()
    return _make_writable(
        {
            SAMPLE_ID: sample_ids,
            VIEW: views,
            BLOCK: positions,
            INPUT: augment(decoder.decode(table), sample_ids, int(views[0]), seed, params),
            LABEL: table[LABEL].to_numpy(),
        }
    )


def iterate_rows(
    decoder: RowDecoder, reader: SplitReader, rank: int, world_size: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """One worker's share of a split, for evaluation: rows rank, rank + world_size, ... in the order of ids.

    Every row comes to exactly one rank, and is not augmented.

    Args:
        decoder: of the split.
        reader: of the split.
        rank: of the worker.
        world_size: number of workers.
        batch_size: rows of a batch; the last may be shorter.

    Yields:
        ``sample_id`` int64 (B,), ``label`` int64 (B,), and ``input`` uint8 (B, C, H, W) or float32 (B, F); all
        writable.
    """
    sample_ids = reader.sample_ids[rank::world_size]
    for start in range(0, len(sample_ids), batch_size):
        table = reader.read(sample_ids[start : start + batch_size])
        columns = {
            SAMPLE_ID: table[SAMPLE_ID].to_numpy(),
            INPUT: decoder.decode(table),
            LABEL: table[LABEL].to_numpy(),
        }
        yield _make_writable(columns)


def _make_writable(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Views of Arrow's memory are read-only, and torch warns of every tensor made from one.
    return {name: values if values.flags.writeable else values.copy() for name, values in columns.items()}
