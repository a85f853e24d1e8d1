"""teacher.source=fill on Ray: one fit, in which the pool computes, goes, and leaves its accelerators to others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.cli.main import main
from pipeline.cluster.train import committed_folder
from pipeline.training import read_state
from tests.integration.commands import events_of, read_result
from tests.integration.conftest import FAKE_ACCELERATOR, NUM_ACCELERATORS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("ray_cluster")]

VIEWS, EPOCHS, BATCH = 2, 5, 64
COMMON = [
    *("teacher=mlp", "teacher.hidden=[16]", f"train.batch_size={BATCH}", "train.blocks_per_step=2"),
    *("data.augment.crop_padding=1", f"data.num_views={VIEWS}", "cache.dtype=float32"),
]


def test_the_pool_computes_every_view_once_and_is_gone(tmp_path: Path) -> None:
    """One fit of two workers, which go from one stream to the next."""
    assert (
        main(["train-teacher", *COMMON, "cluster=inprocess", "train.epochs=1", f"run.dir={tmp_path / 'teacher'}"]) == 0
    )
    taught = [*COMMON, f"teacher.checkpoint={tmp_path / 'teacher'}", f"train.epochs={EPOCHS}"]
    student = ["student=custom", "student.factory=tests.integration.networks:watching"]
    student += [f"student.kwargs={{folder: {tmp_path}, resource: {FAKE_ACCELERATOR}}}"]
    cache = [f"cache.path={tmp_path / 'cache'}", "teacher.source=fill"]
    pool = ["teacher.pool.max=2", "teacher.pool.min=2", f"teacher.pool.resources={{{FAKE_ACCELERATOR}: 1}}"]
    run = tmp_path / "filled"
    assert main(["distill", *taught, *student, *cache, *pool, "cluster.num_workers=2", f"run.dir={run}"]) == 0

    # While it fills, the pool holds two accelerators; once it reads, all are free.
    steps = (1258 // BATCH) * VIEWS // 2
    seen = [[float(line) for line in path.read_text().split()] for path in tmp_path.glob("*.free")]
    assert len(seen) == 2
    for free in seen:
        assert len(free) == (1258 // BATCH) * EPOCHS // 2
        assert max(free[: steps // 2]) == NUM_ACCELERATORS - 2
        assert min(free[-steps:]) == NUM_ACCELERATORS
    assert len(events_of(run, "plan")) == 1  # the workers were started once
    assert read_result(run)["status"] == "finished"

    # What was filled is what is built, and the student is the one that is taught online in one process.
    built = [f"cache.path={tmp_path / 'built'}", "cluster=inprocess", f"run.dir={tmp_path / 'build'}"]
    assert main(["cache", "build", *taught, *built]) == 0
    parts = sorted(path.relative_to(tmp_path / "built") for path in (tmp_path / "built").rglob("*.arrow"))
    assert len(parts) == VIEWS
    for part in parts:
        assert (tmp_path / "built" / part).read_bytes() == (tmp_path / "cache" / part).read_bytes()
    alone = ["cluster=inprocess", "student=custom", "student.factory=tests.integration.networks:linear"]
    assert main(["distill", *taught, *alone, f"run.dir={tmp_path / 'online'}"]) == 0
    folder = committed_folder(str(run / "ray"))
    assert folder is not None
    found, expected = read_state(folder), read_state(tmp_path / "online" / "checkpoints" / "last")
    assert found["step"] == expected["step"]
    for name, weights in expected["network"].items():
        torch.testing.assert_close(found["network"][name], weights, rtol=0, atol=1e-6)
