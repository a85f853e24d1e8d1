"""A run by value: what every worker is sent, and what it builds from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch

from pipeline.contracts.columns import (
    INPUT,
    LABEL,
    LABEL_WEIGHT,
    PARTNER_LABEL,
    SAMPLE_ID,
    TEACHER_LOGITS,
    InputSpec,
    SplitName,
)
from pipeline.contracts.events import Emitter
from pipeline.data import (
    BlockPlanner,
    DataParams,
    DataSource,
    Decoder,
    EpochOrder,
    SplitReader,
    TableReader,
    decode_block,
    iterate_rows,
    read_blocks,
)
from pipeline.data.bad_rows import report_bad_rows
from pipeline.data.cache import FillWriter, LogitsDecoder, LogitsReader
from pipeline.data.logits import load_logits
from pipeline.data.pixels.decode import BAD
from pipeline.errors import ConfigError
from pipeline.evaluation import EvaluationParams
from pipeline.losses import LossParams, Objective
from pipeline.models import ModelParams, Teacher, build_classifier, load_initial_weights, load_weights
from pipeline.training.context import Block, Worker
from pipeline.training.loop import TrainJob
from pipeline.training.params import TrainParams
from pipeline.training.plan import RunPlan
from pipeline.training.validation import Evaluation, EvaluationSet


@dataclass(frozen=True)
class RunSpec:
    """Everything a worker needs to know, small and picklable.

    Attributes:
        network: the network that is trained: the student, or the teacher in ``train-teacher``.
        validation_logits: file with the teacher's logits on validation; none without a teacher.
        class_similarity: (C, C) float32, see ``class_similarity``; none where the loss does not need it.
    """

    data: DataParams
    network: ModelParams
    loss: LossParams
    train: TrainParams
    evaluation: EvaluationParams
    seed: int
    plan: RunPlan
    validation_logits: str | None = None
    class_similarity: np.ndarray | None = None


def open_training(source: DataSource) -> SplitReader:
    """The training split: in memory where it is small enough to be shuffled as a whole."""
    return source.load("train") if source.in_memory("train") else source.split("train")


def make_planner(data: DataParams, reader: SplitReader, train: TrainParams, seed: int) -> BlockPlanner:
    """The order of the run's blocks: a function of the configuration alone."""
    order = EpochOrder(reader, seed, None if isinstance(reader, TableReader) else data.window_bytes)
    return BlockPlanner(order, reader.num_rows, train.batch_size, data.num_views)


def make_plan(planner: BlockPlanner, train: TrainParams) -> RunPlan:
    """How many steps and blocks the run has; ``train.blocks_per_step`` must be resolved by now."""
    if train.blocks_per_step is None:
        raise ConfigError("train.blocks_per_step is not set; it is resolved to the number of workers when a run starts")
    return RunPlan(train.batch_size, planner.blocks_per_epoch, train.blocks_per_step, train.epochs)


def build_job(spec: RunSpec, source: DataSource, emitter: Emitter | None = None) -> TrainJob:
    """Network, objective and validation set of a run; the same weights on every worker.

    Args:
        emitter: is told of validation rows that are left out, on every worker.
    """
    torch.manual_seed(spec.seed)
    classifier = build_classifier(spec.network, source.spec)
    load_initial_weights(classifier, spec.network, role="student")
    logits = None if spec.validation_logits is None else load_logits(Path(spec.validation_logits))
    reader, decoder = source.split("validation"), source.decoder("validation")
    validation = EvaluationSet(source.spec, decoder, reader, "validation", spec.evaluation, logits, emitter)
    similarity = None if spec.class_similarity is None else torch.from_numpy(spec.class_similarity)
    objective = Objective(spec.loss, similarity)
    return TrainJob(classifier, objective, spec.train, spec.plan, validation, spec.seed)


@dataclass(frozen=True)
class EvaluationSpec:
    """One evaluation of kept weights, small and picklable.

    Attributes:
        network: parameters of the network; its checkpoint is not used.
        weights: file with its weights.
        logits: file with the teacher's logits on the split; none without a teacher.
        precision: of the forward pass, as in training.
        device: none: the GPU of the process, if it has one.
        emitter: is told of rows that are left out.
    """

    network: ModelParams
    weights: str
    spec: InputSpec
    decoder: Decoder
    reader: SplitReader
    split: SplitName
    evaluation: EvaluationParams
    logits: str | None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None
    emitter: Emitter | None = None


