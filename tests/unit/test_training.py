"""The training loop in one process: exact resumption, what stops it, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.contracts.checkpoints import read_cursor
from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import Event
from pipeline.data.augment import AugmentParams
from pipeline.data.digits import DigitsParams
from pipeline.errors import CheckpointError, DataError, NonFiniteError, StreamError
from pipeline.evaluation import EvaluationParams
from pipeline.losses import LossParams
from pipeline.losses.cross_entropy import CrossEntropyParams
from pipeline.losses.kd import KDParams
from pipeline.models import ModelParams
from pipeline.models.custom import CustomParams
from pipeline.models.mlp import MLPParams
from pipeline.training import (
    BatchSource,
    Block,
    Evaluation,
    InProcessSource,
    LocalContext,
    OptimizerParams,
    RunSpec,
    TrainJob,
    TrainParams,
    TrainState,
    build_job,
    make_plan,
    make_planner,
    open_training,
    read_state,
    train,
)

# 179 training rows: 11 blocks of 16 an epoch, and 3 rows left over.
DATA = DigitsParams(test_fraction=0.8, augment=AugmentParams(crop_padding=1, flip=True))
SOURCE = DATA.open()
SEED = 3
SGD = OptimizerParams(lr=0.05, schedule="constant")


class Recorder:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Tampered:
    """Blocks of ``source``, each after ``change``, which may also raise."""

    def __init__(self, source: BatchSource, change: Callable[[Block], Block]) -> None:
        self._source, self._change = source, change

    def blocks(self, start: int) -> Iterator[Block]:
        return map(self._change, self._source.blocks(start))


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stop_at(position: int) -> Callable[[Block], Block]:
    def change(block: Block) -> Block:
        if block.position == position:
            raise Stopped
        return block

    return change


def noisy_network(spec: InputSpec) -> nn.Module:
    """Has all that makes resumption hard: running statistics and random numbers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(spec.shape), 24, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(24, spec.num_classes),
    )


NOISY = CustomParams(factory=f"{__name__}:noisy_network")
PLAIN = MLPParams(hidden=(16,))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_spec(params: TrainParams, network: ModelParams = PLAIN, loss: LossParams | None = None) -> RunSpec:
    params = params.model_copy(update={"blocks_per_step": params.blocks_per_step or 1})
    plan = make_plan(make_planner(DATA, open_training(SOURCE), params, SEED), params)
    return RunSpec(DATA, network, loss or CrossEntropyParams(), params, EvaluationParams(), SEED, plan)


def source_of(spec: RunSpec) -> InProcessSource:
    reader = open_training(SOURCE)
    planner = make_planner(spec.data, reader, spec.train, SEED)
    return InProcessSource(SOURCE, reader, planner, spec.data, SEED, spec.plan.num_blocks)


def fit(
    spec: RunSpec, folder: Path, change: Callable[[Block], Block] | None = None, job: TrainJob | None = None
) -> tuple[TrainState, list[Event]]:
    recorder = Recorder()
    source: BatchSource = source_of(spec)
    if change is not None:
        source = Tampered(source, change)
    state = train(job or build_job(spec, SOURCE), LocalContext(folder, recorder, torch.device("cpu")), source)
    return state, recorder.events


def assert_identical(left: Any, right: Any, path: str = "state") -> None:
    """Bit for bit, through any nesting."""
    assert type(left) is type(right), path
    if isinstance(left, Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_identical(one, other, f"{path}[{index}]")
    else:
        assert left == right, path


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


# --- what it keeps ----------------------------------------------------------------------------------------------


class ScriptedValidation:
    """Evaluations with values given in advance."""

    def __init__(self, name: str, values: list[float]) -> None:
        self._name, self._values = name, iter(values)

    def evaluate(self, network: nn.Module, worker: Any, autocast: bool = False) -> Evaluation:
        return Evaluation({self._name: next(self._values)}, {})


@pytest.mark.parametrize(
    ("select_by", "values", "best_epoch"),
    [
        ("val/top1", [0.1, 0.5, 0.5, 0.4], 2),
        ("val/nll", [2.0, 1.0, 1.0, 3.0], 2),
        ("val/top1", [0.5, 0.1, 0.2, 0.6], 4),
        ("val/ece", [0.1, 0.1, 0.1, 0.1], 1),
        ("val/nll", [math.nan, math.inf, 3.0, 4.0], 3),
        ("val/top1", [math.nan] * 4, 1),
    ],
)
def test_best_checkpoint_is_kept(select_by: str, values: list[float], best_epoch: int, tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=4, batch_size=16, optimizer=SGD, select_by=select_by))
    job: Any = replace(build_job(spec, SOURCE), validation=ScriptedValidation(select_by, values))  # type: ignore[arg-type]
    kept = []

    class Watching(LocalContext):
        def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
            assert folder is not None
            kept.append(read_state(folder))
            super().commit(folder, metrics)

    state = train(job, Watching(tmp_path, Recorder(), torch.device("cpu")), source_of(spec))
    assert state.best is not None
    assert (state.best.epoch, state.best.step) == (best_epoch, best_epoch * 11)
    assert state.best.value == pytest.approx(values[best_epoch - 1], nan_ok=True)
    assert_identical(state.best.weights, dict(kept[best_epoch - 1]["network"]))


