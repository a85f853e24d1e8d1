"""Training on the stream: by Ray Train workers, or in the driver's own process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig

from pipeline import errors
from pipeline.cluster.journal import QueueEmitter
from pipeline.cluster.stall import StallGuard
from pipeline.cluster.stream import (
    Phase,
    RunStream,
    Segment,
    build_stream,
    chain_streams,
    configure_context,
    execution_options,
    iterate_stream,
    list_segments,
    segment_name,
)
from pipeline.cluster.tasks import find_pipeline_error
from pipeline.contracts.checkpoints import find_furthest, read_cursor
from pipeline.contracts.events import Emitter, Event
from pipeline.contracts.read_ahead import ReadAhead, read_ahead
from pipeline.data.waiting import tell_waits
from pipeline.errors import PipelineError, TrainingError

RAY_NAME = "train"
_FATAL_FILE = "fatal.json"

# Lines that Ray Data puts behind the text of an error.
_ADVICE = ("Failed to apply", "To change retry attempts")


@dataclass(frozen=True)
class FitPlan:
    """What ``fit`` needs beside the stream.

    Attributes:
        spec: ``pipeline.training.RunSpec``.
        storage: folder every node sees; Ray Train keeps its state and checkpoints in it.
        worker_resources: of each worker, Ray's names.
        num_threads: torch's CPU threads in a worker.
        start_from: a checkpoint kept elsewhere, which counts if it is further than Ray Train's own.
    """

    spec: Any
    storage: Path
    num_workers: int
    worker_resources: dict[str, float]
    num_threads: int
    max_failures: int
    with_teacher: bool
    start_from: Path | None = None


def fit(plan: FitPlan, source: ray.ObjectRef[Any], stream: RunStream, emitter: QueueEmitter) -> Path:
    """Trains with Ray Train, going on from the last committed checkpoint in ``plan.storage``.

    Args:
        source: reference to the opened ``pipeline.data.DataSource``: workers need not read every footer again.

    Returns:
        folder of the last committed checkpoint.

    Raises:
        PipelineError: what a worker or teacher found; ``TrainingError`` for anything else.
    """
    from ray.train.torch import TorchTrainer

    plan.storage.mkdir(parents=True, exist_ok=True)
    fatal = plan.storage / _FATAL_FILE
    fatal.unlink(missing_ok=True)
    configure_context(ray.data.DataContext.get_current(), stream.plans[0])
    find_cursor = partial(_find_cursor, str(plan.storage), plan.start_from)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "plan": plan,
            "source": source,
            "phases": stream.phases,
            "between": stream.between,
            "emitter": emitter,
        },
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.worker_resources.get("GPU", 0) > 0,
            resources_per_worker=plan.worker_resources,
        ),
        run_config=RunConfig(
            name=RAY_NAME,
            storage_path=str(plan.storage),
            failure_config=FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
        datasets=chain_streams(stream, partial(_cursor_unless_fatal, find_cursor, str(fatal)), find_cursor()),
        dataset_config=DataConfig(execution_options=execution_options(stream.plans[0])),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _explain(error, fatal) from error
    folder = find_furthest([committed_folder(str(plan.storage)), plan.start_from])
    if folder is None or read_cursor(folder) != stream.stops[-1]:
        raise TrainingError(f"training ended without its last checkpoint in {plan.storage}; resume the run")
    return folder


def committed_folder(storage: str) -> Path | None:
    """The checkpoint that Ray Train restores, never merely the newest folder; none before the first."""
    try:
        checkpoint = ray.train.Result.from_path(f"{storage}/{RAY_NAME}").checkpoint
    except RuntimeError:
        return None
    return None if checkpoint is None else Path(checkpoint.path)


def _find_cursor(storage: str, start_from: Path | None) -> int:
    """Blocks consumed at the checkpoint that the workers are going to restore."""
    folder = find_furthest([committed_folder(storage), start_from])
    return 0 if folder is None else read_cursor(folder)


def _cursor_unless_fatal(find_cursor: Callable[[], int], fatal: str) -> int:
    """Ends a run whose failure would only repeat: Ray does not retry an error of the controller."""
    if Path(fatal).exists():
        raise TrainingError("a worker met an error that a restart would only repeat")
    return find_cursor()


def _worker(config: dict[str, Any]) -> None:
    """Ray Train's per-worker function."""
    import torch

    from pipeline.training import build_job, train

    plan: FitPlan = config["plan"]
    tell_waits(config["emitter"])
    torch.set_num_threads(plan.num_threads)
    try:
        context = RayWorkerContext(config["emitter"], plan.start_from)
        # The others wait for rank 0 at the next stream, which gives no block before all have asked for one.
        between, emitter = (config["between"], config["emitter"]) if context.rank == 0 else (None, None)
        shards = ShardSource(config["phases"], plan.with_teacher, context.cursor(), emitter, between)
        train(build_job(plan.spec, ray.get(config["source"]), config["emitter"]), context, shards)
    except Exception as error:
        _record_fatal(error, plan.storage / _FATAL_FILE)
        raise
    finally:
        config["emitter"].flush()


