"""Sorting, pooling and correlating of rows on a CPU, compiled by numba; arrays in, arrays out.

A row is kept as ``keys``: one 64-bit number for each place in descending order, its lower half the column
that the place came from, its upper half the number of its pooled block. Before the rows are sorted
the upper half is the value itself, as a number that sorts like it: sorting such pairs as plain integers takes
a tenth of the time of sorting floats with their columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Compiled = TypeVar("Compiled", bound=Callable[..., Any])

_LOWER = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_SIGN = np.uint32(0x80000000)
_ELEMENTS_PER_THREAD = 2**16
_ELEMENTS_IN_CACHE = 2**15  # of rows whose keys, ranks and slopes are to stay in a core's caches


def _compile(function: Compiled, fastmath: frozenset[str] = frozenset()) -> Compiled:
    """Compiled on the first call, without the interpreter's lock; kept on disk where there is a place for it."""
    try:
        compiled: Any = numba.njit(nogil=True, cache=True, fastmath=set(fastmath))(function)
    except RuntimeError:  # neither beside this file nor in the user's folder: compile in every process
        compiled = numba.njit(nogil=True, fastmath=set(fastmath))(function)
    return cast(Compiled, compiled)


def _compile_sums(function: Compiled) -> Compiled:
    """Sums in any order, which takes a fraction of the time; NaN and infinities stay what they are."""
    return _compile(function, frozenset({"reassoc", "nsz"}))


def sort_rows(values: NDArray[Any], num_threads: int) -> NDArray[np.uint64]:
    """The keys of each row, its largest value first and equal values by column; float32 or float64."""
    keys = np.empty(values.shape, dtype=np.uint64)
    if values.dtype == np.float32:
        _in_parts(_sort_float32, num_threads, values.view(np.uint32), keys)
    else:
        _in_parts(_sort_wide, num_threads, values, keys)
    return keys


def _sort_float32(bits: NDArray[np.uint32], keys: NDArray[np.uint64]) -> None:
    _write_keys(bits, keys)
    keys.sort(axis=1)


def _sort_wide(values: NDArray[Any], keys: NDArray[np.uint64]) -> None:
    keys[:] = np.argsort(-values, axis=1, kind="stable")


def pool_rows(
    values: NDArray[Any], keys: NDArray[np.uint64], strength: float, num_threads: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Soft ranks and the number of blocks of each row; writes the blocks' numbers into ``keys``."""
    ranks = np.empty_like(values)
    num_blocks = np.empty(len(values), dtype=np.int64)
    _in_parts(_pool, num_threads, values, keys, ranks, num_blocks, strength=strength)
    return ranks, num_blocks


def centre_blocks(grad: NDArray[Any], keys: NDArray[np.uint64], strength: float, num_threads: int) -> NDArray[Any]:
    """``(grad - its mean over the block) / strength``, the soft ranks' gradient."""
    result = np.empty_like(grad)
    _in_parts(_centre, num_threads, grad, keys, result, strength=strength)
    return result


def rank_rows(values: NDArray[Any], keys: NDArray[np.uint64], num_threads: int) -> NDArray[Any]:
    """Ranks from 1, the smallest value first, the mean of their places for equal values."""
    ranks = np.empty_like(values)
    _in_parts(_rank, num_threads, values, keys, ranks)
    return ranks


def correlate_ranks(
    values: NDArray[Any], reference: NDArray[Any], strength: float, floor: float, num_threads: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any]]:
    """Pearson's correlation of soft ranks with the ranks of ``reference``, the number of blocks, and its gradient."""
    rho = np.empty(len(values), dtype=values.dtype)
    num_blocks = np.empty(len(values), dtype=np.int64)
    slopes = np.empty_like(values)
    _in_parts(_correlate_ranks, num_threads, values, reference, rho, num_blocks, slopes, strength=strength, floor=floor)
    return rho, num_blocks, slopes


