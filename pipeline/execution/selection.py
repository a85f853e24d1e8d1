"""Selecting PTLoss's coefficients from the teacher's validation logits, for a command or at the start of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from pipeline.config.schema import Config
from pipeline.config.stored import write_text
from pipeline.contracts.events import Event
from pipeline.data import DataSource
from pipeline.data.logits import load_logits
from pipeline.evaluation import Selection, SelectionParams
from pipeline.evaluation.perturbation_selection import check_size, select_perturbation
from pipeline.execution.session import RunSession
from pipeline.losses.perturbation import IN_RUN
from pipeline.report.perturbation_plots import plot_candidates, plot_reliability
from pipeline.report.selection import candidates_csv, render_selection

SELECTION_FILE = "selection.json"
TABLE_FILE = "selection.txt"
CHOICE = "ptloss_selected"
_PLOTS = {"candidates.png": plot_candidates, "reliability.png": plot_reliability}


def check_selection(config: Config, source: DataSource) -> None:
    """Finds before work begins what would keep coefficients from being selected.

    Raises:
        DataError, ConfigError: see ``check_size``.
    """
    check_size(source.split("validation").num_rows, source.spec.num_classes, config.selection)


def select(params: SelectionParams, source: DataSource, logits: Path, session: RunSession) -> Selection:
    """Selects coefficients and leaves what speaks for them in ``selection/`` of the run folder and in the tracker.

    What an earlier start of the run has selected is taken as it is.

    Args:
        logits: file with the teacher's logits on validation.

    Raises:
        PipelineError: see ``select_perturbation``.
    """
    folder = selection_folder(session.run.dir)
    if (folder / SELECTION_FILE).exists():  # the last of the files
        return read_selection(session.run.dir)
    reader = source.split("validation")
    teacher_logits, labels = load_logits(logits), reader.read_labels()
    can_be_used = np.isfinite(teacher_logits).all(axis=1)  # rows that were skipped have no logits
    session.say("selection", detail=f"{params.num_candidates} candidates, {int(can_be_used.sum()):,} validation rows")
    selection = select_perturbation(teacher_logits[can_be_used], labels[can_be_used], params)
    _write(folder, selection)
    session.journal.emit(Event("figures", {"message": selection.verdict, "metrics": selection_metrics(selection)}))
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            session.journal.emit(
                Event("artifact", {"path": str(path), "folder": str(path.parent.relative_to(session.run.dir))})
            )
    session.say("selection", "finished")
    return selection


def selection_folder(run_dir: Path) -> Path:
    """Where a run keeps what it selected."""
    return (run_dir / IN_RUN).parent


def read_selection(run_dir: Path) -> Selection:
    """What ``select`` left in a run folder."""
    return Selection.model_validate_json((selection_folder(run_dir) / SELECTION_FILE).read_bytes())


def selection_metrics(selection: Selection) -> dict[str, float]:
    """Scores and gains by name; those on rows that had no part in fitting."""
    scores = {f"selection/{score.name}_score": score.cross_fitted_score.mean for score in selection.scores}
    proxy = selection.scores[-1]
    return scores | {
        "selection/gain": proxy.gain.mean,
        "selection/gain_low": proxy.gain.low,
        "selection/gain_high": proxy.gain.high,
        "selection/gain_over_scaling": selection.gain_over_scaling.mean,
    }


def _write(folder: Path, selection: Selection) -> None:
    """The coefficients, a choice of the group ``loss`` that takes them, a table, two plots; all of it last."""
    conf = folder / "conf" / "loss"
    conf.mkdir(parents=True, exist_ok=True)
    coefficients = folder / IN_RUN.name
    selection.perturbation.write(coefficients)
    head = f"# python -m pipeline distill --conf {folder / 'conf'} loss={CHOICE}\n# {selection.verdict}\n"
    choice = {"name": "ptloss", "perturbation_from": str(coefficients)}
    write_text(conf / f"{CHOICE}.yaml", head + yaml.safe_dump(choice, sort_keys=False))
    write_text(folder / TABLE_FILE, render_selection(selection))
    write_text(folder / "candidates.csv", candidates_csv(selection))
    for name, plot in _PLOTS.items():
        plot(selection).savefig(folder / name, dpi=120)
    write_text(folder / SELECTION_FILE, selection.model_dump_json(indent=2) + "\n")
