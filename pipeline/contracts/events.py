"""Events and the journal: the truth about a run, one JSON object a line in ``events.jsonl``.

Workers, the pool and the trials emit events; the driver appends them to the journal; the live view
and the tracker only read it. So a tracking server that is away, a slow one, and a driver that was
resumed are the same case: the journal is replayed from where the reader got to.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

EventKind = Literal[
    "status",  # status: running | finished | failed | killed; message; outcome (of a trial: pruned)
    "stage",  # name; state: started | finished; detail (what is waited for, or what came out)
    "plan",  # num_epochs, num_steps, steps_per_epoch, rows_per_step, world_size, start_step
    "step",  # step, epoch, samples, metrics (train/...); samples_per_s, data_wait (share of wall time, 0..1)
    "evaluation",  # split, step, epoch, metrics (val/... or test/...), per_class {class name: accuracy}, best
    "checkpoint",  # step, best
    "rows",  # done, total, rows_per_s: of a command that goes once over rows
    "figures",  # message (a sentence), metrics: what a stage came to, such as selection/... or cache/...
    "trial",  # label, state, value, best (so far), epochs, seconds, draw, message, phase, num_done, num_trials
    "pool",  # actor, rows, rows_per_s, busy (share of wall time, 0..1)
    "system",  # process, rss_bytes, cpu_s, gpu_bytes (on a GPU: the most that was allocated)
    "wait",  # name (of a service outside), waiting (false: it answers again), message
    "warning",  # message
    "artifact",  # path (a file of the run folder), folder (where it goes in the tracker)
    "model",  # path of a folder with model.safetensors and model.json
]

# A full queue drops these first: the live view wants them, the record of the run does not need them.
LIVE_ONLY: frozenset[str] = frozenset({"pool", "system"})


@dataclass(frozen=True)
class Event:
    """One record of a run.

    Attributes:
        kind: one of ``EventKind``; its comment lists the keys of ``data``.
        data: JSON-serialisable values.
        time: seconds since the epoch.
    """

    kind: EventKind
    data: dict[str, Any]
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "time": self.time, **self.data})

    @classmethod
    def from_json(cls, line: str) -> Event:
        values = json.loads(line)
        return cls(values.pop("kind"), time=values.pop("time"), data=values)


class Emitter(Protocol):
    """Anything that takes events: the journal itself, or a queue on its way to it."""

    def emit(self, event: Event) -> None: ...


class RowEvents:
    """Tells how far a pass over rows is: at most every few seconds, and at its end.

    Args:
        emitter: none: nobody is told.
        num_rows: in all.
    """

    EVERY_S = 2.0

    def __init__(self, emitter: Emitter | None, num_rows: int) -> None:
        self._emitter, self._num_rows = emitter, num_rows
        self._num_done, self._num_first, self._started, self._last = 0, 0, 0.0, 0.0

    def advance(self, num_rows: int) -> None:
        """So many rows more are done."""
        if self._num_done == 0:
            # What comes before the first rows, such as a pool that starts, says nothing about the rest.
            self._started, self._num_first = time.perf_counter(), num_rows
        self._num_done += num_rows
        now = time.perf_counter()
        if self._emitter is None or (now - self._last < self.EVERY_S and self._num_done < self._num_rows):
            return
        self._last = now
        elapsed = now - self._started
        rate = (self._num_done - self._num_first) / elapsed if self._num_done > self._num_first else None
        self._emitter.emit(Event("rows", {"done": self._num_done, "total": self._num_rows, "rows_per_s": rate}))


class Journal:
    """Append-only file of events; safe to append to from several threads of one process.

    Args:
        path: the ``events.jsonl`` of a run folder; made on the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        _drop_torn_line(path)

    def emit(self, event: Event) -> None:
        """Appends a line, or nothing at all: on a disk that is full, the start of one is taken back.

        Raises:
            OSError: as the disk says.
        """
        line = (event.to_json() + "\n").encode()
        with self._lock, self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)
                raise


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Complete events of a journal from byte ``offset`` on, each with the offset of what follows it.

    For readers: making a ``Journal`` cuts off an incomplete last line, which only its writer may do.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # being written right now
                return
            offset += len(line)
            yield Event.from_json(line.decode("utf-8")), offset


def _drop_torn_line(path: Path) -> None:
    """Cuts off a last line without its newline, left by a driver that died while writing it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
