"""Three ways to carry out a run: Ray Train workers, the driver's own process on Ray's stream, no Ray at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.config.rules import TEACHER_ONLY, uses_pool
from pipeline.config.schema import Config
from pipeline.contracts.columns import SplitName
from pipeline.contracts.events import Emitter, Event
from pipeline.data import SplitReader
from pipeline.data.cache import LogitsDecoder, LogitsReader
from pipeline.data.sealing import seal_fill
from pipeline.errors import ResourceError
from pipeline.evaluation.metrics import TEACHER_METRICS
from pipeline.execution.caching import plan_seal
from pipeline.execution.joining import join_cluster
from pipeline.execution.logits import LogitsHere, Streams, teacher_accuracy
from pipeline.execution.pool import list_stream_demands
from pipeline.execution.session import RunSession
from pipeline.execution.work import Work
from pipeline.training import (
    Evaluation,
    EvaluationSpec,
    FillHere,
    InProcessSource,
    LocalContext,
    Outcome,
    RunSpec,
    build_job,
    evaluate_weights,
    find_local,
    train,
)

if TYPE_CHECKING:  # importing ray takes seconds, and not every way needs it
    from pipeline.cluster.journal import QueueDrain
    from pipeline.cluster.preflight import Demand
    from pipeline.cluster.stream import RunStream, StreamPlan


class Execution(Protocol):
    """A way to carry out a run."""

    def logits(self, split: SplitName, reader: SplitReader) -> Path | None:
        """The file with the teacher's logits on a split; none without a teacher."""
        ...

    def train(self, spec: RunSpec) -> Outcome:
        """Trains to the end of the plan."""
        ...

    def evaluate(self, split: SplitName, reader: SplitReader) -> Evaluation:
        """Evaluates the weights in the run folder's ``model/``."""
        ...


@contextmanager
def open_execution(work: Work, session: RunSession) -> Iterator[Execution]:
    """The way that ``cluster=`` asks for, ready to train.

    Raises:
        ResourceError: the cluster cannot be joined or cannot hold the run.
    """
    if work.config.cluster.name == "inprocess":
        yield _InProcess(work, session)
        return
    # Once a step was taken, workers and pool are placed.
    with join_cluster(work.run, session, list_demands(work.config, work.run.command), "step") as drain:
        yield _OnRay(work, session, drain)


class _InProcess:
    """Everything in this process, one thing after the other."""

    def __init__(self, work: Work, session: RunSession) -> None:
        self._work, self._session = work, session
        self._teacher = None
        if work.teacher is not None:
            self._teacher = LogitsHere(work.config, work.source, work.teacher, session)
        self._asks_teacher = uses_pool(work.config, work.run.command)

    def logits(self, split: SplitName, reader: SplitReader) -> Path | None:
        return None if self._teacher is None else self._teacher.compute(split, reader)

    def train(self, spec: RunSpec) -> Outcome:
        work, skipped = self._work, self._session.skipped
        self._session.say("training")
        source = InProcessSource(
            work.source,
            work.reader,
            work.planner,
            work.config.data,
            work.config.view_seed,
            work.plan.num_blocks,
            self._teacher.teacher if self._teacher is not None and self._asks_teacher else None,
            skipped,
            work.cached,
            None if work.fill is None else FillHere(work.fill.writer, work.fill.end, partial(self._seal, spec)),
        )
        state = train(build_job(spec, work.source, skipped), _local_context(work, self._session), source)
        self._session.say("training", "finished")
        return state.outcome

    def _seal(self, spec: RunSpec) -> tuple[LogitsReader, LogitsDecoder]:
        """The cache that was filled up to now."""
        work, teacher = self._work, self._teacher
        assert work.fill is not None
        assert teacher is not None
        self._session.say("cache", detail="sealing what was filled")
        counted = seal_fill(
            plan_seal(work.run, work.source, work.fill, _accuracy(work, spec)), work.reader, lambda: teacher.teacher
        )
        self._session.say("cache", "finished", f"{counted} rows were in no block and were computed")
        return work.fill.logits, work.fill.decoder

    def evaluate(self, split: SplitName, reader: SplitReader) -> Evaluation:
        logits = self.logits(split, reader)
        return evaluate_weights(_evaluation_spec(self._work, split, reader, logits, self._session.skipped))


