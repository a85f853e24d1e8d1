"""Opening a cache: what serves, and what is said where nothing does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data import AugmentParams, RowSet
from pipeline.data.cache import open_cache
from pipeline.errors import CacheError
from tests.unit.caches import RowsOnly, make_cache, make_key, make_logits, make_reader, write_parts

MIXED = AugmentParams(flip=True, mixup=0.2).model_dump()


def refuse(path: Path | str, message: str, key: Any = None, reader: Any = None) -> CacheError:
    with pytest.raises(CacheError, match=message) as error:
        open_cache(str(path), key or make_key(), reader or make_reader())
    return error.value


def test_nothing_there(tmp_path: Path) -> None:
    advice = "build it with `python -m pipeline cache build` and the same configuration"
    refuse(tmp_path / "none", rf"^cache\.path=.*none holds no cache; {advice}\.$")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy milk")
    refuse(tmp_path, rf"^cache\.path=.* holds no cache; {advice}\.$")


def test_a_cache_is_opened_again(tmp_path: Path) -> None:
    made = make_cache(tmp_path)
    opened = open_cache(str(tmp_path), make_key(), make_reader())
    assert opened.manifest == made.manifest
    assert opened.manifest.teacher_accuracy == 0.75
    assert opened.manifest.recorded == {"created": "today"}
    assert opened.manifest.num_bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.arrow"))
    assert opened.folder.root == str(tmp_path / make_key().digest)


def test_several_live_side_by_side_and_the_nearest_is_named(tmp_path: Path) -> None:
    for key in (make_key(teacher="a", seed=5, precision="bfloat16"), make_key(teacher="a"), make_key(data="b", seed=7)):
        make_cache(tmp_path, key)
    near = make_key(teacher="a").digest
    error = refuse(
        tmp_path,
        rf"holds no cache of these logits: the nearest, {near}, differs in teacher \(stored \"a\", wanted "
        r"\"0123456789abcdef\"\); build it with `python -m pipeline cache build` and the same configuration, or go",
    )
    assert error.details["nearest"] == near


def test_the_nearest_is_a_complete_one_where_there_is_one(tmp_path: Path) -> None:
    write_parts(tmp_path, make_key(seed=1), make_reader(), make_logits(), num_parts=3)
    refuse(
        tmp_path, rf"the nearest, {make_key(seed=1).digest} \(not complete\), differs in seed \(stored 1, wanted 0\)"
    )
    make_cache(tmp_path, make_key(seed=2, teacher="a"))
    refuse(tmp_path, rf"the nearest, {make_key(seed=2, teacher='a').digest}, differs in teacher .* seed \(stored 2,")


def test_a_damaged_neighbour_is_no_neighbour(tmp_path: Path) -> None:
    make_cache(tmp_path, make_key(seed=1))
    (tmp_path / make_key(seed=1).digest / "manifest.json").write_text("{")
    refuse(tmp_path, "holds no cache; build it")


def test_a_build_that_is_not_complete(tmp_path: Path) -> None:
    write_parts(tmp_path, make_key(), make_reader(), make_logits(), num_parts=7)
    refuse(
        tmp_path,
        r"is not complete: it has 7 of 18 parts and no manifest\.json; run `python -m pipeline cache build` with the "
        "same configuration, which computes only what is missing",
    )


def test_labels_batch_size_and_the_way_rows_are_stored_do_not_matter(tmp_path: Path) -> None:
    """Only the row groups are other: a split that is held in memory may have none."""
    make_cache(tmp_path, reader=make_reader(group_rows=7))
    open_cache(str(tmp_path), make_key(), make_reader(group_rows=None))


@pytest.mark.parametrize("reader", [make_reader(20), make_reader(10, 40), make_reader(0, 1)])
def test_fewer_rows_are_served(tmp_path: Path, reader: RowsOnly) -> None:
    make_cache(tmp_path)
    assert open_cache(str(tmp_path), make_key(), reader).rows == reader.rows


def test_rows_that_are_lacking_are_counted(tmp_path: Path) -> None:
    stored, wanted = make_reader(20), make_reader(10)
    make_cache(tmp_path, reader=stored)
    lacking = sorted(set(wanted.sample_ids.tolist()) - set(stored.sample_ids.tolist()))
    error = refuse(
        tmp_path,
        f"lacks 10 of the 50 rows of the train split, the first sample {lacking[0]}: it was built for another split; "
        "build it with `python -m pipeline cache build` and the same configuration, or split the data as it was",
        reader=wanted,
    )
    assert error.details == {"num_rows": 10, "sample_id": lacking[0]}


def test_another_carving_is_served_by_what_both_hold(tmp_path: Path) -> None:
    make_cache(tmp_path, reader=make_reader(20, seed=3))
    other = make_reader(20, seed=4)
    lacking = set(other.sample_ids.tolist()) - set(make_reader(20, seed=3).sample_ids.tolist())
    refuse(tmp_path, f"lacks {len(lacking)} of the 40 rows", reader=other)


def test_mixed_images_want_the_very_rows(tmp_path: Path) -> None:
    key = make_key(augment=MIXED)
    make_cache(tmp_path, key, make_reader(10))
    open_cache(str(tmp_path), key, make_reader(10))
    refuse(
        tmp_path,
        "was built for a train split of 50 rows, and the partners that images are mixed with depend on them",
        key,
        make_reader(20),
    )


def test_mixed_images_of_equal_rows_by_another_rule(tmp_path: Path) -> None:
    key = make_key(augment=MIXED)
    make_cache(tmp_path, key, make_reader(seed=3))
    open_cache(str(tmp_path), key, make_reader(seed=9))  # all rows, whatever the seed


def test_a_source_whose_rows_changed(tmp_path: Path) -> None:
    make_cache(tmp_path)
    more = RowsOnly(RowSet.whole(61), None)
    refuse(
        tmp_path, "built of files of 60 rows, but the train files have 61; restore the data, or build it", reader=more
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://user:secret@bucket/caches", r"^cache\.path holds a secret"),
        ("s3://bucket/caches?colour=red", r"^cache\.path=s3://.* cannot be opened: .* got the setting 'colour'"),
    ],
)
def test_addresses_that_cannot_be_used(path: str, message: str) -> None:
    refuse(path, message)