def _correlate_ranks(
    values: NDArray[Any],
    reference: NDArray[Any],
    rho: NDArray[Any],
    num_blocks: NDArray[np.int64],
    slopes: NDArray[Any],
    strength: float,
    floor: float,
) -> None:
    size = max(1, _ELEMENTS_IN_CACHE // values.shape[1])
    for start in range(0, len(values), size):
        rows = slice(start, start + size)
        reference_ranks = rank_rows(reference[rows], sort_rows(reference[rows], 1), 1)
        keys = sort_rows(values[rows], 1)
        ranks, num_blocks[rows] = pool_rows(values[rows], keys, strength, 1)
        _correlate_rows(ranks, reference_ranks, rho[rows], floor)
        _centre(ranks, keys, slopes[rows], strength)


def correlate_probabilities(
    p: NDArray[Any], q: NDArray[Any], floor: float, additive: bool, rows: bool, columns: bool, num_threads: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """Pearson's correlations of the rows and of the columns of two (B, C) arrays, each of whose rows adds up to 1.

    Returns:
        (B + C,) correlations, the rows' first; (B + C, 2) with which their gradient is, as in ``pearson``,
        ``along[:, 0] * a + along[:, 1] * b``; (2, C) means of the columns. What is not wanted is 0.
    """
    batch, classes = p.shape
    sums, means = np.zeros((batch + classes, 3)), np.zeros((2, classes))
    if rows:
        _in_parts(_sum_rows, num_threads, p, q, sums[:batch])
    if columns:
        origins = np.array([p[0], q[0]], dtype=np.float64)
        moments = sum(_in_parts(_sum_columns, num_threads, p, q, origins=origins))
        means = moments[:2] / batch
        sums[batch:, 0] = moments[2] - moments[0] * means[1]
        sums[batch:, 1:] = np.maximum(moments[3:] - moments[:2] * means, 0).T
        means += origins
    rho, along = np.empty(len(sums), dtype=p.dtype), np.empty((len(sums), 2), dtype=p.dtype)
    _correlate_sums(sums, floor, additive, rho, along)
    return rho, along, means


def softmax_slopes(
    p: NDArray[Any],
    q: NDArray[Any],
    along: NDArray[Any],
    means: NDArray[np.float64],
    temperature: float,
    num_threads: int,
) -> NDArray[Any]:
    """The gradient for the logits, over ``temperature``, whose softmax is ``p``.

    ``along`` and ``means`` are those of ``correlate_probabilities``, ``along`` times each correlation's gradient.
    """
    along_columns = np.ascontiguousarray(along[len(p) :].T)
    result = np.empty_like(p)
    shared = {"along_columns": along_columns, "means": means, "temperature": temperature}
    _in_parts(_softmax_slopes, num_threads, p, q, along[: len(p)], result, **shared)
    return result


def _in_parts(function: Callable[..., Any], num_threads: int, *arrays: NDArray[Any], **shared: Any) -> list[Any]:
    """Calls ``function`` with slices of the rows of ``arrays``, in as many threads as are worth their start."""
    num_rows = len(arrays[0])
    num_parts = max(1, min(num_threads, num_rows, arrays[0].size // _ELEMENTS_PER_THREAD))
    bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
    parts = [
        [array[begin:end] for array in arrays] + list(shared.values()) for begin, end in itertools.pairwise(bounds)
    ]
    if num_parts == 1:
        return [function(*parts[0])]
    with ThreadPoolExecutor(num_parts) as threads:
        return [future.result() for future in [threads.submit(function, *part) for part in parts]]


@_compile
def _write_keys(bits, keys):  # type: ignore[no-untyped-def]
    """Bits of float32 to numbers that sort like them, the largest first."""
    for row in range(bits.shape[0]):
        for column in range(bits.shape[1]):
            value = bits[row, column]
            if not value & _SIGN:  # a positive number's bits sort like it, a negative one's the other way
                value = ~value & ~_SIGN
            keys[row, column] = (np.uint64(value) << _SHIFT) | np.uint64(column)


@_compile
def _pool(values, keys, ranks, num_blocks, strength):  # type: ignore[no-untyped-def]
    """Pool adjacent violators: the closest non-increasing sequence to the sorted values less C, C-1, .., 1."""
    num_classes = values.shape[1]
    scaled = np.empty(num_classes)
    sums = np.empty(num_classes)
    counts = np.empty(num_classes)
    ends = np.empty(num_classes, dtype=np.int64)
    for row in range(values.shape[0]):
        for place in range(num_classes):
            scaled[place] = np.float64(values[row, keys[row, place] & _LOWER]) / strength
        top = -1
        # Whether to pool cannot be predicted, so what it hangs on is short: no division, no conversion.
        for place in range(num_classes):
            total = scaled[place] - (num_classes - place)
            count = 1.0
            # Equal means are not pooled: at a gap of exactly `strength` both are right, and this one is the hard rank.
            while top >= 0 and sums[top] * count < total * counts[top]:
                total += sums[top]
                count += counts[top]
                top -= 1
            top += 1
            sums[top] = total
            counts[top] = count
        num_blocks[row] = top + 1
        end = np.int64(0)
        for block in range(top + 1):
            end += np.int64(counts[block])
            ends[block] = end
            sums[block] /= counts[block]
        block = 0
        for place in range(num_classes):
            block += place == ends[block]
            column = keys[row, place] & _LOWER
            ranks[row, column] = scaled[place] - sums[block]
            keys[row, place] = (np.uint64(block) << _SHIFT) | column


@_compile
def _centre(grad, keys, result, strength):  # type: ignore[no-untyped-def]
    num_classes = grad.shape[1]
    sums = np.empty(num_classes)
    counts = np.empty(num_classes)
    for row in range(grad.shape[0]):
        num_blocks = (keys[row, num_classes - 1] >> _SHIFT) + np.uint64(1)
        sums[:num_blocks] = 0
        counts[:num_blocks] = 0
        for place in range(num_classes):
            block = keys[row, place] >> _SHIFT
            sums[block] += grad[row, keys[row, place] & _LOWER]
            counts[block] += 1
        for block in range(num_blocks):
            sums[block] /= counts[block]
        for place in range(num_classes):
            column = keys[row, place] & _LOWER
            result[row, column] = (grad[row, column] - sums[keys[row, place] >> _SHIFT]) / strength


@_compile
def _rank(values, keys, ranks):  # type: ignore[no-untyped-def]
    num_classes = values.shape[1]
    for row in range(values.shape[0]):
        start = 0
        while start < num_classes:
            value = values[row, keys[row, start] & _LOWER]
            end = start + 1
            while end < num_classes and values[row, keys[row, end] & _LOWER] == value:
                end += 1
            rank = num_classes - (start + end - 1) / 2
            for place in range(start, end):
                ranks[row, keys[row, place] & _LOWER] = rank
            start = end


@_compile_sums
def _correlate_rows(ranks, reference, rho, floor):  # type: ignore[no-untyped-def]
    """Pearson's correlation of the rows, as ``pearson`` has it; writes its gradient for ``ranks`` over them."""
    num_classes = ranks.shape[1]
    for row in range(ranks.shape[0]):
        a, b = ranks[row], reference[row]
        mean_a = mean_b = products = squares_a = squares_b = 0.0
        for column in range(num_classes):
            mean_a += a[column]
            mean_b += b[column]
        mean_a /= num_classes
        mean_b /= num_classes
        for column in range(num_classes):
            products += (a[column] - mean_a) * (b[column] - mean_b)
            squares_a += (a[column] - mean_a) ** 2
            squares_b += (b[column] - mean_b) ** 2
        rho[row], along_a, along_b = _correlate(products, squares_a, squares_b, floor)
        for column in range(num_classes):
            a[column] = (b[column] - mean_b) * along_b + (a[column] - mean_a) * along_a


@_compile_sums
def _sum_rows(p, q, sums):  # type: ignore[no-untyped-def]
    """(B, 3): sums of ``a * b``, ``a^2``, ``b^2``, the probabilities less 1/C."""
    num_classes = p.shape[1]
    level = 1 / num_classes
    for row in range(p.shape[0]):
        products = squares_a = squares_b = 0.0
        for column in range(num_classes):
            a, b = p[row, column] - level, q[row, column] - level
            products += a * b
            squares_a += a * a
            squares_b += b * b
        sums[row, 0], sums[row, 1], sums[row, 2] = products, squares_a, squares_b


@_compile_sums
def _sum_columns(p, q, origins):  # type: ignore[no-untyped-def]
    """(5, C): sums of ``a``, ``b``, ``a * b``, ``a^2``, ``b^2``, the probabilities less ``origins``.

    With the first row for ``origins`` one pass does: what it is away from the mean is part of the variance, so that
    little is lost in the difference of the sums, and nothing in a constant column.
    """
    sums = np.zeros((5, p.shape[1]))
    for row in range(p.shape[0]):
        for column in range(p.shape[1]):
            a, b = p[row, column] - origins[0, column], q[row, column] - origins[1, column]
            sums[0, column] += a
            sums[1, column] += b
            sums[2, column] += a * b
            sums[3, column] += a * a
            sums[4, column] += b * b
    return sums


@_compile
def _correlate_sums(sums, floor, additive, rho, along):  # type: ignore[no-untyped-def]
    for index in range(len(sums)):
        products, squares_a, squares_b = sums[index]
        if additive:
            norm_a, norm_b = math.sqrt(squares_a), math.sqrt(squares_b)
            along_b = 1 / (norm_a * norm_b + floor)
            rho[index] = products * along_b
            along_a = -products * along_b**2 * norm_b / norm_a if norm_a > 0 else 0.0
        else:
            rho[index], along_a, along_b = _correlate(products, squares_a, squares_b, floor)
        along[index, 0], along[index, 1] = along_a, along_b


@_compile
def _correlate(products, squares_a, squares_b, floor):  # type: ignore[no-untyped-def]
    """Correlation, and the numbers with which its gradient is ``along_a * a + along_b * b``."""
    floored_a, floored_b = squares_a + floor**2, squares_b + floor**2
    along_b = 1 / math.sqrt(floored_a * floored_b)
    return products * along_b, -products * along_b / floored_a, along_b


@_compile_sums
def _softmax_slopes(p, q, along_rows, result, along_columns, means, temperature):  # type: ignore[no-untyped-def]
    """Means in float64: in a nearly constant column rounding is multiplied by as much as 1/floor^2."""
    num_classes = p.shape[1]
    kind = p.dtype.type
    level, scale = kind(1 / num_classes), kind(1 / temperature)
    along_a, along_b, mean_p, mean_q = along_columns[0], along_columns[1], means[0], means[1]
    for row in range(p.shape[0]):
        student, teacher, slopes = p[row], q[row], result[row]
        row_a, row_b = along_rows[row, 0], along_rows[row, 1]
        total = 0.0
        for column in range(num_classes):
            slope = (student[column] - level) * row_a + (teacher[column] - level) * row_b
            slope += (student[column] - mean_p[column]) * along_a[column]
            slope += (teacher[column] - mean_q[column]) * along_b[column]
            slopes[column] = slope
            total += slope * student[column]
        expected = kind(total)
        for column in range(num_classes):
            slopes[column] = (slopes[column] - expected) * (student[column] * scale)
