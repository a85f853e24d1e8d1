"""What is on its way to the journal, when processes die: nothing of the record is lost, told twice or out of order."""

from __future__ import annotations

import math
import random
import resource
from pathlib import Path

from pipeline.contracts.events import Event, EventKind
from pipeline.contracts.queue import Arrivals, Sent, Spool


def sent(number: int | None, sender: str = "worker", kind: EventKind = "step") -> Sent:
    return Sent(sender, number, Event(kind, {"step": number}, time=1.5))


def steps(events: list[Event]) -> list[int]:
    return [event.data["step"] for event in events]


def test_what_is_put_is_read_from_where_the_last_answer_ended(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    spool.put(sent(0))
    first, offset = spool.read(0)
    spool.put(sent(1))
    assert first == [sent(0)]
    assert spool.read(offset)[0] == [sent(1)]
    assert spool.read(0)[0] == [sent(0), sent(1)]  # the answer was lost, and is asked for again


def test_the_next_process_finds_what_the_killed_one_had(tmp_path: Path) -> None:
    path = tmp_path / "spool.jsonl"
    killed = Spool(path)
    killed.put(sent(0))
    killed.put(sent(None, kind="pool"))
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "time": 2.0, "st')  # it died while it wrote
    spool = Spool(path, begun=True)
    spool.put(sent(1))
    found, _ = spool.read(0)
    assert [one for one in found if one.event.kind != "warning"] == [sent(0), sent(1)]
    (warning,) = [one.event.data["message"] for one in found if one.event.kind == "warning"]
    assert "died and was started again; nothing of the record is lost" in warning


def test_only_what_the_live_view_alone_wants_is_dropped_and_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl", capacity=2)
    for number in range(4):
        spool.put(sent(None, kind="system"))
        spool.put(sent(number))
    found, offset = spool.read(0)
    assert [one.event.kind for one in found] == ["system"] * 2 + ["step"] * 4 + ["warning"]
    assert found[-1].event.data["message"] == "2 records for the live view were dropped: the queue was full"
    assert spool.read(offset) == ([], offset)


def test_no_file_is_left(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    spool.put(sent(0))
    spool.close()
    spool.put(sent(1))  # of a worker that goes on until it is stopped
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing_while_the_process_lives(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.jsonl")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, unlimited[1]))
    try:
        spool.put(sent(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    spool.put(sent(1))
    assert spool.read(0)[0] == [sent(0), sent(1)]


def test_events_of_every_sender_come_in_its_order_and_once() -> None:
    draw = random.Random(0)
    for _ in range(50):
        calls = [sent(number, sender) for sender in "ab" for number in range(20)]
        calls = [calls[n]._replace(event=Event("step", {"step": n})) for n in range(40)]
        calls += draw.sample(calls, 10)  # calls that were made again
        draw.shuffle(calls)
        arrivals, ready = Arrivals(), []
        for first in range(0, len(calls), 7):
            ready += steps(arrivals.take(calls[first : first + 7], now=0.0))
        assert [n for n in ready if n < 20] == list(range(20))
        assert [n for n in ready if n >= 20] == list(range(20, 40))
        assert arrivals.give_up(math.inf) == ([], 0)


def test_what_the_live_view_alone_wants_waits_for_nothing() -> None:
    ready = Arrivals().take([sent(1), sent(None, kind="pool")], now=0.0)
    assert [event.kind for event in ready] == ["pool"]


def test_what_never_comes_is_waited_for_so_long_and_counted() -> None:
    arrivals = Arrivals()
    assert steps(arrivals.take([sent(0), sent(2), sent(6)], now=10.0)) == [0]
    assert steps(arrivals.take([sent(3)], now=20.0)) == []  # the gap is the same
    assert arrivals.give_up(10.0) == ([], 0)
    ready, num_missing = arrivals.give_up(10.5)
    assert (steps(ready), num_missing) == ([2, 3, 6], 3)
    assert steps(arrivals.take([sent(1), sent(7)], now=30.0)) == [7]  # too late, and on time
    assert arrivals.give_up(math.inf) == ([], 0)
