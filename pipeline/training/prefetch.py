"""Moves blocks to the device ahead of the step that needs them, and measures the waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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


class Prefetcher:
    """Iterates over blocks on the device; a thread stays ``depth`` blocks ahead.

    On a GPU the host copies are pinned and the transfers do not block the step.

    Args:
        blocks: blocks in host memory.
        device: where they are needed.
        depth: how many blocks may wait on the device.
    """

    def __init__(self, blocks: Iterator[Block], device: torch.device, depth: int = 2) -> None:
        self.waited_s = 0.0
        self._device = device
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(blocks,), name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self, blocks: Iterator[Block]) -> None:
        try:
            for block in blocks:
                if not self._put(self._to_device(block)):
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

    def _to_device(self, block: Block) -> DeviceBlock:
        teacher = None if block.teacher_logits is None else self._copy(block.teacher_logits)
        return DeviceBlock(block, self._copy(block.inputs), self._copy(block.labels), teacher)

    def _copy(self, values: np.ndarray) -> Tensor:
        on_gpu = self._device.type == "cuda"
        return host_tensor(values, pin=on_gpu).to(self._device, non_blocking=on_gpu)

    def __iter__(self) -> Iterator[DeviceBlock]:
        return self

    def __next__(self) -> DeviceBlock:
        started = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - started
        if item is _END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        block: DeviceBlock = item
        return block

    def close(self) -> None:
        """Stops the thread; blocks that wait are dropped."""
        self._stopped.set()
        self._thread.join(timeout=5.0)


def host_tensor(values: np.ndarray, pin: bool = False) -> Tensor:
    """``values`` as a tensor on the host; copied where it is read-only (shared memory) or to be pinned."""
    if values.flags.writeable and not pin:
        return torch.from_numpy(values)
    tensor = torch.empty(values.shape, dtype=torch.from_numpy(np.empty(0, values.dtype)).dtype, pin_memory=pin)
    tensor.numpy()[...] = values
    return tensor
