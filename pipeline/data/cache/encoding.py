"""Logits as they are stored, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import SAMPLE_ID
from pipeline.data.cache.folder import REBUILD
from pipeline.data.cache.params import EncodingParams, check_classes
from pipeline.data.cache.topk import TEMPERATURES, measure_tail, select_topk, spread_tail
from pipeline.errors import CacheError

LOGITS = "logits"  # dense: of every class; float16: relative to the row's maximum
OFFSET = "offset"  # float32, the row's maximum where logits or values are relative to it
IDS = "ids"  # topk: uint16, the classes kept, the likeliest first
VALUES = "values"  # topk: their logits, relative to the row's maximum
TAIL = "tail"  # topk: float32, log-sum-exp of the other classes at each of ``TEMPERATURES``
MISSING = "missing"  # of rows as they are read: the teacher never saw this one, it could not be decoded

COLUMNS = (LOGITS, IDS, VALUES, OFFSET, TAIL)
_CHUNK_ELEMENTS = 2**20  # of the float64 copies that the tail is computed from
_DTYPES = {pa.from_numpy_dtype(name): np.dtype(name) for name in ("float16", "float32", "uint16", "int64")}

Columns = dict[str, np.ndarray]


def column_types(params: EncodingParams, num_classes: int) -> dict[str, tuple[np.dtype, int | None]]:
    """Type and width of the columns that hold a row's logits; width none: a single number."""
    dtype, single = np.dtype(params.dtype), (np.dtype(np.float32), None)
    if params.k is not None:
        ids, tail = (np.dtype(np.uint16), params.k), (np.dtype(np.float32), len(TEMPERATURES))
        return {IDS: ids, VALUES: (dtype, params.k), OFFSET: single, TAIL: tail}
    return {LOGITS: (dtype, num_classes)} | ({OFFSET: single} if params.dtype == "float16" else {})


def encode_logits(logits: np.ndarray, params: EncodingParams) -> Columns:
    """The columns that hold these logits.

    Args:
        logits: (B, C) float32.

    Returns:
        By name (B, width) or (B,), as ``column_types`` says.

    Raises:
        CacheError: a logit is not finite, or too far below the largest of its row for float16.
        ConfigError: the encoding does not fit the number of classes.
    """
    check_classes(params, logits.shape[1])
    logits = np.ascontiguousarray(logits, np.float32)
    _refuse_unusable(~np.isfinite(logits), logits, "not finite", "check the teacher's weights and its precision")
    if params.format == "dense" and params.dtype == "float32":
        return {LOGITS: logits}
    offset: np.ndarray = logits.max(axis=1)
    if params.k is None:
        return {LOGITS: _narrow(logits, offset, params), OFFSET: offset}
    ids, tail = np.empty((len(logits), params.k), np.uint16), np.empty((len(logits), len(TEMPERATURES)), np.float32)
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        kept = select_topk(logits[rows], params.k)
        ids[rows], tail[rows] = kept, measure_tail(logits[rows], kept)
    values = np.take_along_axis(logits, ids.astype(np.int64), axis=1)
    return {IDS: ids, VALUES: _narrow(values, offset, params), OFFSET: offset, TAIL: tail}


def _narrow(values: np.ndarray, offset: np.ndarray, params: EncodingParams) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is refused below
        narrow: np.ndarray = (values - offset[:, None]).astype(params.dtype)
    what = f"too far below the largest of its row for {params.dtype}"
    advice = "set cache.dtype=float32" if params.dtype == "float16" else "check the teacher's weights"
    _refuse_unusable(~np.isfinite(narrow), values, what, advice)
    return narrow


def _refuse_unusable(unusable: np.ndarray, logits: np.ndarray, what: str, advice: str) -> None:
    if unusable.any():
        row, column = (int(number) for number in np.argwhere(unusable)[0])
        raise CacheError(
            f"{int(unusable.any(axis=1).sum())} of {len(logits)} rows have logits that cannot be cached: the first, "
            f"row {row}, has {logits[row, column]}, which is {what}; {advice}.",
            row=row,
        )


