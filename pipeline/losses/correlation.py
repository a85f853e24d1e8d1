"""Pearson's correlation of rows and columns, with gradients that stay finite where one is constant."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.losses.chunks import row_chunks
from pipeline.losses.tensors import Logits, widen

SMOOTH_FLOOR = 1e-4
PUBLISHED_FLOOR = 1e-8


def pearson(u: Logits, v: Logits, *, floor: float = SMOOTH_FLOOR, additive: bool = False) -> Float[Tensor, " batch"]:
    """How linear the relation of two rows is, whatever their scale and offset.

    ``<a, b> / (sqrt(|a|^2 + floor^2) sqrt(|b|^2 + floor^2))`` with ``a``, ``b`` the rows less their means. The
    floor bounds the gradient by 1/floor where a row is constant.

    Args:
        u: (B, C), anything.
        v: (B, C), anything.
        floor: > 0, in the units of ``u`` and ``v``.
        additive: divide by ``|a| |b| + floor`` instead, as DIST's code does with 1e-8; there the gradient of a
            nearly constant row grows without bound.

    Returns:
        (B,) in [-1, 1], 0 where a row is constant.

    ``v`` is detached; differentiable once.
    """
    return _Pearson.apply(widen(u), widen(v.detach()), floor, additive)


class _Pearson(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, floor: float, additive: bool) -> Tensor:
        a = u - u.mean(dim=1, keepdim=True)
        b = v - v.mean(dim=1, keepdim=True)
        sums = u.new_empty((3, len(u)))
        for rows in row_chunks(a):
            _products(a[rows], b[rows], 1, sums[:, rows])
        rho, along_b, along_a = _correlate(sums, floor, additive)
        ctx.save_for_backward(a, b, along_a, along_b)
        return rho

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, along_a, along_b = ctx.saved_tensors
        gradient = torch.empty_like(a)
        for rows in row_chunks(a):
            torch.mul(b[rows], (grad * along_b)[rows, None], out=gradient[rows])
            gradient[rows].addcmul_(a[rows], (grad * along_a)[rows, None])
        return gradient, None, None, None


def _correlate(sums: Tensor, floor: float, additive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Correlations, and the numbers with which their gradient is ``along_b * b + along_a * a``, from ``_products``."""
    products, norms_a, norms_b = sums
    if additive:
        divisor = norms_a * norms_b + floor
        rho = products / divisor
        along_a = torch.where(norms_a > 0, -rho * norms_b / (divisor * norms_a), 0)
    else:
        least = norms_a.new_full((), floor)
        floored_a, floored_b = norms_a.hypot(least), norms_b.hypot(least)
        divisor = floored_a * floored_b
        rho = products / divisor
        along_a = -rho / floored_a.square()
    return rho, 1 / divisor, along_a


def softmax_correlations(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    temperature: float,
    floor: float = SMOOTH_FLOOR,
    additive: bool = False,
    rows: bool = True,
    columns: bool = True,
) -> tuple[Float[Tensor, " batch"] | None, Float[Tensor, " classes"] | None]:
    """Correlations of softened probabilities: of the classes in each row, of the rows in each class.

    ``pearson(p, q)`` and ``pearson(p.T, q.T)`` of ``p``, ``q``, the softmax of student's and teacher's logits over
    ``temperature``, in one go for both.

    Args:
        student_logits: (B, C) logits.
        teacher_logits: (B, C) logits; a constant added to a row changes nothing.
        temperature: > 0.
        floor: > 0, probability; see ``pearson``. The norm of a column of 1,000 classes is some 3e-3.
        additive: see ``pearson``.
        rows: whether to compute the first; otherwise it is none.
        columns: whether to compute the second; otherwise it is none.

    Returns:
        (B,) and (C,) in [-1, 1]. With fewer than three rows the columns' are -1 or 1 and have no gradient.

    The teacher is detached; differentiable once.
    """
    function = _SoftmaxCorrelationsOnCpu if student_logits.device.type == "cpu" else _SoftmaxCorrelations
    return function.apply(
        widen(student_logits), widen(teacher_logits.detach()), temperature, floor, additive, rows, columns
    )


