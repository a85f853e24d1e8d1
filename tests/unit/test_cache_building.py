"""Building a cache: interrupted, resumed, by two at once, on a disk that is full; the result is the same or none."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.cache import decode_logits, load_logits, open_build, open_cache, verify_files
from pipeline.data.cache import folder as folder_module
from pipeline.data.cache.build import seal
from pipeline.errors import CacheError, ConfigError, StreamError
from tests.unit.caches import (
    NUM_CLASSES,
    NUM_ROWS,
    files_of,
    make_cache,
    make_key,
    make_logits,
    make_reader,
    write_parts,
)


@pytest.mark.parametrize("seed", range(5))
def test_an_interrupted_build_equals_an_uninterrupted_one(tmp_path: Path, seed: int) -> None:
    draws = np.random.default_rng(seed)
    reader = make_reader(5)
    whole = make_cache(tmp_path / "whole", reader=reader, absent=[9])
    places = [(part.view, part.index) for part in whole.manifest.parts]
    done = 0
    while done < len(places):
        with open_build(str(tmp_path / "resumed"), make_key(), reader) as build:
            assert build.cache is None
            assert build.find_missing_parts() == places[done:]
        done += int(draws.integers(1, 5))
        write_parts(tmp_path / "resumed", make_key(), reader, make_logits(), [9], num_parts=done - len(places) or None)
        written = sum(1 for _ in (tmp_path / "resumed").rglob("*.arrow"))
        done = written
        # What a process that is killed in the middle of a part leaves behind.
        half = tmp_path / "resumed" / make_key().digest / "view-0000" / f".part-000001.arrow.{seed}.tmp"
        half.write_bytes(b"ARROW1")
    make_cache(tmp_path / "resumed", reader=reader, absent=[9])
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "whole")


def test_a_finished_build_has_nothing_to_do(tmp_path: Path) -> None:
    made = make_cache(tmp_path)
    before = files_of(tmp_path)
    for reader in (make_reader(), make_reader(20)):
        with open_build(str(tmp_path), make_key(), reader) as build:
            assert build.cache is not None
            assert build.cache.manifest == made.manifest
            assert build.find_missing_parts() == []
    assert files_of(tmp_path) == before


def test_a_part_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    key, reader = make_key(dtype="float32"), make_reader()
    write_parts(tmp_path, key, reader, make_logits(seed=0))
    before = files_of(tmp_path)
    with open_build(str(tmp_path), key, reader) as build:
        ids = build.layout.ids(0)
        build.writer.write(0, 0, ids, make_logits(seed=1)[0, ids])
        assert files_of(tmp_path) == before
        build.seal(None, {})
    assert open_cache(str(tmp_path), key, reader).manifest.teacher_accuracy is None


def test_a_build_for_more_rows_takes_the_place_of_one_for_fewer(tmp_path: Path) -> None:
    """Parts that hold the same rows in both stay."""
    few, more = make_reader(30, group_rows=2), make_reader(25, group_rows=2)
    key = make_key(dtype="float32")
    make_cache(tmp_path, key, few)
    same = {index for index in range(31) if np.array_equal(layout_ids(few, index), layout_ids(more, index))}
    with open_build(str(tmp_path), key, more) as build:
        assert build.cache is None
        missing = build.find_missing_parts()
    assert {index for _, index in missing} == set(build.layout.indexes) - same
    assert 0 < len(missing) < 2 * len(build.layout.indexes)
    with pytest.raises(CacheError, match="is not complete"):
        open_cache(str(tmp_path), key, few)
    cache = make_cache(tmp_path, key, more)
    assert verify_files(cache.folder) == []
    decoded = decode_logits(load_logits(cache).read(1, more.sample_ids), NUM_CLASSES, 1)
    np.testing.assert_array_equal(decoded, make_logits()[1, more.sample_ids])


def layout_ids(reader: Any, index: int) -> np.ndarray:
    from pipeline.data.cache import PartLayout

    return PartLayout.of(reader).ids(index)


def test_parts_without_a_record_of_their_build_are_looked_at(tmp_path: Path) -> None:
    write_parts(tmp_path, make_key(), make_reader(), make_logits(), num_parts=5)
    folder = tmp_path / make_key().digest
    (folder / "build.json").unlink()
    damaged = folder / "view-0000" / "part-000003.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with open_build(str(tmp_path), make_key(), make_reader()) as build:
        assert build.find_missing_parts()[0] == (0, 3)
        assert len(build.find_missing_parts()) == 18 - 4


@pytest.mark.parametrize("seed", range(20))
def test_a_byte_flipped_before_the_manifest_is_written(tmp_path: Path, seed: int) -> None:
    """Nothing but the part itself tells what it should hold."""
    write_parts(tmp_path, make_key(), make_reader(), make_logits())
    draws = np.random.default_rng(seed)
    files = sorted(tmp_path.rglob("*.arrow"))
    file = files[draws.integers(len(files))]
    part = 12 * 2 + 4 + 8  # logits, offset and sample id of a row
    content = bytearray(file.read_bytes())
    start = content.index(np.sort(layout_ids(make_reader(), int(file.stem.removeprefix("part-")))).tobytes())
    content[start + draws.integers(part)] ^= draws.integers(1, 256)
    file.write_bytes(content)
    with (
        open_build(str(tmp_path), make_key(), make_reader()) as build,
        pytest.raises(CacheError, match=f"{file.name} is damaged: its content does not fit its checksum"),
    ):
        build.seal(None, {})


def test_a_part_of_another_cache_is_not_sealed(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_parts(tmp_path, make_key(seed=seed), make_reader(), make_logits())
    name = "view-0000/part-000001.arrow"
    other, own = (tmp_path / make_key(seed=seed).digest for seed in (1, 0))
    for source, message in (
        (other / name, "is a part of another cache, or of another place"),
        (own / "view-0001/part-000001.arrow", "is a part of another cache, or of another place"),
    ):
        (own / name).write_bytes(source.read_bytes())
        with open_build(str(tmp_path), make_key(), make_reader()) as build, pytest.raises(CacheError, match=message):
            build.seal(None, {})
    write_parts(tmp_path / "elsewhere", make_key(), make_reader(30), make_logits())
    assert len(layout_ids(make_reader(30), 1)) < 7
    (own / name).write_bytes((tmp_path / "elsewhere" / make_key().digest / name).read_bytes())
    with (
        open_build(str(tmp_path), make_key(), make_reader()) as build,
        pytest.raises(CacheError, match=r"part-000001\.arrow was made of other rows than the 7 that are due"),
    ):
        build.seal(None, {})


def test_sealing_wants_every_part(tmp_path: Path) -> None:
    write_parts(tmp_path, make_key(), make_reader(), make_logits(), num_parts=16)
    with (
        open_build(str(tmp_path), make_key(), make_reader()) as build,
        pytest.raises(CacheError, match=r"lacks 2 parts, the first view-0001/part-000008\.arrow; run .* cache build"),
    ):
        seal(build.folder, build.key, build.layout, None, {})


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    with open_build(str(tmp_path), make_key(), make_reader()):
        with pytest.raises(CacheError, match=rf"is being built by process {os.getpid()} on .*; wait for it to end"):
            open_build(str(tmp_path), make_key(), make_reader())
        open_build(str(tmp_path), make_key(seed=1), make_reader()).close()
    open_build(str(tmp_path), make_key(), make_reader()).close()


def build_as_fast_as_possible(path: str, seed: int, results: Any) -> None:
    try:
        make_cache(path, logits=make_logits(seed=seed))
        results.put("built")
    except CacheError as error:
        results.put(error.message)


def test_two_builders_at_once_leave_one_whole_cache(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    results = processes.Queue()
    builders = [processes.Process(target=build_as_fast_as_possible, args=(str(tmp_path), 0, results)) for _ in range(2)]
    for builder in builders:
        builder.start()
    told = [results.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join(60)
    assert "built" in told
    assert all(message == "built" or "is being built by process" in message for message in told)
    make_cache(tmp_path / "alone")
    assert files_of(tmp_path / make_key().digest) == files_of(tmp_path / "alone" / make_key().digest)


@pytest.mark.parametrize("name", ["view-0000/part-000004.arrow", "manifest.json", "build.json"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = open

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(bytes(content)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path: str, *args: Any) -> Any:
        return Full(path, "xb") if Path(name).name in path else original(path, *args)

    monkeypatch.setattr(folder_module, "open", open_full, raising=False)
    with pytest.raises(CacheError, match=rf"{name} cannot be written \(No space left on device\); make room there"):
        make_cache(tmp_path)
    assert not any(Path(name).name in file for file in files_of(tmp_path))
    monkeypatch.undo()
    cache = make_cache(tmp_path)
    assert verify_files(cache.folder) == []
    make_cache(tmp_path / "alone")
    assert files_of(tmp_path / make_key().digest) == files_of(tmp_path / "alone" / make_key().digest)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"^cache\.path: .* cannot be written \(Not a directory\); set one that is"):
        open_build(str(tmp_path / "file"), make_key(), make_reader())


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids[:-1],
        lambda ids: np.append(ids, ids[0]),
        lambda ids: np.where(ids == ids[0], ids[1], ids),
        lambda ids: np.where(ids == ids[0], NUM_ROWS - 1, ids),
        lambda ids: ids[:0],
    ],
    ids=["lost", "more", "repeated", "foreign", "none"],
)
def test_parts_of_other_rows_are_not_written(tmp_path: Path, change: Any) -> None:
    with open_build(str(tmp_path), make_key(), make_reader()) as build:
        ids = change(build.layout.ids(1))
        with pytest.raises(StreamError, match=r"part 1 of view 0 .* expected the 7 with sample ids 7 to 13, each once"):
            build.writer.write(0, 1, ids, make_logits()[0, ids])
        assert len(build.find_missing_parts()) == 18


def test_the_row_with_unusable_logits_is_named(tmp_path: Path) -> None:
    logits = make_logits()
    logits[1, 23, 4] = np.nan
    with pytest.raises(CacheError, match=r"^sample 23 in view 1: 1 of 7 rows have logits that") as error:
        make_cache(tmp_path, logits=logits)
    assert error.value.details == {"sample_id": 23}
    make_cache(tmp_path, logits=logits, absent=[23])  # of a row that was not decoded nothing is kept


def test_logits_of_rows_that_were_not_decoded_do_not_matter(tmp_path: Path) -> None:
    with open_build(str(tmp_path), make_key(), make_reader()) as build:
        ids = build.layout.ids(1).copy()
        ids[2] = NO_SAMPLE
        logits = make_logits()[0, build.layout.ids(1)]
        logits[2] = np.nan
        build.writer.write(0, 1, ids, logits)
        assert (0, 1) not in build.find_missing_parts()


def test_encodings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for key in (make_key(format="topk", k=13), make_key(format="topk", k=3, num_classes=70_000)):
        with pytest.raises(ConfigError, match=r"cache\.(k=13 is more|format=topk keeps)"):
            open_build(str(tmp_path), key, make_reader())
    assert list(tmp_path.iterdir()) == []
