"""Several workers without Ray: processes that a process group connects."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.training import (
    InProcessSource,
    LocalContext,
    TrainParams,
    build_job,
    make_planner,
    open_training,
    read_state,
    train,
)
from pipeline.training.context import process_group
from tests.recorder import Recorder
from tests.unit.fits import SEED, SGD, SOURCE, fit, make_spec, source_of

NUM_WORKERS = 2
PARAMS = TrainParams(epochs=3, batch_size=16, blocks_per_step=NUM_WORKERS, optimizer=SGD)
JOIN_S = 120.0


def work(rank: int, folder: Path, address: str, end_early: bool) -> None:
    """One worker; rank 0 may be told to end at the first evaluation."""

    def committed(metrics: Mapping[str, float]) -> None:
        if end_early:
            raise SystemExit(7)

    torch.set_num_threads(1)
    spec, recorder, reader = make_spec(PARAMS), Recorder(), open_training(SOURCE)
    planner = make_planner(spec.data, reader, spec.train, SEED)
    source = InProcessSource(
        SOURCE, reader, planner, spec.data, SEED, spec.plan.num_blocks, rank=rank, world_size=NUM_WORKERS
    )
    cpu = torch.device("cpu")
    with process_group(cpu, rank, NUM_WORKERS, address) as store:
        context = LocalContext(
            folder, recorder, cpu, committed=committed, rank=rank, world_size=NUM_WORKERS, store=store
        )
        train(build_job(spec, SOURCE), context, source)
    assert bool(recorder.events) == (rank == 0)


def run_workers(folder: Path, end_early: bool = False) -> list[int | None]:
    """Exit codes of the workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        multiprocessing.get_context("spawn").Process(target=work, args=(rank, folder, address, end_early))
        for rank in range(NUM_WORKERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(JOIN_S)
        process.kill()
    return [process.exitcode for process in processes]


def test_each_has_every_second_block() -> None:
    spec = make_spec(PARAMS)
    reader = open_training(SOURCE)
    planner = make_planner(spec.data, reader, spec.train, SEED)
    start = NUM_WORKERS * 4
    found = [
        [block.position for block in source.blocks(start)]
        for source in (
            InProcessSource(
                SOURCE, reader, planner, spec.data, SEED, spec.plan.num_blocks, rank=rank, world_size=NUM_WORKERS
            )
            for rank in range(NUM_WORKERS)
        )
    ]
    assert found == [list(range(start + rank, spec.plan.num_blocks, NUM_WORKERS)) for rank in range(NUM_WORKERS)]
    whole = [block.position for block in source_of(spec).blocks(start)]
    assert sorted(found[0] + found[1]) == whole


def test_two_take_the_steps_of_one_and_end_together(tmp_path: Path) -> None:
    """What ends rank 0 at an evaluation ends the other too; started again, they go on to where one worker ends."""
    assert run_workers(tmp_path / "two", end_early=True) == [7, 0]
    assert run_workers(tmp_path / "two") == [0, 0]
    fit(make_spec(PARAMS), tmp_path / "one")
    one, two = (read_state(tmp_path / name / "last") for name in ("one", "two"))
    assert one["step"] == two["step"] == make_spec(PARAMS).plan.num_steps
    assert all(torch.allclose(one["network"][name], two["network"][name], atol=1e-6) for name in one["network"])


def test_rank_0_must_bring_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 0"):
        LocalContext(tmp_path, Recorder(), torch.device("cpu")).commit(None, {})
