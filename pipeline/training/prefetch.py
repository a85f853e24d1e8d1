"""Moves blocks to the device ahead of the step that needs them, and measures the waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.training.context import Block

_END = object()


@dataclass(frozen=True)
class DeviceBlock:
    """A block as tensors on the training device; the meaning of each field is ``Block``'s."""

    source: Block
    inputs: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    partner_labels: Tensor | None
    label_weights: Tensor | None


T = TypeVar("T")


class ReadAhead(Iterator[T]):
    """Iterates over ``items`` while a thread stays ahead; it starts at once.

    Args:
        items: iterated in the thread; an exception there is raised here, in its turn.
        depth: how many may wait.

    Attributes:
        waited_s: time that ``next`` has waited so far.
    """

    def __init__(self, items: Iterator[T], depth: int = 2) -> None:
        self.waited_s = 0.0
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="read-ahead", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(_END)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        started = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - started
        if item is _END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        ready: T = item
        return ready

    def close(self) -> None:
        """Stops the thread; what waits is dropped."""
        self._stopped.set()
        self._thread.join(timeout=5.0)


def prefetch(blocks: Iterator[Block], device: torch.device) -> ReadAhead[DeviceBlock]:
    """Blocks on the device, two ahead. On a GPU the host copies are pinned and transfers do not block the step."""
    on_gpu = device.type == "cuda"

    def move(values: np.ndarray) -> Tensor:
        return host_tensor(values, pin=on_gpu).to(device, non_blocking=on_gpu)

    def move_optional(values: np.ndarray | None) -> Tensor | None:
        return None if values is None else move(values)

    def move_all() -> Iterator[DeviceBlock]:
        for block in blocks:
            yield DeviceBlock(
                block,
                move(block.inputs),
                move(block.labels),
                move_optional(block.teacher_logits),
                move_optional(block.partner_labels),
                move_optional(block.label_weights),
            )

    return ReadAhead(move_all())


def host_tensor(values: np.ndarray, pin: bool = False) -> Tensor:
    """``values`` as a tensor on the host; copied where it is read-only (shared memory) or to be pinned."""
    if values.flags.writeable and not pin:
        return torch.from_numpy(values)
    tensor = torch.empty(values.shape, dtype=torch.from_numpy(np.empty(0, values.dtype)).dtype, pin_memory=pin)
    tensor.numpy()[...] = values
    return tensor
