"""The mixture of Gaussians and its exact class probabilities."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from pipeline.contracts.columns import LABEL, SPLITS, InputSpec
from pipeline.data import AugmentParams
from pipeline.data.sources.gaussians import GaussiansParams, GaussiansSource
from pipeline.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def mixture() -> GaussiansSource:
    return GaussiansParams(num_train=20_000, num_validation=500, num_test=1_000).open()


def read(source: GaussiansSource, split: str) -> tuple[np.ndarray, np.ndarray]:
    reader = source.split(split)
    table = reader.read(reader.sample_ids)
    return source.decoder(split).decode(table), table[LABEL].to_numpy()


def test_sizes_and_types(mixture: GaussiansSource) -> None:
    assert mixture.spec == InputSpec("features", (30,), ("0", "1", "2"))
    assert [mixture.split(name).num_rows for name in SPLITS] == [20_000, 500, 1_000]
    assert mixture.carved == {}
    features, labels = read(mixture, "validation")
    assert features.dtype == np.float32
    assert features.shape == (500, 30)
    assert set(labels.tolist()) == {0, 1, 2}
    assert [GaussiansParams().num_train, GaussiansParams().num_validation, GaussiansParams().num_test] == [
        5_000, 5_000, 90_000,
    ]  # fmt: skip


def test_rows_have_the_distribution_described(mixture: GaussiansSource) -> None:
    features, labels = read(mixture, "train")
    assert set(np.unique(mixture.means).tolist()) == {-1.0, 0.0, 1.0}
    # Standard errors: 0.0033 of a class frequency, 0.03 of a coordinate's mean, 0.01 of the variance over 600,000.
    np.testing.assert_allclose(np.bincount(labels) / len(labels), 1 / 3, atol=0.015)
    noise = features - mixture.means[labels]
    for label in range(3):
        np.testing.assert_allclose(features[labels == label].mean(axis=0), mixture.means[label], atol=0.15)
    assert noise.var() == pytest.approx(6.0, abs=0.06)
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(3.0, abs=0.05)
    covariance = np.cov(noise.T)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=0.25)


def test_class_probabilities_are_those_of_bayes(mixture: GaussiansSource) -> None:
    features, _ = read(mixture, "test")
    ids = np.array([3, 999, 0, 3])
    densities = np.empty((4, 3))
    for row, sample_id in enumerate(ids):
        for label in range(3):
            distance = features[sample_id].astype(np.float64) - mixture.means[label]
            densities[row, label] = np.prod(np.exp(-(distance**2) / 12) / np.sqrt(12 * np.pi))
    probabilities = mixture.class_probabilities("test", ids)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities, densities / densities.sum(axis=1, keepdims=True), rtol=1e-10)
    with pytest.raises(DataError, match="sample 1000 is not one of the 1000 rows"):
        mixture.class_probabilities("test", np.array([1_000]))


def test_labels_have_the_frequencies_that_the_probabilities_say(mixture: GaussiansSource) -> None:
    _, labels = read(mixture, "train")
    probabilities = mixture.class_probabilities("train", mixture.split("train").sample_ids)
    for label in range(3):
        predicted = probabilities[:, label]
        edges = np.quantile(predicted, np.linspace(0, 1, 9))
        bins = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, 7)
        for number in range(8):  # 2,500 rows each: the standard error is at most 0.01
            chosen = bins == number
            assert (labels[chosen] == label).mean() == pytest.approx(predicted[chosen].mean(), abs=0.04)
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    assert accuracy == pytest.approx(probabilities.max(axis=1).mean(), abs=0.012)
    assert 0.72 < accuracy < 0.92


def test_means_and_noise_scale() -> None:
    plain = GaussiansParams(num_train=50, num_validation=5, num_test=5, num_classes=4, num_features=2).open()
    scaled = GaussiansParams(
        num_train=50, num_validation=5, num_test=5, num_classes=4, num_features=2, scale=3.0, variance=54.0
    ).open()
    np.testing.assert_array_equal(scaled.means, 3 * plain.means)
    np.testing.assert_allclose(read(scaled, "train")[0], 3 * read(plain, "train")[0], rtol=1e-5)


def test_draws_are_golden() -> None:
    # Part of the contract: raw bits never change, so neither does the data set.
    source = GaussiansParams(num_train=4, num_validation=1, num_test=1, num_features=3).open()
    features, labels = read(source, "train")
    assert source.means.tolist() == [[1, -1, 1], [1, 1, 0], [0, 1, 1]]
    assert labels.tolist() == [1, 1, 2, 1]
    np.testing.assert_allclose(features[0], [-2.540251, 0.3319082, -0.84244324], rtol=1e-6)
    bits = np.random.PCG64(np.random.SeedSequence((4, 0, 1))).random_raw(16).reshape(4, 4)
    normal = NormalDist()
    for row, label in enumerate(labels):
        noise = [normal.inv_cdf(((int(value) >> 11) + 0.5) / 2**53) for value in bits[row, 1:]]
        np.testing.assert_allclose(features[row], source.means[label] + np.sqrt(6) * np.array(noise), rtol=1e-6)


def test_splits_and_seeds_are_drawn_apart() -> None:
    small = GaussiansParams(num_train=10, num_validation=10, num_test=10)
    longer = GaussiansParams(num_train=11, num_validation=10, num_test=10)
    source, again, other = small.open(), longer.open(), GaussiansParams(**small.model_dump() | {"seed": 1}).open()
    np.testing.assert_array_equal(read(source, "test")[0], read(again, "test")[0])
    np.testing.assert_array_equal(read(source, "train")[0], read(again, "train")[0][:10])
    assert not np.array_equal(read(source, "train")[0], read(source, "test")[0])
    assert not np.array_equal(source.means, other.means)
    assert source.fingerprint == small.open().fingerprint
    assert len({source.fingerprint, again.fingerprint, other.fingerprint}) == 3


def test_augmentation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment: flip is for images"):
        GaussiansParams(augment=AugmentParams(flip=True)).open()