class _SoftmaxCorrelations(torch.autograd.Function):
    """Keeps the probabilities ``p``, ``q`` themselves: kept less 1/C, those far below it would lose their digits.

    The gradient for ``p`` is linear in both less their means, with two numbers a row and two a column; then that of
    the softmax follows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        floor: float,
        additive: bool,
        rows: bool,
        columns: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.temperature, ctx.rows, ctx.columns = temperature, rows, columns
        ctx.set_materialize_grads(False)
        p, q = _soften(student, temperature), _soften(teacher, temperature)
        uniform = 1 / student.shape[1]
        row_sums = student.new_empty((3, len(student)))
        rho_rows = rho_columns = None
        saved: list[Tensor] = []
        if rows:
            for part in row_chunks(student):
                _products(p[part] - uniform, q[part] - uniform, 1, row_sums[:, part])
            rho_rows, *factors = _correlate(row_sums, floor, additive)
            saved += factors
        if columns:
            means = p.mean(dim=0), q.mean(dim=0)
            column_sums = student.new_zeros((3, student.shape[1]))
            for part in row_chunks(student):
                sums = torch.empty_like(column_sums)
                _products(p[part] - means[0], q[part] - means[1], 0, sums, squared=True)
                column_sums += sums
            column_sums[1:].sqrt_()
            rho_columns, *factors = _correlate(column_sums, floor, additive)
            saved += [*means, *factors]
        ctx.save_for_backward(p, q, *saved)
        return rho_rows, rho_columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor | None, grad_columns: Tensor | None) -> tuple[Tensor | None, ...]:
        p, q, *saved = ctx.saved_tensors
        along_a = along_b = None
        by_column = False
        if ctx.rows:
            b_by_row, a_by_row = saved[:2]
            if grad_rows is not None:
                along_b, along_a = (grad_rows * b_by_row)[:, None], (grad_rows * a_by_row)[:, None]
        if ctx.columns and grad_columns is not None:
            mean_p, mean_q, b_by_column, a_by_column = saved[-4:]
            b_by_column, a_by_column = grad_columns * b_by_column, grad_columns * a_by_column
            by_column = True
        gradient, uniform = torch.empty_like(p), 1 / p.shape[1]
        for part in row_chunks(p):
            out = gradient[part]
            if along_a is None or along_b is None:
                out.zero_()
            else:
                torch.mul(p[part] - uniform, along_a[part], out=out).addcmul_(q[part] - uniform, along_b[part])
            if by_column:
                out.addcmul_(p[part] - mean_p, a_by_column).addcmul_(q[part] - mean_q, b_by_column)
            expected = (out * p[part]).sum(dim=1, keepdim=True)
            out.sub_(expected).mul_(p[part] / ctx.temperature)
        return gradient, None, None, None, None, None, None


class _SoftmaxCorrelationsOnCpu(torch.autograd.Function):
    """The same in fewer passes, by compiled loops."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        floor: float,
        additive: bool,
        rows: bool,
        columns: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        from pipeline.losses.kernels import cpu

        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        p, q = _soften(student, temperature), _soften(teacher, temperature)
        found = cpu.correlate_probabilities(
            p.numpy(), q.numpy(), floor, additive, rows, columns, torch.get_num_threads()
        )
        rho, along, means = (torch.from_numpy(array) for array in found)
        ctx.save_for_backward(p, q, along, means)
        of_rows, of_columns = rho.split(student.shape)
        return of_rows if rows else None, of_columns if columns else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor | None, grad_columns: Tensor | None) -> tuple[Tensor | None, ...]:
        from pipeline.losses.kernels import cpu

        p, q, along, means = ctx.saved_tensors
        grad = along.new_zeros(len(along), 1)
        if grad_rows is not None:
            grad[: len(p), 0] = grad_rows
        if grad_columns is not None:
            grad[len(p) :, 0] = grad_columns
        arrays = p.numpy(), q.numpy(), (along * grad).numpy(), means.numpy()
        gradient = cpu.softmax_slopes(*arrays, ctx.temperature, torch.get_num_threads())
        return torch.from_numpy(gradient), None, None, None, None, None, None


def _soften(logits: Tensor, temperature: float) -> Tensor:
    """Softened probabilities (B, C), row by row in memory, by chunks that stay in the cache."""
    softened = logits.new_empty(logits.shape)
    for part in row_chunks(logits):
        torch.softmax(logits[part] / temperature, dim=1, out=softened[part])
    return softened


def _products(a: Tensor, b: Tensor, dim: int, out: Tensor, squared: bool = False) -> None:
    """Sums along ``dim``: ``a * b``, and the norms of both, or their squares."""
    scratch = a * b
    out[0] = scratch.sum(dim=dim)
    for index, values in ((1, a), (2, b)):
        if squared:
            out[index] = torch.mul(values, values, out=scratch).sum(dim=dim)
        else:
            out[index] = torch.linalg.vector_norm(values, dim=dim)
