"""The two protocols the training loop is written against, and the one-process implementation.

A worker context says who this worker is and takes what it reports; a batch source yields the
blocks this worker must see. The loop knows neither Ray nor the tracker.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from pipeline.contracts.checkpoints import find_furthest
from pipeline.contracts.columns import NO_LABEL
from pipeline.contracts.events import Emitter, Event
from pipeline.errors import DataError, StreamError
from pipeline.training.state import explain_writing

_JOIN_WITHIN = timedelta(minutes=2)
_END_WITHIN = timedelta(seconds=5)
_ANY_TIME = timedelta(days=100)
_GO, _END = "go", "end"


@dataclass(frozen=True)
class Block:
    """Rows of one block, in host memory.

    Attributes:
        position: number of the block in the run.
        inputs: (batch, ...) uint8 pixels or float32 features.
        labels: (batch,) int64.
        sample_ids: (batch,) int64.
        teacher_logits: (batch, num_classes) float32, where a teacher is used.
        partner_labels: (batch,) int64, where images are mixed: the label of the image mixed in.
        label_weights: (batch,) float32, with them: the weight of ``labels``; the partner's is the rest.
    """

    position: int
    inputs: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    teacher_logits: np.ndarray | None = None
    partner_labels: np.ndarray | None = None
    label_weights: np.ndarray | None = None


class BatchSource(Protocol):
    """Blocks for one worker, in order."""

    def blocks(self, start: int) -> Iterator[Block]:
        """This worker's blocks: ``start + rank``, ``start + rank + world_size``, ... to the end of the run."""
        ...


class WorkerContext(Protocol):
    """Who a worker is, and where what it produces goes."""

    rank: int
    world_size: int
    device: torch.device

    def resume_folder(self) -> Path | None:
        """Folder of the last committed checkpoint, or none."""
        ...

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, made to average its gradients over the workers."""
        ...

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Element-wise sum over the workers, in place."""
        ...

    def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
        """Makes ``folder`` (rank 0's; none elsewhere) the last checkpoint. Every worker must call it."""
        ...

    def emit(self, event: Event) -> None:
        """Records an event; does nothing but on rank 0."""
        ...


class Worker:
    """The only worker, or one of those that a process group of ``torch.distributed`` connects."""

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.device, self.rank, self.world_size = device, rank, world_size

    def wrap(self, network: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        # Each worker's blocks are BatchNorm's groups; its statistics are averaged before they are used. Torch before
        # 2.13 has another name for it, and then does not make buffers equal at the start: they are, as the weights are.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        return DistributedDataParallel(network, device_ids=devices, **options)

    def sum_over_workers(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values


@contextmanager
def process_group(device: torch.device, rank: int, world_size: int, address: str) -> Iterator[Store]:
    """Connects several workers for the time of the block.

    Args:
        address: ``host:port`` at which rank 0 listens meanwhile.

    Yields:
        What they tell each other by.
    """
    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), world_size, rank == 0, timeout=_JOIN_WITHIN)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield store
    finally:
        torch.distributed.destroy_process_group()


class LocalContext(Worker):
    """A worker whose checkpoints lie under ``folder``/last, replaced atomically.

    What ``committed`` raises on rank 0 ends all workers at the same step, the others by SystemExit.

    Args:
        folder: where checkpoints live; it may hold one to go on from.
        emitter: takes the events.
        device: where to train; by default the first GPU, else the CPU.
        start_from: a checkpoint kept elsewhere, which counts if it is further than those in ``folder``.
        committed: is told the metrics of every checkpoint, on rank 0; none: nobody is.
        rank, world_size: of several workers, which are in a process group; ``store`` is that group's.
    """

    def __init__(
        self,
        folder: Path,
        emitter: Emitter,
        device: torch.device | None = None,
        start_from: Path | None = None,
        committed: Callable[[Mapping[str, float]], None] | None = None,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
    ) -> None:
        default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(device or default, rank, world_size)
        self._folder = folder
        self._emitter = emitter
        self._start_from = start_from
        self._committed = committed
        self._store = store
        self._num_commits = 0

    def resume_folder(self) -> Path | None:
        return find_furthest([find_local(self._folder), self._start_from])

    def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
        if self._store is None:
            self._keep(folder, metrics)
            return
        # Not by a collective operation: whoever answers rank 0 may take longer than those are given.
        key = f"commit {self._num_commits}"
        self._num_commits += 1
        if self.rank:
            self._store.wait([key], _ANY_TIME)
            if self._store.get(key).decode() == _END:
                self._store.set(f"{key}, {self.rank}", _END)
                raise SystemExit(0)
            return
        try:
            self._keep(folder, metrics)
        except BaseException:  # SystemExit too
            self._store.set(key, _END)
            with suppress(RuntimeError):  # the store ends with this process: it is there until all have read it
                self._store.wait([f"{key}, {rank}" for rank in range(1, self.world_size)], _END_WITHIN)
            raise
        self._store.set(key, _GO)

    def _keep(self, folder: Path | None, metrics: dict[str, float]) -> None:
        if folder is None:
            raise ValueError("rank 0 must bring the checkpoint")
        incoming, last, previous = (self._folder / name for name in ("incoming", "last", "previous"))
        with explain_writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if incoming.exists():
                shutil.rmtree(incoming)
            shutil.copytree(folder, incoming)
            if last.exists():
                if previous.exists():
                    shutil.rmtree(previous)
                last.rename(previous)
            incoming.rename(last)
        shutil.rmtree(previous, ignore_errors=True)
        if self._committed is not None:
            self._committed(metrics)

    def emit(self, event: Event) -> None:
        if self.rank == 0:
            self._emitter.emit(event)


def find_local(folder: Path) -> Path | None:
    """The last checkpoint that a ``LocalContext`` committed in ``folder``."""
    last, previous = folder / "last", folder / "previous"
    # A process killed between the two renames of `commit` leaves only the previous one.
    return next((path for path in (last, previous) if path.exists()), None)


def check_block(block: Block, expected_position: int, batch_size: int) -> None:
    """One comparison that turns every silent way of losing the order into an error.

    Raises:
        StreamError: the block is not the one that this worker's position calls for.
    """
    if block.position != expected_position or len(block.inputs) != batch_size:
        raise StreamError(
            f"the stream delivered block {block.position} with {len(block.inputs)} rows where block "
            f"{expected_position} with {batch_size} rows was due; no step was taken with it. "
            "Resume the run; if this repeats, the data or the stream's configuration changed under it."
        )


def check_labels(block: Block, terms: Sequence[str], num_classes: int) -> None:
    """Refuses a block with a label that is no class, before a loss would index with it.

    Args:
        block: not yet on the device, where looking at its labels would wait for it.
        terms: names of the loss terms that need labels; none: any label will do.
        num_classes: of the network.

    Raises:
        DataError: a row, or the image mixed into it, has no label or one outside 0..num_classes-1.
    """
    if not terms:
        return
    for labels in (block.labels, block.partner_labels):
        if labels is None or (labels.min() >= 0 and labels.max() < num_classes):
            continue
        row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        sample, label = int(block.sample_ids[row]), int(labels[row])
        who = f"sample {sample}" if labels is block.labels else f"the image mixed into sample {sample}"
        has = "has no label" if label == NO_LABEL else f"has label {label}"
        raise DataError(
            f"{who} {has}, but loss term {' and '.join(map(repr, terms))} needs one in 0..{num_classes - 1}; no step "
            "was taken with it. Label the row or remove it, or set the term's weight to 0.",
            sample_id=sample,
        )
