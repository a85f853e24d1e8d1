"""The training loop in one process: exact resumption, and what stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.contracts.checkpoints import read_cursor
from pipeline.contracts.events import Event
from pipeline.errors import CheckpointError, DataError, NonFiniteError, StreamError
from pipeline.losses.kd import KDParams
from pipeline.training import (
    Block,
    LocalContext,
    OptimizerParams,
    TrainJob,
    TrainParams,
    build_job,
    read_state,
    train,
)
from tests.recorder import Recorder
from tests.unit.fits import NOISY, SGD, SOURCE, Stopped, assert_identical, fit, make_spec, source_of, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")


# --- going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD.model_copy(update={"nesterov": True}), OptimizerParams(name="adamw")])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(optimizer: OptimizerParams, tmp_path: Path) -> None:
    optimizer = optimizer.model_copy(update={"schedule": "cosine", "warmup_epochs": 0.7, "clip_grad_norm": 1.0})
    params = TrainParams(
        epochs=3, batch_size=16, blocks_per_step=2, optimizer=optimizer, ema_decay=0.9, checkpoint_every=3, log_every=2
    )
    spec = make_spec(params, NOISY)
    assert spec.plan.num_steps == 16  # 33 blocks, two a step: epochs end within steps
    fit(spec, tmp_path / "whole")
    # In the middle of a step, between checkpoint and evaluation, just after an epoch, in the last step.
    for stop in (3, 13, 24, 31):
        with pytest.raises(Stopped):
            fit(spec, tmp_path / "parts", stop_at(stop))
    assert read_cursor(tmp_path / "parts" / "last") == 30
    fit(spec, tmp_path / "parts")
    assert_identical(read_state(tmp_path / "parts" / "last"), read_state(tmp_path / "whole" / "last"))


def test_resumed_run_reports_the_same_metrics(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=2, batch_size=16, optimizer=SGD, checkpoint_every=4, log_every=4), NOISY)
    _, whole = fit(spec, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(spec, tmp_path / "parts", stop_at(9))
    _, rest = fit(spec, tmp_path / "parts")

    def metrics(events: list[Event], kind: str) -> dict[int, Any]:
        return {event.data["step"]: event.data["metrics"] for event in events if event.kind == kind}

    assert rest[0].kind == "plan"
    assert rest[0].data["start_step"] == 8
    assert metrics(rest, "evaluation") == metrics(whole, "evaluation")
    steps = metrics(whole, "step")
    assert metrics(rest, "step") == {step: steps[step] for step in steps if step > 8}


def test_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD))
    fit(spec, tmp_path)
    before = read_state(tmp_path / "last")
    state, events = fit(spec, tmp_path, stop_at(0))
    assert [event.kind for event in events] == ["plan"]
    assert state.step == spec.plan.num_steps
    assert_identical(read_state(tmp_path / "last"), before)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD)), tmp_path)
    with pytest.raises(CheckpointError, match=r"1 blocks per step, this run has 2; set train.blocks_per_step=1"):
        fit(make_spec(TrainParams(epochs=1, batch_size=16, blocks_per_step=2, optimizer=SGD)), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this run's network and optimizer"):
        fit(make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD), NOISY), tmp_path)
    (tmp_path / "last" / "state.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD)), tmp_path)


# --- what stops it ----------------------------------------------------------------------------------------------


def weights_of(job: TrainJob) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in job.classifier.network.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: replace(block, position=block.position + 1), "delivered block 1 .* where block 0 with 16 rows"),
        (lambda block: replace(block, inputs=block.inputs[:-1]), "delivered block 0 with 15 rows where block 0 with"),
        (lambda block: replace(block, position=-1), "delivered block -1 "),
    ],
    ids=["another", "short", "mixed"],
)
def test_wrong_first_block_stops_before_the_first_step(
    change: Callable[[Block], Block], message: str, tmp_path: Path
) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD))
    job = build_job(spec, SOURCE)
    before = weights_of(job)
    with pytest.raises(StreamError, match=message):
        fit(spec, tmp_path, change, job)
    assert_identical(weights_of(job), before)
    assert not (tmp_path / "last").exists()


def test_stream_from_another_cursor_stops_a_resumed_run(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD, checkpoint_every=2))
    with pytest.raises(Stopped):
        fit(spec, tmp_path, stop_at(5))

    class FromTheStart:
        def blocks(self, start: int) -> Iterator[Block]:
            assert start == 4
            return source_of(spec).blocks(0)

    context = LocalContext(tmp_path, Recorder(), torch.device("cpu"))
    with pytest.raises(StreamError, match="delivered block 0 with 16 rows where block 4 with 16 rows was due"):
        train(build_job(spec, SOURCE), context, FromTheStart())
    assert read_cursor(tmp_path / "last") == 4


@pytest.mark.parametrize(
    ("column", "label", "message"),
    [
        ("labels", -1, r"sample 5 has no label, but loss term 'ce' needs one in 0\.\.9; no step was taken with it"),
        ("labels", 10, r"sample 5 has label 10, but loss term 'ce' needs one in 0\.\.9"),
        ("partner_labels", -1, "the image mixed into sample 5 has no label"),
    ],
)
def test_label_that_is_no_class_stops_before_the_step(column: str, label: int, message: str, tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD))

    def change(block: Block) -> Block:
        labels = block.labels.copy()
        labels[3] = label
        ids = block.sample_ids.copy()
        ids[3] = 5
        mixed = replace(block, partner_labels=block.labels, label_weights=np.ones(16, np.float32), sample_ids=ids)
        return replace(mixed, **{column: labels})

    job = build_job(spec, SOURCE)
    before = weights_of(job)
    with pytest.raises(DataError, match=message) as caught:
        fit(spec, tmp_path, change, job)
    assert caught.value.details == {"sample_id": 5}
    assert_identical(weights_of(job), before)


def test_labels_that_no_term_reads_may_be_missing(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD), loss=KDParams(ce_weight=0))

    def unlabel(block: Block) -> Block:
        return replace(block, labels=np.full(16, -1), teacher_logits=np.zeros((16, 10), np.float32))

    assert fit(spec, tmp_path, unlabel)[0].step == spec.plan.num_steps


def test_stream_that_ends_early_is_an_error(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD))

    class Short:
        def blocks(self, start: int) -> Iterator[Block]:
            return (block for block, _ in zip(source_of(spec).blocks(start), range(3), strict=False))

    with pytest.raises(StreamError, match="ended before block 3 of 11"):
        train(build_job(spec, SOURCE), LocalContext(tmp_path, Recorder(), torch.device("cpu")), Short())


def test_non_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD, checkpoint_every=1), loss=KDParams())

    def teach(block: Block) -> Block:
        logits = np.zeros((16, 10), np.float32)
        if block.position == 3:
            logits[5, 7] = np.nan
        return replace(block, teacher_logits=logits)

    job = build_job(spec, SOURCE)
    with pytest.raises(
        NonFiniteError, match=r"kd.* became .*nan.* at step 4 \(epoch 1, learning rate 0.05\)"
    ) as caught:
        fit(spec, tmp_path, teach, job)
    assert caught.value.details == {"step": 4}
    saved = read_state(tmp_path / "last")
    assert saved["step"] == 3
    assert_identical(weights_of(job), dict(saved["network"]))