class _OnRay:
    """The stream and the pool on Ray; the student in Ray Train workers, or in this process."""

    def __init__(self, work: Work, session: RunSession, drain: QueueDrain) -> None:
        self._work, self._session, self._drain = work, session, drain
        self._streams = Streams(work.config, work.source, work.teacher, session, drain.emitter)

    def logits(self, split: SplitName, reader: SplitReader) -> Path | None:
        if self._work.teacher is None:
            return None
        try:
            return self._streams.compute(split, reader, self._check_pool)
        except ResourceError as error:
            config = self._work.config
            if config.train.select_by.rpartition("/")[2] in TEACHER_METRICS or config.loss.wants_perturbation:
                raise
            self._session.journal.emit(
                Event("warning", {"message": f"no metrics beside the teacher on {split}: {error.message}"})
            )
            return None

    def _check_pool(self) -> None:
        """A run on a cache does without a pool, but for the teacher's logits on validation and test."""
        from pipeline.cluster.preflight import check_demand

        if self._work.cached is not None:
            check_demand(list_stream_demands(self._work.config, "teacher actor"))

    def train(self, spec: RunSpec) -> Outcome:
        in_driver = self._work.config.cluster.name == "driver"
        self._session.say("training", detail="starting the workers, the stream and the teachers")
        outcome = self._train_in_driver(spec) if in_driver else self._train_in_workers(spec)
        self._session.say("training", "finished")
        return outcome

    def _train_in_workers(self, spec: RunSpec) -> Outcome:
        from pipeline.cluster.stream import share
        from pipeline.cluster.train import FitPlan, fit

        work, cluster = self._work, self._work.config.cluster
        plan = FitPlan(
            spec=spec,
            storage=work.run.dir / "ray",
            num_workers=cluster.num_workers,
            worker_resources=worker_bundle(work.config),
            num_threads=_num_threads(work),
            max_failures=cluster.max_failures,
            with_teacher=work.teacher is not None,
            start_from=find_local(work.run.dir / "checkpoints"),
        )
        folder = fit(plan, share(work.source), self._run_stream(spec), self._drain.emitter)
        return Outcome.read(folder)

    def _train_in_driver(self, spec: RunSpec) -> Outcome:
        from pipeline.cluster.train import DriverSource

        work = self._work
        source = DriverSource(self._run_stream(spec), work.teacher is not None, self._session.journal)
        context = _local_context(work, self._session)
        return train(build_job(spec, work.source, self._session.skipped), context, source).outcome

    def evaluate(self, split: SplitName, reader: SplitReader) -> Evaluation:
        spec = _evaluation_spec(self._work, split, reader, self.logits(split, reader), self._drain.emitter)
        if self._work.config.cluster.name == "driver":
            return evaluate_weights(spec)
        from pipeline.cluster.tasks import run_task

        return run_task(evaluate_weights, spec, worker_bundle(self._work.config), self._drain.emitter)

    def _run_stream(self, spec: RunSpec) -> RunStream:
        """One stream to the end, or, where a cache is filled, one that computes and then one that reads."""
        from pipeline.cluster.fill import SealTask
        from pipeline.cluster.stream import RunStream, share

        work, end = self._work, self._work.plan.num_blocks
        if work.fill is None:
            return RunStream((self._training_stream(work.cached),), (end,))
        filling = self._training_stream(None)
        assert filling.pool is not None
        pool = replace(filling.pool, fill=work.fill.writer)
        reading = self._training_stream((work.fill.logits, work.fill.decoder))
        plan = plan_seal(work.run, work.source, work.fill, _accuracy(work, spec))
        seal = SealTask(plan, share(work.reader), pool.build, pool.actor_options, self._drain.emitter)
        return RunStream((replace(filling, pool=pool), reading), (work.fill.end, end), seal)

    def _training_stream(self, cached: tuple[LogitsReader, LogitsDecoder] | None) -> StreamPlan:
        from pipeline.cluster.stream import TrainingBlocks

        work = self._work
        reader, decoder = cached or (None, None)
        blocks = TrainingBlocks(work.reader, work.planner, work.config.data.augment, work.config.view_seed, reader)
        stream = self._streams.make(blocks, "train", work.reader, work.plan.blocks_per_step)
        if decoder is not None:
            stream = replace(stream, pool=None, logits=decoder)
        actor = None if stream.pool is None else "teacher actor"
        return replace(
            stream, demands=tuple(_list_worker_demands(work.config) + list_stream_demands(work.config, actor))
        )


