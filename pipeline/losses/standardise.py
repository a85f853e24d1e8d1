"""Logits of mean 0 and standard deviation 1 in every row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.losses.chunks import row_chunks
from pipeline.losses.tensors import Logits, widen


def standardise(logits: Logits, *, floor: float = 1e-7) -> Logits:
    """Removes each row's offset and scale, so that a student need not imitate the teacher's.

    ``(z - mean z) / (std z + floor)`` with the sample standard deviation (C - 1 degrees of freedom).

    Args:
        logits: (B, C) logits, C at least 2.
        floor: > 0, logits; keeps a constant row at zeros. Such a row's gradient is multiplied by 1/floor: the
            published 1e-7 is safe as long as the student's head is not initialised to zero, 1e-3 always.

    Returns:
        (B, C), each row of mean 0 and standard deviation 1, between -(C-1)/sqrt(C) and (C-1)/sqrt(C): at
        temperature 1 no probability of 10 classes exceeds 0.72.

    Differentiable once; nothing is detached. Source: arXiv 2403.01427.
    """
    return _Standardise.apply(widen(logits), floor)


class _Standardise(torch.autograd.Function):
    """With ``y`` the result and ``s`` the standard deviation, the gradient of ``<g, y>`` is the centred

    ``(g - y <g, y> (s + floor) / (s (C - 1))) / (s + floor)``; the second term is 0 in a constant row.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, floor: float) -> Tensor:
        degrees = logits.shape[1] - 1
        result = torch.empty_like(logits)
        deviations = logits.new_empty((len(logits), 1))
        for rows in row_chunks(logits):
            centred = torch.sub(logits[rows], logits[rows].mean(dim=1, keepdim=True), out=result[rows])
            deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(degrees)
            deviations[rows] = deviation
            centred.div_(deviation + floor)
        ctx.save_for_backward(result, deviations)
        ctx.floor = floor
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        result, deviations = ctx.saved_tensors
        degrees = result.shape[1] - 1
        gradient = torch.empty_like(result)
        for rows in row_chunks(result):
            y, g, deviation = result[rows], grad[rows], deviations[rows]
            along = torch.mul(g, y, out=gradient[rows]).sum(dim=1, keepdim=True)
            widened = deviation + ctx.floor
            share = torch.where(deviation > 0, along * widened / (deviation * degrees), 0)
            part = torch.addcmul(g, y, share, value=-1, out=gradient[rows])
            part.sub_(part.mean(dim=1, keepdim=True)).div_(widened)
        return gradient, None
