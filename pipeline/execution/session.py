"""What surrounds the work of a run: journal, live view, tracker, signals, the result file."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import psutil

from pipeline.config.runs import Run
from pipeline.contracts.events import Event, Journal, read_events
from pipeline.data.waiting import tell_waits
from pipeline.errors import PipelineError
from pipeline.execution.skipped import SkippedRows
from pipeline.report.live import LiveView
from pipeline.tracking import Tracker, has_unsent

_KILL_FLUSH_S = 1.0  # a job is killed three seconds after it was told to stop
_CLOSE_FLUSH_S = 60.0
_AWAY_FLUSH_S = 5.0  # a server that is away may take hours; the run is not held up for it
_LOOK_S = 0.25
_JOIN_S = 0.5


class RunSession:
    """A run while it is being worked on.

    Everything that happens goes through the journal; the view and the tracker read it there.

    Args:
        run: the folder, held by this process.
        dataset: name, fingerprint, number of rows and path, for the tracker.
        with_teacher: whether waiting for data means waiting for a teacher.

    Attributes:
        began: whether work began: an error before that ends with exit code 2, one after it with 1.
        skipped: the journal for whoever decodes: bad rows are told there once.
    """

    def __init__(self, run: Run, dataset: Mapping[str, Any], with_teacher: bool) -> None:
        self.run = run
        self.began = False
        self.journal = Journal(run.dir / "events.jsonl")
        self.skipped = SkippedRows(run.dir, self.journal)
        self._offset = run.dir.joinpath("events.jsonl").stat().st_size if run.resumed and _has_events(run) else 0
        self._tracker = _open_tracker(run, dataset, required=run.config.tracking.required)
        self._view = LiveView(run.name, run.dir, with_teacher=with_teacher)
        self._listeners: list[Callable[[Event], None]] = []
        self._last_words: list[Callable[[], None]] = []
        self._stopped = threading.Event()
        self._killed = False
        self._reader = threading.Thread(target=self._read, name="live-view", daemon=True)

    def start(self) -> None:
        """The run is now running, and shown."""
        tell_waits(self.journal)
        self.run.set_status("running")
        self.journal.emit(Event("status", {"status": "running", "message": ""}))
        for name in ("config.yaml", "provenance.json"):
            self.journal.emit(Event("artifact", {"path": str(self.run.dir / name), "folder": "run"}))
        self._view.__enter__()
        self._reader.start()

    @property
    def samples_per_s(self) -> float | None:
        """Median training speed of the run so far, earlier starts included; none before the first record."""
        rates = [event.data["samples_per_s"] for event, _ in read_events(self.journal.path) if event.kind == "step"]
        return statistics.median(rates) if rates else None

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls ``listener`` with every event from now on, soon after it was written."""
        self._listeners.append(listener)

    def before_kill(self, action: Callable[[], None]) -> None:
        """Has ``action``, which must be quick, done before a killed run records its end."""
        self._last_words.append(action)

    def say(self, name: str, state: str = "started", detail: str = "") -> None:
        """Records that a stage of the run began or ended, or what it waits for."""
        self.journal.emit(Event("stage", {"name": name, "state": state, "detail": detail}))

    def finish(self, metrics: Mapping[str, float], extra: Mapping[str, Any]) -> None:
        """The run is complete: result, status, and everything sent to the tracker."""
        if self._killed:
            return
        # The result first: a run that is complete stays so, whatever happens while the tracker is waited for.
        self.run.write_result("finished", metrics, {**extra, "num_bad_rows": len(self.skipped)})
        if len(self.skipped):
            self.journal.emit(Event("artifact", {"path": str(self.skipped.path), "folder": "run"}))
        self.journal.emit(Event("status", {"status": "finished", "message": ""}))
        sent = _close(self._tracker)
        self._close_view()
        self.run.refresh_result()
        if not sent:
            print(f"tracking: not everything was sent ({self._tracker.problem}); {self.run.resume_command} sends it")

    def fail(self, error: BaseException) -> int:
        """Records a failure; returns the exit code."""
        message = error.message if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
        code = 2 if isinstance(error, PipelineError) and not self.began else 1
        with contextlib.suppress(OSError):  # a disk that is full must not hide what happened
            self.journal.emit(Event("status", {"status": "failed", "message": message}))
        self._tracker.close(5.0)
        self._close_view()
        with contextlib.suppress(OSError):
            self.run.write_result("failed", {}, exit_code=code, error=message)
        return code

    def kill(self, code: int) -> None:
        """Records that the run was told to stop, and ends this process at once."""
        reason = f"stopped by {signal.Signals(code - 128).name}"
        for action in self._last_words:
            action()
        self._killed = True  # the work goes on until the process is gone, and is recorded; its result is not
        self.journal.emit(Event("status", {"status": "killed", "message": reason}))
        self.run.write_result("killed", {}, exit_code=code, error=reason)
        self._close_view()
        print(f"go on with: {self.run.resume_command}\n{self.run.result_path}", flush=True)
        self._tracker.flush(_KILL_FLUSH_S)
        end_process(code)

    def _read(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            self._show_new()

    def _show_new(self) -> None:
        for event, offset in read_events(self.journal.path, self._offset):
            self._offset = offset
            self._view.show(event)
            for listener in self._listeners:
                with contextlib.suppress(Exception):  # whoever listens must not end the view
                    listener(event)

    def _close_view(self) -> None:
        tell_waits(None)
        self._stopped.set()
        if self._reader.is_alive():
            self._reader.join(timeout=_JOIN_S)
        if not self._reader.is_alive():
            self._show_new()
        self._view.close()


def has_rest(run: Run) -> bool:
    """Whether the tracker lacks something of a finished run, because its server was away."""
    return has_unsent(run.dir, run.config.tracking.uri or "")


def send_rest(run: Run, dataset: Mapping[str, Any]) -> None:
    """Sends what the tracker lacks of a finished run; says what came of it."""
    tracker = _open_tracker(run, dataset, required=False)
    if not _close(tracker):
        print(f"tracking: not everything was sent ({tracker.problem}); {run.resume_command} sends it")
        return
    run.refresh_result()
    print("tracking: what was missing is sent")


def _close(tracker: Tracker) -> bool:
    return tracker.close(_AWAY_FLUSH_S if tracker.is_away else _CLOSE_FLUSH_S)


def _open_tracker(run: Run, dataset: Mapping[str, Any], *, required: bool) -> Tracker:
    config = run.config
    return Tracker.open(
        config.tracking.uri or "",
        config.tracking.experiment,
        run.dir,
        run.name,
        required=required,
        params=config.to_dict(),
        tags={"command": run.command, "config_hash": run.config_hash, **_provenance_tags(run)},
        dataset=dataset,
    )


def _has_events(run: Run) -> bool:
    return (run.dir / "events.jsonl").exists()


def _provenance_tags(run: Run) -> dict[str, str]:
    facts = run.read_provenance()
    git = facts.get("git") or {}
    tags = {
        "git_commit": git.get("commit"),
        "data_fingerprint": facts.get("data"),
        "teacher_fingerprint": facts.get("teacher"),
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def end_process(code: int) -> NoReturn:
    """Ends this process at once, with those that it started."""
    # A Ray that this process started would outlive it in part; one that it joined has no process here.
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


def run_interruptibly(work: Callable[[], None], on_signal: Callable[[int], None]) -> None:
    """Runs ``work`` so that SIGTERM and SIGINT are answered at once, whatever it waits for.

    Python runs signal handlers in the main thread only, between two of its instructions; a call that
    blocks in C would hold them up. So the work gets a thread of its own.

    Args:
        on_signal: gets the exit code (128 + signal number) and does not return.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=guarded, name="work", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(timeout=0.1)
            if received:
                on_signal(128 + received[0])
            for number in previous:
                signal.signal(number, note)  # Ray's core puts handlers of its own in place when it starts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if failure:
        raise failure[0]
