"""Events on their way from workers and teachers to the driver's journal."""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.contracts.events import LIVE_ONLY, Emitter, Event
from pipeline.contracts.queue import Arrivals, Sent, Spool

_LATE_S = 10.0  # longer than a busy cluster takes to answer
_CLOSE_S = 60.0  # and to start the queue's process again
_MISSING_S = 60.0
_MAX_UNANSWERED = 1000


class EventQueue(Spool):
    """Actor: the spool of a run, on the driver's node. Ray starts it again when its process dies.

    Args:
        name: of the file, which its next process must find.
    """

    def __init__(self, name: str) -> None:
        again = ray.get_runtime_context().was_current_actor_reconstructed
        super().__init__(Path(tempfile.gettempdir(), f"{name}.jsonl"), begun=again)


class _Outbox:
    """What this process sends to one queue: numbered, so that what is sent again can be told from what is new."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._sender = uuid.uuid4().hex
        self._number = 0
        self._calls: deque[Any] = deque(maxlen=_MAX_UNANSWERED)
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        if event.kind in LIVE_ONLY:
            self._queue.put.remote(Sent(self._sender, None, event))
            return
        with self._lock:
            self._calls.append(self._queue.put.remote(Sent(self._sender, self._number, event)))
            self._number += 1

    def wait(self, timeout_s: float) -> None:
        if calls := list(self._calls):
            ray.wait(calls, num_returns=len(calls), timeout=timeout_s)


_OUTBOXES: dict[str, _Outbox] = {}  # of this process, by the name of the queue


class QueueEmitter:
    """Sends events to the queue actor without waiting; picklable. What a dead queue missed, Ray sends again."""

    def __init__(self, queue: Any, name: str) -> None:
        self._queue, self._name = queue, name

    def emit(self, event: Event) -> None:
        self._outbox().send(event)

    def flush(self, timeout_s: float = _CLOSE_S) -> None:
        """Waits until all that this process sent has arrived: nobody sends it again once the process is gone."""
        self._outbox().wait(timeout_s)

    def _outbox(self) -> _Outbox:
        return _OUTBOXES.get(self._name) or _OUTBOXES.setdefault(self._name, _Outbox(self._queue))


class QueueDrain:
    """Driver's side: owns the actor and moves its events into the journal from a thread.

    Args:
        journal: where events go.
        interval_s: time between two looks.
    """

    def __init__(self, journal: Emitter, interval_s: float = 0.5) -> None:
        self._journal = journal
        self._interval_s = interval_s
        name = f"distill-events-{uuid.uuid4().hex}"
        # On this node: it shares the driver's fate, and no other's.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._queue: Any = ray.remote(num_cpus=0)(EventQueue).options(**options).remote(name)
        self._pending: Any = None
        self._offset = 0
        self._arrivals = Arrivals()
        self._ready: deque[Event] = deque()
        self.emitter = QueueEmitter(self._queue, name)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-drain", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with contextlib.suppress(OSError):  # a disk that is full: tried again, and told where the run ends
                self.flush(_LATE_S)

    def flush(self, timeout_s: float) -> None:
        """Moves what is in the queue now, if the actor answers in time.

        Raises:
            OSError: the journal cannot be written; what is in it is whole, and the rest is tried again next time.
        """
        if not self._lock.acquire(timeout=timeout_s):  # another thread waits for the actor already
            return
        try:
            # An answer that comes too late for this look is taken with the next.
            self._pending = self._pending or self._queue.read.remote(self._offset)
            arrived, self._offset = ray.get(self._pending, timeout=timeout_s)
            self._pending = None
            now = time.monotonic()
            self._ready.extend(self._arrivals.take(arrived, now))
            self._give_up(now - _MISSING_S)
            self._write()
        except ray.exceptions.GetTimeoutError:
            pass  # a busy cluster, or a queue that is being started again, answers later
        except ray.exceptions.RayError:
            self._pending = None  # a lost cluster does not answer at all
        finally:
            self._lock.release()

    def abandon(self, timeout_s: float) -> None:
        """As ``close``, for a process that is about to be gone."""
        self.flush(timeout_s)
        with contextlib.suppress(ray.exceptions.RayError):  # Ray was left already
            self._queue.close.remote()

    def close(self) -> None:
        """Moves what is left and ends the actor.

        Raises:
            OSError: the journal cannot be written.
        """
        self._stopped.set()
        self._thread.join(timeout=2 * _LATE_S)
        try:
            self.flush(_CLOSE_S)
            self._give_up(math.inf)
            self._write()
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._queue.close.remote(), timeout=_LATE_S)
        finally:
            ray.kill(self._queue)

    def _give_up(self, since: float) -> None:
        ready, num_missing = self._arrivals.give_up(since)
        self._ready.extend(ready)
        if num_missing:
            message = f"{num_missing} records of the run were lost on their way to the journal"
            self._ready.append(Event("warning", {"message": message}))

    def _write(self) -> None:
        while self._ready:
            self._journal.emit(self._ready[0])
            self._ready.popleft()
