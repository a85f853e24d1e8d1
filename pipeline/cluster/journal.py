"""Events on their way from workers and teachers to the driver's journal."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any

import ray

from pipeline.contracts.events import LIVE_ONLY, Emitter, Event

CAPACITY = 20_000  # events; some minutes of a fast run with the driver away


class EventQueue:
    """Actor: a bounded queue. When it is full, records for the live view alone are dropped first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._events: deque[Event] = deque()
        self._capacity = capacity
        self._dropped = 0

    def put(self, events: list[Event]) -> None:
        """Appends ``events`` in order."""
        for event in events:
            if len(self._events) >= self._capacity:
                self._dropped += 1
                if event.kind in LIVE_ONLY:
                    continue
                self._make_room()
            self._events.append(event)

    def _make_room(self) -> None:
        for index, event in enumerate(self._events):
            if event.kind in LIVE_ONLY:
                del self._events[index]
                return
        self._events.popleft()

    def drain(self) -> list[Event]:
        """All events so far; the number of dropped ones is told as a warning."""
        events = list(self._events)
        self._events.clear()
        if self._dropped:
            events.append(Event("warning", {"message": f"{self._dropped} events were dropped: the queue was full"}))
            self._dropped = 0
        return events


class QueueEmitter:
    """Sends events to the queue actor without waiting; picklable."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def emit(self, event: Event) -> None:
        self._queue.put.remote([event])


class QueueDrain:
    """Driver's side: owns the actor and moves its events into the journal from a thread.

    Args:
        journal: where events go.
        interval_s: time between two looks.
    """

    def __init__(self, journal: Emitter, interval_s: float = 0.5) -> None:
        self._journal = journal
        self._interval_s = interval_s
        self._queue: Any = ray.remote(num_cpus=0, max_restarts=0)(EventQueue).remote()
        self.emitter = QueueEmitter(self._queue)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-drain", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            # A busy cluster may answer late; what is in the queue then comes with the next look.
            with contextlib.suppress(ray.exceptions.RayError):
                self._move()

    def _move(self) -> None:
        for event in ray.get(self._queue.drain.remote(), timeout=30.0):
            self._journal.emit(event)

    def close(self) -> None:
        """Moves what is left and ends the actor."""
        self._stopped.set()
        self._thread.join(timeout=35.0)
        with contextlib.suppress(ray.exceptions.RayError):
            self._move()
        ray.kill(self._queue)
