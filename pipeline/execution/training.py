"""The story of a training run, for student and teacher alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.request import Request
from pipeline.config.results import write_json
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.contracts.events import Event, Journal, read_events
from pipeline.data import DataSource
from pipeline.execution.own_network import check_kept
from pipeline.execution.selection import check_selection, select
from pipeline.execution.session import RunSession
from pipeline.execution.skipped import SkippedRows
from pipeline.execution.story import Story, tell
from pipeline.execution.ways import Execution, open_execution
from pipeline.execution.work import Work, check_labels, prepare_work
from pipeline.losses import Perturbation
from pipeline.models import Classifier, CustomParams, ModelCard, build_classifier, save_model
from pipeline.report.tables import render_table
from pipeline.training import BestRecord, Outcome, RunPlan, open_test


def run_training(request: Request, defaults: Sequence[str] = ()) -> int:
    """Trains one network to its end, evaluates what is kept, and leaves a run folder behind; see ``tell``."""
    story = Story(_check, prepare_work, _carry_out, show_result, extend="train.epochs=+N extends it")
    return tell(story, request, defaults)


def _check(config: Config, source: DataSource) -> None:
    check_labels(config, source)
    if config.loss.wants_perturbation:
        check_selection(config, source)


def _carry_out(work: Work, session: RunSession) -> None:
    with open_execution(work, session) as execution:
        session.began = True
        logits = execution.logits("validation", work.source.split("validation"))
        outcome = execution.train(work.spec(logits, _find_perturbation(work, logits, session)))
        best = outcome.best
        classifier = keep_best(work, best)
        check_kept(work.network, work.run.dir / "model", work.source)
        session.journal.emit(Event("model", {"path": str(work.run.dir / "model")}))
        metrics = dict(best.metrics)
        if work.config.evaluation.test:
            metrics |= evaluate_test(work, execution, session, best, "the kept checkpoint, once, at the end of its run")
    # By now all that was on its way to the journal has arrived.
    complete_record(session.journal, work.plan, outcome)
    write_evaluations(work.run, best.step)
    extra = {
        "best_step": best.step,
        "best_epoch": best.epoch,
        "num_parameters": sum(parameter.numel() for parameter in classifier.network.parameters()),
        "samples_per_s": session.samples_per_s,
    }
    session.finish(metrics, extra)


def _find_perturbation(work: Work, logits: Path | None, session: RunSession) -> Perturbation | None:
    """The coefficients that the loss wants selected from the teacher's validation logits; none where it wants none."""
    if not work.config.loss.wants_perturbation or logits is None:
        return None
    return select(work.config.selection, work.source, logits, session).perturbation


def complete_record(journal: Journal, plan: RunPlan, outcome: Outcome) -> None:
    """Puts evaluations that the journal of a trained run lacks into it: that of the last step, and of the kept one.

    The last checkpoint has them too. The journal may lack them where a driver was killed before they had reached it.
    """
    recorded = {
        event.data["step"]
        for event, _ in read_events(journal.path)
        if event.kind == "evaluation" and event.data["split"] == "validation"
    }
    for data in outcome.evaluations:
        step = data["step"]
        if step not in recorded:
            message = f"the evaluation at step {step} had not reached the journal; it is from the last checkpoint"
            journal.emit(Event("warning", {"message": message}))
            journal.emit(Event("evaluation", {"epoch": plan.epoch_of_step(step), **data}))


def write_evaluations(run: Run, step: int) -> None:
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
    code = work.network.code_folder if isinstance(work.network, CustomParams) else None
    save_model(work.run.dir / "model", classifier, card, code)
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
