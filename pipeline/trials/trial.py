"""One trial of a search, in a process that runs many: a run of ``distill`` that reads what they share."""

from __future__ import annotations

import contextlib
import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.config.runs import Run, open_run
from pipeline.config.schema import Config
from pipeline.config.validate import build_config
from pipeline.contracts.events import Emitter, Event, Journal
from pipeline.data import DataSource, SplitReader
from pipeline.data.cache import CacheKey, LogitsReader
from pipeline.data.waiting import tell_waits
from pipeline.errors import PipelineError
from pipeline.execution.caching import make_decoder
from pipeline.execution.skipped import SkippedRows
from pipeline.execution.teacher import CheckedTeacher
from pipeline.execution.training import complete_record, keep_best, write_evaluations
from pipeline.execution.work import plan_work
from pipeline.search import TrialTask
from pipeline.training import InProcessSource, LocalContext, RunSpec, TrainState, build_job, make_planner, train
from pipeline.training.context import find_local, process_group
from pipeline.training.state import read_state
from pipeline.trials.configs import TRIAL_COMMAND

Report = Callable[[int, float], None]

_LEAVES_WITHIN_S = 30.0


@dataclass(frozen=True)
class TrialInputs:
    """What all trials of a search share; large arrays in it lie in the object store, once on each node.

    Attributes:
        reader: the training split.
        cache: reads the cache that has this key; none without a teacher.
        validation_logits: file with the teacher's logits on validation; none without a teacher.
        metric: what trials are compared by.
        provenance: facts recorded with each run.
    """

    source: DataSource
    reader: SplitReader
    teacher: CheckedTeacher | None
    cache: tuple[LogitsReader, CacheKey] | None
    validation_logits: str | None
    metric: str
    provenance: Mapping[str, Any]


class Team(Protocol):
    """The other workers of a trial that has several."""

    size: int

    def beside(
        self, function: Callable[..., None], argument: Any, emitter: Emitter
    ) -> contextlib.AbstractContextManager[str]:
        """Calls ``function(inputs, argument, rank, address, emitter)`` in each of them for the time of the block.

        Yields the address at which rank 0 is to listen.
        """
        ...


@dataclass(frozen=True)
class _Part:
    """What the other workers of a trial are sent.

    Attributes:
        place: its run folder, for the checkpoint to go on from.
    """

    task: TrialTask
    spec: RunSpec
    place: Path
    world_size: int


def run_trial(inputs: TrialInputs, task: TrialTask, report: Report, team: Team | None = None) -> None:
    """Trains a trial to its end, or as long as ``report`` returns; its run folder says what came of it.

    What our own errors say is kept in the run folder, where the same would happen again; any other is raised.

    Args:
        report: takes epoch and value of an evaluation; it raises SystemExit where the trial is to end.
        team: none: this is the only worker.
    """
    parsed = _config(task)
    # The process that paused this trial may still be about to leave its folder.
    run = open_run(TRIAL_COMMAND, parsed, provenance=lambda: inputs.provenance, wait_s=_LEAVES_WITHIN_S)
    with run, _own_process_state(parsed):
        if not run.finished:
            journal = Journal(run.dir / "events.jsonl")
            run.set_status("running")
            tell_waits(journal)
            journal.emit(Event("status", {"status": "running", "message": ""}))
            try:
                _train(inputs, run, task, journal, report, team)
            except PipelineError as error:
                if error.passes:
                    raise
                run.write_result("failed", {}, exit_code=1, error=error.message)
                journal.emit(Event("status", {"status": "failed", "message": error.message}))
                return
            journal.emit(Event("status", {"status": "finished", "message": ""}))
        result = run.read_result()
    report(parsed.train.epochs, result["last_value"])


