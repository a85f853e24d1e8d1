"""The story of a training run, for student and teacher alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.config.results import write_json
from pipeline.config.runs import Run, open_run
from pipeline.contracts.events import Event, read_events
from pipeline.data import DataSource
from pipeline.errors import PipelineError, RunError
from pipeline.models import Classifier, ModelCard, build_classifier, save_model
from pipeline.report.tables import render_table
from pipeline.stages.execution import Execution, open_execution, preflight_rows
from pipeline.stages.session import RunSession, run_interruptibly, send_rest
from pipeline.stages.skipped import SkippedRows
from pipeline.stages.work import Work, check_labels, check_teacher, learns_from_teacher, prepare_work
from pipeline.training import BestRecord, open_test


def run_training(request: Request, defaults: Sequence[str] = ()) -> int:
    """Trains one network to its end, evaluates what is kept, and leaves a run folder behind.

    Args:
        defaults: overrides that the command starts from.

    Raises:
        PipelineError: with ``exit_code`` 2 in its details before work began, 1 after.
    """
    loaded = load_config(request, defaults)
    source = loaded.config.data.open()
    check_labels(loaded.config, source)
    teacher = check_teacher(loaded.config, source) if learns_from_teacher(loaded.config, request.command) else None
    facts = {"data": source.fingerprint, "teacher": None if teacher is None else teacher.fingerprint}
    with open_run(request.command, loaded.config, provenance=lambda: facts, extends=loaded.extends) as run:
        if run.finished:
            print(f"{run.dir} is finished; train.epochs=+N extends it, run.dir=... makes another run")
            send_rest(run, describe_dataset(source, run))
            show_result(run)
            return 0
        if run.resumed:
            check_unchanged(run, facts)
        try:
            work = prepare_work(run, source, teacher)
            session = RunSession(run, describe_dataset(source, run), with_teacher=teacher is not None)
        except BaseException:
            run.discard()
            raise
        _announce(run)
        try:
            run_interruptibly(lambda: _carry_out(work, session), session.kill)
        except Exception as error:
            code = session.fail(error)
            print(run.result_path)
            if isinstance(error, PipelineError):
                error.details["exit_code"] = code
            raise
        show_result(run)
    return 0


def check_unchanged(run: Run, facts: Mapping[str, str | None]) -> None:
    """Refuses to go on with a run whose data or teacher are no longer what it began with.

    Raises:
        RunError: with both fingerprints.
    """
    recorded = run.read_provenance()
    for name, now in facts.items():
        if recorded.get(name) != now:
            raise RunError(
                f"{run.dir} began with {name} of fingerprint {recorded.get(name)}, but it now has {now}; put back what "
                "it began with, or start a new run"
            )


def _announce(run: Run) -> None:
    """How to go on with the run comes first; then who needs what."""
    print(f"run {run.name} in {run.dir}\ngo on with it: {run.resume_command}")
    print(
        render_table("preflight", ("who", "how many", "each", "in all"), preflight_rows(run.config, run.command)),
        flush=True,
    )


def _carry_out(work: Work, session: RunSession) -> None:
    session.start()
    with open_execution(work, session) as execution:
        session.began = True
        best = execution.train()
        classifier = keep_best(work, best)
        session.journal.emit(Event("model", {"path": str(work.run.dir / "model")}))
        metrics = dict(best.metrics)
        if work.config.evaluation.test:
            metrics |= evaluate_test(work, execution, session, best, "the kept checkpoint, once, at the end of its run")
    _write_evaluations(work.run, best.step)
    extra = {
        "best_step": best.step,
        "best_epoch": best.epoch,
        "num_parameters": sum(parameter.numel() for parameter in classifier.network.parameters()),
        "samples_per_s": session.samples_per_s,
    }
    session.finish(metrics, extra)


def _write_evaluations(run: Run, step: int) -> None:
    """Writes ``evaluation.json``: metrics and accuracies by class of the kept step, for each split."""
    kept = {}
    for event, _ in read_events(run.dir / "events.jsonl"):
        if event.kind == "evaluation" and event.data["step"] == step:
            kept[event.data["split"]] = {name: event.data[name] for name in ("step", "epoch", "metrics", "per_class")}
    write_json(run.dir / "evaluation.json", kept)


def keep_best(work: Work, best: BestRecord) -> Classifier:
    """Writes the kept weights with their card into ``model/`` of the run folder."""
    classifier = build_classifier(work.network, work.source.spec)
    classifier.network.load_state_dict(best.weights)
    card = ModelCard.describe(work.network, classifier, best.metrics, work.source.fingerprint)
    save_model(work.run.dir / "model", classifier, card)
    return classifier


def evaluate_test(
    work: Work, execution: Execution, session: RunSession, best: BestRecord, reason: str
) -> dict[str, float]:
    """Metrics of the kept weights on test."""
    reader = open_test(work.source, reason)
    session.say("evaluation", detail=f"test, {reader.num_rows} rows: {reason}")
    result = execution.evaluate("test", reader)
    session.journal.emit(
        Event(
            "evaluation",
            {
                "split": "test",
                "step": best.step,
                "epoch": best.epoch,
                "metrics": result.metrics,
                "per_class": result.per_class,
                "best": False,
            },
        )
    )
    session.say("evaluation", "finished")
    return result.metrics


def describe_dataset(source: DataSource, run: Run) -> dict[str, Any]:
    """What the tracker records of the data."""
    data = run.config.data
    return {
        "name": data.name,
        "fingerprint": source.fingerprint,
        "num_rows": source.split("train").num_rows,
        "path": getattr(data, "path", None) or data.name,
    }


def show_result(run: Run) -> None:
    """Prints the table of a finished run, and the path of ``result.json`` as the last line."""
    result = run.read_result()
    values: dict[str, float] = result["metrics"]
    print(metrics_table(f"{run.name}: kept is step {result.get('best_step', '-')}", values))
    if summary := SkippedRows(run.dir, None).summary():
        print(summary)
    if (uri := run.config.tracking.uri or "").startswith("sqlite"):
        print(f"review it with: mlflow ui --backend-store-uri {uri}")
    print(run.result_path, flush=True)


def metrics_table(title: str, metrics: Mapping[str, float]) -> str:
    """Metrics by name, a column for each split that was evaluated."""
    splits = [
        (prefix, split) for prefix, split in (("val", "validation"), ("test", "test")) if f"{prefix}/top1" in metrics
    ]
    names = sorted({name.split("/")[-1] for name in metrics} - {"num_rows"})
    rows: list[list[object]] = [[name, *(metrics.get(f"{prefix}/{name}") for prefix, _ in splits)] for name in names]
    rows.append(["rows", *(int(metrics[f"{prefix}/num_rows"]) for prefix, _ in splits)])
    return render_table(title, ("metric", *(split for _, split in splits)), rows)
