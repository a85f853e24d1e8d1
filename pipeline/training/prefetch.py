"""Moves blocks to the device ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.contracts.read_ahead import ReadAhead
from pipeline.training.context import Block


@dataclass(frozen=True)
class DeviceBlock:
    """A block as tensors on the training device; the meaning of each field is ``Block``'s."""

    source: Block
    inputs: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    partner_labels: Tensor | None
    label_weights: Tensor | None


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
