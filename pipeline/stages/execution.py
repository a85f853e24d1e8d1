"""Three ways to carry out a run: Ray Train workers, the driver's own process on Ray's stream, no Ray at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.config.schema import Config
from pipeline.contracts.columns import SplitName
from pipeline.contracts.events import Emitter
from pipeline.data import SplitReader
from pipeline.data.logits import save_logits
from pipeline.errors import TrainingError
from pipeline.stages.pool import (
    estimate_block_bytes,
    list_stream_demands,
    make_pool_plan,
    pool_device,
    stream_limits,
)
from pipeline.stages.session import RunSession
from pipeline.stages.work import Work, learns_from_teacher, logits_path
from pipeline.training import (
    BestRecord,
    Evaluation,
    EvaluationSpec,
    InProcessSource,
    LocalContext,
    TeacherArguments,
    build_job,
    compute_logits,
    evaluate_weights,
    find_local,
    read_state,
    teacher_arguments,
    train,
)

if TYPE_CHECKING:  # importing ray takes seconds, and not every way needs it
    from pipeline.cluster.preflight import Demand
    from pipeline.cluster.stream import BlockReader, PoolPlan, StreamPlan


class Execution(Protocol):
    """A way to carry out a run."""

    def train(self) -> BestRecord:
        """Trains to the end of the plan; returns what is kept."""
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
    else:
        with ExitStack() as stack:
            yield _OnRay(work, session, stack)


class _InProcess:
    """Everything in this process, one thing after the other."""

    def __init__(self, work: Work, session: RunSession) -> None:
        self._work, self._session = work, session
        self._teacher = None
        if work.teacher is not None:
            from pipeline.models import Teacher

            self._teacher = Teacher(**_teacher_arguments(work, None))

    def train(self) -> BestRecord:
        work = self._work
        logits = self._logits("validation", work.source.split("validation"))
        self._session.say("training")
        source = InProcessSource(
            work.source,
            work.reader,
            work.planner,
            work.config.data,
            work.config.run.seed,
            work.plan.num_blocks,
            self._teacher,
            self._session.skipped,
        )
        context = _local_context(work, self._session)
        state = train(build_job(work.spec(logits), work.source, self._session.skipped), context, source)
        self._session.say("training", "finished")
        return _kept(state.best)

    def evaluate(self, split: SplitName, reader: SplitReader) -> Evaluation:
        logits = self._logits(split, reader)
        return evaluate_weights(_evaluation_spec(self._work, split, reader, logits, self._session.skipped))

    def _logits(self, split: SplitName, reader: SplitReader) -> Path | None:
        if self._teacher is None:
            return None
        path = _logits_path(self._work, split, reader)
        if not path.exists():
            self._session.say("teacher logits", detail=f"{split}, {reader.num_rows} rows")
            batch_size = self._work.config.train.batch_size
            save_logits(path, compute_logits(self._teacher, self._work.source.decoder(split), reader, batch_size))
            self._session.say("teacher logits", "finished")
        return path


class _OnRay:
    """The stream and the pool on Ray; the student in Ray Train workers, or in this process."""

    def __init__(self, work: Work, session: RunSession, stack: ExitStack) -> None:
        from pipeline.cluster.journal import QueueDrain
        from pipeline.cluster.preflight import admitted, check_demand
        from pipeline.cluster.session import ray_session

        self._work, self._session = work, session
        cluster = work.config.cluster
        demands = list_demands(work.config, work.run.command)
        session.say("ray", detail="connecting to the cluster, or starting one here")
        stack.enter_context(ray_session(cluster.address, demands, work.run.dir / "ray.log"))
        check_demand(demands, resuming=work.run.resumed)
        session.say("ray", "finished")
        release = stack.enter_context(
            admitted(demands, work.run.name, cluster.wait_s, lambda detail: session.say("placement", detail=detail))
        )
        # Once a step was taken, workers and pool are placed: the next run may be.
        session.listen(lambda event: release() if event.kind == "step" else None)
        self._drain = QueueDrain(session.skipped)
        stack.callback(self._drain.close)
        session.before_kill(lambda: self._drain.flush(0.3))

    def train(self) -> BestRecord:
        work = self._work
        logits = self._logits("validation", work.source.split("validation"))
        self._session.say("training", detail="starting the workers, the stream and the teachers")
        best = self._train_in_driver(logits) if work.config.cluster.name == "driver" else self._train_in_workers(logits)
        self._session.say("training", "finished")
        return best

    def _train_in_workers(self, logits: Path | None) -> BestRecord:
        from pipeline.cluster.stream import share
        from pipeline.cluster.train import FitPlan, fit

        work, cluster = self._work, self._work.config.cluster
        plan = FitPlan(
            spec=work.spec(logits),
            storage=work.run.dir / "ray",
            num_blocks=work.plan.num_blocks,
            num_workers=cluster.num_workers,
            worker_resources=_worker_bundle(work.config),
            num_threads=_num_threads(work),
            max_failures=cluster.max_failures,
            with_teacher=work.teacher is not None,
            start_from=find_local(work.run.dir / "checkpoints"),
        )
        folder = fit(plan, share(work.source), self._training_stream(), self._drain.emitter)
        saved = read_state(folder)["best"]
        return _kept(None if saved is None else BestRecord(**saved))

    def _train_in_driver(self, logits: Path | None) -> BestRecord:
        from pipeline.cluster.train import DriverSource

        work = self._work
        source = DriverSource(self._training_stream(), work.plan.num_blocks, work.teacher is not None)
        context = _local_context(work, self._session)
        job = build_job(work.spec(logits), work.source, self._session.skipped)
        return _kept(train(job, context, source).best)

    def evaluate(self, split: SplitName, reader: SplitReader) -> Evaluation:
        spec = _evaluation_spec(self._work, split, reader, self._logits(split, reader), self._drain.emitter)
        if self._work.config.cluster.name == "driver":
            return evaluate_weights(spec)
        from pipeline.cluster.tasks import run_task

        return run_task(evaluate_weights, spec, _worker_bundle(self._work.config))

    def _logits(self, split: SplitName, reader: SplitReader) -> Path | None:
        """The teacher's logits on a split, computed by the pool unless an earlier run has kept them."""
        if self._work.teacher is None:
            return None
        path = _logits_path(self._work, split, reader)
        if not path.exists():
            from pipeline.cluster.logits import write_pool_logits
            from pipeline.cluster.stream import SplitBlocks, whole_split

            self._session.say("teacher logits", detail=f"{split}, {reader.num_rows} rows")
            blocks = SplitBlocks(reader, self._work.config.train.batch_size)
            write_pool_logits(whole_split(self._stream(blocks, split, reader)), reader.num_rows, path)
            self._session.say("teacher logits", "finished")
        return path

    def _training_stream(self) -> StreamPlan:
        from pipeline.cluster.stream import TrainingBlocks

        work = self._work
        augment, seed = work.config.data.augment, work.config.run.seed
        return self._stream(TrainingBlocks(work.reader, work.planner, augment, seed), "train", work.reader)

    def _stream(self, blocks: BlockReader, split: SplitName, reader: SplitReader) -> StreamPlan:
        from pipeline.cluster.stream import StreamPlan, share

        work, config = self._work, self._work.config
        return StreamPlan(
            blocks=share(blocks),
            batch_size=config.train.batch_size,
            block_bytes=estimate_block_bytes(
                work.source.spec, config.train.batch_size, reader, with_partners=config.data.augment.mixes
            ),
            decoder=work.source.decoder(split),
            augment=config.data.augment,
            seed=config.run.seed,
            pool=self._pool_plan(),
            emitter=self._drain.emitter,
            blocks_per_step=work.plan.blocks_per_step,
            split=split,
            **stream_limits(config),
        )

    def _pool_plan(self) -> PoolPlan | None:
        teacher, pool = self._work.teacher, self._work.config.teacher.pool
        if teacher is None:
            return None
        return make_pool_plan(pool, _teacher_arguments(self._work, pool_device(pool)), teacher.fingerprint)


