"""Training on Ray survives lost workers, and goes on with another number of them, without repeating or skipping."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from pipeline.cluster.journal import QueueDrain
from pipeline.cluster.stream import RunStream, share
from pipeline.cluster.train import FitPlan, fit
from pipeline.errors import TrainingError
from pipeline.evaluation import EvaluationParams
from pipeline.losses.cross_entropy import CrossEntropyParams
from pipeline.models.custom import CustomParams
from pipeline.training import (
    InProcessSource,
    LocalContext,
    OptimizerParams,
    RunSpec,
    TrainParams,
    build_job,
    find_local,
    make_plan,
    read_state,
    train,
)
from tests.integration.audit import SEED, TracedParams, make_stream
from tests.recorder import Recorder

# Up to three fits a test, on a machine that may be busy.
pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(900)]

DATA = TracedParams()
SOURCE = DATA.open()
TRAIN = TrainParams(
    epochs=3,
    batch_size=8,  # 103 rows: 12 blocks an epoch, 7 rows left over
    blocks_per_step=2,
    optimizer=OptimizerParams(lr=0.05, warmup_epochs=0.5),
    checkpoint_every=4,  # at blocks 8, 16, 24 and 32; and where epochs end: 12, 24 and 36
    log_every=4,
)


@dataclass
class Audit:
    """One run, in one or several fits, and what its workers were given."""

    folder: Path
    fates: list[dict[str, Any]] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.stream = make_stream(SOURCE.split("train"), SOURCE.decoder("train"), 8, 8 * 40, blocks_per_step=2)
        self.plan = make_plan(self.stream.planner, TRAIN)
        self.storage = self.folder / "ray"

    def meets(
        self, name: str, position: int, how: Literal["kill", "raise"] = "kill", after_commit: int | None = None
    ) -> None:
        """Whoever sees block ``position`` first is killed then, or fails."""
        ids = self.stream.planner.block(position).sample_ids.tolist()
        fate = {"name": name, "ids": ids, "how": how, "storage": str(self.storage), "after_commit": after_commit}
        self.fates.append(fate)

    def spec(self) -> RunSpec:
        network = CustomParams(
            factory="tests.integration.networks:recording", kwargs={"folder": str(self.folder), "fates": self.fates}
        )
        return RunSpec(DATA, network, CrossEntropyParams(), TRAIN, EvaluationParams(), SEED, self.plan)

    def fit(self, num_workers: int, max_failures: int = 0, start_from: Path | None = None) -> dict[str, Any]:
        """One fit to its end; returns the state of its last checkpoint."""
        plan = FitPlan(
            spec=self.spec(),
            storage=self.storage,
            num_workers=num_workers,
            worker_resources={"CPU": 1.0},
            num_threads=1,
            max_failures=max_failures,
            with_teacher=False,
            start_from=start_from,
        )
        drain = QueueDrain(self.recorder)
        try:
            stream = RunStream((self.stream.plan,), (self.plan.num_blocks,))
            return read_state(fit(plan, share(SOURCE), stream, drain.emitter))
        finally:
            drain.close()

    def train_in_process(self) -> dict[str, Any]:
        """The same run without Ray."""
        source = InProcessSource(SOURCE, SOURCE.split("train"), self.stream.planner, DATA, SEED, self.plan.num_blocks)
        context = LocalContext(self.folder / "checkpoints", self.recorder, torch.device("cpu"))
        train(build_job(self.spec(), SOURCE), context, source)
        return read_state(self.folder / "checkpoints" / "last")

    def committed_at(self, name: str) -> int:
        """The committed cursor when this fate was met."""
        return int((self.folder / name).read_text())

    def check_history(self, starts: list[tuple[int, int]]) -> None:
        """The workers of every start saw what was due, and what counts of it is each block once.

        Args:
            starts: cursor and number of workers of each start of the workers.
        """
        found = [(plan["start_step"] * TRAIN.blocks_per_step, plan["world_size"]) for plan in self.recorder.of("plan")]
        assert found == starts
        saved = {0} | {record["step"] * TRAIN.blocks_per_step for record in self.recorder.of("checkpoint")}
        assert {cursor for cursor, _ in starts} <= saved
        seen = self._positions()
        history = []
        for index, (start, num_workers) in enumerate(starts):
            last = index == len(starts) - 1
            counted = (self.plan.num_blocks if last else starts[index + 1][0]) - start
            for rank in range(num_workers):
                positions = seen[rank].pop(0)
                assert positions == [start + rank + step * num_workers for step in range(len(positions))]
                assert len(positions) >= counted // num_workers
                assert not last or len(positions) == counted // num_workers
                history += positions[: counted // num_workers]
        assert not any(seen.values())
        assert sorted(history) == list(range(self.plan.num_blocks))

    def _positions(self) -> dict[int, list[list[int]]]:
        """By rank, for each of its processes in order of time: the positions of the blocks it was trained on."""
        planner = self.stream.planner
        known = {tuple(planner.block(n).sample_ids.tolist()): n for n in range(self.plan.num_blocks)}
        assert len(known) == self.plan.num_blocks
        processes = [
            [json.loads(line) for line in path.read_text().splitlines()] for path in self.folder.glob("*.jsonl")
        ]
        by_rank: dict[int, list[list[int]]] = {}
        for records in sorted(processes, key=lambda records: records[0]["time"]):
            positions = [known[tuple(record["ids"])] for record in records]
            by_rank.setdefault(records[0]["rank"], []).append(positions)
        return by_rank


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final state of the run without Ray, one worker, and nothing in its way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Audit(tmp_path_factory.mktemp("reference") / "run").train_in_process()
    finally:
        torch.set_num_threads(threads)


def assert_close(left: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    """Weights of two states, and of what they keep; 0 is bit for bit."""
    for one, other in ((left["network"], right["network"]), (left["best"]["weights"], right["best"]["weights"])):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)
    assert left["step"] == right["step"]
    assert left["best"]["step"] == right["best"]["step"]


def test_two_workers_lose_one_and_another(
    tmp_path: Path, in_process: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed in the middle of an epoch, one between writing a checkpoint and its being committed. Two fits."""
    # The controller looks for checkpoints once in this time; the second kill must fall between two looks.
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.5")
    run = Audit(tmp_path / "killed")
    run.meets("middle", position=19, after_commit=16)  # rank 1, in step 10
    run.meets("window", position=24)  # rank 0, at once after the checkpoint at 24
    state = run.fit(num_workers=2, max_failures=2)
    assert run.committed_at("middle") == 16
    assert run.committed_at("window") == 16
    run.check_history([(0, 2), (16, 2), (16, 2)])

    whole = Audit(tmp_path / "whole")
    reference = whole.fit(num_workers=2)
    whole.check_history([(0, 2)])
    assert_close(state, reference, 0)
    assert_close(state, in_process, 1e-6)


