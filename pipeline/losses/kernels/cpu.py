"""Sorting and pooling of rows on a CPU, compiled by numba; arrays in, arrays out.

A row is kept as ``keys``: one 64-bit number for each place in descending order, its lower half the column
that the place came from, its upper half the number of its pooled block. Before the rows are sorted
the upper half is the value itself, as a number that sorts like it: sorting such pairs as plain integers takes
a tenth of the time of sorting floats with their columns.
"""

from __future__ import annotations

import itertools
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


def _compile(function: Compiled) -> Compiled:
    """Compiled on the first call, without the interpreter's lock; kept on disk where there is a place for it."""
    try:
        compiled: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's folder: compile in every process
        compiled = numba.njit(nogil=True)(function)
    return cast(Compiled, compiled)


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


def _in_parts(function: Callable[..., None], num_threads: int, *arrays: NDArray[Any], **scalars: float) -> None:
    """Calls ``function`` with slices of the rows of ``arrays``, in as many threads as are worth their start."""
    num_rows = len(arrays[0])
    num_parts = max(1, min(num_threads, num_rows, arrays[0].size // _ELEMENTS_PER_THREAD))
    bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
    parts = [
        [array[begin:end] for array in arrays] + list(scalars.values()) for begin, end in itertools.pairwise(bounds)
    ]
    if num_parts == 1:
        function(*parts[0])
        return
    with ThreadPoolExecutor(num_parts) as threads:
        for future in [threads.submit(function, *part) for part in parts]:
            future.result()


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
