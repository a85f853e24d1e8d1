"""Caches on Ray: what the pool builds is what one process builds, and who trains from it has no teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

import pipeline.cluster.stream  # noqa: F401  # Ray Data configures its loggers when imported: before Ray is started
from tests.integration.conftest import FAKE_ACCELERATOR
from tests.unit.cached_runs import (
    BATCH_SIZE,
    CACHED,
    EXACT,
    VIEWS,
    Workplace,
    assert_same_student,
    write_pictures,
)
from tests.unit.caches import files_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]

POOL = ("cluster=ray", "teacher.pool.min=2", "teacher.pool.max=2", f"teacher.pool.resources={{{FAKE_ACCELERATOR}: 1}}")
SKIP = "data.on_bad_row=skip"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a cache that the pool built; some images cannot be decoded."""
    place = Workplace.make(tmp_path_factory.mktemp("cached"))
    write_pictures(place.folder / "data", damaged=[5, 77, 78, 130])
    assert place.run("cache build", "pool", *VIEWS, EXACT, SKIP, *POOL) == 0
    return place


def teachers_so_far() -> set[str]:
    """The pool's actors, those included that are gone; Ray's State API, without the dashboard that serves it."""
    actors = ray._private.state.actors().values()
    return {actor["ActorID"] for actor in actors if "TeacherActor" in actor["ActorClassName"]}


def test_the_pool_builds_what_one_process_builds(place: Workplace) -> None:
    here = place.folder / "here"
    assert place.run("cache build", "here", *VIEWS, EXACT, SKIP, f"cache.path={here}") == 0
    parts = [
        {name: content for name, content in files_of(caches).items() if name.endswith(".arrow")}
        for caches in (place.caches, here)
    ]
    assert len(parts[0]) == 36
    assert parts[0] == parts[1]
    pool, alone = place.manifest("pool"), place.manifest("here", here)
    assert pool.model_dump(exclude={"recorded"}) == alone.model_dump(exclude={"recorded"})
    assert len(pool.absent)

    results = [place.result(name) for name in ("pool", "here")]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["num_bad_rows"] == results[1]["num_bad_rows"] == len(pool.absent)
    computed, forwarded = (results[0]["metrics"][f"cache/rows_{name}"] for name in ("computed", "forwarded"))
    assert computed == 648
    assert forwarded == 3 * BATCH_SIZE * -(-216 // BATCH_SIZE)
    assert pool.recorded["rows_forwarded_last"] == forwarded
    rows = place.events("pool", "rows")[-1]
    assert (rows["done"], rows["total"]) == (computed, computed)


def test_a_build_by_the_pool_computes_what_is_missing(place: Workplace, tmp_path: Path) -> None:
    before = files_of(place.caches)
    parts = sorted(place.caches.rglob("*.arrow"))
    drawn = np.random.default_rng(0).permutation(len(parts))[:7]
    for number in drawn:
        parts[number].unlink()
    assert place.run("cache build", "rest", *VIEWS, EXACT, SKIP, *POOL) == 0
    after = files_of(place.caches)
    assert {name for name in after if after[name] != before[name]} == {
        name for name in after if name.endswith("manifest.json")
    }
    metrics = place.result("rest")["metrics"]
    assert 7 < metrics["cache/rows_computed"] <= 7 * 20
    assert metrics["cache/rows_computed"] < metrics["cache/rows_forwarded"]
    assert metrics["cache/num_rows"] == place.result("pool")["metrics"]["cache/num_rows"]


def test_two_workers_with_a_cache_and_without_a_teacher(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    """Two fits."""
    workers = [*VIEWS, SKIP, *POOL, "cluster.num_workers=2", "train.blocks_per_step=2"]
    before = teachers_so_far()
    assert place.run("distill", "online", *workers) == 0
    taught = teachers_so_far()
    assert taught - before
    assert "teacher actor" in capsys.readouterr().out
    assert place.run("distill", "cached", *workers, EXACT, CACHED) == 0
    assert teachers_so_far() == taught
    assert "teacher actor" not in capsys.readouterr().out
    assert place.events("cached", "pool") == []
    assert_same_student(place, "cached", "online")
