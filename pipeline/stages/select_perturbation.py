"""``select-perturbation``: PTLoss's coefficients from the teacher's validation logits, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.request import Request
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.contracts.columns import SplitName
from pipeline.data import DataSource, SplitReader
from pipeline.execution.joining import join_cluster
from pipeline.execution.logits import LogitsHere, Streams, logits_path
from pipeline.execution.selection import (
    CHOICE,
    TABLE_FILE,
    check_selection,
    select,
    selection_folder,
    selection_metrics,
)
from pipeline.execution.session import RunSession
from pipeline.execution.skipped import SkippedRows
from pipeline.execution.story import Story, tell
from pipeline.execution.teacher import CheckedTeacher
from pipeline.execution.ways import list_demands
from pipeline.execution.work import check_validation_labels

_Compute = Callable[[SplitName, SplitReader], Path]


@dataclass(frozen=True)
class _Work:
    run: Run
    source: DataSource
    teacher: CheckedTeacher
    reader: SplitReader


def select_perturbation(request: Request) -> int:
    """Returns 0; the run folder holds the choice, see ``pipeline.execution.selection``."""
    return tell(Story(_check, _prepare, _carry_out, _show), request)


def _check(config: Config, source: DataSource) -> None:
    check_validation_labels(config, source, "coefficients are selected by them")
    check_selection(config, source)


def _prepare(run: Run, source: DataSource, teacher: CheckedTeacher | None) -> _Work:
    assert teacher is not None  # the command asks for one
    return _Work(run, source, teacher, source.split("validation"))


def _carry_out(work: _Work, session: RunSession) -> None:
    with _open_teacher(work, session) as compute:
        session.began = True
        logits = compute("validation", work.reader)
    selection = select(work.run.config.selection, work.source, logits, session)
    extra = {
        "beats_zero": selection.beats_zero,
        "verdict": selection.verdict,
        "perturbation": selection.perturbation.model_dump(mode="json"),
    }
    session.finish(selection_metrics(selection), extra)


@contextmanager
def _open_teacher(work: _Work, session: RunSession) -> Iterator[_Compute]:
    """The way to the teacher's logits; no Ray where an earlier run has kept them."""
    config, source, teacher = work.run.config, work.source, work.teacher
    kept = logits_path(work.run.dir, teacher, source, "validation", work.reader)
    if config.cluster.name == "inprocess" or kept.exists():
        yield LogitsHere(config, source, teacher, session).compute
        return
    with join_cluster(work.run, session, list_demands(config, work.run.command), "pool") as drain:
        yield Streams(config, source, teacher, session, drain.emitter).compute


def _show(run: Run) -> None:
    folder = selection_folder(run.dir)
    print((folder / TABLE_FILE).read_text(encoding="utf-8"))
    if summary := SkippedRows(run.dir, None).summary():
        print(summary)
    print(f"plots: {folder / 'candidates.png'} and {folder / 'reliability.png'}")
    print(f"use them: python -m pipeline distill --conf {folder / 'conf'} loss={CHOICE}")
    print(run.result_path, flush=True)
