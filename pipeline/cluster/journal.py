"""Events on their way from workers and teachers to the driver's journal."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.contracts.events import LIVE_ONLY, Emitter, Event

_LATE_S = 10.0  # longer than a busy cluster takes to answer
CAPACITY = 20_000  # events; some minutes of a fast run with the driver away


class EventQueue:
    """Actor: a bounded queue. When it is full, records for the live view alone are dropped, and counted."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._events: deque[Event] = deque()
        self._capacity = capacity
        self._dropped = 0

    def put(self, events: list[Event]) -> None:
        """Appends ``events`` in order."""
        for event in events:
            # What belongs to the record of the run is kept at any length; it comes a few times a second at most.
            if len(self._events) >= self._capacity and event.kind in LIVE_ONLY:
                self._dropped += 1
                continue
            self._events.append(event)

    def drain(self) -> list[Event]:
        """All events so far; the number of dropped ones is told as a warning."""
        events = list(self._events)
        self._events.clear()
        if self._dropped:
            message = f"{self._dropped} records for the live view were dropped: the queue was full"
            events.append(Event("warning", {"message": message}))
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
        # On this node: it shares the driver's fate, and no other's.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue: Any = ray.remote(num_cpus=0)(EventQueue).options(scheduling_strategy=here).remote()
        self._pending: Any = None
        self.emitter = QueueEmitter(self._queue)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-drain", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self.flush(_LATE_S)

    def flush(self, timeout_s: float) -> None:
        """Moves what is in the queue now, if the actor answers in time."""
        if not self._lock.acquire(timeout=timeout_s):  # another thread waits for the actor already
            return
        try:
            # An answer that comes too late for this look is taken with the next: it has left the queue.
            self._pending = self._pending or self._queue.drain.remote()
            events = ray.get(self._pending, timeout=timeout_s)
            self._pending = None
            for event in events:
                self._journal.emit(event)
        except ray.exceptions.RayError:
            pass  # a busy cluster answers later, a lost one not at all
        finally:
            self._lock.release()

    def close(self) -> None:
        """Moves what is left and ends the actor."""
        self._stopped.set()
        self._thread.join(timeout=2 * _LATE_S)
        self.flush(_LATE_S)
        ray.kill(self._queue)
