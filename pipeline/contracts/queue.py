"""What is on its way to the journal: kept so that no process that dies takes it along, and put in order again."""

from __future__ import annotations

import uuid
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.contracts.events import LIVE_ONLY, Event, Journal, read_events

CAPACITY = 20_000  # events; some minutes of a fast run with the driver away
_STAMP = "sent"


class Sent(NamedTuple):
    """An event on its way.

    Attributes:
        sender: whose counting ``number`` is.
        number: 0, 1, 2, ... of this sender; none for what the live view alone wants, which may be lost.
    """

    sender: str
    number: int | None
    event: Event


class Spool:
    """Events that wait for the driver.

    What belongs to the record of the run is in a file, and stays in it: whoever comes after a process that was killed
    finds it there, and an answer that was lost is asked for again. What the live view alone wants is in memory; when
    that is full it is dropped, and counted.

    Args:
        path: of the file, made with the first event.
        begun: whether an earlier process, which died, had this spool; that is told as a warning.
        capacity: of the memory, in events.
    """

    def __init__(self, path: Path, begun: bool = False, capacity: int = CAPACITY) -> None:
        self._file = Journal(path)
        self._memory: deque[Sent] = deque()
        self._capacity = capacity
        self._dropped = 0
        self._closed = False
        if begun:
            self._warn(
                "the process that gathers the run's records died and was started again; nothing of the record is lost, "
                "but figures of the last moments about pool and memory may be"
            )

    def put(self, sent: Sent) -> None:
        """Keeps an event; one that belongs to the record is safe from then on."""
        sender, number, event = sent
        if self._closed:
            return
        if event.kind not in LIVE_ONLY:
            try:
                self._file.emit(Event(event.kind, {**event.data, _STAMP: [sender, number]}, event.time))
            except OSError:  # the disk is full: as safe as this process is
                self._memory.append(sent)
        elif len(self._memory) < self._capacity:
            self._memory.append(sent)
        else:
            self._dropped += 1

    def read(self, offset: int) -> tuple[list[Sent], int]:
        """What came since an earlier answer, and the ``offset`` to ask with next; 0 at first.

        Asked with the same offset again, what belongs to the record is told again.
        """
        if self._dropped:
            self._warn(f"{self._dropped} records for the live view were dropped: the queue was full")
            self._dropped = 0
        answer = list(self._memory)
        self._memory.clear()
        for event, end in read_events(self._file.path, offset):
            offset = end
            sender, number = event.data.pop(_STAMP)
            answer.append(Sent(sender, number, event))
        return answer, offset

    def close(self) -> None:
        """Deletes the file; what is put from then on is dropped."""
        self._closed = True
        self._file.path.unlink(missing_ok=True)

    def _warn(self, message: str) -> None:
        self.put(Sent(uuid.uuid4().hex, 0, Event("warning", {"message": message})))


class Arrivals:
    """Gives the events of every sender in its order, each once.

    A call that was lost is made again: so an event may come twice, and behind later ones.
    """

    def __init__(self) -> None:
        self._due: Counter[str] = Counter()  # the number that comes next, by sender
        self._early: dict[str, dict[int, Event]] = {}
        self._waiting_since: dict[str, float] = {}

    def take(self, arrived: Iterable[Sent], now: float) -> list[Event]:
        """What of ``arrived``, and of what came before it, can be given on now."""
        ready = []
        for sender, number, event in arrived:
            if number is None:
                ready.append(event)
            elif number >= self._due[sender]:
                self._early.setdefault(sender, {})[number] = event
                ready += self._in_order(sender, now)
        return ready

    def give_up(self, since: float) -> tuple[list[Event], int]:
        """No longer waits for what has been missing since before ``since``.

        Returns:
            what waited for it, and how many events are missing.
        """
        ready, num_missing = [], 0
        for sender, waiting_since in list(self._waiting_since.items()):
            while sender in self._early and waiting_since < since:
                first = min(self._early[sender])
                num_missing += first - self._due[sender]
                self._due[sender] = first
                ready += self._in_order(sender, waiting_since)
        return ready, num_missing

    def _in_order(self, sender: str, now: float) -> list[Event]:
        early, ready = self._early[sender], []
        while (event := early.pop(self._due[sender], None)) is not None:
            ready.append(event)
            self._due[sender] += 1
        if not early:
            del self._early[sender]
            self._waiting_since.pop(sender, None)
        elif ready or sender not in self._waiting_since:
            self._waiting_since[sender] = now
        return ready
