"""What a search has come to: its winner, opened once on test, its tables and charts."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.results import write_json
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.config.stored import read_json, write_text
from pipeline.contracts.events import Event, read_events
from pipeline.data import DataSource
from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.metrics import METRIC_DIRECTIONS
from pipeline.evaluation.seeds import mean_over_seeds
from pipeline.execution.own_network import check_kept
from pipeline.execution.session import RunSession
from pipeline.execution.ways import student_device, worker_bundle
from pipeline.report.search import (
    TrialRow,
    render_candidates,
    render_trials,
    show_interval,
    trials_csv,
)
from pipeline.report.search_charts import importances, render_charts
from pipeline.search.study import make_study
from pipeline.training import EvaluationSpec, evaluate_weights, open_test
from pipeline.trials.configs import TrialConfigs, describe_draw
from pipeline.trials.records import Trial, best_trials, past_trials, read_trials, trial_folder
from pipeline.trials.winner import (
    DEFAULTS,
    Confirmed,
    confirmations,
    describe,
    paired_gain,
    rank,
    write_choice,
)

FOLDER = "search"
_TABLES = ("trials.txt", "confirmed.txt", "winner.txt")


def conclude(
    run: Run, configs: TrialConfigs, source: DataSource, session: RunSession
) -> tuple[dict[str, float], dict[str, Any]]:
    """Chooses the winner, opens test for it, and writes everything into the run folder.

    Returns:
        the metrics of the search, and the further keys of its result.
    """
    trials = {trial.label: trial for trial in read_trials(run.dir)}
    confirmed, _ = confirmations(configs, best_trials(trials.values(), configs.maximises), trials)
    ranked = rank(confirmed, configs.maximises)
    candidates = describe(ranked, configs.maximises)
    winner, metric = ranked[0], configs.params.metric
    test = _open_test(run, configs, source, ranked, session) if run.config.evaluation.test else {}

    metrics = _metrics(run, configs, trials, candidates[0].mean, candidates[0].gain, test)
    shares = importances(_study(configs, trials))
    metrics |= {f"importance/{name}": share for name, share in shares.items()}
    verdict = _verdict(winner, candidates[0].mean, candidates[0].gain, metric, test)
    command = write_choice(configs, winner, run.dir / "winner", verdict)
    best = max(winner.repeats.values(), key=lambda trial: (1 if configs.maximises else -1) * (trial.value or 0.0))
    _copy_model(trial_folder(run.dir, best.label) / "model", run.dir / "model")
    check_kept(configs.build(winner.draw, Path("winner"), "winner").student, run.dir / "model", source)
    text = "\n".join(
        [
            textwrap.fill(verdict, 100, subsequent_indent="  ", break_long_words=False),
            f"its values: {describe_draw(winner.draw or {})}",
            f"its weights (seed {best.seed}, the best of its seeds on validation): {run.dir / 'model'}",
            f"train it again: {command}",
        ]
    )
    _write(run, configs, trials, render_candidates(candidates, metric), text, shares)
    session.journal.emit(Event("figures", {"message": verdict, "metrics": metrics}))
    for path in sorted([*(run.dir / FOLDER).glob("*.*"), *(run.dir / "winner").rglob("*.yaml")]):
        folder = path.parent.relative_to(run.dir)
        session.journal.emit(Event("artifact", {"path": str(path), "folder": str(folder)}))
    session.journal.emit(Event("model", {"path": str(run.dir / "model")}))
    extra = {
        "winner": winner.label,
        "winner_values": dict(winner.draw or {}),
        "winner_run": str(trial_folder(run.dir, best.label)),
        "verdict": verdict,
        "train_again": command,
    }
    return metrics, extra


def render_state(run_dir: Path, configs: TrialConfigs, *, finished: bool) -> str:
    """The tables of a finished search, or the trials of one that is not."""
    files = [run_dir / FOLDER / name for name in _TABLES]
    if finished and all(file.exists() for file in files):
        parts = [file.read_text() for file in files]
    else:
        parts = [render_all(configs, read_trials(run_dir))]
    return "\n\n".join(part.rstrip("\n") for part in parts)


def render_all(configs: TrialConfigs, trials: Sequence[Trial]) -> str:
    """The table of the search's own trials."""
    own = [trial_row(trial) for trial in trials if not trial.confirms]
    states = [row.state for row in own]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return render_trials(f"{len(own)} trials: {counts}", own, configs.params.metric, configs.maximises)


