"""Rows in chunks that stay in a core's cache, for losses that pass over their rows many times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS_PER_THREAD = 2**17  # 512 KiB in float32, so that the few buffers of a loss stay in a core's caches


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a (B, C) tensor: one on an accelerator, more on a CPU where rows are many.

    Memory, not arithmetic, bounds elementwise work on a CPU: five passes over a chunk cost little more than
    one over the whole.
    """
    batch, classes = matrix.shape
    size = max(batch, 1)
    if matrix.device.type == "cpu":
        size = max(1, _ELEMENTS_PER_THREAD * torch.get_num_threads() // max(classes, 1))
    for start in range(0, batch, size):
        yield slice(start, start + size)
