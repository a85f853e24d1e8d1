"""Blocks: rows read in training order, then decoded and augmented. Shared by Ray tasks and the in-process iterator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import (
    BLOCK,
    ENCODED,
    INPUT,
    LABEL,
    LABEL_WEIGHT,
    PARTNER_LABEL,
    SAMPLE_ID,
    TEACHER_LOGITS,
    VIEW,
)
from pipeline.data.bad_rows import NO_SAMPLE, find_substitutes, refuse_all_bad
from pipeline.data.cache import LogitsDecoder, LogitsReader
from pipeline.data.order.epochs import BlockPlan
from pipeline.data.pixels.augment import AugmentParams, augment, draw_boxes
from pipeline.data.pixels.decode import BAD, Decoder
from pipeline.data.sources.source import SplitReader
from pipeline.errors import StreamError

# Where images are mixed, the columns of the image that is mixed in, and the names they have as a row of their own.
_PARTNER_COLUMNS = {
    "partner_id": SAMPLE_ID,
    "partner_encoded": ENCODED,
    PARTNER_LABEL: LABEL,
    "partner_bad": BAD,
}

BadRows = Callable[[Mapping[int, str]], None]
"""Takes the sample ids of bad rows, with what is wrong with each."""


def read_blocks(
    reader: SplitReader,
    plans: Iterable[BlockPlan],
    params: AugmentParams | None = None,
    seed: int = 0,
    logits: LogitsReader | None = None,
) -> pa.Table:
    """Reads the rows of several blocks, still encoded, in one go.

    Args:
        reader: of the train split.
        plans: the blocks, usually consecutive ones; at least one.
        params: augmentation, which may mix images; none: it does not.
        seed: of the augmentation.
        logits: of a cache; none: the teacher is asked, or not needed.

    Returns:
        The blocks' rows one after the other: the columns of ``SplitReader.read``, ``view`` int32 and ``block`` int64;
        where images are mixed also ``partner_id``, ``partner_encoded`` and ``partner_label`` of the image mixed in;
        with ``logits`` also the columns that these are stored in.
    """
    plans = list(plans)
    sizes = [len(plan.sample_ids) for plan in plans]
    sample_ids = np.concatenate([plan.sample_ids for plan in plans])
    if params is not None and params.mixes:
        table = _read_pairs(reader, sample_ids, _draw_partners(reader, plans, seed))
    else:
        table = reader.read(sample_ids)
    views = np.repeat(np.array([plan.view for plan in plans], np.int32), sizes)
    positions = np.repeat(np.array([plan.position for plan in plans], np.int64), sizes)
    table = table.append_column(VIEW, pa.array(views)).append_column(BLOCK, pa.array(positions))
    if logits is None:
        return table
    # Views repeat after those that the cache holds: planned alike, or the same where nothing is augmented. Blocks of
    # one view are read at once, because a read of few rows costs more by the row.
    runs = [
        (view, np.concatenate([plan.sample_ids for plan in run]))
        for view, run in itertools.groupby(plans, lambda plan: plan.view % logits.num_views)
    ]
    stored = pa.concat_tables([logits.read(view, ids) for view, ids in runs])
    for name in stored.column_names:
        table = table.append_column(name, stored[name])
    return table


def _draw_partners(reader: SplitReader, plans: list[BlockPlan], seed: int) -> np.ndarray:
    from pipeline.data.pixels.mixing import draw_partners  # only where images are mixed

    drawn = [draw_partners(plan.sample_ids, plan.view, seed, reader.rows, reader.groups) for plan in plans]
    return np.concatenate(drawn)


def _read_pairs(reader: SplitReader, sample_ids: np.ndarray, partner_ids: np.ndarray) -> pa.Table:
    """The rows, with their partners' columns beside them. Read together: they lie in the same row groups."""
    both = reader.read(np.concatenate([sample_ids, partner_ids]))
    table, partners = both.slice(0, len(sample_ids)), both.slice(len(sample_ids))
    for name, own in _PARTNER_COLUMNS.items():
        if own in partners.column_names:
            table = table.append_column(name, partners[own])
    return table