def trial_row(trial: Trial) -> TrialRow:
    """A trial, as tables show it."""
    epochs = trial.curve[-1][0] if trial.curve else 0
    return TrialRow(
        trial.label, trial.state, trial.value, epochs, trial.seconds, trial.draw or {}, trial.seed, trial.confirms,
        trial.message, trial.copy_of,
    )  # fmt: skip


def _study(configs: TrialConfigs, trials: Mapping[str, Trial]) -> Any:
    return make_study(configs.space, past_trials(trials.values()), "max" if configs.maximises else "min")[0]


def _write(
    run: Run, configs: TrialConfigs, trials: Mapping[str, Trial], confirmed: str, winner: str, shares: dict[str, float]
) -> None:
    folder = run.dir / FOLDER
    folder.mkdir(exist_ok=True)
    metric = configs.params.metric
    write_text(folder / "trials.csv", trials_csv([trial_row(trial) for trial in trials.values()]))
    write_text(folder / "trials.txt", render_all(configs, list(trials.values())))
    write_text(folder / "space.yaml", yaml.safe_dump(configs.params.model_dump(mode="json"), sort_keys=False))
    write_json(folder / "importance.json", shares)
    write_text(folder / "charts.html", render_charts(run.name, metric, _study(configs, trials)))
    write_text(folder / "confirmed.txt", confirmed)
    write_text(folder / "winner.txt", winner)


def _copy_model(kept: Path, place: Path) -> None:
    incoming = place.with_name("incoming-model")
    shutil.rmtree(incoming, ignore_errors=True)
    shutil.copytree(kept, incoming)
    shutil.rmtree(place, ignore_errors=True)
    incoming.rename(place)


def _metrics(
    run: Run,
    configs: TrialConfigs,
    trials: Mapping[str, Trial],
    mean: Interval,
    gain: Interval | None,
    test: Mapping[str, Any],
) -> dict[str, float]:
    metric = configs.params.metric
    own = [trial for trial in trials.values() if not trial.confirms]
    metrics = {
        f"search/num_{state}": float(sum(trial.state == state for trial in own))
        for state in ("finished", "pruned", "failed")
    }
    metrics |= _named(f"winner/{metric}", mean)
    if gain is not None:
        metrics |= _named("winner/gain", gain)
    for name, interval in test.get("intervals", {}).items():
        metrics |= _named(f"winner/{name}", Interval(**interval))
    teacher = count_teacher_rows(run)
    metrics |= {f"teacher/rows_{name}": number for name, number in teacher.items()}
    metrics["teacher/share_of_time"] = teacher_share(run)
    return metrics


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _verdict(winner: Confirmed, mean: Interval, gain: Interval | None, metric: str, test: Mapping[str, Any]) -> str:
    seeds = f"{len(winner.values)} fresh seed{'s' * (len(winner.values) != 1)}"
    if winner.label == DEFAULTS:
        said = f"no trial beats the defaults: {metric} {show_interval(mean)} over {seeds}"
    else:
        better = "" if gain is None else f", {show_interval(gain)} better than the defaults"
        said = f"trial {winner.label} wins: {metric} {show_interval(mean)} over {seeds}{better}"
    shown = metric.replace("val/", "test/")
    if shown in test.get("intervals", {}):
        said += f"; {shown} {show_interval(Interval(**test['intervals'][shown]))}"
        if test["gain"] is not None:
            said += f", {show_interval(Interval(**test['gain']))} better than theirs"
    return said