def decode_logits(table: pa.Table, num_classes: int, temperature: float) -> np.ndarray:
    """The logits of rows as they were read.

    Of a top-k cache, those of the classes kept are as they were; all others get one logit, such that their mass at
    ``temperature`` is as it was. Missing rows hold numbers that mean nothing.

    Args:
        table: with the columns of ``column_types``, one row a sample.
        num_classes: C.
        temperature: that the loss divides them by; matters for a top-k cache only.

    Returns:
        (B, C) float32, writable. Of a dense cache in float32, bit for bit what the teacher gave.

    Raises:
        ConfigError: a temperature at which a top-k cache does not know the mass.
    """
    columns = {name: column_array(table[name]) for name in COLUMNS if name in table.column_names}
    if LOGITS in columns:
        logits = columns[LOGITS].astype(np.float32)
        return logits + columns[OFFSET][:, None] if OFFSET in columns else logits
    return _reconstruct(columns, num_classes, temperature)


def _reconstruct(columns: Mapping[str, np.ndarray], num_classes: int, temperature: float) -> np.ndarray:
    values, offset = columns[VALUES].astype(np.float32), columns[OFFSET]
    logits = np.empty((len(values), num_classes), np.float32)
    if num_classes > values.shape[1]:
        spread = spread_tail(columns[TAIL], num_classes - values.shape[1], temperature, values[:, -1])
        logits[:] = (spread + offset)[:, None]
    np.put_along_axis(logits, columns[IDS].astype(np.int64), values + offset[:, None], axis=1)
    return logits


def to_arrow(values: np.ndarray) -> pa.Array:
    """An array of Arrow over the same memory: of numbers, or of fixed-size lists where there are two dimensions."""
    if values.dtype == np.bool_:
        bits = pa.py_buffer(np.packbits(values, bitorder="little"))
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, bits])
    flat = pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(np.ascontiguousarray(values))]
    )
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim == 2 else flat


def as_table(columns: Columns) -> pa.Table:
    """A table over the memory of these columns; truth values are copied."""
    return pa.table({name: to_arrow(values) for name, values in columns.items()})


def arrow_type(dtype: np.dtype, width: int | None) -> pa.DataType:
    """Arrow's type for a column of ``column_types``."""
    single = pa.from_numpy_dtype(dtype)
    return single if width is None else pa.list_(single, width)


def column_array(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """(B,) or (B, width), the reverse of ``to_arrow``; read-only, and over the same memory unless there are chunks."""
    array = column
    if isinstance(column, pa.ChunkedArray):  # combining copies, even a single one
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return _numbers(array)
    width, start = array.type.list_size, array.offset
    numbers = array.values.slice(start * width, len(array) * width)  # flatten() would copy
    return _numbers(numbers).reshape(len(array), width)


def _numbers(array: pa.Array) -> np.ndarray:
    dtype = _DTYPES[array.type]  # neither to_numpy() nor to_pandas_dtype(): they import pandas, which takes a second
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


@dataclass(frozen=True)
class LogitsDecoder:
    """Turns the stored logits of a block's rows into numbers; small and picklable.

    Attributes:
        num_classes: of the teacher.
        temperature: that the loss divides them by; matters for a top-k cache only.
    """

    num_classes: int
    temperature: float = 1.0

    def columns(self, table: pa.Table) -> list[str]:
        """The names among a table's columns that stored logits have."""
        return [name for name in table.column_names if name in (*COLUMNS, MISSING)]

    def __call__(self, table: pa.Table, bad: Mapping[int, Any]) -> np.ndarray:
        """(B, num_classes) float32, writable; those of bad rows mean nothing.

        Args:
            table: rows with the columns of ``LogitsReader.read``.
            bad: positions of the rows that cannot be used.

        Raises:
            CacheError: a row can be used, but could not be when the cache was built.
        """
        missing = np.setdiff1d(np.flatnonzero(table[MISSING].to_numpy()), list(bad))
        if len(missing):
            sample_id = int(table[SAMPLE_ID][int(missing[0])].as_py())
            raise CacheError(
                f"the cache has no logits of sample {sample_id} and {len(missing) - 1} others of its block, which "
                f"could not be decoded when it was built, but now can: the data has changed; {REBUILD}.",
                sample_id=sample_id,
            )
        return decode_logits(table, self.num_classes, self.temperature)
