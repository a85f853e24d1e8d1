"""The journal of a run on a disk that is full."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from pipeline.contracts.events import Event, Journal, read_events


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
