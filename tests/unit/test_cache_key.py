"""What a cache of logits depends on: every ingredient of its key is told apart, and named where it differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.data import AugmentParams
from pipeline.data.cache import CacheKey, CacheParams, check_classes, open_cache
from pipeline.errors import ConfigError, PipelineError
from tests.unit.caches import make_cache, make_key, make_reader

AUGMENT = AugmentParams(flip=True).model_dump()
CHANGES: list[tuple[dict[str, Any], str, Any, Any]] = [
    ({"teacher": "ffff"}, "teacher", "0123456789abcdef", "ffff"),
    ({"architecture": {"name": "resnet20", "depth": 32}}, "architecture.depth", 20, 32),
    (
        {"preprocessing": {"mean": [0.5, 0.5, 0.4], "size": None}},
        "preprocessing.mean",
        [0.5, 0.5, 0.5],
        [0.5, 0.5, 0.4],
    ),
    ({"precision": "bfloat16"}, "precision", "float32", "bfloat16"),
    ({"data": "aaaa"}, "data", "fedcba9876543210", "aaaa"),
    ({"seed": 1}, "seed", 0, 1),
    ({"seed": None}, "seed", 0, None),
    ({"num_views": 3}, "num_views", 2, 3),
    ({"num_classes": 13}, "num_classes", 12, 13),
    ({"dtype": "float32"}, "dtype", "float16", "float32"),
    *(
        ({"augment": AUGMENT | {name: value}}, f"augment.{name}", AUGMENT[name], value)
        for name, value in {
            "crop_padding": 4,
            "random_resized_crop": [0.08, 1.0],
            "flip": False,
            "brightness": 0.1,
            "contrast": 0.1,
            "saturation": 0.1,
            "randaugment": 2,
            "randaugment_magnitude": 10,
            "mixup": 0.2,
            "cutmix": 1.0,
        }.items()
    ),
]


def test_the_changes_cover_every_field() -> None:
    changed = {path.split(".")[0] for _, path, _, _ in CHANGES} | {"format", "k"}  # these two in a test of their own
    assert changed == set(CacheKey.model_fields)
    assert {path for _, path, _, _ in CHANGES if path.startswith("augment.")} == {
        f"augment.{name}" for name in AugmentParams.model_fields
    }


@pytest.mark.parametrize(("change", "path", "stored", "wanted"), CHANGES, ids=[f"{c[1]}={c[3]}" for c in CHANGES])
def test_each_ingredient_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], path: str, stored: Any, wanted: Any
) -> None:
    make_cache(tmp_path)
    key = make_key(**change)
    assert key.digest != make_key().digest
    assert make_key().differences(key) == [(path, stored, wanted)]
    with pytest.raises(PipelineError) as error:
        open_cache(str(tmp_path), key, make_reader())
    assert f"differs in {path} (stored {json.dumps(stored)}, wanted {json.dumps(wanted)});" in error.value.message
    assert "`python -m pipeline cache build`" in error.value.message
    assert error.value.details["differences"] == [[path, stored, wanted]]


def test_format_and_k_are_refused_by_name(tmp_path: Path) -> None:
    make_cache(tmp_path)
    with pytest.raises(
        PipelineError, match=r'differs in format \(stored "dense", wanted "topk"\), k \(stored null, wanted 3'
    ):
        open_cache(str(tmp_path), make_key(format="topk", k=3), make_reader())


def test_fields_that_one_key_lacks_are_named() -> None:
    without = {name: value for name, value in AUGMENT.items() if name != "cutmix"}
    assert make_key(augment=without).differences(make_key()) == [("augment.cutmix", "(not there)", 0.0)]
    assert make_key().differences(make_key(augment=without)) == [("augment.cutmix", 0.0, "(not there)")]


def test_the_digest_does_not_depend_on_the_order_of_fields() -> None:
    turned = dict(reversed(list(AUGMENT.items())))
    assert make_key(augment=turned).digest == make_key().digest
    assert make_key(augment=turned).differences(make_key()) == []


def test_the_digest_stays_as_it_is() -> None:
    """A change of it makes every cache that there is a stale one."""
    assert make_key().digest == "2049800359f932c2"


def test_keys_survive_json() -> None:
    key = make_key(augment=AugmentParams(random_resized_crop=(0.1, 1)).model_dump())
    again = CacheKey.model_validate_json(key.model_dump_json())
    assert again.digest == key.digest
    assert again.differences(key) == []


@pytest.mark.parametrize(("augment", "mixes"), [({}, False), ({"mixup": 0.2}, True), ({"cutmix": 1.0}, True)])
def test_mixing_is_seen_in_the_key(augment: dict[str, float], mixes: bool) -> None:
    assert make_key(augment=AUGMENT | augment).mixes == mixes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "topk"}, "format=topk keeps the k likeliest classes, expected k, got none"),
        ({"k": 10}, "format=dense keeps every class, expected no k, got k=10"),
        ({"format": "topk", "k": 0}, "greater than or equal to 1"),
        ({"dtype": "bfloat16"}, "'float16' or 'float32'"),
        ({"format": "sparse"}, "'dense' or 'topk'"),
    ],
)
def test_parameters_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CacheParams(**values)


@pytest.mark.parametrize(
    ("k", "num_classes", "message"),
    [
        (None, 70_000, None),
        (10, 10, None),
        (10, 60_000, None),
        (10, 65_536, None),
        (11, 10, "cache.k=11 is more than the 10 classes there are; set cache.k to less, or cache.format=dense"),
        (
            10,
            70_000,
            "keeps class numbers as uint16, expected at most 65536 classes, got 70000; set cache.format=dense",
        ),
    ],
)
def test_encodings_that_do_not_fit_the_classes(k: int | None, num_classes: int, message: str | None) -> None:
    params = CacheParams(format="dense" if k is None else "topk", k=k)
    if message is None:
        check_classes(params, num_classes)
    else:
        with pytest.raises(ConfigError, match=message):
            check_classes(params, num_classes)
