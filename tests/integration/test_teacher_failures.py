"""Teachers that die are replaced without a trace; teachers that are wrong end the run with their own sentence."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli.main import main
from pipeline.cluster.journal import QueueDrain
from pipeline.cluster.stream import PoolPlan, RunStream, build_stream, share
from pipeline.cluster.train import FitPlan, fit
from pipeline.config.schema import teacher_classes
from pipeline.contracts.columns import InputSpec
from pipeline.errors import ModelError
from pipeline.evaluation import EvaluationParams
from pipeline.losses.kd import KDParams
from pipeline.models import Teacher
from pipeline.models.mlp import MLPParams
from pipeline.training import InProcessSource, RunSpec, TrainParams, make_plan, teacher_arguments
from tests.integration.audit import SEED, Stream, TracedParams, consume, make_stream
from tests.integration.conftest import FAKE_ACCELERATOR
from tests.integration.networks import faulty
from tests.recorder import Recorder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

DATA = TracedParams()
SOURCE = DATA.open()
BATCH_SIZE = 8


def taught_stream(folder: Path, **faults: Any) -> tuple[Stream, Any]:
    """The stream with a pool of two teachers with ``faults``, and the arguments of such a teacher."""
    kwargs = {"folder": str(folder), "spared": os.getpid(), **faults}
    torch.manual_seed(0)
    torch.save(faulty(SOURCE.spec, **kwargs).state_dict(), folder / "teacher.pt")
    values = {"factory": "tests.integration.networks:faulty", "kwargs": kwargs}
    params: Any = teacher_classes()["custom"].model_validate({**values, "checkpoint": str(folder / "teacher.pt")})
    arguments = teacher_arguments(params, SOURCE, BATCH_SIZE)
    options = {"num_cpus": 1, "resources": {FAKE_ACCELERATOR: 1}, "max_restarts": -1, "max_task_retries": 3}
    pool = PoolPlan(pickle.dumps(arguments), 2, 2, options, 1)
    return make_stream(SOURCE.split("train"), SOURCE.decoder("train"), BATCH_SIZE, 320, pool=pool), arguments


def test_killed_teachers_leave_no_trace_in_the_stream(tmp_path: Path) -> None:
    stream, arguments = taught_stream(tmp_path, deadly_ids=[3, 50])

    def keep(block: dict[str, Any]) -> tuple[int, list[int], np.ndarray]:
        return block["position"], block["sample_ids"].tolist(), block["teacher_logits"].copy()

    taken = consume([build_stream(stream.plan, 0, 24)], 2, keep, with_teacher=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"killed-3", "killed-50"}
    source = InProcessSource(SOURCE, SOURCE.split("train"), stream.planner, DATA, SEED, 24, Teacher(**arguments))
    for rank, blocks in enumerate(taken):
        assert [position for position, _, _ in blocks] == list(range(rank, 24, 2))
    for expected in source.blocks(0):
        _, ids, logits = taken[expected.position % 2][expected.position // 2]
        assert ids == expected.sample_ids.tolist()
        assert expected.teacher_logits is not None
        np.testing.assert_array_equal(logits, expected.teacher_logits)


def test_teacher_whose_logits_are_nan_ends_training_without_a_retry(tmp_path: Path) -> None:
    """One fit."""
    stream, _ = taught_stream(tmp_path, nan_ids=[11])
    params = TrainParams(epochs=2, batch_size=BATCH_SIZE, blocks_per_step=1)
    run = make_plan(stream.planner, params)
    spec = RunSpec(DATA, MLPParams(hidden=(4,)), KDParams(), params, EvaluationParams(), SEED, run)
    plan = FitPlan(spec, tmp_path / "ray", 1, {"CPU": 1.0}, 1, 3, True)
    recorder = Recorder()
    drain = QueueDrain(recorder)
    with pytest.raises(ModelError, match="the teacher's logits are not finite in 1 of 8 rows: check its weights"):
        fit(plan, share(SOURCE), RunStream((stream.plan,), (run.num_blocks,)), drain.emitter)
    drain.close()
    assert len(recorder.of("plan")) == 1
    record = json.loads((tmp_path / "ray" / "fatal.json").read_text())
    assert record["type"] == "ModelError"


def test_command_with_a_broken_teacher_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs = {"folder": str(tmp_path), "spared": 0, "always_nan": True}
    torch.save(faulty(InputSpec("image", (1, 8, 8), tuple("0123456789")), **kwargs).state_dict(), tmp_path / "t.pt")
    overrides = ["teacher=custom", "teacher.factory=tests.integration.networks:faulty"]
    overrides += [f"teacher.kwargs={{folder: {tmp_path}, spared: 0, always_nan: true}}"]
    overrides += [f"teacher.checkpoint={tmp_path / 't.pt'}", "student=mlp", f"run.dir={tmp_path / 'run'}"]
    assert main(["distill", *overrides]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("ModelError: the teacher's logits are not finite in 64 of 64 rows: check its weights")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 1)
    assert "not finite in 64 of 64 rows" in result["error"]
