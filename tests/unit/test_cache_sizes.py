"""What a cache will cost and lose, told before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.cache import CacheParams, estimate_bytes, measure_topk_error, plan_cache
from tests.unit.caches import NUM_ROWS, make_cache, make_key, make_reader


@pytest.mark.parametrize("group_rows", [3, 20, None])
@pytest.mark.parametrize("num_classes", [12, 1000])
@pytest.mark.parametrize("encoding", [{}, {"dtype": "float32"}, {"format": "topk", "k": 10}])
def test_the_estimate_is_what_it_takes(
    tmp_path: Path, encoding: dict[str, Any], num_classes: int, group_rows: int | None
) -> None:
    reader = make_reader(6, group_rows=group_rows)
    cache = make_cache(tmp_path, make_key(num_classes=num_classes, num_views=3, **encoding), reader)
    num_parts = None if group_rows is None else len(cache.manifest.layout.indexes)
    estimated = estimate_bytes(reader.num_rows, 3, num_classes, CacheParams(**encoding), num_parts)
    assert estimated == pytest.approx(cache.manifest.num_bytes, rel=0.02)


def test_a_plan_by_hand() -> None:
    plan = plan_cache(1_281_167, 4, 1000, CacheParams(), rows_per_s=2000, samples_per_s=1500, num_parts=1282)
    assert plan.num_rows == 5_124_668
    assert plan.num_files == 4 * 1282 + 1
    assert plan.build_hours == pytest.approx(5_124_668 / 2000 / 3600)
    assert plan.read_bytes_per_s == 1500 * (8 + 2000 + 4)
    assert plan.num_bytes == pytest.approx(5_124_668 * 2012, rel=0.01)
    small = plan_cache(NUM_ROWS, 1, 1000, CacheParams(format="topk", k=10), rows_per_s=1, samples_per_s=1)
    assert small.read_bytes_per_s == 8 + 20 + 20 + 4 + 20
    assert small.num_files == 2


def test_the_error_of_topk_is_what_comes_back_wrong() -> None:
    logits = (np.random.default_rng(0).normal(size=(500, 100)) * 4).astype(np.float32)
    errors = {error.temperature: error for error in measure_topk_error(logits, TOP10)}
    assert list(errors) == [1, 1.5, 2, 4, 6, 8, 20]
    for temperature, error in errors.items():
        stored = temperature not in (1.5, 6)
        assert error.head_largest < (1e-5 if stored else 0.01)
        assert 0 <= error.head_mean <= error.head_largest
        assert 0 < error.kl_mean < error.kl_largest < 0.5
    masses = [error.tail_mass for error in errors.values()]
    assert masses == sorted(masses)  # the hotter, the more is left out
    scaled = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    left_out = np.sort(scaled, axis=1)[:, :-10].sum(axis=1) / scaled.sum(axis=1)
    assert errors[1].tail_mass == pytest.approx(left_out.mean(), rel=1e-5)


def test_more_classes_kept_lose_less() -> None:
    logits = (np.random.default_rng(0).normal(size=(100, 100)) * 4).astype(np.float32)
    divergences = [
        measure_topk_error(logits, CacheParams(format="topk", k=k, dtype="float32"))[3].kl_mean
        for k in (1, 10, 50, 100)
    ]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] == pytest.approx(0, abs=1e-9)


TOP10 = CacheParams(format="topk", k=10, dtype="float32")
