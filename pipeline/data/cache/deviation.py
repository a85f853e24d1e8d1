"""How far what a cache holds is from what the teacher says now."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.data.cache.encoding import IDS, column_array, decode_logits
from pipeline.data.cache.key import CacheKey

# Largest deviation of a logit that rounding explains, as a share of the range of its row's logits: of sums that another
# machine adds up in another order, of what is stored in half precision, of a network that computes in bfloat16.
_COMPUTED = {"fp32": 1e-4, "bf16": 2**-6}
_STORED = {"float32": 0.0, "float16": 2**-11}


def tolerance(key: CacheKey) -> float:
    """Largest deviation of a logit that rounding explains, as a share of the range of its row's logits."""
    return _COMPUTED[key.precision] + _STORED[key.dtype]


def find_deviations(stored: pa.Table, logits: np.ndarray, key: CacheKey) -> np.ndarray:
    """Largest difference in each row between a logit that is stored and the same one now.

    Args:
        stored: B rows as of ``LogitsReader.read``.
        logits: (B, C) float32 of the live teacher.
        key: of the cache.

    Returns:
        (B,) float32; of the classes that are kept.
    """
    differences = np.abs(decode_logits(stored, key.num_classes, 1.0) - logits)
    if key.k is not None:
        kept = column_array(stored[IDS]).astype(np.int64)
        differences = np.take_along_axis(differences, kept, axis=1)
    largest: np.ndarray = differences.max(axis=1)
    return largest
