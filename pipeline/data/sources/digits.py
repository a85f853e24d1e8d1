"""The digits that come with scikit-learn: 1,797 grey images of 8 x 8; no download."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import InputSpec, SplitName
from pipeline.data.order.rows import RowSet, carve
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.pixels.decode import Decoder
from pipeline.data.sources.source import DataSource, TableReader, describe_carved, make_table


@DATASETS.register
class DigitsParams(DataParams):
    """Handwritten digits, all three splits carved out of the one set."""

    name: Literal["digits"] = "digits"

    def open(self) -> DigitsSource:
        return DigitsSource(self)


class DigitsSource(DataSource):
    """The digits in memory. The stored values 0..16 are spread over 0..255.

    Args:
        params: how to carve the splits.
    """

    def __init__(self, params: DigitsParams) -> None:
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        self._pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        self._labels = digits.target.astype(np.int64)
        shape = self._pixels.shape
        self.spec = InputSpec("image", (1, *shape[1:]), tuple(str(digit) for digit in range(10)))
        self.fingerprint = hashlib.sha256(repr(shape).encode() + self._pixels.tobytes()).hexdigest()[:16]
        self.memory_bytes = params.memory_bytes
        fractions: dict[SplitName, float] = {"validation": params.validation_fraction, "test": params.test_fraction}
        self._rows = carve(len(self._labels), fractions, params.split_seed)
        self.carved = {name: describe_carved(self._rows[name]) for name in fractions}
        self._readers = {name: self._make_reader(rows) for name, rows in self._rows.items()}

    def _make_reader(self, rows: RowSet) -> TableReader:
        pixels = self._pixels[rows.ids].reshape(-1)
        encoded = pa.FixedSizeListArray.from_arrays(pa.array(pixels), self._pixels[0].size)
        return TableReader(make_table(rows.ids, encoded, pa.array(self._labels[rows.ids])), rows)

    def split(self, name: SplitName) -> TableReader:
        return self._readers[name]

    def decoder(self, name: SplitName) -> Decoder:
        return Decoder(self.spec.kind, self.spec.shape)