def _train(inputs: TrialInputs, run: Run, task: TrialTask, journal: Journal, report: Report, team: Team | None) -> None:
    config = run.config
    work = plan_work(run, inputs.source, inputs.teacher, inputs.reader)
    skipped = SkippedRows(run.dir, journal)
    spec = work.spec(None if inputs.validation_logits is None else Path(inputs.validation_logits))

    def tell(metrics: Mapping[str, float]) -> None:
        step, plan = int(metrics["step"]), work.plan
        epoch = plan.epoch_of_step(step)
        # The last evaluation is told once the result is written, for the answer may end this function.
        if step < plan.num_steps and plan.ends_epoch(step) and epoch % config.train.evaluate_every == 0:
            report(epoch, metrics[inputs.metric])

    make_context = partial(
        LocalContext, run.dir / "checkpoints", journal, _device(config), _start(task), committed=tell
    )
    if (folder := find_local(run.dir / "checkpoints")) is not None:
        tell(_read_metrics(folder))  # whoever should have been told may have been gone by then
    if team is None:
        state = _train_worker(inputs, config, spec, make_context(), skipped)
    else:
        part = _Part(task._replace(config=config.model_dump_json()), spec, run.dir, team.size)
        with (
            team.beside(_train_beside, part, skipped) as address,
            process_group(_device(config), 0, team.size, address) as store,
        ):
            context = make_context(world_size=team.size, store=store)
            state = _train_worker(inputs, config, spec, context, skipped)
    best = state.outcome.best
    keep_best(work, best)
    complete_record(journal, work.plan, state.outcome)
    write_evaluations(run, best.step)
    extra = {
        "best_step": best.step,
        "best_epoch": best.epoch,
        "trial_value": best.metrics[inputs.metric],
        "last_value": state.last_metrics[inputs.metric],
    }
    run.write_result("finished", best.metrics, extra)


def _read_metrics(folder: Path) -> dict[str, float]:
    saved = read_state(folder)
    return {**saved["last_metrics"], "step": saved["step"]}


def _train_beside(inputs: TrialInputs, part: _Part, rank: int, address: str, emitter: Emitter) -> None:
    """A worker that is not rank 0."""
    config = _config(part.task)
    tell_waits(emitter)
    device, size = _device(config), part.world_size
    with _own_process_state(config), process_group(device, rank, size, address) as store:
        folder = part.place / "checkpoints"
        context = LocalContext(folder, emitter, device, _start(part.task), rank=rank, world_size=size, store=store)
        _train_worker(inputs, config, part.spec, context, emitter)


def _train_worker(
    inputs: TrialInputs, config: Config, spec: RunSpec, context: LocalContext, emitter: Emitter
) -> TrainState:
    """Trains this worker's share.

    Args:
        emitter: is told of rows that are skipped.
    """
    cached = None
    if inputs.cache is not None and config.loss.needs_teacher:
        logits, key = inputs.cache
        cached = logits, make_decoder(config, key)
    source = InProcessSource(
        inputs.source,
        inputs.reader,
        make_planner(config.data, inputs.reader, config.train, config.run.seed),
        config.data,
        config.view_seed,
        spec.plan.num_blocks,
        emitter=emitter,
        cached=cached,
        rank=context.rank,
        world_size=context.world_size,
    )
    return train(build_job(spec, inputs.source, emitter), context, source)


def _config(task: TrialTask) -> Config:
    return build_config(json.loads(task.config), TRIAL_COMMAND)


def _start(task: TrialTask) -> Path | None:
    return Path(task.start_from) if task.start_from else None


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if config.cluster.num_gpus_per_worker else "cpu")


@contextlib.contextmanager
def _own_process_state(config: Config) -> Iterator[None]:
    """A process serves one trial after the other; none may find what an earlier one has set."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(config.train.num_threads or max(1, int(config.cluster.num_cpus_per_worker)))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(config.run.seed)
    try:
        yield
    finally:
        tell_waits(None)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        gc.collect()  # a trial that was stopped leaves its network in a ring of references
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if config.train.compile:  # what is compiled is kept by the function, and after eight networks no further one is
            torch.compiler.reset()
