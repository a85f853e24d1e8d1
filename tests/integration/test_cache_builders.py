"""``cache build`` in processes that are killed, and in two at once: the cache is whole, or there is none."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.cache import folder as folder_module
from pipeline.data.cache import list_caches, open_build, verify_files
from pipeline.data.cache.folder import open_folder
from pipeline.data.sources.parquet import ParquetParams
from tests.unit.cached_runs import BATCH_SIZE, EXACT, NUM_TRAINED, VIEWS, Workplace
from tests.unit.caches import files_of

TIMEOUT_S = 240.0
NUM_PARTS = 36  # twelve row groups in three views
# Of one server that has imported everything, each builder is a copy within milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pipeline.stages.cache_build", "pipeline.tracking.quiet", "tests.unit.cached_runs"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a cache that was built in one go."""
    place = Workplace.make(tmp_path_factory.mktemp("whole"))
    assert place.run("cache build", "build", *VIEWS, EXACT) == 0
    return place


@pytest.fixture
def place(whole: Workplace) -> Workplace:
    """The same data, teacher and tracking database; each test has another ``cache.path``."""
    return whole


def build(place: Workplace, name: str, caches: Path) -> int:
    return place.run("cache build", name, *VIEWS, EXACT, f"cache.path={caches}")


def build_until(number: int, named: bool, place: Workplace, name: str, caches: Path) -> None:
    """Builds, and is killed when this file of the cache is about to get its name, or has just got it."""
    done, replace = 0, os.replace

    def counted(source: str, target: str) -> None:
        nonlocal done
        done += str(target).startswith(str(caches))
        if done == number and not named:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    folder_module.os.replace = counted  # type: ignore[attr-defined]
    build(place, name, caches)


def without_origin(files: dict[str, bytes]) -> dict[str, Any]:
    """Files, but of manifests what says when and by which run they were written."""
    kept: dict[str, Any] = {}
    for name, content in files.items():
        kept[name] = content
        if name.endswith("manifest.json"):
            kept[name] = json.loads(content)
            del kept[name]["recorded"], kept[name]["checksum"]
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_a_build_that_was_killed_goes_on(place: Workplace, tmp_path: Path, seed: int) -> None:
    """At a random point: build.json is the first file, the manifest the last."""
    caches, name = tmp_path / "cache", f"killed-{seed}"
    draws = np.random.default_rng(seed)
    number, named = int(draws.integers(1, NUM_PARTS + 3)), bool(draws.integers(2))
    builder = PROCESSES.Process(target=build_until, args=(number, named, place, name, caches))
    builder.start()
    builder.join(TIMEOUT_S)
    assert builder.exitcode == -signal.SIGKILL
    (entry,) = list_caches(str(caches))
    assert entry.state == ("complete" if named and number == NUM_PARTS + 2 else "incomplete")
    left = files_of(caches)
    present = {file for file in left if file.endswith(".arrow")}
    assert len(present) == min(max(number - 1 - (not named), 0), NUM_PARTS)
    assert sum(file.endswith(".tmp") for file in left) == (not named)

    assert build(place, name, caches) == 0  # in the folder of its run: it goes on
    due = sum(part.num_rows for part in whole_parts(place) if f"{entry.name}/{part.name}" not in present)
    metrics = place.result(name)["metrics"]
    assert metrics["cache/rows_computed"] == due
    assert due <= metrics["cache/rows_forwarded"] < due + 3 * BATCH_SIZE
    assert metrics["cache/num_rows"] == 3 * NUM_TRAINED
    now = files_of(caches)
    assert {file: now[file] for file in present} == {file: left[file] for file in present}
    assert without_origin(now) == without_origin(files_of(place.caches))
    assert verify_files(open_folder(str(caches)).below(entry.name)) == []


def whole_parts(place: Workplace) -> Any:
    return place.manifest("build").parts


def build_and_tell(place: Workplace, name: str, caches: Path, codes: Any) -> None:
    codes.put((name, build(place, name, caches)))


def test_two_builders_at_once(place: Workplace, tmp_path: Path) -> None:
    caches, codes = tmp_path / "cache", PROCESSES.Queue()
    names = ["one", "other"]
    builders = [PROCESSES.Process(target=build_and_tell, args=(place, name, caches, codes)) for name in names]
    for builder in builders:
        builder.start()
    told = dict(codes.get(timeout=TIMEOUT_S) for _ in builders)
    for builder in builders:
        builder.join(TIMEOUT_S)
    assert sorted(told) == names
    assert 0 in told.values()
    assert set(told.values()) <= {0, 2}  # who comes late finds it complete, or being built
    assert without_origin(files_of(caches)) == without_origin(files_of(place.caches))
    built = [name for name in names if told[name] == 0]
    computed = [place.result(name)["metrics"]["cache/rows_computed"] for name in built]
    assert sorted(computed) == [0, 3 * NUM_TRAINED][-len(built) :]


def test_who_comes_while_another_builds_says_so(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caches, key = tmp_path / "cache", place.manifest("build").key
    reader = ParquetParams(path=str(place.folder / "data")).open().split("train")
    with open_build(str(caches), key, reader):
        before = files_of(tmp_path)
        assert build(place, "late", caches) == 2
        said = capsys.readouterr().err
        assert f"CacheError: the cache {caches}/{key.digest} is being built by process {os.getpid()} on " in said
        assert "wait for it to end, then run this again." in said
        assert len(said.splitlines()) == 1
        assert not (place.folder / "runs" / "late").exists()
        assert files_of(tmp_path) == before
        assert place.run("cache prune", "-", f"cache.path={caches}", f"name={key.digest}") == 2
        assert "is being built by process" in capsys.readouterr().err
        assert place.run("distill", "early", *VIEWS, EXACT, "teacher.source=cached", f"cache.path={caches}") == 2
        assert "is not complete: it has 0 of 36 parts and no manifest.json" in capsys.readouterr().err
    assert build(place, "late", caches) == 0
