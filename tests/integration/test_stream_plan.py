"""What Ray Data makes of the stream before anything runs."""

from __future__ import annotations

import pytest

from pipeline.cluster.stream import PoolPlan, StreamPlan, TrainingBlocks, build_stream, share
from pipeline.data import AugmentParams, BlockPlanner, EpochOrder
from pipeline.data.sources.digits import DigitsParams

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize("num_gpus", [0.0, 1.0])
def test_teachers_do_not_decode(num_gpus: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Data fuses steps with equal resources, and refuses actors with GPUs that name no batch size."""
    source = DigitsParams().open()
    reader = source.load("train")
    options = {"num_cpus": 1.0, "num_gpus": num_gpus, "resources": {}, "max_restarts": -1, "max_task_retries": 3}
    plan = StreamPlan(
        blocks=share(TrainingBlocks(reader, BlockPlanner(EpochOrder(reader, 0, None), reader.num_rows, 64, None))),
        batch_size=64,
        block_bytes=64 * 100,
        decoder=source.decoder("train"),
        augment=AugmentParams(),
        seed=0,
        pool=PoolPlan(b"", 1, 1, options, 1),
    )
    build_stream(plan, 0, 8).explain()
    physical = capsys.readouterr().out.split("Physical Plan")[-1]
    assert "MapBatches(TeacherActor)" in physical
    assert "MapBatches(_decode_task)" in physical
    assert "MapBatches(_decode_task)->MapBatches(TeacherActor)" not in physical
