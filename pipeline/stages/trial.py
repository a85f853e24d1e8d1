"""One trial of a search, in a process that runs many: a run of ``distill`` that reads what they share."""

from __future__ import annotations

import contextlib
import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.runs import Run, open_run
from pipeline.config.schema import Config
from pipeline.config.validate import build_config
from pipeline.contracts.events import Event, Journal
from pipeline.data import DataSource, SplitReader
from pipeline.data.cache import CacheKey, LogitsReader
from pipeline.errors import PipelineError, TrainingError
from pipeline.stages.cached import make_decoder
from pipeline.stages.search_configs import TRIAL_COMMAND
from pipeline.stages.skipped import SkippedRows
from pipeline.stages.training import keep_best, write_evaluations
from pipeline.stages.work import CheckedTeacher, plan_work
from pipeline.training import InProcessSource, LocalContext, build_job, train

Report = Callable[[int, float], None]


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


def run_trial(inputs: TrialInputs, label: str, config: str, report: Report) -> None:
    """Trains a trial to its end, or as long as ``report`` returns; its run folder says what came of it.

    What our own errors say is kept in the run folder, for the same would happen again; any other is raised.

    Args:
        config: of the trial, as JSON.
        report: takes epoch and value of an evaluation; it raises SystemExit where the trial is to end.
    """
    parsed = build_config(json.loads(config), TRIAL_COMMAND)
    with open_run(TRIAL_COMMAND, parsed, provenance=lambda: inputs.provenance) as run, _own_process_state(parsed):
        if not run.finished:
            journal = Journal(run.dir / "events.jsonl")
            run.set_status("running")
            journal.emit(Event("status", {"status": "running", "message": ""}))
            try:
                _train(inputs, run, journal, report)
            except PipelineError as error:
                run.write_result("failed", {}, exit_code=1, error=error.message)
                journal.emit(Event("status", {"status": "failed", "message": error.message}))
                return
            journal.emit(Event("status", {"status": "finished", "message": ""}))
        result = run.read_result()
    report(parsed.train.epochs, result["last_value"])


def _train(inputs: TrialInputs, run: Run, journal: Journal, report: Report) -> None:
    config = run.config
    work = plan_work(run, inputs.source, inputs.teacher, inputs.reader)
    skipped = SkippedRows(run.dir, journal)
    spec = work.spec(None if inputs.validation_logits is None else Path(inputs.validation_logits))
    cached = None
    if inputs.cache is not None and config.loss.needs_teacher:
        logits, key = inputs.cache
        cached = logits, make_decoder(config, key)
    source = InProcessSource(
        work.source,
        work.reader,
        work.planner,
        config.data,
        config.view_seed,
        work.plan.num_blocks,
        emitter=skipped,
        cached=cached,
    )

    def tell(metrics: Mapping[str, float]) -> None:
        step, plan = int(metrics["step"]), work.plan
        epoch = plan.epoch_of_step(step)
        # The last evaluation is told once the result is written, for the answer may end this function.
        if step < plan.num_steps and plan.ends_epoch(step) and epoch % config.train.evaluate_every == 0:
            report(epoch, metrics[inputs.metric])

    device = torch.device("cuda" if config.cluster.num_gpus_per_worker else "cpu")
    context = LocalContext(run.dir / "checkpoints", journal, device, committed=tell)
    state = train(build_job(spec, work.source, skipped), context, source)
    best = state.best
    if best is None:
        raise TrainingError("training ended without an evaluated checkpoint")
    keep_best(work, best)
    write_evaluations(run, best.step)
    extra = {
        "best_step": best.step,
        "best_epoch": best.epoch,
        "trial_value": best.metrics[inputs.metric],
        "last_value": state.last_metrics[inputs.metric],
    }
    run.write_result("finished", best.metrics, extra)


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
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        gc.collect()  # a trial that was stopped leaves its network in a ring of references
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
