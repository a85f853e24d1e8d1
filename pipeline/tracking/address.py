"""What a tracking address may look like, and whether something useful answers there.

Standard library only: the check runs before work begins, and importing mlflow takes seconds.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from pipeline.errors import TrackingError

SQLITE_PREFIX = "sqlite:///"
PROBE_TIMEOUT_S = 5.0
_MAX_REPLY_BYTES = 1_000_000
_CREDENTIALS = "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD,"
_WHAT_TO_DO = (
    "Start it (mlflow server --host ... --port ...), give another address with tracking.uri=..., "
    "or let the run start without it with tracking.required=false."
)


def strip_credentials(uri: str) -> str:
    """``uri`` without user, password and query, fit for messages, logs and files."""
    parts = urllib.parse.urlsplit(uri)
    if not parts.netloc:
        return uri.partition("?")[0]
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def check_uri(uri: str) -> None:
    """Refuses an address of a kind that the tracker does not serve, without contacting it.

    Raises:
        TrackingError: neither http(s) nor sqlite, or a password in it.
    """
    shown = strip_credentials(uri)
    if is_http(uri):
        if "@" in urllib.parse.urlsplit(uri).netloc:
            raise TrackingError(
                f"tracking.uri={shown} holds a user or a password, which would be written into the run's files. Leave "
                f"it out and set {_CREDENTIALS} in the environment."
            )
    elif not uri.startswith(SQLITE_PREFIX) or not sqlite_path(uri).name:
        raise TrackingError(
            f"tracking.uri={shown} is not an address the tracker can use: expected http://HOST:PORT, https://HOST or "
            "sqlite:///PATH/mlflow.db. A folder of files (mlruns) is no longer served by MLflow; use sqlite:///PATH/mlflow.db."
        )


def check_reachable(uri: str, experiment: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Asks the server for ``experiment``, or looks whether the database can be opened and written.

    Raises:
        TrackingError: nothing answers, something answers that is not MLflow, the credentials are
            refused, or the experiment was deleted.
    """
    if is_http(uri):
        _check_server(uri, experiment, timeout_s)
    else:
        _check_database(sqlite_path(uri))


def is_http(uri: str) -> bool:
    """Whether ``uri`` is a server's address, as opposed to a database's."""
    return uri.startswith(("http://", "https://"))


def sqlite_path(uri: str) -> Path:
    """The database file of a ``sqlite:///`` address."""
    return Path(uri.removeprefix(SQLITE_PREFIX).partition("?")[0])


def _check_server(uri: str, experiment: str, timeout_s: float) -> None:
    shown = strip_credentials(uri)
    query = urllib.parse.urlencode({"experiment_name": experiment})
    request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{query}")
    if authorization := _authorization():
        # Unredirected: a server that sends us elsewhere must not pass the token on.
        request.add_unredirected_header("Authorization", authorization)
    try:
        status, body = _get(request, timeout_s, _tls_context(uri))
    except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors; a malformed port is a ValueError
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"the tracking server {shown} cannot be reached ({reason}). {_WHAT_TO_DO}") from None
    except Exception as error:  # http.client's errors: the port speaks something else than HTTP
        raise TrackingError(f"{shown} does not answer like a web server ({error!r}). {_WHAT_TO_DO}") from None
    _judge_reply(shown, experiment, status, body)


def _get(request: urllib.request.Request, timeout_s: float, context: ssl.SSLContext | None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as reply:
            return reply.status, reply.read(_MAX_REPLY_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_MAX_REPLY_BYTES)


def _judge_reply(shown: str, experiment: str, status: int, body: bytes) -> None:
    """Raises unless the reply is MLflow's, naming the experiment or saying that there is none yet."""
    reply = _parse_object(body)
    if status == 200 and isinstance(reply.get("experiment"), dict):
        if reply["experiment"].get("lifecycle_stage") == "deleted":
            raise TrackingError(
                f"the experiment {experiment!r} on {shown} was deleted. Restore it (mlflow experiments restore), "
                "or choose another name with tracking.experiment=..."
            )
        return
    if status == 404 and reply.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return
    if status in (401, 403):
        said = body.decode("utf-8", "replace").strip().partition("\n")[0][:120]
        raise TrackingError(
            f"the tracking server {shown} refused access (HTTP {status}: {said}). Set {_CREDENTIALS} in the "
            "environment, and see that the server allows this host."
        )
    if status >= 500 or status == 429:  # 429: too many requests
        raise TrackingError(f"the tracking server {shown} answers with HTTP {status}. {_WHAT_TO_DO}")
    raise TrackingError(f"{shown} answers, but is not an MLflow tracking server (HTTP {status}). {_WHAT_TO_DO}")


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(body)
    except ValueError:
        return {}
    return reply if isinstance(reply, dict) else {}


def _authorization() -> str | None:
    """The header MLflow itself would send; its credentials come from the environment only."""
    username, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if username and password:
        return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _tls_context(uri: str) -> ssl.SSLContext | None:
    """TLS settings from the variables that MLflow reads, so that the check agrees with what follows."""
    if not uri.startswith("https://"):
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if certificate := os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
        context.load_cert_chain(certificate)
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _check_database(path: Path) -> None:
    advice = "Give another one with tracking.uri=sqlite:///PATH/mlflow.db."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"the folder of the tracking database {path} cannot be made ({error}). {advice}") from None
    writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not writable or path.is_dir():
        raise TrackingError(f"the tracking database {path} cannot be written. {advice}")
    if path.exists():
        try:
            database = sqlite3.connect(path, timeout=PROBE_TIMEOUT_S)
            try:
                database.execute("PRAGMA schema_version").fetchone()
            finally:
                database.close()
        except sqlite3.Error as error:
            raise TrackingError(f"{path} is not a usable SQLite database ({error}). {advice}") from None
