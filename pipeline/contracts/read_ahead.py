"""An iterator whose items a thread fetches ahead of whoever asks for them, and what becomes of a long wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_END = object()
LOOK_S = 5.0

T = TypeVar("T")


class ReadAhead(Iterator[T]):
    """Iterates over ``items`` while a thread stays ahead; it starts at once.

    Args:
        items: iterated in the thread; an exception there is raised here, in its turn.
        depth: how many may wait.
        overdue: called every ``look_s`` seconds (none: 5) that ``next`` waits, with the seconds so far; what it raises
            ends the wait.

    Attributes:
        waited_s: time that ``next`` has waited so far.
    """

    def __init__(
        self,
        items: Iterator[T],
        depth: int = 2,
        overdue: Callable[[float], None] | None = None,
        look_s: float | None = None,
    ) -> None:
        self.waited_s = 0.0
        self._overdue, self._look_s = overdue, look_s or LOOK_S
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="read-ahead", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(_END)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        started = time.perf_counter()
        item = self._wait(started)
        self.waited_s += time.perf_counter() - started
        if item is _END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        ready: T = item
        return ready

    def _wait(self, started: float) -> Any:
        while self._overdue is not None:
            try:
                return self._ready.get(timeout=self._look_s)
            except queue.Empty:
                self._overdue(time.perf_counter() - started)
        return self._ready.get()

    def close(self) -> None:
        """Stops the thread; what waits is dropped."""
        self._stopped.set()
        self._thread.join(timeout=5.0)


def read_ahead(items: Iterator[T], overdue: Callable[[float], None]) -> Iterator[T]:
    """``items``, one ahead, for as long as the result is iterated over; ``overdue`` as in ``ReadAhead``."""
    ahead = ReadAhead(items, depth=1, overdue=overdue)
    try:
        yield from ahead
    finally:
        ahead.close()
