"""Translation of events into what MLflow stores, without MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.contracts.events import Event, Journal, read_events
from pipeline.tracking.batches import MAX_POINTS, clean_key, collect, flatten
from pipeline.tracking.progress import Progress


def step_event(step: int) -> Event:
    """Three points."""
    return Event("step", {"step": step, "metrics": {"train/loss": 0.5}, "samples_per_s": 100.0, "data_wait": 0.1})


def test_reading_leaves_an_unfinished_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path).emit(step_event(1))
    whole = path.stat().st_size
    with path.open("a") as file:
        file.write('{"kind": "step", "ti')
    content = path.read_bytes()
    assert [end for _, end in read_events(path)] == [whole]
    assert list(read_events(path, whole)) == []
    assert path.read_bytes() == content
    assert list(read_events(tmp_path / "none")) == []


def test_batch_ends_at_what_is_costly_and_at_the_limit() -> None:
    many = [(step_event(step), step + 1) for step in range(MAX_POINTS)]
    batch = collect(many, Progress("uri"))
    assert batch is not None
    assert MAX_POINTS <= len(batch.points) < MAX_POINTS + 3
    assert batch.progress.offset == len(batch.points) // 3
    events = [(Event("artifact", {"path": "a"}), 1), (Event("artifact", {"path": "b"}), 2)]
    batch = collect(events, Progress("uri"))
    assert batch is not None
    assert [str(path) for path, _ in batch.files] == ["a"]
    assert batch.progress.offset == 1
    assert collect([], batch.progress) is None


def test_collecting_does_not_touch_what_was_stored() -> None:
    stored = Progress("uri")
    collect([(step_event(5), 10)], stored)
    assert (stored.offset, stored.step, stored.sent_steps) == (0, 0, {})


def test_new_metrics_at_a_known_step_are_sent() -> None:
    first = Event("evaluation", {"split": "validation", "step": 5, "metrics": {"val/top1": 0.5}})
    again = Event("evaluation", {"split": "validation", "step": 5, "metrics": {"val/top1": 0.5, "val/ece": 0.1}})
    batch = collect([(first, 1), (again, 2)], Progress("uri"))
    assert batch is not None
    assert [point.key for point in batch.points] == ["val/top1", "val/ece"]


def test_flatten_writes_values_as_in_yaml() -> None:
    nested = {"a": {"b": {"c": 1, "none": None}, "flag": True}, "text": "x", "list": [1, "two"], "empty": {}}
    assert flatten(nested) == {
        "a.b.c": "1", "a.b.none": "null", "a.flag": "true", "text": "x", "list": '[1, "two"]', "empty": "{}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/top1", "val/top1"), ("what?=%", "what___"), ("/a//b/", "a/b"), ("../../a", "a"),
        ("system/actor(pid=1, ip=::1)/busy", "system/actor_pid_1_ ip_::1_/busy"), ("", "_"), ("x" * 300, "x" * 250),
    ],
)  # fmt: skip
def test_keys_are_made_fit(name: str, expected: str) -> None:
    assert clean_key(name) == expected