def _accuracy(work: Work, spec: RunSpec) -> float | None:
    """The teacher's on validation."""
    logits = spec.validation_logits
    return None if logits is None else teacher_accuracy(work.source, Path(logits))


def list_demands(config: Config, command: str) -> list[Demand]:
    """Who needs what of the cluster."""
    from pipeline.cluster.preflight import Demand

    if command == "search":
        limit, workers = None if config.search is None else config.search.max_concurrent, config.cluster.num_workers
        who, knob = (
            ("trial", "cluster.num_cpus_per_worker") if workers == 1 else ("trial worker", "cluster.num_workers")
        )
        return [Demand(who, workers, worker_bundle(config), knob, most=None if limit is None else limit * workers)]
    demands = [] if command in TEACHER_ONLY else _list_worker_demands(config)
    return demands + list_stream_demands(config, "teacher actor" if uses_pool(config, command) else None)


def _list_worker_demands(config: Config) -> list[Demand]:
    from pipeline.cluster.preflight import Demand

    if config.cluster.name != "ray":
        return []
    return [Demand("student worker", config.cluster.num_workers, worker_bundle(config), "cluster.num_workers")]


def preflight_rows(config: Config, command: str) -> list[list[str]]:
    """Rows of the preflight table; without Ray there is one process."""
    if config.cluster.name == "inprocess":
        return [["this process", "1", "no Ray", "-"]]
    from pipeline.cluster.preflight import demand_rows

    return demand_rows(list_demands(config, command))


def worker_bundle(config: Config) -> dict[str, float]:
    """Resources of a process that trains."""
    cluster = config.cluster
    bundle = {"CPU": cluster.num_cpus_per_worker, "GPU": cluster.num_gpus_per_worker, **cluster.resources_per_worker}
    return {name: amount for name, amount in bundle.items() if amount}


def _num_threads(work: Work) -> int:
    return work.config.train.num_threads or max(1, int(work.config.cluster.num_cpus_per_worker))


def student_device(config: Config) -> str | None:
    """Where the student lives; none: on the GPU of this process, if it has one."""
    if config.cluster.name == "inprocess":
        return None
    return "cuda" if config.cluster.num_gpus_per_worker else "cpu"


def _local_context(work: Work, session: RunSession) -> LocalContext:
    """One worker in this process, which goes on where Ray Train's workers got further."""
    import torch

    config, storage = work.config, work.run.dir / "ray"
    committed = None
    if storage.exists():
        from pipeline.cluster.train import committed_folder

        committed = committed_folder(str(storage))
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    device = student_device(config)
    return LocalContext(
        work.run.dir / "checkpoints", session.journal, None if device is None else torch.device(device), committed
    )


def _evaluation_spec(
    work: Work, split: SplitName, reader: SplitReader, logits: Path | None, emitter: Emitter
) -> EvaluationSpec:
    return EvaluationSpec(
        work.network,
        str(work.run.dir / "model" / "model.safetensors"),
        work.source.spec,
        work.source.decoder(split),
        reader,
        split,
        work.config.evaluation,
        None if logits is None else str(logits),
        work.config.train.precision,
        student_device(work.config),
        emitter,
    )
