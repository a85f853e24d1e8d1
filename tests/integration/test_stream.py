"""Audit of the stream: each worker sees the predicted samples at each step, and the pixels of the iterator."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.cluster import stream as stream_module
from pipeline.cluster.journal import QueueDrain
from pipeline.cluster.stream import PoolPlan, RunStream, build_stream, chain_streams
from pipeline.config.schema import teacher_classes
from pipeline.contracts.columns import SplitName
from pipeline.data import AugmentParams, Decoder, TableReader
from pipeline.data.pixels.decode import BAD
from pipeline.data.sources.digits import DigitsParams
from pipeline.models import Teacher, build_classifier
from pipeline.models.mlp import MLPParams
from pipeline.training import InProcessSource, RunPlan, teacher_arguments
from tests.integration.audit import SEED, Stream, WideReader, consume, make_stream
from tests.integration.conftest import FAKE_ACCELERATOR
from tests.recorder import Recorder

pytestmark = pytest.mark.usefixtures("ray_cluster")

BATCH_SIZE = 64
DIGITS = DigitsParams(augment=AugmentParams(crop_padding=1, flip=True), num_views=2)
SOURCE = DIGITS.open()
READER = SOURCE.load("train")  # 1,258 rows: 19 blocks an epoch, 42 rows left over
NUM_EPOCHS = 3


def digits_stream(**options: Any) -> Stream:
    return make_stream(
        READER, SOURCE.decoder("train"), BATCH_SIZE, BATCH_SIZE * 100, DIGITS.augment, DIGITS.num_views, **options
    )


def copy_block(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in block.items()}


def assert_predicted(taken: list[list[dict[str, Any]]], stream: Stream, first: int, stop: int) -> None:
    """Worker w at step s has block first + s * W + w, with the samples that the planner says, in its order."""
    num_workers = len(taken)
    assert [len(blocks) for blocks in taken] == [(stop - first) // num_workers] * num_workers
    for rank, blocks in enumerate(taken):
        for step, block in enumerate(blocks):
            position = first + step * num_workers + rank
            assert block["position"] == position
            np.testing.assert_array_equal(block["sample_ids"], stream.planner.block(position).sample_ids)


def assert_epochs_are_whole(taken: list[list[dict[str, Any]]], stream: Stream, num_rows: int) -> None:
    """No sample twice in an epoch, and every epoch but a cut last one lacks fewer than a block of them."""
    epochs: dict[int, list[int]] = {}
    for block in (block for blocks in taken for block in blocks):
        epochs.setdefault(stream.planner.epoch_of(block["position"]), []).extend(block["sample_ids"].tolist())
    for epoch, ids in epochs.items():
        assert len(set(ids)) == len(ids)
        if epoch != max(epochs):
            assert num_rows - len(ids) < stream.planner.batch_size


# --- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_small_blocks_come_as_predicted(num_workers: int) -> None:
    blocks_per_step = {1: 1, 2: 4, 3: 3}[num_workers]
    stream = digits_stream(blocks_per_step=blocks_per_step)
    run = RunPlan(BATCH_SIZE, stream.planner.blocks_per_epoch, blocks_per_step, NUM_EPOCHS)
    assert run.blocks_per_epoch == 19
    assert run.num_blocks == {1: 57, 2: 56, 3: 57}[num_workers]
    assert stream.plan.blocks_per_task == 8  # so a read task yields what Ray Data would merge
    taken = consume([build_stream(stream.plan, 0, run.num_blocks)], num_workers, copy_block)
    assert_predicted(taken, stream, 0, run.num_blocks)
    assert_epochs_are_whole(taken, stream, READER.num_rows)

    # Pixels, labels and augmentation are those of the iterator without Ray.
    iterator = InProcessSource(SOURCE, READER, stream.planner, DIGITS, SEED, run.num_blocks)
    for expected in iterator.blocks(0):
        block = taken[expected.position % num_workers][expected.position // num_workers]
        for name in ("inputs", "labels", "sample_ids"):
            assert block[name].dtype == getattr(expected, name).dtype
            np.testing.assert_array_equal(block[name], getattr(expected, name))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_large_blocks_come_as_predicted(num_workers: int) -> None:
    """Blocks of 192 MiB; Ray Data would cut them at its default of 128 MiB."""
    reader, rows = WideReader(num_rows=19, num_features=2**23), 6
    block_bytes = rows * 4 * reader.num_features
    assert block_bytes == 192 * 2**20
    decoder = Decoder("features", (reader.num_features,))
    stream = make_stream(reader, decoder, rows, block_bytes, max_read_tasks=1)
    stop = RunPlan(rows, stream.planner.blocks_per_epoch, num_workers, 2).num_blocks
    assert stop == 6  # two epochs of three blocks; every read task has two

    def check(block: dict[str, Any]) -> dict[str, Any]:
        inputs, ids = block.pop("inputs"), block["sample_ids"]
        assert inputs.shape == (rows, reader.num_features)
        for row, sample_id in zip(inputs, ids, strict=True):  # one at a time: the test stays small
            np.testing.assert_array_equal(row, reader.values(np.array([sample_id]))[0])
        return copy_block(block)

    taken = consume([build_stream(stream.plan, 0, stop)], num_workers, check)
    assert_predicted(taken, stream, 0, stop)
    assert_epochs_are_whole(taken, stream, reader.num_rows)


# --- teacher ----------------------------------------------------------------------------------------------------


class Damaged:
    """The digits with every 50th row of train bad, for a run that skips these and mixes images."""

    BAD_IDS = READER.sample_ids[::50]
    spec = SOURCE.spec
    data = DIGITS.model_copy(update={"augment": AugmentParams(crop_padding=1, flip=True, mixup=0.4, cutmix=1.0)})
    reader = TableReader(
        READER.table.append_column(BAD, pa.array(np.isin(READER.sample_ids, BAD_IDS))), READER.rows, READER.groups
    )

    def decoder(self, name: SplitName) -> Decoder:
        return replace(SOURCE.decoder(name), skip_bad=True)


def test_pool_gives_the_logits_of_the_teacher_in_process(tmp_path: Path) -> None:
    """With rows that are skipped, and with mixed images."""
    damaged: Any = Damaged()
    torch.manual_seed(0)
    network = build_classifier(MLPParams(hidden=(32,)), SOURCE.spec).network
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    params: Any = teacher_classes()["mlp"].model_validate({"hidden": (32,), "checkpoint": str(tmp_path / "teacher.pt")})
    arguments = teacher_arguments(params, SOURCE, BATCH_SIZE)
    options = {"num_cpus": 1, "resources": {FAKE_ACCELERATOR: 1}, "max_restarts": -1, "max_task_retries": 3}
    recorder = Recorder()
    drain = QueueDrain(recorder)
    stream = make_stream(
        damaged.reader,
        damaged.decoder("train"),
        BATCH_SIZE,
        BATCH_SIZE * 100,
        damaged.data.augment,
        damaged.data.num_views,
        pool=PoolPlan(pickle.dumps(arguments), 2, 2, options, 1),
        emitter=drain.emitter,
    )
    taken = consume([build_stream(stream.plan, 3, 35)], 2, copy_block, with_teacher=True)
    iterator = InProcessSource(damaged, damaged.reader, stream.planner, damaged.data, SEED, 35, Teacher(**arguments))
    skipped: set[int] = set()
    for expected in iterator.blocks(3):
        block = taken[(expected.position - 3) % 2][(expected.position - 3) // 2]
        assert expected.teacher_logits is not None
        assert block["teacher_logits"].dtype == expected.teacher_logits.dtype == np.float32
        for name in ("teacher_logits", "inputs", "labels", "sample_ids", "partner_labels", "label_weights"):
            np.testing.assert_array_equal(block[name], getattr(expected, name))
        planned = stream.planner.block(expected.position).sample_ids
        bad = np.isin(planned, damaged.BAD_IDS)
        np.testing.assert_array_equal(block["sample_ids"][~bad], planned[~bad])
        assert not np.isin(block["sample_ids"], damaged.BAD_IDS).any()
        skipped |= set(planned[bad].tolist())
    assert skipped
    drain.close()
    told = {int(number) for event in recorder.events for number in event.data.get("bad_rows", ())}
    assert skipped <= told <= set(damaged.BAD_IDS.tolist())  # a partner may be bad as well


# --- segments and cursor ----------------------------------------------------------------------------------------


def test_chain_of_segments_is_one_stream_from_wherever_the_cursor_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "TASKS_PER_SEGMENT", 2)
    monkeypatch.setattr(stream_module, "MAX_BLOCKS_PER_TASK", 10)
    stream = digits_stream(blocks_per_step=3)
    # Two tasks of ten blocks would be 20: with three workers the last ones would be cut into parts.
    assert stream.plan.blocks_per_segment == 18
    cursor = 0
    chain = chain_streams(RunStream((stream.plan,), (54,)), lambda: cursor, 0)
    assert list(chain) == ["train-0000", "train-0001", "train-0002"]
    builders: Any = list(chain.values())
    taken = consume([build() for build in builders], 3, copy_block)
    assert_predicted(taken, stream, 0, 54)
    assert_epochs_are_whole(taken, stream, READER.num_rows)

    # The same builders after a restart, asked again: less is left, the last one has nothing, and one worker does it.
    cursor = 21
    taken = consume([build() for build in builders], 1, copy_block)
    assert_predicted(taken, stream, 21, 54)


def test_segments_cover_the_run() -> None:
    assert stream_module.segments(15, 0, 57) == [(0, 15), (15, 30), (30, 45), (45, 57)]
    assert stream_module.segments(15, 57, 57) == [(57, 57)]
    assert stream_module.segments(100, 18, 57) == [(18, 57)]


def test_features_of_a_wide_reader_are_told_apart() -> None:
    """The oracle of the large blocks itself."""
    values = WideReader(254, 2**4).values(np.arange(254))
    assert np.isfinite(values).all()
    assert len(np.unique(values)) == values.size