# --- test ---------------------------------------------------------------------------------------------------------


def _open_test(
    run: Run, configs: TrialConfigs, source: DataSource, ranked: Sequence[Confirmed], session: RunSession
) -> dict[str, Any]:
    """Evaluates the winner's runs on test, and those of the defaults that it is compared with; once for a winner."""
    winner = ranked[0]
    kept = run.dir / FOLDER / "test.json"
    if kept.exists() and (found := read_json(kept))["winner"] == winner.label:
        return found
    reason = f"the winner of a search ({winner.label}) and the defaults beside it, once, after it was chosen"
    reader = open_test(source, reason)
    session.say("evaluation", detail=f"test, {reader.num_rows} rows: {reason}")
    found_metrics: dict[str, dict[int, dict[str, float]]] = {}
    for point in [winner, *(other for other in ranked[1:] if other.label == DEFAULTS)]:
        found_metrics[point.label] = {
            seed: _evaluate(run.dir, configs, point, trial, source, reader) for seed, trial in point.repeats.items()
        }
    session.say("evaluation", "finished")
    shown = configs.params.metric.replace("val/", "test/")
    own = found_metrics[winner.label]
    names = next(iter(own.values())).keys() - {"test/num_rows"}
    gain = None
    if winner.label != DEFAULTS and DEFAULTS in found_metrics and shown in names:
        values, others = (
            {seed: metrics[shown] for seed, metrics in found_metrics[label].items()}
            for label in (winner.label, DEFAULTS)
        )
        gain = paired_gain(values, others, METRIC_DIRECTIONS[shown.removeprefix("test/")] == "max")
    result = {
        "winner": winner.label,
        "reason": reason,
        "intervals": {
            name: mean_over_seeds([metrics[name] for metrics in own.values()]).model_dump() for name in sorted(names)
        },
        "gain": None if gain is None else gain.model_dump(),
        "metrics": {label: {str(seed): found for seed, found in by.items()} for label, by in found_metrics.items()},
    }
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, result)
    return result


def _evaluate(
    run_dir: Path, configs: TrialConfigs, point: Confirmed, trial: Trial, source: DataSource, reader: Any
) -> dict[str, float]:
    from pipeline.cluster.tasks import run_task

    folder = trial_folder(run_dir, trial.label)
    config: Config = configs.build(point.draw, folder, trial.label, trial.seed)
    weights = str(folder / "model" / "model.safetensors")
    device = student_device(configs.config)
    spec = EvaluationSpec(
        config.student, weights, source.spec, source.decoder("test"), reader, "test", config.evaluation, None,
        config.train.precision, device,
    )  # fmt: skip
    return run_task(evaluate_weights, spec, worker_bundle(configs.config)).metrics


# --- the teacher's part -------------------------------------------------------------------------------------------


def count_teacher_rows(run: Run) -> dict[str, float]:
    """Rows of the training split that the teacher computed for the search, and that its forward call counted."""
    counts = {"computed": 0.0, "forwarded": 0.0}
    for event, _ in read_events(run.dir / "events.jsonl"):
        if event.kind == "figures":
            for name in counts:
                counts[name] += event.data["metrics"].get(f"cache/rows_{name}", 0.0)
    return counts


def teacher_share(run: Run) -> float:
    """Share of the time of teacher and trials that the teacher took, over all starts of a search."""
    seconds = 0.0
    begun: dict[str, float] = {}
    for event, _ in read_events(run.dir / "events.jsonl"):
        if event.kind == "stage" and event.data["name"] in ("logits", "teacher logits"):
            if event.data["state"] == "started":
                begun[event.data["name"]] = event.time
            elif event.data["name"] in begun:
                seconds += event.time - begun.pop(event.data["name"])
    trials = sum(trial.seconds for trial in read_trials(run.dir))
    return seconds / (seconds + trials) if seconds + trials else 0.0
