"""Addresses, and what happens when nobody answers there, or somebody else does."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.events import Event, Journal
from pipeline.errors import TrackingError
from pipeline.tracking import Tracker
from pipeline.tracking.address import check_reachable, check_uri, strip_credentials


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def open_tracker(uri: str, run_dir: Path, required: bool = True) -> Tracker:
    return Tracker.open(uri, "an experiment", run_dir, "a run", required=required, params={}, tags={}, dataset={})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def web_server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply_with(status: int, body: str, headers: dict[str, str] | None = None) -> Any:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body.encode())

    return answer


def test_server_that_is_away_is_an_error_if_required(run_dir: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingError, match=r"cannot be reached .*refused.*tracking\.required=false") as caught:
        open_tracker(address, run_dir)
    assert address in str(caught.value)
    assert not list(run_dir.iterdir())


def test_server_that_is_away_is_waited_for_if_not_required(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    Journal(run_dir / "events.jsonl").emit(Event("stage", {"name": "training"}))
    tracker = open_tracker(f"http://127.0.0.1:{free_port()}", run_dir, required=False)
    assert "goes on without its tracking server" in caplog.text
    assert not tracker.flush(0.05)
    assert "cannot be reached" in str(tracker.problem)
    assert tracker.run_id is None
    started = time.monotonic()
    assert not tracker.close(0.05)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, "<html>welcome</html>", "is not an MLflow tracking server"),
        (200, '{"experiment": 3}', "is not an MLflow tracking server"),
        (404, "<html>no such page</html>", "is not an MLflow tracking server"),
        (401, "You are not authenticated", r"\(HTTP 401: You are not authenticated\).*MLFLOW_TRACKING_TOKEN"),
        (503, "later", "answers with HTTP 503"),
        (200, '{"experiment": {"lifecycle_stage": "deleted"}}', "'an experiment' .*was deleted"),
    ],
)  # fmt: skip
def test_answers_that_are_not_good_enough(status: int, body: str, expected: str, run_dir: Path) -> None:
    with web_server(reply_with(status, body)) as address, pytest.raises(TrackingError, match=expected):
        open_tracker(address, run_dir)


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, '{"experiment": {"lifecycle_stage": "active"}}'), (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST"}')],
)
def test_answers_of_mlflow(status: int, body: str) -> None:
    with web_server(reply_with(status, body)) as address:
        check_reachable(address, "an experiment")


def test_server_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match=r"cannot be reached .*timed out"):
            check_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", "an experiment", timeout_s=0.1)
        assert time.monotonic() - started < 2


def test_token_is_sent_but_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    seen: dict[str, str | None] = {}

    def elsewhere(request: http.server.BaseHTTPRequestHandler) -> None:
        seen["elsewhere"] = request.headers["Authorization"]
        reply_with(200, "")(request)

    with web_server(elsewhere) as other:

        def redirect(request: http.server.BaseHTTPRequestHandler) -> None:
            seen["server"] = request.headers["Authorization"]
            reply_with(302, "", {"Location": other})(request)

        with web_server(redirect) as address, pytest.raises(TrackingError, match="not an MLflow"):
            check_reachable(address, "an experiment")
    assert seen == {"server": "Bearer abc", "elsewhere": None}


@pytest.mark.parametrize(
    "uri", ["", "mlruns", "file:///data/mlruns", "sqlite:///", "postgresql://me:s3cr3t@host/db", "databricks"]
)
def test_addresses_that_cannot_be_used(uri: str) -> None:
    with pytest.raises(TrackingError, match=r"expected http://HOST:PORT") as caught:
        check_uri(uri)
    assert "s3cr3t" not in str(caught.value)


def test_password_in_an_address_is_refused_and_not_repeated(run_dir: Path) -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        open_tracker("https://me:s3cr3t@mlflow.example.org:5000/base", run_dir, required=False)
    assert "s3cr3t" not in str(caught.value)
    assert "https://mlflow.example.org:5000/base" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://me:pass@host:5000/base?token=x", "https://host:5000/base"),
        ("http://host", "http://host"),
        ("sqlite:////data/mlflow.db?key=x", "sqlite:////data/mlflow.db"),
    ],
)
def test_credentials_are_stripped(uri: str, expected: str) -> None:
    assert strip_credentials(uri) == expected


def test_databases_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("this is no database, and long enough to be seen as none" * 10)
    with pytest.raises(TrackingError, match="not a usable SQLite database"):
        check_reachable(f"sqlite:///{tmp_path}/file", "an experiment")
    with pytest.raises(TrackingError, match=r"folder of the tracking database .* cannot be made"):
        check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db", "an experiment")
    with pytest.raises(TrackingError, match="cannot be written"):
        check_reachable(f"sqlite:///{tmp_path}", "an experiment")
    check_reachable(f"sqlite:///{tmp_path}/new/folder/mlflow.db", "an experiment")
    assert not list((tmp_path / "new" / "folder").iterdir())  # looking leaves no empty database behind


def test_damaged_state_is_named(run_dir: Path) -> None:
    (run_dir / "tracking.json").write_text("{")
    with pytest.raises(TrackingError, match=r"tracking\.json is damaged"):
        open_tracker(f"sqlite:///{run_dir}/mlflow.db", run_dir)
