"""Fits of the training loop in one process, on a part of the digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import Event
from pipeline.data.pixels.augment import AugmentParams
from pipeline.data.sources.digits import DigitsParams
from pipeline.evaluation import EvaluationParams
from pipeline.losses import LossParams
from pipeline.losses.cross_entropy import CrossEntropyParams
from pipeline.models import ModelParams
from pipeline.models.custom import CustomParams
from pipeline.models.mlp import MLPParams
from pipeline.training import (
    BatchSource,
    Block,
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
    train,
)
from tests.recorder import Recorder

# 179 training rows: 11 blocks of 16 an epoch, and 3 rows left over.
DATA = DigitsParams(test_fraction=0.8, augment=AugmentParams(crop_padding=1, flip=True))
SOURCE = DATA.open()
SEED = 3
SGD = OptimizerParams(lr=0.05, schedule="constant")


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
