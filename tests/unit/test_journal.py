"""The journal of a run: on a disk that is full, and when a record does not reach it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.contracts.events import Event, Journal, read_events
from pipeline.execution.training import complete_record
from pipeline.training import BestRecord, Outcome, RunPlan


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: it takes the start of a line, and no more."""
    journal = Journal(tmp_path / "events.jsonl")
    journal.emit(Event("warning", {"message": "first"}))
    before = journal.path.read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"No space|too large"):
            journal.emit(Event("warning", {"message": "lost"}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert journal.path.read_bytes() == before
    journal.emit(Event("warning", {"message": "after"}))
    assert [event.data["message"] for event, _ in read_events(journal.path)] == ["first", "after"]


def test_a_run_on_a_disk_that_fills_up_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emit = Journal.emit
    full = False

    def fill(journal: Journal, event: Event) -> None:
        nonlocal full
        full = full or event.kind == "evaluation"
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        emit(journal, event)

    run_dir = tmp_path / "run"
    teacher = ["train-teacher", "teacher=mlp", "teacher.hidden=[8]", "cluster=inprocess", "train.epochs=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "emit", fill)
        assert main([*teacher, f"run.dir={run_dir}"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"RunError: {run_dir} cannot be written (No space left on device); make room, then go on with python -m "
        f"pipeline train-teacher resume={run_dir}: what the run saved before is whole"
    )
    assert main(["train-teacher", f"resume={run_dir}"]) == 0


def test_evaluations_that_a_run_must_not_end_without_come_from_the_checkpoint(tmp_path: Path) -> None:
    """That of the last step, and of the kept one; what is on record stays as it is."""
    plan = RunPlan(batch_size=8, blocks_per_epoch=10, blocks_per_step=1, num_epochs=3)
    kept, last = ({"split": "validation", "step": step, "metrics": {"val/top1": 0.5}} for step in (10, 30))
    best = BestRecord(0.5, 10, 1, {"val/top1": 0.5}, {})
    journal = Journal(tmp_path / "events.jsonl")
    recorded = [{"split": "validation", "step": 20}, {"split": "test", "step": 10}]
    for data in recorded:
        journal.emit(Event("evaluation", data))
    for _ in range(2):  # nothing is missing the second time
        complete_record(journal, plan, Outcome(best, [kept, last]))
    events = [event for event, _ in read_events(journal.path)]
    found = [event.data for event in events if event.kind == "evaluation"]
    assert found == [*recorded, {"epoch": 1, **kept}, {"epoch": 3, **last}]
    assert [event.data["message"] for event in events if event.kind == "warning"] == [
        "the evaluation at step 10 had not reached the journal; it is from the last checkpoint",
        "the evaluation at step 30 had not reached the journal; it is from the last checkpoint",
    ]
