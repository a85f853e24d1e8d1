"""The process that gathers a run's records is killed, and nothing of the record is missing."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.cluster.journal import QueueDrain, QueueEmitter
from pipeline.contracts.events import Event
from tests.recorder import Recorder

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(240)]

STARTED_AGAIN = "died and was started again; nothing of the record is lost"


def numbers(recorder: Recorder, sender: str) -> list[int]:
    return [data["step"] for data in recorder.of("step") if data["sender"] == sender]


def check_warnings(recorder: Recorder, num_kills: int) -> None:
    assert [STARTED_AGAIN in data["message"] for data in recorder.of("warning")] == [True] * num_kills


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def drain(recorder: Recorder) -> Iterator[QueueDrain]:
    """One that looks when it is told to."""
    drain = QueueDrain(recorder, interval_s=3600.0)
    yield drain
    drain.close()
    assert not list(Path(tempfile.gettempdir()).glob(f"{drain.emitter._name}*"))


def process_of(drain: QueueDrain) -> int:
    queue = drain._queue
    pid: int = ray.get(queue.__ray_call__.remote(lambda _: os.getpid()), timeout=60.0)
    return pid


def step(number: int, sender: str) -> Event:
    return Event("step", {"step": number, "sender": sender})


class Sender:
    """Actor: sends events with the numbers from 0 on."""

    def __init__(self, emitter: QueueEmitter, name: str) -> None:
        self._emitter, self._name = emitter, name
        self._number = 0

    def send(self, num_events: int) -> None:
        for _ in range(num_events):
            self._emitter.emit(step(self._number, self._name))
            self._emitter.emit(Event("pool", {"actor": self._name}))
            self._number += 1

    def flush(self) -> None:
        self._emitter.flush()


def test_what_arrived_before_the_kill_and_was_not_looked_at(drain: QueueDrain, recorder: Recorder) -> None:
    for number in range(100):
        drain.emitter.emit(step(number, "driver"))
    drain.emitter.flush()
    os.kill(process_of(drain), signal.SIGKILL)
    drain.emitter.emit(step(100, "driver"))
    drain.emitter.flush()
    drain.flush(60.0)
    assert numbers(recorder, "driver") == list(range(101))
    check_warnings(recorder, 1)


def test_kills_while_three_processes_send(drain: QueueDrain, recorder: Recorder) -> None:
    names = ("a", "b", "c")
    senders: list[Any] = [ray.remote(num_cpus=0)(Sender).remote(drain.emitter, name) for name in names]
    for turn in range(12):
        for sender in senders:
            sender.send.remote(50)
        if turn in (2, 5, 9):
            os.kill(process_of(drain), signal.SIGKILL)
        drain.flush(60.0)
    ray.get([sender.flush.remote() for sender in senders], timeout=120.0)
    drain.flush(60.0)
    for name in names:
        assert numbers(recorder, name) == list(range(600))
    check_warnings(recorder, 3)