@pytest.mark.slow
def test_number_of_workers_changes_from_one_to_two_to_one(tmp_path: Path, in_process: dict[str, Any]) -> None:
    """Three fits."""
    run = Audit(tmp_path / "run")
    run.meets("first stop", position=10, how="raise", after_commit=8)
    run.meets("second stop", position=27, how="raise", after_commit=24)
    for num_workers in (1, 2):
        with pytest.raises(TrainingError, match=r"the test stops the run here.*; see ray\.log"):
            run.fit(num_workers)
    state = run.fit(num_workers=1)
    run.check_history([(0, 1), (8, 2), (24, 1)])
    assert_close(state, in_process, 1e-6)


@pytest.mark.slow
def test_run_goes_on_with_ray_where_it_stopped_without(tmp_path: Path, in_process: dict[str, Any]) -> None:
    """One fit."""
    run = Audit(tmp_path / "run")
    run.meets("stop", position=18, how="raise")
    with pytest.raises(RuntimeError, match="the test stops the run here"):
        run.train_in_process()
    state = run.fit(num_workers=1, start_from=find_local(run.folder / "checkpoints"))
    run.check_history([(0, 1), (16, 1)])
    assert_close(state, in_process, 0)


@pytest.mark.slow
def test_one_worker_that_is_killed_ends_where_the_run_without_ray_does(
    tmp_path: Path, in_process: dict[str, Any]
) -> None:
    """One fit."""
    run = Audit(tmp_path / "run")
    run.meets("middle", position=19, after_commit=16)
    state = run.fit(num_workers=1, max_failures=1)
    run.check_history([(0, 1), (16, 1)])
    assert_close(state, in_process, 0)
