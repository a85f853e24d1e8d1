"""What a cache will cost, and what top-k will lose, before any of it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.data.cache.encoding import IDS, as_table, column_types, decode_logits, encode_logits
from pipeline.data.cache.key import CacheKey
from pipeline.data.cache.params import EncodingParams
from pipeline.data.cache.parts import RUN_ROWS, format_part, part_name
from pipeline.data.cache.topk import TEMPERATURES

MEASURED_TEMPERATURES = tuple(sorted({*TEMPERATURES, 1.5, 6.0}))
"""The stored temperatures, and two between them."""

_SAMPLE_ID_BYTES = 8


@dataclass(frozen=True)
class CachePlan:
    """What a cache of some data set costs.

    Attributes:
        num_rows: of all views.
        num_bytes: of its parts.
        num_files: parts, and the manifest.
        build_hours: of one accelerator.
        read_bytes_per_s: that training asks of the storage.
    """

    num_rows: int
    num_bytes: int
    num_files: int
    build_hours: float
    read_bytes_per_s: float


@dataclass(frozen=True)
class TopkError:
    """What is lost at one temperature by keeping the k likeliest classes of each row.

    Attributes:
        temperature: the losses divide by.
        head_largest: largest difference of a probability of a class that is kept.
        head_mean: mean of these differences.
        kl_largest: of the rows' KL divergences from the full probabilities to the reconstructed ones, in nats.
        kl_mean: their mean.
        tail_mass: mean probability of all classes that are not kept, together.
    """

    temperature: float
    head_largest: float
    head_mean: float
    kl_largest: float
    kl_mean: float
    tail_mass: float


def row_bytes(num_classes: int, params: EncodingParams) -> int:
    """Bytes that a row takes in a part."""
    types = column_types(params, num_classes).values()
    return _SAMPLE_ID_BYTES + sum(dtype.itemsize * (width or 1) for dtype, width in types)


def estimate_bytes(
    num_rows: int, num_views: int, num_classes: int, params: EncodingParams, num_parts: int | None = None
) -> int:
    """Bytes of all parts of a cache.

    Args:
        num_rows: of the split.
        num_views: of each row.
        num_classes: of the teacher.
        params: encoding.
        num_parts: of one view: row groups of the source; none: it has no row groups.
    """
    parts = _count_parts(num_rows, num_parts)
    return num_views * (num_rows * row_bytes(num_classes, params) + parts * _frame_bytes(num_classes, params))


def plan_cache(
    num_rows: int,
    num_views: int,
    num_classes: int,
    params: EncodingParams,
    rows_per_s: float,
    samples_per_s: float,
    num_parts: int | None = None,
) -> CachePlan:
    """What a cache of a data set of any size costs.

    Args:
        num_rows: of the split.
        num_views: of each row.
        num_classes: of the teacher.
        params: encoding.
        rows_per_s: that the teacher does on one accelerator, > 0.
        samples_per_s: that training is to read.
        num_parts: as of ``estimate_bytes``.
    """
    return CachePlan(
        num_rows=num_rows * num_views,
        num_bytes=estimate_bytes(num_rows, num_views, num_classes, params, num_parts),
        num_files=num_views * _count_parts(num_rows, num_parts) + 1,
        build_hours=num_rows * num_views / rows_per_s / 3600,
        read_bytes_per_s=samples_per_s * row_bytes(num_classes, params),
    )


def measure_topk_error(logits: np.ndarray, params: EncodingParams) -> list[TopkError]:
    """What a top-k cache loses on a sample of logits, at each of ``MEASURED_TEMPERATURES``.

    Args:
        logits: (B, C) float32, of rows of the user's own data.
        params: with format=topk.
    """
    columns = encode_logits(logits, params)
    table, kept = as_table(columns), columns[IDS].astype(np.int64)
    return [
        _measure(logits, decode_logits(table, logits.shape[1], temperature), kept, temperature)
        for temperature in MEASURED_TEMPERATURES
    ]


def _measure(logits: np.ndarray, decoded: np.ndarray, kept: np.ndarray, temperature: float) -> TopkError:
    full, reconstructed = _log_softmax(logits, temperature), _log_softmax(decoded, temperature)
    heads = [np.exp(np.take_along_axis(values, kept, axis=1)) for values in (full, reconstructed)]
    differences = np.abs(heads[0] - heads[1])
    divergences = (np.exp(full) * (full - reconstructed)).sum(axis=1)
    return TopkError(
        temperature=temperature,
        head_largest=float(differences.max()),
        head_mean=float(differences.mean()),
        kl_largest=float(divergences.max()),
        kl_mean=float(divergences.mean()),
        tail_mass=float(1 - heads[0].sum(axis=1).mean()),
    )


def _log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    log_probabilities: np.ndarray = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return log_probabilities


def _count_parts(num_rows: int, num_parts: int | None) -> int:
    return math.ceil(num_rows / RUN_ROWS) if num_parts is None else num_parts


def _frame_bytes(num_classes: int, params: EncodingParams) -> int:
    """Bytes of a part without rows: schema, metadata and footer."""
    key = CacheKey(
        **params.model_dump(include=set(EncodingParams.model_fields)),
        teacher="",
        architecture={},
        preprocessing={},
        precision="",
        data="",
        augment={},
        seed=None,
        num_views=1,
        num_classes=num_classes,
    )
    types, nobody = column_types(params, num_classes), np.empty(0, np.int64)
    columns = {name: np.empty(0 if width is None else (0, width), dtype) for name, (dtype, width) in types.items()}
    return int(format_part(key, part_name(0, 0), nobody, nobody, columns).size)
