"""A mixture of Gaussians whose class probabilities are known: what a teacher says can be compared with the truth."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.contracts.columns import SPLITS, InputSpec, SplitName
from pipeline.data.order.rows import RowSet
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.pixels.augment import check_augment
from pipeline.data.pixels.decode import Decoder
from pipeline.data.sources.source import DataSource, TableReader, make_table

# First word of the seeds, as of the keys in ``pipeline.data.order.rows``.
_KEY = 4


@DATASETS.register
class GaussiansParams(DataParams):
    """The generator of Ren et al. (arXiv 2203.02485), with its sizes as defaults.

    Every mean has coordinates drawn from -1, 0 and 1, times ``scale``. A row's class is drawn uniformly, and its
    features are the mean of the class plus Gaussian noise. With the defaults the best possible accuracy is about 0.83,
    depending on the means.
    """

    name: Literal["gaussians"] = "gaussians"
    num_train: int = Field(default=5_000, ge=1)
    """Rows of the train split."""
    num_validation: int = Field(default=5_000, ge=1)
    """Rows of the validation split."""
    num_test: int = Field(default=90_000, ge=1)
    """Rows of the test split."""
    num_classes: int = Field(default=3, ge=2)
    """Gaussians in the mixture, each a class."""
    num_features: int = Field(default=30, ge=1)
    """Features of a row."""
    scale: float = Field(default=1.0, gt=0)
    """Distance between neighbouring coordinates of the means."""
    variance: float = Field(default=6.0, gt=0)
    """Variance of the noise, in each coordinate."""
    seed: int = Field(default=0, ge=0)
    """Draws means, classes and noise; not the seed of the run."""

    def open(self) -> GaussiansSource:
        return GaussiansSource(self)


class GaussiansSource(DataSource):
    """The mixture in memory; features are float32.

    Everything is drawn from raw bits, which NumPy promises never to change (NEP 19), through SciPy's inverse of the
    normal distribution function; versions of that differ in last bits of float64, which float32 hardly shows.

    Args:
        params: of the mixture.

    Raises:
        ConfigError: augmentation, which is for images.
    """

    def __init__(self, params: GaussiansParams) -> None:
        self.spec = InputSpec(
            "features", (params.num_features,), tuple(str(number) for number in range(params.num_classes))
        )
        check_augment(params.augment, self.spec)
        self.memory_bytes = params.memory_bytes
        self.carved = {}
        self.means = _draw_means(params)
        """(C, F) float64 mean of each class."""
        self._variance = params.variance
        sizes: dict[SplitName, int] = {
            "train": params.num_train,
            "validation": params.num_validation,
            "test": params.num_test,
        }
        rows = {split: self._draw_rows(params.seed, number, sizes[split]) for number, split in enumerate(SPLITS, 1)}
        digest = hashlib.sha256()
        for features, _ in rows.values():
            digest.update(repr(features.shape).encode() + features.tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self._readers = {split: _make_reader(*values) for split, values in rows.items()}

    def split(self, name: SplitName) -> TableReader:
        return self._readers[name]

    def decoder(self, name: SplitName) -> Decoder:
        return Decoder(self.spec.kind, self.spec.shape)

    def class_probabilities(self, name: SplitName, sample_ids: np.ndarray) -> np.ndarray:
        """The probability of each class given a row's features: softmax of -|x - mean|^2 / (2 variance).

        Args:
            name: of the split.
            sample_ids: (B,) int64, of that split.

        Returns:
            (B, C) float64.

        Raises:
            DataError: an id is not of the split.
        """
        features = self.decode(self.split(name).read(sample_ids)).astype(np.float64)
        # |x|^2 is the same for every class.
        scores = (features @ self.means.T - (self.means**2).sum(axis=1) / 2) / self._variance
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities

    def _draw_rows(self, seed: int, number: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(N, F) float32 features and (N,) int64 labels of a split, whatever the sizes of the others."""
        from scipy.special import ndtri  # 20 MB that only this data set needs

        bits = _draw_bits(seed, number, num_rows * (1 + self.means.shape[1])).reshape(num_rows, -1)
        labels = _below(bits[:, 0], len(self.means))
        # The middle of each of 2**53 steps: neither 0 nor 1, whose normal values are infinite.
        noise = ndtri(((bits[:, 1:] >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
        return (self.means[labels] + np.sqrt(self._variance) * noise).astype(np.float32), labels


def _draw_means(params: GaussiansParams) -> np.ndarray:
    bits = _draw_bits(params.seed, 0, params.num_classes * params.num_features)
    means: np.ndarray = params.scale * (_below(bits, 3) - 1.0).reshape(params.num_classes, params.num_features)
    return means


def _draw_bits(seed: int, number: int, size: int) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence((_KEY, seed, number))).random_raw(size)


def _below(bits: np.ndarray, limit: int) -> np.ndarray:
    """int64 in [0, limit); the bias of the remainder is below limit / 2**64."""
    return (bits % np.uint64(limit)).astype(np.int64)


def _make_reader(features: np.ndarray, labels: np.ndarray) -> TableReader:
    encoded = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    rows = RowSet.whole(len(labels))
    return TableReader(make_table(rows.ids, encoded, pa.array(labels)), rows)
