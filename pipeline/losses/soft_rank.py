"""Ranks: the soft rank, which has a gradient, and the hard one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import ResourceError
from pipeline.losses.tensors import Logits, widen


def soft_rank(values: Logits, *, strength: float) -> tuple[Logits, Int64[Tensor, " batch"]]:
    """Ranks within each row that move with the values, so that they have a gradient.

    The point closest to ``values / strength`` among those that are means of orders of 1, .., C (the l2 form of
    Blondel et al.). Values that are further than ``strength`` apart get their hard ranks and no gradient;
    those that are closer are pooled in blocks, within which ranks are linear in the values.

    Args:
        values: (B, C), in each row only differences count.
        strength: > 0, in the units of ``values``. Far below the gaps: hard ranks, no gradient; at the gaps or
            above: one block, which is a linear function of the row. About 1/C suits standardised logits.

    Returns:
        Ranks (B, C), the smallest value near 1, the largest near C, of mean (C + 1) / 2; and the number of
        blocks of each row, 1 (linear) to C (hard), see ``degenerate_shares``.

    Exact in O(C log C) a row, float64 inside; differentiable once, by ``(g - mean of g over the block) / strength``.
    At a gap of exactly ``strength`` two one-sided gradients differ; this is the hard rank's, 0. Source: arXiv
    2002.08871.

    Raises:
        ResourceError: the values are on a GPU and Triton is not installed.
    """
    return _SoftRank.apply(widen(values), strength)


class DegenerateShares(NamedTuple):
    """Shares of rows, 0 to 1, whose soft ranks are nothing of their own."""

    hard: Tensor
    """Hard ranks: no gradient. ``strength`` is too small for them."""
    linear: Tensor
    """One block: Spearman's correlation is Pearson's. ``strength`` is too large for them."""


def degenerate_shares(num_blocks: Int64[Tensor, " batch"], num_classes: int) -> DegenerateShares:
    """The shares of degenerate rows among those with ``num_blocks`` blocks, as ``soft_rank`` returns them."""
    return DegenerateShares((num_blocks == num_classes).float().mean(), (num_blocks == 1).float().mean())


@torch.no_grad()
def average_ranks(values: Logits) -> Logits:
    """Hard ranks within each row: 1 for the smallest value, C for the largest, the mean of their places for equal ones.

    Args:
        values: (B, C).

    Returns:
        Ranks (B, C) of the values' type, at least float32. No gradient.
    """
    values = widen(values)
    if values.device.type == "cuda":
        return _rank_by_sorting(values)
    from pipeline.losses.kernels import cpu

    threads = torch.get_num_threads()
    array = values.cpu().contiguous().numpy()
    ranks = cpu.rank_rows(array, cpu.sort_rows(array, threads), threads)
    return torch.from_numpy(ranks).to(values.device)


class _SoftRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        ctx.strength = strength
        if values.device.type == "cuda":
            ranks, num_blocks, order, blocks = _pool_on_gpu(values, strength)
            ctx.save_for_backward(order, blocks)
        else:
            from pipeline.losses.kernels import cpu

            threads = torch.get_num_threads()
            array = values.detach().cpu().contiguous().numpy()
            keys = cpu.sort_rows(array, threads)
            found, counts = cpu.pool_rows(array, keys, strength, threads)
            ranks, num_blocks = torch.from_numpy(found).to(values.device), torch.from_numpy(counts).to(values.device)
            ctx.save_for_backward(torch.from_numpy(keys.view("int64")))
        ctx.mark_non_differentiable(num_blocks)
        return ranks, num_blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        if grad.device.type == "cuda":
            order, blocks = ctx.saved_tensors
            return _centre_on_gpu(grad, order, blocks, ctx.strength), None
        from pipeline.losses.kernels import cpu

        (keys,) = ctx.saved_tensors
        array = grad.cpu().contiguous().numpy()
        result = cpu.centre_blocks(array, keys.numpy().view("uint64"), ctx.strength, torch.get_num_threads())
        return torch.from_numpy(result).to(grad.device), None


def _pool_on_gpu(values: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks, number of blocks, columns in descending order, and the beginnings of their blocks."""
    try:
        from pipeline.losses.kernels import gpu
    except ImportError as error:
        raise ResourceError(
            f"the soft rank on {values.device} needs Triton, which cannot be imported ({error}): install triton."
        ) from error
    ordered, order = torch.sort(values, dim=1, descending=True, stable=True)
    scaled = ordered.double() / strength
    places = torch.arange(values.shape[1], 0, -1, dtype=torch.float64, device=values.device)
    pooled, blocks, num_blocks = gpu.pool_rows(scaled - places)
    ranks = torch.empty_like(values).scatter_(1, order, (scaled - pooled).to(values.dtype))
    return ranks, num_blocks, order, blocks


def _centre_on_gpu(grad: Tensor, order: Tensor, blocks: Tensor, strength: float) -> Tensor:
    from pipeline.losses.kernels import gpu

    ordered = grad.gather(1, order).double()
    centred = (ordered - gpu.average_blocks(ordered, blocks)) / strength
    return torch.empty_like(grad).scatter_(1, order, centred.to(grad.dtype))


def _rank_by_sorting(values: Tensor) -> Tensor:
    """``average_ranks`` by whole-tensor operations, for accelerators."""
    ordered, order = torch.sort(values, dim=1)
    num_classes = values.shape[1]
    places = torch.arange(num_classes, device=values.device).expand_as(order)
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = differs.new_ones((len(values), 1))
    first = torch.where(torch.cat([edge, differs], dim=1), places, 0).cummax(dim=1).values
    last = torch.where(torch.cat([differs, edge], dim=1), places, num_classes).flip(1).cummin(dim=1).values.flip(1)
    return torch.empty_like(values).scatter_(1, order, ((first + last) / 2 + 1).to(values.dtype))
