"""What the tests of stream and training share: data that can be recognised, and readers of the stream.

Processes of Ray import this module, so it imports neither torch nor pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.cluster.stream import StreamPlan, TrainingBlocks, iterate_stream, share
from pipeline.contracts.columns import InputSpec, SplitName
from pipeline.data import (
    AugmentParams,
    BlockPlanner,
    DataParams,
    DataSource,
    Decoder,
    EpochOrder,
    RowSet,
    SplitReader,
    TableReader,
)
from pipeline.data.sources.source import make_table

T = TypeVar("T")

SEED = 7
NUM_CLASSES = 3


class WideReader(SplitReader):
    """Rows made up when they are read, every number of them another: few rows make a block of any size.

    Args:
        num_rows: at most 254.
        num_features: at most 2**23.
    """

    def __init__(self, num_rows: int, num_features: int) -> None:
        self.rows = RowSet.whole(num_rows)
        self.num_features = num_features

    @property
    def encoded_bytes(self) -> int:
        return 4 * self.num_rows * self.num_features

    def read(self, sample_ids: np.ndarray) -> pa.Table:
        encoded = pa.FixedSizeListArray.from_arrays(pa.array(self.values(sample_ids).reshape(-1)), self.num_features)
        return make_table(sample_ids, encoded, pa.array(sample_ids % NUM_CLASSES))

    def values(self, sample_ids: np.ndarray) -> np.ndarray:
        """(B, num_features) float32: the sample id is the exponent, the column the mantissa."""
        exponents = (sample_ids.astype(np.uint32) + 1) << 23
        return np.bitwise_or.outer(exponents, np.arange(self.num_features, dtype=np.uint32)).view(np.float32)


class TracedParams(DataParams):
    """Feature vectors that carry their sample id in front, so that a network sees which rows it is given."""

    name: str = "traced"
    num_rows: int = 103
    num_features: int = 6

    def open(self) -> TracedSource:
        return TracedSource(self)


class TracedSource(DataSource):
    """The label is the position of the largest of the first features; train has ``num_rows`` rows, validation 20."""

    def __init__(self, params: TracedParams) -> None:
        self.spec = InputSpec("features", (params.num_features + 1,), tuple("abc"))
        self.fingerprint = "traced"
        self.carved = {}
        self.memory_bytes = params.memory_bytes
        self._num_rows = {"train": params.num_rows, "validation": 20, "test": 20}

    def split(self, name: SplitName) -> TableReader:
        rows = self._num_rows[name]
        features = np.random.default_rng(list(name.encode())).normal(size=(rows, self.spec.shape[0]))
        labels = features[:, 1 : 1 + NUM_CLASSES].argmax(axis=1).astype(np.int64)
        features[:, 0] = np.arange(rows)
        encoded = pa.FixedSizeListArray.from_arrays(
            pa.array(features.astype(np.float32).reshape(-1)), self.spec.shape[0]
        )
        return TableReader(make_table(np.arange(rows), encoded, pa.array(labels)), RowSet.whole(rows))

    def decoder(self, name: SplitName) -> Decoder:
        return Decoder(self.spec.kind, self.spec.shape)


@dataclass(frozen=True)
class Stream:
    """A stream with what predicts it."""

    plan: StreamPlan
    planner: BlockPlanner


def make_stream(
    reader: SplitReader,
    decoder: Decoder,
    batch_size: int,
    block_bytes: int,
    augment: AugmentParams | None = None,
    num_views: int | None = None,
    **options: Any,
) -> Stream:
    """The stream over the rows of ``reader``; ``options`` are ``StreamPlan``'s."""
    planner = BlockPlanner(EpochOrder(reader, SEED), reader.num_rows, batch_size, num_views)
    augment = augment or AugmentParams()
    blocks = share(TrainingBlocks(reader, planner, augment, SEED))
    values: dict[str, Any] = {"pool": None, "no_progress_timeout_s": 120.0, **options}
    plan = StreamPlan(blocks, batch_size, block_bytes, decoder, augment, SEED, **values)
    return Stream(plan, planner)


def consume(
    segments: Iterable[Any], num_workers: int, keep: Callable[[dict[str, Any]], T], with_teacher: bool = False
) -> list[list[T]]:
    """What each of ``num_workers`` threads gets of datasets that follow each other, block by block.

    Args:
        keep: makes of a block, whose arrays are views of the object store, what is returned of it.
    """
    shards = [dataset.streaming_split(num_workers, equal=True) for dataset in segments]
    taken: list[list[T]] = [[] for _ in range(num_workers)]
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            for block in iterate_stream((segment[rank] for segment in shards), with_teacher):
                taken[rank].append(keep(block))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200.0)
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), "the stream stands still"
    return taken