def evaluate_weights(job: EvaluationSpec) -> Evaluation:
    """Metrics of kept weights on a split, in this process."""
    device = torch.device(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    classifier = build_classifier(job.network, job.spec)
    load_weights(classifier.network, Path(job.weights))
    logits = None if job.logits is None else load_logits(Path(job.logits))
    rows = EvaluationSet(job.spec, job.decoder, job.reader, job.split, job.evaluation, logits, job.emitter)
    return rows.evaluate(classifier.to(device), Worker(device), autocast=job.precision == "bf16")


def compute_logits(teacher: Teacher, decoder: Decoder, reader: SplitReader, batch_size: int) -> np.ndarray:
    """The teacher's logits on every row of a split: (rows, num_classes) float32 in order of sample id.

    Those of a row that is left out are NaN.
    """
    blocks = iterate_rows(decoder, reader, 0, 1, batch_size)
    return np.concatenate([np.where(rows[BAD][:, None], np.nan, teacher(rows[INPUT])) for rows in blocks])


@dataclass(frozen=True)
class FillHere:
    """A cache that is filled in this process.

    Attributes:
        writer: keeps what the teacher says.
        end: the block from which on the cache is read.
        seal: makes the cache, and opens it.
    """

    writer: FillWriter
    end: int
    seal: Callable[[], tuple[LogitsReader, LogitsDecoder]]


class InProcessSource:
    """The stream's blocks without Ray: the same plan, read, decode and teacher, one after the other.

    Args:
        seed: of the augmentation.
        teacher: adds logits; none where the loss needs none, or they come out of a cache.
        stop: end of the run in blocks.
        emitter: is told of rows that are skipped.
        cached: reads logits out of a cache, and decodes them.
        fill: keeps what the teacher says, and turns it into a cache.
        rank, world_size: of several workers; each has the blocks from its rank on, in steps of their number.
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
        emitter: Emitter | None = None,
        cached: tuple[LogitsReader, LogitsDecoder] | None = None,
        fill: FillHere | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._fill = fill
        self._cached: LogitsReader | None = None
        self._logits_decoder: LogitsDecoder | None = None
        if cached is not None:
            self._cached, self._logits_decoder = cached
        self._decoder = source.decoder("train")
        self._reader, self._planner, self._data = reader, planner, data
        self._seed, self._stop, self._teacher = seed, stop, teacher
        self._on_bad = partial(report_bad_rows, emitter, "train")

    def blocks(self, start: int) -> Iterator[Block]:
        """This worker's blocks from ``start`` to the end; see ``BatchSource``."""
        augment, seed = self._data.augment, self._seed
        for plan in islice(self._planner.blocks(start, self._stop), self._rank, None, self._world_size):
            if self._fill is not None and self._cached is None and plan.position >= self._fill.end:
                self._cached, self._logits_decoder = self._fill.seal()
            table = read_blocks(self._reader, [plan], augment, seed, self._cached)
            rows = decode_block(table, self._decoder, augment, seed, self._on_bad, logits=self._logits_decoder)
            logits = rows.get(TEACHER_LOGITS)
            if self._teacher is not None and self._cached is None:
                logits = self._teacher(rows[INPUT])
                if self._fill is not None:
                    self._fill.writer.write(plan.position, plan.view, rows[SAMPLE_ID], logits)
            yield Block(
                position=plan.position,
                inputs=rows[INPUT],
                labels=rows[LABEL],
                sample_ids=rows[SAMPLE_ID],
                teacher_logits=logits,
                partner_labels=rows.get(PARTNER_LABEL),
                label_weights=rows.get(LABEL_WEIGHT),
            )


class TeacherArguments(TypedDict):
    """Arguments of ``Teacher``, for this process or for the pool's."""

    params: ModelParams
    spec: InputSpec
    batch_size: int
    device: torch.device | None


def teacher_arguments(
    params: ModelParams, source: DataSource, batch_size: int, device: str | None = None
) -> TeacherArguments:
    """What a teacher on ``source`` is built from; it runs blocks of ``batch_size`` rows.

    Args:
        device: none: the GPU of the process, if it has one.
    """
    chosen = None if device is None else torch.device(device)
    return {"params": params, "spec": source.spec, "batch_size": batch_size, "device": chosen}
