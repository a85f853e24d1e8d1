"""Logits as they are stored: what comes back exactly, and how far off the rest may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.data.cache.encoding import IDS, OFFSET, TAIL, VALUES, Columns, as_table, decode_logits, encode_logits
from pipeline.data.cache.params import EncodingParams
from pipeline.data.cache.topk import TEMPERATURES, _spline_weights, select_topk
from pipeline.errors import CacheError, ConfigError

KINDS = ["normal", "wide", "two groups", "heavy tails", "exponential", "confident"]
TOP10 = EncodingParams(format="topk", k=10, dtype="float32")


def draw_logits(kind: str, num_rows: int = 200, num_classes: int = 100, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    shape = (num_rows, num_classes)
    normal = draws.normal(size=shape)
    logits = {
        "normal": 4 * normal,
        "wide": 30 * normal,
        "two groups": np.where(draws.random(shape) < 0.5, -1, -30) + normal,
        "heavy tails": 3 * draws.standard_t(3, size=shape),
        "exponential": -4 * draws.exponential(size=shape),
        "confident": normal + 20 * (np.arange(num_classes) == draws.integers(num_classes, size=(num_rows, 1))),
    }[kind]
    return logits.astype(np.float32)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def encode(logits: np.ndarray, **values: Any) -> Columns:
    return encode_logits(logits, EncodingParams(**values))


@pytest.mark.parametrize("temperature", [0.1, 1, 3.3, 100])
def test_dense_float32_is_exact(temperature: float) -> None:
    logits = np.concatenate([draw_logits(kind) for kind in KINDS])
    logits[:5] *= 1e30
    decoded = decode_logits(as_table(encode(logits, dtype="float32")), 100, temperature)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == logits.tobytes()
    assert decoded.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_dense_float16_is_within_its_rounding(kind: str) -> None:
    logits = draw_logits(kind) + 1000
    decoded = decode_logits(as_table(encode(logits)), 100, 1)
    below = logits - logits.max(axis=1, keepdims=True)
    # Half a unit in the last of 11 bits, and what float32 makes of numbers near 1000.
    assert (np.abs(decoded - logits) <= np.abs(below) * 2**-11 + 1e-4).all()
    np.testing.assert_array_equal(decoded.max(axis=1), logits.max(axis=1))
    assert np.abs(softmax(decoded, 1) - softmax(logits, 1)).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_topk_is_exact_at_the_stored_temperatures(kind: str, temperature: float) -> None:
    logits = draw_logits(kind)
    columns = encode_logits(logits, TOP10)
    decoded = decode_logits(as_table(columns), 100, temperature)
    kept = columns[IDS].astype(int)
    full, reconstructed = softmax(logits, temperature), softmax(decoded, temperature)
    np.testing.assert_allclose(
        np.take_along_axis(reconstructed, kept, 1), np.take_along_axis(full, kept, 1), rtol=2e-5, atol=1e-7
    )
    for row in range(len(logits)):
        others = np.setdiff1d(np.arange(100), kept[row])
        assert len(set(decoded[row, others].tolist())) == 1
        np.testing.assert_allclose(reconstructed[row, others].sum(), full[row, others].sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_near_between_the_stored_temperatures(kind: str) -> None:
    logits = draw_logits(kind, seed=1)
    columns = encode_logits(logits, TOP10)
    kept = columns[IDS].astype(int)
    for temperature in (1.05, 1.5, 3, 5, 6, 7, 10, 13, 17, 19.9):
        decoded = decode_logits(as_table(columns), 100, temperature)
        full, reconstructed = softmax(logits, temperature), softmax(decoded, temperature)
        heads = [np.take_along_axis(values, kept, 1).sum(axis=1) for values in (full, reconstructed)]
        assert np.abs(heads[0] - heads[1]).max() < 0.02  # one stored temperature alone would make it 0.15
        assert np.abs(heads[0] - heads[1]).mean() < 0.003
        # No class that is left out overtakes one that is kept.
        smallest_kept = np.take_along_axis(decoded, kept[:, -1:], 1)
        assert (decoded <= smallest_kept + 1e-4).sum() >= 90 * len(logits)


def test_the_interpolation_is_the_cubic_spline() -> None:
    from scipy.interpolate import CubicSpline

    knots = np.array([0, *(1 / temperature for temperature in reversed(TEMPERATURES))])
    values = np.random.default_rng(0).normal(size=6)
    for position in np.linspace(0.051, 0.999, 40):
        weighed = values[::-1] @ _spline_weights(position)
        assert weighed == pytest.approx(float(CubicSpline(knots, values)(position)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("near", TEMPERATURES)
def test_the_tail_is_continuous_in_the_temperature(near: float) -> None:
    table = as_table(encode_logits(draw_logits("normal"), TOP10))
    at = decode_logits(table, 100, near)
    for temperature in {min(near + 1e-6, 20), max(near - 1e-6, 1)}:
        np.testing.assert_allclose(decode_logits(table, 100, temperature), at, atol=1e-3)


def test_float16_changes_a_topk_row_by_its_rounding() -> None:
    logits = draw_logits("normal")
    columns = encode(logits, format="topk", k=10)
    assert columns[VALUES].dtype == np.float16
    for temperature in TEMPERATURES:
        decoded = decode_logits(as_table(columns), 100, temperature)
        kept = columns[IDS].astype(int)
        heads = [np.take_along_axis(softmax(values, temperature), kept, 1) for values in (logits, decoded)]
        assert np.abs(heads[0] - heads[1]).max() < 2e-3


def test_a_row_by_hand() -> None:
    columns = encode_logits(np.array([[1, 5, 3, 1]], np.float32), EncodingParams(format="topk", k=2, dtype="float32"))
    assert columns[IDS].tolist() == [[1, 2]]
    assert columns[VALUES].tolist() == [[0, -2]]
    assert columns[OFFSET].tolist() == [5]
    # Two others, each 4 below the maximum: log(2 exp(-4 / T)).
    np.testing.assert_allclose(
        columns[TAIL], [[np.log(2) - 4 / temperature for temperature in TEMPERATURES]], rtol=1e-6
    )
    for temperature in (1, 1.7, 3, 20):  # equal logits come back at any temperature
        np.testing.assert_allclose(decode_logits(as_table(columns), 4, temperature), [[1, 5, 3, 1]], atol=1e-5)


def test_equal_logits_are_taken_in_the_order_of_classes() -> None:
    draws = np.random.default_rng(0)
    logits = draws.integers(0, 4, size=(300, 40)).astype(np.float32)
    for k in (1, 3, 17, 39, 40):
        expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(select_topk(logits, k), expected)


def test_all_classes_may_be_kept() -> None:
    logits = draw_logits("normal", num_classes=10)
    table = as_table(encode_logits(logits, TOP10))
    np.testing.assert_allclose(decode_logits(table, 10, 2.5), logits, atol=1e-5)


@pytest.mark.parametrize("params", [EncodingParams(), TOP10], ids=["dense", "topk"])
def test_very_large_logits(params: EncodingParams) -> None:
    logits = draw_logits("normal")
    logits[:, ::2] -= 10_000
    logits[0, 5] = 10_000
    table = as_table(encode_logits(logits, params))
    for temperature in (1, 1.3, 9, 20):
        decoded = decode_logits(table, 100, temperature)
        assert np.isfinite(decoded).all()
        likeliest = [softmax(values, temperature).max(axis=1) for values in (decoded, logits)]
        np.testing.assert_allclose(*likeliest, atol=2e-3 if temperature in TEMPERATURES else 0.02)


def test_60_000_classes_in_topk_and_70_000_in_dense() -> None:
    many = draw_logits("normal", 3, 60_000)
    columns = encode_logits(many, TOP10)
    assert columns[IDS].dtype == np.uint16
    np.testing.assert_array_equal(columns[IDS], np.argsort(-many, axis=1, kind="stable")[:, :10])
    assert columns[IDS].max() > 2**15
    decoded = decode_logits(as_table(columns), 60_000, 4)
    assert (decoded.argmax(axis=1) == many.argmax(axis=1)).all()
    more = draw_logits("normal", 3, 70_000)
    assert decode_logits(as_table(encode(more, dtype="float32")), 70_000, 4).tobytes() == more.tobytes()
    with pytest.raises(ConfigError, match="expected at most 65536 classes, got 70000"):
        encode_logits(more, TOP10)


def test_more_to_keep_than_classes() -> None:
    with pytest.raises(ConfigError, match=r"cache\.k=10 is more than the 9 classes"):
        encode_logits(draw_logits("normal", 3, 9), TOP10)


@pytest.mark.parametrize("params", [EncodingParams(), EncodingParams(dtype="float32"), TOP10])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(params: EncodingParams, number: float) -> None:
    logits = draw_logits("normal", 20)
    logits[7, 30] = logits[9, 1] = number
    with pytest.raises(
        CacheError, match=rf"2 of 20 rows .*: the first, row 7, has {number}, which is not finite; check"
    ):
        encode_logits(logits, params)


def test_logits_too_far_apart_for_float16() -> None:
    logits = draw_logits("normal", 20)
    logits[4, 2] = -70_000
    with pytest.raises(
        CacheError, match=r"1 of 20 rows .* row 4, .* too far below the largest.* set cache\.dtype=float32"
    ):
        encode(logits)
    assert (decode_logits(as_table(encode(logits, dtype="float32")), 100, 1) == logits).all()


@pytest.mark.parametrize("temperature", [0.5, 0.999, 20.1, 100])
def test_temperatures_beyond_the_stored_ones(temperature: float) -> None:
    table = as_table(encode_logits(draw_logits("normal", 4), TOP10))
    with pytest.raises(
        ConfigError, match=rf"temperatures 1 to 20, got {temperature:g}; set a temperature between them"
    ):
        decode_logits(table, 100, temperature)


@pytest.mark.parametrize("params", [EncodingParams(), EncodingParams(dtype="float32"), TOP10])
def test_slices_chunks_and_taken_rows_decode_alike(params: EncodingParams) -> None:
    import pyarrow as pa

    table = as_table(encode_logits(draw_logits("normal"), params))
    whole = decode_logits(table, 100, 3)
    np.testing.assert_array_equal(decode_logits(table.slice(13, 50), 100, 3), whole[13:63])
    chunks = pa.concat_tables([table.slice(90, 20), table.slice(5, 30)])
    np.testing.assert_array_equal(decode_logits(chunks, 100, 3), np.concatenate([whole[90:110], whole[5:35]]))
    np.testing.assert_array_equal(decode_logits(table.take(pa.array([7, 3, 7])), 100, 3), whole[[7, 3, 7]])
