"""Runs of the pipeline in this process, on a Ray that the benchmark starts, and what their journals say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contracts.events import Event, read_events


@contextlib.contextmanager
def local_ray(num_cpus: int, log_file: Path, resources: dict[str, float] | None = None) -> Iterator[None]:
    """A Ray as ``pipeline.cluster.session`` starts one, with custom resources in place of accelerators."""
    from pipeline.cluster.session import own_ray

    with own_ray(num_cpus, log_file, resources):
        yield


def distill(run_dir: Path, overrides: list[str]) -> Journal:
    """Carries out ``distill`` to its end; returns what it recorded.

    What it prints goes to ``<run_dir>.txt``.
    """
    from pipeline.config.request import Request
    from pipeline.stages.distill import distill as carry_out

    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".txt").open("w") as file, contextlib.redirect_stdout(file):
        code = carry_out(Request("distill", (*overrides, f"run.dir={run_dir}")))
    if code:
        raise SystemExit(f"the run in {run_dir} ended with {code}; see {run_dir.with_suffix('.txt')}")
    return Journal([event for event, _ in read_events(run_dir / "events.jsonl")])


@dataclass(frozen=True)
class Journal:
    """The events of a finished run."""

    events: list[Event]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def steps(self) -> dict[int, float]:
        """Optimizer step to the time it was recorded at; as many as ``train.log_every`` lets through."""
        return {event.data["step"]: event.time for event in self.of("step")}

    def stage_started(self, name: str) -> float:
        return next(e.time for e in self.of("stage") if e.data["name"] == name and e.data["state"] == "started")


class Watcher:
    """Calls ``note`` with every event of a run's journal, from a thread, soon after it was written."""

    def __init__(self, run_dir: Path, note: Callable[[Event], Any], interval_s: float = 0.2) -> None:
        self._path, self._note, self._interval_s = run_dir / "events.jsonl", note, interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        offset = 0
        while not self._stopped.wait(self._interval_s):
            for event, following in read_events(self._path, offset):
                offset = following
                self._note(event)