def decode_block(
    table: pa.Table,
    decoder: Decoder,
    params: AugmentParams,
    seed: int,
    on_bad: BadRows | None = None,
    *,
    substitute: bool = True,
    logits: LogitsDecoder | None = None,
) -> dict[str, np.ndarray]:
    """Decodes, augments and mixes one block.

    A row that cannot be used is an error, unless the decoder skips it: then the next good row of the block stands in
    its place, with its sample id, its label and its partner. So a block keeps its size, and what it holds is a
    function of what it would hold. A sample whose partner is bad is mixed with itself.

    Args:
        table: the rows of one block, as ``read_blocks`` gives them.
        decoder: of the train split.
        params: augmentation.
        seed: of the augmentation.
        on_bad: is told which rows were skipped, where there are some.
        substitute: put good rows in the place of bad ones; otherwise a bad row is zeros, with sample id NO_SAMPLE.
        logits: decodes those that were read with the rows; none: there are none.

    Returns:
        ``sample_id`` int64, ``view`` int32, ``block`` int64, ``label`` int64, each (B,), and ``input``: uint8
        (B, C, H, W) or float32 (B, F); where images are mixed also ``partner_label`` int64 (B,) and ``label_weight``
        float32 (B,); with ``logits`` also ``teacher_logits`` float32 (B, num_classes). All writable.

    Raises:
        StreamError: the rows belong to more than one block.
        DataError: a row cannot be used, and is not skipped or has no good one to stand in for it.
        CacheError: a row can be used, but could not be when the cache was built.
    """
    views, positions = table[VIEW].to_numpy(), table[BLOCK].to_numpy()
    if (positions != positions[0]).any() or (views != views[0]).any():
        raise StreamError(
            f"{len(positions)} rows of blocks {positions.min()} to {positions.max()} arrived as one block, expected "
            "rows of one; the stream has merged or cut blocks. Please report this.",
        )
    view = int(views[0])
    sample_ids = table[SAMPLE_ID].to_numpy()
    inputs, bad = _decode(table, decoder, view, seed, params)
    extra: dict[str, np.ndarray] = {}
    if logits is not None:
        extra[TEACHER_LOGITS] = logits(table, bad)
        table = table.drop_columns(logits.columns(table))
    if bad:
        _tell(on_bad, sample_ids, bad)
        if substitute:
            refuse_all_bad(len(sample_ids), bad, int(positions[0]))
            chosen = find_substitutes(len(sample_ids), bad)
            table, inputs, sample_ids = table.take(pa.array(chosen)), inputs[chosen], sample_ids[chosen]
            extra = {name: values[chosen] for name, values in extra.items()}
        else:
            sample_ids = sample_ids.copy()
            sample_ids[list(bad)] = NO_SAMPLE
    columns = {
        SAMPLE_ID: sample_ids,
        VIEW: views,
        BLOCK: positions,
        INPUT: augment(inputs, sample_ids, view, seed, params),
        LABEL: table[LABEL].to_numpy(),
        **extra,
    }
    if params.mixes:
        columns |= _mix(table, columns, inputs, decoder, params, seed, on_bad)
    return _make_writable(columns)


def _mix(
    table: pa.Table,
    columns: Mapping[str, np.ndarray],
    decoded: np.ndarray,
    decoder: Decoder,
    params: AugmentParams,
    seed: int,
    on_bad: BadRows | None,
) -> dict[str, np.ndarray]:
    """The columns that mixing changes or adds.

    Args:
        table: as read.
        columns: of the block, not mixed.
        decoded: its inputs as they were before augmentation.
    """
    from pipeline.data.pixels.mixing import mix  # only where images are mixed

    sample_ids, view = columns[SAMPLE_ID], int(columns[VIEW][0])
    partners = pa.table({own: table[name] for name, own in _PARTNER_COLUMNS.items() if name in table.column_names})
    partner_inputs, bad = _decode(partners, decoder, view, seed, params)
    partner_ids, partner_labels = partners[SAMPLE_ID].to_numpy(), partners[LABEL].to_numpy()
    if bad:
        _tell(on_bad, partner_ids, bad)
        rows = list(bad)
        partner_ids, partner_labels = partner_ids.copy(), partner_labels.copy()
        partner_ids[rows], partner_labels[rows] = sample_ids[rows], columns[LABEL][rows]
        partner_inputs[rows] = decoded[rows]
    partner_inputs = augment(partner_inputs, partner_ids, view, seed, params)
    mixed, weights = mix(columns[INPUT], partner_inputs, sample_ids, view, seed, params)
    return {INPUT: mixed, PARTNER_LABEL: partner_labels, LABEL_WEIGHT: weights}


def _decode(
    rows: pa.Table, decoder: Decoder, view: int, seed: int, params: AugmentParams
) -> tuple[np.ndarray, dict[int, str]]:
    """As ``Decoder.decode_rows``, cut out as the view says."""
    if params.random_resized_crop is None:
        return decoder.decode_rows(rows)
    sample_ids = rows[SAMPLE_ID].to_numpy()
    return decoder.decode_rows(rows, lambda sizes: draw_boxes(sizes, sample_ids, view, seed, params))


def _tell(on_bad: BadRows | None, sample_ids: np.ndarray, bad: Mapping[int, str]) -> None:
    if on_bad is not None:
        on_bad({int(sample_ids[row]): problem for row, problem in bad.items()})


def iterate_rows(
    decoder: Decoder, reader: SplitReader, rank: int, world_size: int, batch_size: int, on_bad: BadRows | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """One worker's share of a split, for evaluation: rows rank, rank + world_size, ... in the order of ids.

    Every row comes to exactly one rank, and is not augmented.

    Args:
        decoder: of the split.
        reader: of the split.
        rank: of the worker.
        world_size: number of workers.
        batch_size: rows of a batch; the last may be shorter.
        on_bad: is told which rows cannot be used, where the decoder skips them.

    Yields:
        ``sample_id`` int64 (B,), ``label`` int64 (B,), ``input`` uint8 (B, C, H, W) or float32 (B, F), and ``bad``
        bool (B,): the row cannot be used, its input is zeros; all writable.
    """
    sample_ids = reader.sample_ids[rank::world_size]
    for start in range(0, len(sample_ids), batch_size):
        table = reader.read(sample_ids[start : start + batch_size])
        inputs, bad = decoder.decode_rows(table)
        columns = {SAMPLE_ID: table[SAMPLE_ID].to_numpy(), INPUT: inputs, LABEL: table[LABEL].to_numpy()}
        if bad:
            _tell(on_bad, columns[SAMPLE_ID], bad)
        yield _make_writable(columns | {BAD: np.isin(np.arange(len(inputs)), list(bad))})


def _make_writable(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Views of Arrow's memory are read-only, and torch warns of every tensor made from one.
    return {name: values if values.flags.writeable else values.copy() for name, values in columns.items()}