class ShardSource:
    """This worker's share of the stream, segment after segment.

    It asks for the first block at once: the stream takes seconds to start, and the network is built meanwhile.

    Args:
        start: the block that the restored checkpoint stands at.
        emitter: is told of a long wait; none: another worker tells.
        between: see ``RunStream``.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        with_teacher: bool,
        start: int,
        emitter: Emitter | None,
        between: Callable[[], None] | None = None,
    ) -> None:
        guard = StallGuard(emitter)
        indexes = _in_order(phases, start, guard, between)
        shards = (ray.train.get_dataset_shard(segment_name(index)) for index, _ in indexes)
        self._start = start
        self._blocks = ReadAhead(_as_blocks(iterate_stream(shards, with_teacher)), depth=1, overdue=guard)

    def blocks(self, start: int) -> Iterator[Any]:
        """See ``pipeline.training.BatchSource``; the stream stands at one place only."""
        if start != self._start:
            raise errors.StreamError(
                f"the stream starts at block {self._start} but block {start} is due; resume the run"
            )
        return self._blocks


class DriverSource:
    """The whole stream, for a student that is trained in the driver's process."""

    def __init__(self, stream: RunStream, with_teacher: bool, emitter: Emitter) -> None:
        self._stream, self._with_teacher, self._emitter = stream, with_teacher, emitter

    def blocks(self, start: int) -> Iterator[Any]:
        # A coordinator process of its own runs the execution, so that it does not share this one's lock.
        stream, guard = self._stream, StallGuard(self._emitter)
        shards = (
            build_stream(stream.plans[segment.phase], segment.first, segment.stop).streaming_split(1, equal=True)[0]
            for _, segment in _in_order(stream.phases, start, guard, stream.between)
        )
        return read_ahead(_as_blocks(iterate_stream(shards, self._with_teacher)), guard)


def _in_order(
    phases: Sequence[Phase], start: int, guard: StallGuard, between: Callable[[], None] | None
) -> Iterator[tuple[int, Segment]]:
    """The segments with their numbers, each when it is asked for; ``between`` is called before the second phase."""
    for index, segment in enumerate(list_segments(phases, start)):
        if segment.phase > 0 and between is not None:
            between()
            between = None
        guard.demands = phases[segment.phase].demands
        yield index, segment


def _as_blocks(stream: Iterator[dict[str, Any]]) -> Iterator[Any]:
    from pipeline.training import Block

    return (Block(**block) for block in stream)


class RayWorkerContext:
    """A Ray Train worker; see ``pipeline.training.WorkerContext``."""

    def __init__(self, emitter: Emitter, start_from: Path | None = None) -> None:
        import ray.train.torch

        from pipeline.training import Worker

        train_context = ray.train.get_context()
        self.rank = train_context.get_world_rank()
        self.world_size = train_context.get_world_size()
        self.device = ray.train.torch.get_device()
        worker = Worker(self.device, self.rank, self.world_size)
        self.wrap, self.sum_over_workers = worker.wrap, worker.sum_over_workers
        self._emitter = emitter

        checkpoint = ray.train.get_checkpoint()
        # The storage is a folder that every node sees, so the checkpoint is read where it lies.
        self._folder = find_furthest([None if checkpoint is None else Path(checkpoint.path), start_from])

    def resume_folder(self) -> Path | None:
        return self._folder

    def cursor(self) -> int:
        """Blocks consumed at the checkpoint that this worker restores."""
        return 0 if self._folder is None else read_cursor(self._folder)

    def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
        checkpoint = None if folder is None else Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)

    def emit(self, event: Event) -> None:
        if self.rank == 0:
            self._emitter.emit(event)


def _record_fatal(error: BaseException, path: Path) -> None:
    """Keeps an error that a restart would only repeat, for the driver and for the next start."""
    found = find_pipeline_error(error)
    if found is None or found.passes:
        return
    content = json.dumps(
        {"type": type(found).__name__, "message": found.message, "details": found.details}, default=str
    )
    with contextlib.suppress(OSError):
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(content)
        os.replace(part, path)


def _explain(error: Exception, fatal: Path) -> PipelineError:
    """The error to show for a failed fit."""
    if fatal.exists():
        record = json.loads(fatal.read_text())
        cls = getattr(errors, record["type"], TrainingError)
        return cls(record["message"], **record["details"])
    if (found := find_pipeline_error(error)) is not None:
        return found
    lines = [line for line in str(error).splitlines() if line.strip() and not line.strip().startswith(_ADVICE)]
    reason = lines[-1].strip() if lines else type(error).__name__
    return TrainingError(f"training failed: {reason}; see ray.log in the run folder, then resume the run")
