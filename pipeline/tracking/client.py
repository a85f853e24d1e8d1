"""The tracker: replays a run's journal to MLflow from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.contracts.events import read_events
from pipeline.errors import TrackingError
from pipeline.tracking.address import check_reachable, check_uri, strip_credentials
from pipeline.tracking.batches import Batch, clean_key, collect, flatten, format_warning
from pipeline.tracking.connection import Connection, RunInfo
from pipeline.tracking.progress import Progress

log = logging.getLogger(__name__)
JOURNAL_NAME = "events.jsonl"
_POLL_S = 1.0
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# After so many failures in a row, a minute, while the server answers: its artifact store must not hold up the metrics.
_UPLOAD_ATTEMPTS = 8


def has_unsent(run_dir: Path, uri: str) -> bool:
    """Whether the journal of a run holds more than the server at ``uri`` was sent; nothing is connected."""
    journal = run_dir / JOURNAL_NAME
    return journal.exists() and Progress.load(run_dir, strip_credentials(uri)).offset < journal.stat().st_size


class Tracker:
    """Sends ``events.jsonl`` of a run folder to one MLflow run, and remembers how far it got.

    Workers never call it and it never raises into the run: a server that is away or slow only
    means that the thread is behind. Open it with ``Tracker.open``; close it at the end.
    """

    def __init__(self, uri: str, info: RunInfo, run_dir: Path) -> None:
        self._uri = uri
        self._info = info
        self._run_dir = run_dir
        self._journal_path = run_dir / JOURNAL_NAME
        self._progress = Progress.load(run_dir, strip_credentials(uri))
        self._problem: str | None = None
        self._num_failed_uploads = 0
        self._given_up: str | None = None  # the last of the files that could not be stored
        self._warnings: list[str] = []
        self._is_open = False  # the run was found or created by this process
        self._changed = threading.Condition()
        self._is_nudged = False  # somebody waits in flush(): do not sleep
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)

    @classmethod
    def open(
        cls,
        uri: str,
        experiment: str,
        run_dir: Path,
        run_name: str,
        *,
        required: bool,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        dataset: Mapping[str, Any],
        parent_run_id: str | None = None,
    ) -> Tracker:
        """Checks that the server answers and starts sending; takes up the run of ``tracking.json`` if there is one.

        Args:
            uri: ``http(s)://...`` or ``sqlite:///PATH``. Credentials come from MLflow's environment variables.
            experiment: MLflow experiment, made if it does not exist.
            run_dir: the run folder.
            run_name: shown in MLflow.
            required: whether a server that does not answer now is an error; if not, it is tried again later.
            params: the configuration, nested or flat.
            tags: of the MLflow run, such as the kind of command and the config hash.
            dataset: name, fingerprint, num_rows and path.
            parent_run_id: MLflow's id of the search that this run is a trial of.

        Raises:
            TrackingError: the address cannot be used or ``tracking.json`` is damaged; if ``required`` also
                that nothing, or something else than MLflow, answers.
        """
        check_uri(uri)
        info = RunInfo(
            experiment=experiment,
            run_name=run_name,
            params=flatten(params),
            tags={"run_dir": str(run_dir), **{clean_key(key): str(value) for key, value in tags.items()}},
            dataset=dict(dataset),
            parent_run_id=parent_run_id,
            start_time_ms=int(time.time() * 1000),
        )
        tracker = cls(uri, info, run_dir)
        try:
            check_reachable(uri, experiment)
        except TrackingError as error:
            if required:
                raise
            tracker._problem = error.message
            log.warning("the run goes on without its tracking server for now: %s", error.message)
        tracker._thread.start()
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has it."""
        return self._progress.run_id

    @property
    def problem(self) -> str | None:
        """Why the server lacks a part of the record; None when it has all of it."""
        if self._problem or self._given_up:
            return self._problem or self._given_up
        missing = self._journal_size() - self._progress.offset
        return f"{missing:,} bytes of the journal are still to be sent" if missing > 0 else None

    @property
    def is_away(self) -> bool:
        """Whether the last attempt to reach the server or to send failed."""
        return self._problem is not None

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that the journal holds now is sent.

        Returns:
            Whether the server has all of it: False after ``timeout_s``, or when files could not be stored.
        """
        end = self._journal_size()
        with self._changed:
            self._is_nudged = True
            self._changed.notify_all()
            is_sent = self._changed.wait_for(lambda: self._is_open and self._progress.offset >= end, timeout_s)
        return is_sent and self._given_up is None

    def close(self, timeout_s: float) -> bool:
        """Flushes and stops; what was not sent is sent when the run is opened again.

        Returns:
            As ``flush``.
        """
        started = time.monotonic()
        is_sent = self.flush(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # A request in flight may hang for minutes; the thread is a daemon and need not be waited for.
        self._thread.join(max(0.1, timeout_s - (time.monotonic() - started)))
        return is_sent

    def _journal_size(self) -> int:
        return self._journal_path.stat().st_size if self._journal_path.exists() else 0

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        connection: Connection | None = None
        while not self._stopping:
            try:
                if self._problem:
                    check_reachable(self._uri, self._info.experiment)
                connection = connection or self._connect()
                has_more = self._send_next(connection)
            except Exception as error:  # nothing that goes wrong here may end the run or the sending
                self._note_problem(error)
                is_nudged = self._sleep(wait_s)
                wait_s = _FIRST_WAIT_S if is_nudged else min(2 * wait_s, _LONGEST_WAIT_S)
                continue
            self._problem = None
            wait_s = _FIRST_WAIT_S
            if not has_more:
                self._sleep(_POLL_S)

    def _connect(self) -> Connection:
        connection = Connection(self._uri, self._run_dir)
        # With the key by which whoever comes next finds the run, if it is created now and nothing more is heard of it.
        self._progress.save(self._run_dir)
        self._store(connection.open_run(self._info, self._progress))
        self._warnings = [
            format_warning(event)
            for event, end in read_events(self._journal_path)
            if event.kind == "warning" and end <= self._progress.offset
        ]
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
        return connection

    def _send_next(self, connection: Connection) -> bool:
        """Sends one batch; returns whether there was one."""
        batch = collect(read_events(self._journal_path, self._progress.offset), self._progress)
        if batch is None:
            return False
        connection.log_records(batch)
        if batch.has_uploads:
            self._upload(connection, batch)
        connection.set_status(batch)
        self._warnings += batch.warnings
        self._store(batch.progress)
        return True

    def _upload(self, connection: Connection, batch: Batch) -> None:
        try:
            connection.upload(batch, self._warnings + batch.warnings)
        except Exception as error:
            self._num_failed_uploads += 1
            if self._num_failed_uploads < _UPLOAD_ATTEMPTS:
                raise
            self._given_up = f"files could not be stored and are only in {self._run_dir} ({error!r})"
            log.warning("tracking: %s", self._given_up)
        self._num_failed_uploads = 0

    def _store(self, progress: Progress) -> None:
        progress.save(self._run_dir)
        with self._changed:
            self._progress = progress
            self._changed.notify_all()

    def _note_problem(self, error: Exception) -> None:
        problem = error.message if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        if self._problem is None:
            log.warning("tracking is behind and goes on trying: %s", problem)
        self._problem = problem

    def _sleep(self, timeout_s: float) -> bool:
        """Waits, and ends early when stopped or when flush() begins to wait; returns whether it did."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._is_nudged, timeout_s)
            is_nudged, self._is_nudged = self._is_nudged, False
        return is_nudged
