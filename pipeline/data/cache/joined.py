"""Logits of a cache beside the rows that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import SAMPLE_ID
from pipeline.data.cache.encoding import COLUMNS, MISSING, decode_logits
from pipeline.data.cache.folder import REBUILD
from pipeline.errors import CacheError


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
