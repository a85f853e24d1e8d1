"""``evaluate run=RUN``: the network that a run kept, on validation and test."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.config.load import load_config, take_run
from pipeline.config.request import Request
from pipeline.config.results import write_json, write_result
from pipeline.config.rules import asks_teacher
from pipeline.config.schema import Config
from pipeline.config.stored import StoredRun, find_run, read_run
from pipeline.contracts.columns import SplitName
from pipeline.data.logits import save_logits
from pipeline.errors import ConfigError
from pipeline.execution.logits import logits_path, teacher_here
from pipeline.execution.skipped import FILE_NAME, SkippedRows
from pipeline.execution.teacher import check_teacher
from pipeline.execution.training import metrics_table
from pipeline.execution.work import check_labels, trained_network
from pipeline.models import resolve_checkpoint
from pipeline.training import Evaluation, EvaluationSpec, compute_logits, evaluate_weights, open_test


def evaluate(request: Request) -> int:
    """Evaluates in this process, on its GPU if it has one; returns 0.

    The result goes to ``evaluate/result.json`` of the run folder, with accuracies by class beside it in
    ``evaluation.json``; the run itself is not changed.

    Raises:
        PipelineError: no such run, or one without kept weights.
    """
    stored, config = _load_run(request)
    weights = resolve_checkpoint(str(stored.dir))
    source = config.data.open()
    check_labels(config, source, training=False)
    _, network = trained_network(config, stored.command)
    checked = check_teacher(config, source) if asks_teacher(config, stored.command) else None
    teacher = None
    folder = stored.dir / "evaluate"
    folder.mkdir(exist_ok=True)
    (folder / FILE_NAME).unlink(missing_ok=True)
    skipped = SkippedRows(folder, None)
    metrics: dict[str, float] = {}
    evaluations: dict[str, Evaluation] = {}
    splits: tuple[SplitName, ...] = ("validation", "test") if config.evaluation.test else ("validation",)
    for split in splits:
        reader = open_test(source, "asked for by the evaluate command") if split == "test" else source.split(split)
        logits: Path | None = None
        if checked is not None:
            logits = logits_path(stored.dir, checked, source, split, reader)
            if not logits.exists():
                teacher = teacher or teacher_here(config, source)
                save_logits(logits, compute_logits(teacher, source.decoder(split), reader, config.train.batch_size))
        job = EvaluationSpec(
            network, str(weights), source.spec, source.decoder(split), reader, split, config.evaluation,
            None if logits is None else str(logits), config.train.precision, emitter=skipped,
        )  # fmt: skip
        evaluations[split] = evaluate_weights(job)
        metrics |= evaluations[split].metrics
    print(metrics_table(stored.name, metrics))
    if summary := skipped.summary():
        print(summary)
    write_json(folder / "evaluation.json", {split: asdict(result) for split, result in evaluations.items()})
    path = folder / "result.json"
    extra = {"exit_code": 0, "num_bad_rows": len(skipped)}
    write_result(path, stored.dir, stored.config_hash, "finished", metrics, extra)
    print(path, flush=True)
    return 0


def _load_run(request: Request) -> tuple[StoredRun, Config]:
    """The run that ``run=RUN`` names, and its configuration with the other overrides on top."""
    run, others = take_run(request.overrides, "run")
    if run is None:
        raise ConfigError("evaluate needs run=RUN: a run folder, or its name under runs/")
    stored = read_run(find_run(run))
    resume = Request(stored.command, (f"resume={stored.dir}", *others), request.conf_dirs, request.debug)
    return stored, load_config(resume).config