def list_demands(config: Config, command: str) -> list[Demand]:
    """Who needs what of the cluster."""
    from pipeline.cluster.preflight import Demand

    demands = []
    if config.cluster.name == "ray":
        demands.append(
            Demand("student worker", config.cluster.num_workers, _worker_bundle(config), "cluster.num_workers")
        )
    return demands + list_stream_demands(config, "teacher actor" if learns_from_teacher(config, command) else None)


def preflight_rows(config: Config, command: str) -> list[list[str]]:
    """Rows of the preflight table; without Ray there is one process."""
    if config.cluster.name == "inprocess":
        return [["this process", "1", "no Ray", "-"]]
    from pipeline.cluster.preflight import demand_rows

    return demand_rows(list_demands(config, command))


def _worker_bundle(config: Config) -> dict[str, float]:
    cluster = config.cluster
    bundle = {"CPU": cluster.num_cpus_per_worker, "GPU": cluster.num_gpus_per_worker, **cluster.resources_per_worker}
    return {name: amount for name, amount in bundle.items() if amount}


def _num_threads(work: Work) -> int:
    return work.config.train.num_threads or max(1, int(work.config.cluster.num_cpus_per_worker))


def _logits_path(work: Work, split: SplitName, reader: SplitReader) -> Path:
    if work.teacher is None:
        raise ValueError("this run has no teacher")
    return logits_path(work.run.dir, work.teacher, work.source, split, reader)


def _teacher_arguments(work: Work, device: str | None) -> TeacherArguments:
    return teacher_arguments(work.config.teacher, work.source, work.config.train.batch_size, device)


def _student_device(config: Config) -> str | None:
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
    device = _student_device(config)
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
        _student_device(work.config),
        emitter,
    )


def _kept(best: BestRecord | None) -> BestRecord:
    if best is None:
        raise TrainingError("training ended without an evaluated checkpoint; see ray.log in the run folder")
    return best
