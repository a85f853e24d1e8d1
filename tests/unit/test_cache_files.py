"""The files of a cache: no byte of any of them changes unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.cache import (
    Cache,
    WindowedLogits,
    list_caches,
    load_logits,
    open_cache,
    reading,
    remove_cache,
    verify_files,
)
from pipeline.data.cache.folder import open_folder
from pipeline.data.cache.manifest import Manifest, _dump
from pipeline.errors import CacheError
from tests.unit.caches import NUM_ROWS, NUM_VIEWS, make_cache, make_key, make_logits, make_reader, write_parts

REBUILD = "delete it and run `python -m pipeline cache build` with the same configuration"
PART = "view-0001/part-000003.arrow"


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_KEPT", reading._KeptParts())
    reading._open_index.cache_clear()


def folder_of(path: Path) -> Path:
    return path / make_key().digest


def read_all(path: Path, way: str) -> None:
    cache = open_cache(str(path), make_key(), make_reader())
    if way == "loaded":
        load_logits(cache)
    else:
        reading._KEPT = reading._KeptParts()
        for view in range(NUM_VIEWS):
            WindowedLogits(cache, 1).read(view, np.arange(NUM_ROWS))


def verify(path: Path) -> list[str]:
    return verify_files(open_folder(str(path)).below(make_key().digest))


def test_a_whole_cache_has_no_problems(tmp_path: Path) -> None:
    make_cache(tmp_path)
    assert verify(tmp_path) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_byte_flipped_anywhere_is_caught(tmp_path: Path, seed: int) -> None:
    """Ten times twenty places, in files drawn at random, by verifying and by each way of reading."""
    make_cache(tmp_path)
    draws = np.random.default_rng(seed)
    files = sorted(file for file in folder_of(tmp_path).rglob("*") if file.is_file() and file.name != ".lock")
    assert len(files) == 19
    for number in range(20):
        # Half of them in the manifest, which is but one of the files.
        file = folder_of(tmp_path) / "manifest.json" if number % 2 else files[draws.integers(len(files))]
        content = bytearray(file.read_bytes())
        place = draws.integers(len(content))
        content[place] ^= draws.integers(1, 256)
        whole = file.read_bytes()
        file.write_bytes(content)
        name = str(file.relative_to(folder_of(tmp_path)))
        problems = verify(tmp_path)
        assert len(problems) == 1
        assert name in problems[0] or "newer version" in problems[0]
        for way in ("loaded", "windowed"):
            with pytest.raises(CacheError, match=name):
                read_all(tmp_path, way)
        file.write_bytes(whole)
    assert verify(tmp_path) == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def exchange(file: Path) -> None:
    shutil.copy(file.with_name("part-000000.arrow"), file)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (cut, rf"{PART} has \d+ bytes, expected \d+; {REBUILD}"),
    (lengthen, rf"{PART} has \d+ bytes, expected \d+; {REBUILD}"),
    (empty, rf"{PART} has 0 bytes, expected \d+; {REBUILD}"),
    (Path.unlink, f"{PART} is missing from the cache; run `python -m pipeline cache build`"),
    (exchange, rf"{PART} is damaged: its checksum is not that of the manifest; {REBUILD}"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=["cut", "longer", "empty", "missing", "exchanged"])
@pytest.mark.parametrize("way", ["loaded", "windowed"])
def test_damaged_parts(tmp_path: Path, damage: Callable[[Path], Any], message: str, way: str) -> None:
    make_cache(tmp_path)
    damage(folder_of(tmp_path) / PART)
    with pytest.raises(CacheError, match=message):
        read_all(tmp_path, way)
    problems = verify(tmp_path)
    assert len(problems) == 1
    with pytest.raises(CacheError, match=message):
        raise CacheError(problems[0])


@pytest.mark.parametrize(("damage", "_"), DAMAGES, ids=["cut", "longer", "empty", "missing", "exchanged"])
def test_the_advice_mends_a_damaged_cache(tmp_path: Path, damage: Callable[[Path], Any], _: str) -> None:
    make_cache(tmp_path)
    whole = (folder_of(tmp_path) / PART).read_bytes()
    damage(folder_of(tmp_path) / PART)
    (folder_of(tmp_path) / PART).unlink(missing_ok=True)
    make_cache(tmp_path)
    assert verify(tmp_path) == []
    assert (folder_of(tmp_path) / PART).read_bytes() == whole


def test_all_damaged_files_are_named(tmp_path: Path) -> None:
    make_cache(tmp_path)
    cut(folder_of(tmp_path) / PART)
    (folder_of(tmp_path) / "view-0000/part-000001.arrow").unlink()
    problems = verify(tmp_path)
    assert ["part-000001" in problems[0], PART in problems[1], len(problems)] == [True, True, 2]


def test_foreign_files_are_named(tmp_path: Path) -> None:
    make_cache(tmp_path)
    (folder_of(tmp_path) / "notes.txt").write_text("mine")
    (folder_of(tmp_path) / "view-0000" / "part-000099.arrow").write_text("whose?")
    (folder_of(tmp_path) / "view-0000" / ".part-000001.arrow.ab12.tmp").write_text("half")
    assert [problem.rsplit("/", 1)[-1] for problem in verify(tmp_path)] == [
        "notes.txt is no file of this cache; move it elsewhere, or delete it.",
        ".part-000001.arrow.ab12.tmp was left by a build that was interrupted; delete it.",
        "part-000099.arrow is no file of this cache; move it elsewhere, or delete it.",
    ]
    read_all(tmp_path, "windowed")  # they do no harm


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> None:
    file = folder_of(path) / "manifest.json"
    values = json.loads(file.read_bytes())
    change(values)
    if sign:
        import hashlib

        rest = {name: value for name, value in values.items() if name != "checksum"}
        values["checksum"] = hashlib.sha256(_dump(rest)).hexdigest()
    file.write_bytes(_dump(values))


@pytest.mark.parametrize("name", [*Manifest.model_fields, "checksum"])
def test_a_manifest_without_a_field(tmp_path: Path, name: str) -> None:
    make_cache(tmp_path)
    edit(tmp_path, lambda values: values.pop(name))
    with pytest.raises(CacheError, match=rf"manifest\.json has no {name}: it was edited or damaged; delete it and run"):
        read_all(tmp_path, "loaded")


@pytest.mark.parametrize("name", Manifest.model_fields)
def test_an_edited_manifest(tmp_path: Path, name: str) -> None:
    make_cache(tmp_path)
    edit(tmp_path, lambda values: values.update({name: 0}))
    with pytest.raises(
        CacheError, match=r"manifest\.json was edited or damaged: it does not fit its checksum; delete it"
    ):
        read_all(tmp_path, "loaded")


def test_a_manifest_that_is_only_written_otherwise(tmp_path: Path) -> None:
    make_cache(tmp_path)
    file = folder_of(tmp_path) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_bytes())))
    assert "does not fit its checksum" in verify(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: values.update(schema_version=2),
            r"newer version .*\(schema version 2, expected at most 1\); update",
        ),
        (lambda values: values.update(num_rows="many"), r"cannot be understood: num_rows: .*integer"),
        (lambda values: values["key"].pop("teacher"), r"cannot be understood: key\.teacher: Field required"),
        (
            lambda values: values["key"].update(teacher="x"),
            r"belongs to the folder \w{16}, expected in one named \w{16}",
        ),
        (lambda values: values["rows"].update(seed=9, stop=50), "the rule of its rows gives other rows than it did"),
        (lambda values: values["parts"].pop(), "does not list the 18 parts that are due"),
        (lambda values: values.update(surplus=1), "cannot be understood: surplus: Extra inputs are not permitted"),
    ],
)
def test_manifests_that_are_signed_but_wrong(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    make_cache(tmp_path)
    edit(tmp_path, change, sign=True)
    with pytest.raises(CacheError, match=message):
        read_all(tmp_path, "loaded")


@pytest.mark.parametrize(("text", "message"), [("", "it is not JSON"), ("[1]", "no JSON object"), ("\xff", "not JSON")])
def test_a_manifest_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    make_cache(tmp_path)
    (folder_of(tmp_path) / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match=message):
        read_all(tmp_path, "loaded")


def test_the_manifest_of_another_cache(tmp_path: Path) -> None:
    make_cache(tmp_path)
    make_cache(tmp_path, make_key(seed=1))
    shutil.copy(tmp_path / make_key(seed=1).digest / "manifest.json", folder_of(tmp_path))
    with pytest.raises(CacheError, match="belongs to the folder"):
        read_all(tmp_path, "loaded")


def test_caches_are_listed(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    write_parts(tmp_path, make_key(seed=1), make_reader(), make_logits(), num_parts=4)
    make_cache(tmp_path, make_key(seed=2))
    (tmp_path / make_key(seed=2).digest / "manifest.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("123")
    (tmp_path / "b.txt").write_text("12345")
    entries = {entry.name: entry for entry in list_caches(str(tmp_path))}
    told = {name: (entry.state, entry.num_parts) for name, entry in entries.items()}
    assert told == {
        make_key().digest: ("complete", 18),
        make_key(seed=1).digest: ("incomplete", 4),
        make_key(seed=2).digest: ("damaged", 18),
        "notes": ("foreign", 0),
        "b.txt": ("foreign", 0),
    }
    assert entries[make_key().digest].manifest == cache.manifest
    assert entries[make_key(seed=1).digest].key == make_key(seed=1)
    assert "has no" in entries[make_key(seed=2).digest].problem
    assert [entries["notes"].num_bytes, entries["b.txt"].num_bytes] == [3, 5]
    assert list_caches(str(tmp_path / "none")) == []


def test_a_cache_is_removed(tmp_path: Path) -> None:
    make_cache(tmp_path)
    make_cache(tmp_path, make_key(seed=1))
    write_parts(tmp_path, make_key(seed=2), make_reader(), make_logits(), num_parts=4)
    (folder_of(tmp_path) / "notes.txt").write_text("mine")
    assert remove_cache(str(tmp_path), make_key().digest) == ["notes.txt"]
    assert remove_cache(str(tmp_path), make_key(seed=2).digest) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([make_key().digest, make_key(seed=1).digest])
    assert [file.name for file in folder_of(tmp_path).rglob("*") if file.is_file()] == ["notes.txt"]
    with pytest.raises(CacheError, match=f"holds no cache {make_key().digest}; there are: {make_key(seed=1).digest}"):
        remove_cache(str(tmp_path), make_key().digest)


def test_a_cache_without_logits_of_any_row(tmp_path: Path) -> None:
    cache: Cache = make_cache(tmp_path, absent=range(NUM_ROWS))
    assert cache.manifest.num_rows == 0
    assert verify(tmp_path) == []
    assert all(load_logits(cache).read(0, np.arange(5))["missing"].to_pylist())