def test_average_of_the_weights_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    """The average by hand: the first step's weights, then 0.8 of itself plus 0.2 of the new ones."""
    spec = make_spec(TrainParams(epochs=1, batch_size=64, optimizer=SGD, ema_decay=0.8, checkpoint_every=1), NOISY)
    assert spec.plan.num_steps == 2
    seen = []

    class Watching(LocalContext):
        def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
            assert folder is not None
            seen.append(read_state(folder)["network"])
            super().commit(folder, metrics)

    state = train(build_job(spec, SOURCE), Watching(tmp_path, Recorder(), torch.device("cpu")), source_of(spec))
    assert state.best is not None
    for name, value in state.best.weights.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.8 * seen[0][name] + 0.2 * seen[1][name])


def test_gradients_of_two_blocks_are_those_of_one_large_block(tmp_path: Path) -> None:
    whole, _ = fit(make_spec(TrainParams(epochs=2, batch_size=16, optimizer=SGD)), tmp_path / "whole")
    halves, _ = fit(make_spec(TrainParams(epochs=2, batch_size=8, blocks_per_step=2, optimizer=SGD)), tmp_path / "two")
    assert whole.step == halves.step == 22
    for one, other in zip(whole.classifier.parameters(), halves.classifier.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# --- mixed labels -----------------------------------------------------------------------------------------------


def test_labels_weigh_as_the_block_says(tmp_path: Path) -> None:
    """All the weight on one of two labels is training on that label."""
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD))

    def mix_in(own: float, shift: int, partner_shift: int) -> Callable[[Block], Block]:
        def change(block: Block) -> Block:
            labels, partners = (block.labels + shift) % 10, (block.labels + partner_shift) % 10
            weights = np.full(16, own, np.float32)
            return replace(block, labels=labels, partner_labels=partners, label_weights=weights)

        return change

    plain, _ = fit(spec, tmp_path / "plain")
    for number, change in enumerate((mix_in(1, 0, 1), mix_in(0, 1, 0), mix_in(0.25, 0, 0))):
        mixed, _ = fit(spec, tmp_path / str(number), change)
        for one, other in zip(plain.classifier.parameters(), mixed.classifier.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    halves, _ = fit(spec, tmp_path / "halves", mix_in(0.5, 0, 1))
    assert any(
        (one - other).abs().max() > 1e-3
        for one, other in zip(plain.classifier.parameters(), halves.classifier.parameters(), strict=True)
    )


def test_run_on_mixed_images_resumes_bit_for_bit(tmp_path: Path) -> None:
    params = TrainParams(epochs=2, batch_size=16, optimizer=SGD, checkpoint_every=3, log_every=22)
    data = DATA.model_copy(update={"augment": AugmentParams(crop_padding=1, mixup=0.4, cutmix=1.0)})
    spec = replace(make_spec(params, NOISY), data=data)
    block = next(source_of(spec).blocks(0))
    assert block.label_weights is not None
    assert 0.2 < block.label_weights.mean() < 0.9
    _, events = fit(spec, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(spec, tmp_path / "parts", stop_at(14))
    fit(spec, tmp_path / "parts")
    assert_identical(read_state(tmp_path / "parts" / "last"), read_state(tmp_path / "whole" / "last"))
    (step,) = (event for event in events if event.kind == "step" and event.data["step"] == 22)
    assert math.isfinite(step.data["metrics"]["train/ce"])
