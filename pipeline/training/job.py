"""A run by value: what every worker is sent, and what it builds from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.data import BlockPlanner, DataParams, DataSource, EpochOrder, SplitReader, decode_block, read_blocks
from pipeline.data.logits import load_logits
from pipeline.errors import ConfigError
from pipeline.evaluation import EvaluationParams
from pipeline.losses import LossParams, Objective
from pipeline.models import ModelParams, Teacher, TeacherParams, build_classifier, load_weights, resolve_checkpoint
from pipeline.contracts.columns import INPUT, LABEL, SAMPLE_ID
from pipeline.training.context import Block
from pipeline.training.loop import TrainJob
from pipeline.training.params import TrainParams
from pipeline.training.plan import RunPlan
from pipeline.training.validation import EvaluationSet


@dataclass(frozen=True)
class RunSpec:
    """Everything a worker needs to know, small and picklable.

    Attributes:
        network: the network that is trained: the student, or the teacher in ``train-teacher``.
        validation_logits: file with the teacher's logits on validation; none without a teacher.
    """

    data: DataParams
    network: ModelParams
    loss: LossParams
    train: TrainParams
    evaluation: EvaluationParams
    seed: int
    plan: RunPlan
    validation_logits: str | None = None


def open_training(source: DataSource) -> SplitReader:
    """The training split: in memory where it is small enough to be shuffled as a whole."""
    return source.load("train") if source.in_memory("train") else source.split("train")


def make_planner(data: DataParams, reader: SplitReader, train: TrainParams, seed: int) -> BlockPlanner:
    """The order of the run's blocks: a function of the configuration alone."""
    order = EpochOrder(reader, seed, data.window_bytes)
    return BlockPlanner(order, reader.num_rows, train.batch_size, data.num_views)


def make_plan(planner: BlockPlanner, train: TrainParams) -> RunPlan:
    """How many steps and blocks the run has; ``train.blocks_per_step`` must be resolved by now."""
    if train.blocks_per_step is None:
        raise ConfigError("train.blocks_per_step is not set; it is resolved to the number of workers when a run starts")
    return RunPlan(train.batch_size, planner.blocks_per_epoch, train.blocks_per_step, train.epochs)


def build_job(spec: RunSpec, source: DataSource) -> TrainJob:
    """Network, objective and validation set of a run; the same weights on every worker."""
    torch.manual_seed(spec.seed)
    classifier = build_classifier(spec.network, source.spec)
    if spec.network.checkpoint is not None:
        load_weights(classifier.network, resolve_checkpoint(spec.network.checkpoint))
    logits = None if spec.validation_logits is None else load_logits(Path(spec.validation_logits))
    validation = EvaluationSet(source, source.split("validation"), "validation", spec.evaluation, logits)
    return TrainJob(classifier, Objective.from_params(spec.loss), spec.train, spec.plan, validation, spec.seed)


class InProcessSource:
    """The stream's blocks without Ray: the same plan, read, decode and teacher, one after the other.

    Args:
        teacher: adds logits; none where the loss needs none.
        stop: end of the run in blocks.
    """

    def __init__(
        self,
        source: DataSource,
        reader: SplitReader,
        planner: BlockPlanner,
        data: DataParams,
        seed: int,
        stop: int,
        teacher: Teacher | None = None,
    ) -> None:
        self._decoder = source.decoder("train")
        self._reader, self._planner, self._data = reader, planner, data
        self._seed, self._stop, self._teacher = seed, stop, teacher

    def blocks(self, start: int) -> Iterator[Block]:
        """Blocks ``start`` to the end; see ``BatchSource``."""
        for plan in self._planner.blocks(start, self._stop):
            rows = decode_block(read_blocks(self._reader, [plan]), self._decoder, self._data.augment, self._seed)
            logits = None if self._teacher is None else self._teacher(rows[INPUT])
            yield Block(plan.position, rows[INPUT], rows[LABEL], rows[SAMPLE_ID], logits)


def teacher_arguments(params: TeacherParams, source: DataSource, batch_size: int) -> dict[str, object]:
    """Arguments of ``Teacher``, for this process or for the pool's."""
    return {"params": params, "spec": source.spec, "batch_size": batch_size}
