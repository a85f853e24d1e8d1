"""Pooling of rows on a GPU, compiled by Triton: one program a row, whose loop is sequential.

Tested by Triton's interpreter only, against the CPU's kernels; not measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A product that is fused with a sum is rounded once instead of twice, which the CPU's is not.
OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}


def pool_rows(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The closest non-increasing sequence to each row, by pooling adjacent violators.

    Args:
        values: (B, C) float64.

    Returns:
        The sequences (B, C), the place where each place's block begins (B, C) int32, and the number of blocks
        (B,) int64.
    """
    values = values.contiguous()
    pooled, sums = torch.empty_like(values), torch.empty_like(values)
    starts = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    blocks = torch.empty_like(starts)
    num_blocks = torch.empty(len(values), dtype=torch.int64, device=values.device)
    if values.numel():
        with torch.cuda.device_of(values):  # Triton launches on the current device, which may be another
            _pool[(len(values),)](values, pooled, blocks, sums, starts, num_blocks, values.shape[1], **OPTIONS)
    return pooled, blocks, num_blocks


def average_blocks(values: Tensor, blocks: Tensor) -> Tensor:
    """Each place's mean over its block; ``values`` (B, C) float64, ``blocks`` as ``pool_rows`` returns them."""
    values = values.contiguous()
    means = torch.empty_like(values)
    if values.numel():
        with torch.cuda.device_of(values):
            _average[(len(values),)](values, blocks, means, values.shape[1], **OPTIONS)
    return means


@triton.jit
def _pool(values, pooled, blocks, sums, starts, num_blocks, num_classes):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    values += row * num_classes
    pooled += row * num_classes
    blocks += row * num_classes
    sums += row * num_classes
    starts += row * num_classes
    size = 0  # blocks on the stack
    for place in range(num_classes):
        total = tl.load(values + place)
        start = place
        pooling = size > 0
        while pooling:
            total_below = tl.load(sums + size - 1)
            start_below = tl.load(starts + size - 1)
            # Equal means are not pooled, as on the CPU.
            pooling = total_below * (place + 1 - start) < total * (start - start_below)
            if pooling:
                total += total_below
                start = start_below
                size -= 1
                pooling = size > 0
        tl.store(sums + size, total)
        tl.store(starts + size, start)
        size += 1
        tl.debug_barrier()  # the next turn's loads must see these stores
    tl.store(num_blocks + row, size)
    end = num_classes
    for turn in range(size):
        block = size - 1 - turn
        start = tl.load(starts + block)
        mean = tl.load(sums + block) / (end - start)
        for place in range(start, end):
            tl.store(pooled + place, mean)
            tl.store(blocks + place, start)
        end = start


@triton.jit
def _average(values, blocks, means, num_classes):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    values += row * num_classes
    blocks += row * num_classes
    means += row * num_classes
    start = 0
    total = tl.load(values) * 0
    for place in range(num_classes):
        if tl.load(blocks + place) != start:
            mean = total / (place - start)
            for earlier in range(start, place):
                tl.store(means + earlier, mean)
            start = place
            total = total * 0
        total += tl.load(values + place)
    mean = total / (num_classes - start)
    for earlier in range(start, num_classes):
        tl.store(means + earlier, mean)
