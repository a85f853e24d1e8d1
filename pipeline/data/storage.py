"""Where the files of a data set are: a local folder, or object storage by a URI. No secrets travel with either."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.data.waiting import ask_service, ask_storage
from pipeline.errors import DataError

T = TypeVar("T")

S3_SETTINGS = ("endpoint_override", "region", "scheme")
# Of one request, whose failure the AWS library tells after about a minute at most, attempts together.
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0
MAX_ATTEMPTS = 4

_USER = re.compile(r"^s3://[^/@:]*:[^@]*@")
_SECRET_SETTING = re.compile(r"[?&][^=&]*(access_key|secret|token|password)[^=&]*=", re.IGNORECASE)
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, where they are temporary), on every node, "
    "to ones that may list and read it"
)
_ADDRESS = (
    "check the address: ?endpoint_override=host:port&scheme=http of the URI, or AWS_ENDPOINT_URL, set on every node"
)
# What the words in an error of the AWS library come down to, and what to do.
_EXPLANATIONS = (
    (
        r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|ACCESS_DENIED|UNRECOGNIZED_CLIENT|InvalidToken|ExpiredToken"
        r"|MISSING_AUTHENTICATION_TOKEN|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE|HTTP status 40[13]",
        f"the server refuses the credentials; {_CREDENTIALS}",
    ),
    ("NO_SUCH_BUCKET|Bucket '.*' not found", "there is no such bucket; correct its name"),
    ("NETWORK_CONNECTION|curlCode", f"the server cannot be reached; {_ADDRESS}"),
)


def open_storage(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path, and the path within it.

    Args:
        path: a local path, or a URI. ``s3://bucket/folder`` may set ``endpoint_override``, ``region`` and ``scheme``;
            otherwise AWS_ENDPOINT_URL and AWS_REGION say where. Credentials come from where the AWS library looks for
            them in each process (AWS_ACCESS_KEY_ID and so on).

    Raises:
        DataError: a URI that cannot be understood, or one that holds a secret.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    if holds_secret(path):
        raise DataError("data.path holds a secret, which would be stored with the run; " + _CREDENTIALS + ".")
    if path.startswith("s3://"):
        return _open_s3(path)
    try:
        filesystem, root = pafs.FileSystem.from_uri(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"data.path={path} cannot be opened ({_first_line(error)}); give a folder, or a URI such as "
            "s3://bucket/folder."
        ) from error
    return filesystem, root.rstrip("/")


def holds_secret(uri: str) -> bool:
    """Whether an address holds a password, a secret key or a token, as far as its form tells; a local path never.

    Raises:
        ValueError: something like a URI, but none.
    """
    if "://" not in uri:
        return False
    secret_part = _USER.match(uri) or _SECRET_SETTING.search(uri)  # a secret key may hold a slash
    return secret_part is not None or bool(urlsplit(uri).password)


def show_path(path: str) -> str:
    """A path for messages about what lies below it: a URI without its settings."""
    return (path.partition("?")[0] if "://" in path else path).rstrip("/")


def check_exists(filesystem: pafs.FileSystem, root: str, path: str, wanted: str) -> pafs.FileInfo:
    """What lies at ``path``.

    Args:
        filesystem: that ``path`` is on.
        root: the path within it.
        path: as the user gave it.
        wanted: what to give instead, for the message.

    Raises:
        DataError: nothing is there, or it cannot be reached.
        StorageError: see ``ask_storage``.
    """
    bucket = root.partition("/")[0]

    def look() -> pafs.FileInfo:
        info = filesystem.get_file_info(root)
        if info.type != pafs.FileType.NotFound or filesystem.type_name != "s3":
            return info
        if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            raise DataError(f"data.path={path}: there is no bucket {bucket!r}; correct its name.")
        return info

    info = read_storage(filesystem, root, look, f"data.path={path}")
    if info.type != pafs.FileType.NotFound:
        return info
    raise DataError(f"data.path={path} does not exist; give {wanted}.")


def read_storage(
    filesystem: pafs.FileSystem, path: str, action: Callable[[], T], what: str, advice: str = "make it readable"
) -> T:
    """As ``ask_storage``, with the errors of the file system turned into sentences.

    Args:
        what: is to be read, as the sentence begins.
        advice: how it ends.

    Raises:
        DataError: instead of OSError and Arrow's own.
        StorageError: see ``ask_storage``.
    """
    try:
        return ask_storage(filesystem, path, action)
    except (OSError, pa.ArrowException) as error:
        raise _explain(error, what, advice) from error


def _explain(error: Exception, what: str, advice: str = "make it readable") -> DataError:
    return DataError(explain_s3(error, what) or f"{what} cannot be read ({_first_line(error)}); {advice}.")


def explain_s3(error: BaseException, what: str) -> str | None:
    """The sentence for an error of object storage; none for any other.

    Args:
        error: as Arrow raises it.
        what: was to be read, as the sentence begins.
    """
    text = _first_line(error)
    for pattern, explanation in _EXPLANATIONS:
        if ("AWS Error" in text or "Bucket" in text) and re.search(pattern, text):
            found = re.search(r"AWS Error \w+(?: \([^)]*\))?(?=.*?(?:Details: (.*))?$)", text)
            reason = (found[1] or found[0]) if found else text
            return f"{what}: {explanation} ({reason})."
    return None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- S3 -----------------------------------------------------------------------------------------------------------


class _S3(pafs.S3FileSystem):
    """S3 that pickles as its address: credentials stay out of the object store, and every process finds its own."""

    def __init__(self, endpoint: str | None, scheme: str, region: str | None) -> None:
        super().__init__(
            endpoint_override=endpoint,
            scheme=scheme,
            region=region,
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        )
        self.address = (endpoint, scheme, region)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_connect, self.address)


@lru_cache(maxsize=4)
def _connect(endpoint: str | None, scheme: str, region: str | None) -> _S3:
    """One client a process, whatever number of readers is unpickled there: making one takes half a second."""
    return _S3(endpoint, scheme, region)


def _open_s3(path: str) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(path)
    settings = dict(parse_qsl(parts.query))
    unknown = [name for name in settings if name not in S3_SETTINGS]
    if unknown or not parts.netloc or "@" in parts.netloc:
        got = f"the setting {unknown[0]!r}" if unknown else f"{parts.netloc!r} for a bucket"
        raise DataError(
            f"data.path={path} cannot be opened: expected s3://bucket/folder with no settings but "
            f"{', '.join(S3_SETTINGS)}, got {got}; correct it."
        )
    endpoint, scheme = settings.get("endpoint_override"), settings.get("scheme", "https")
    if endpoint is None:
        # Arrow does not read these variables, the other tools of AWS do.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is not None and "://" in endpoint:
        scheme, _, endpoint = endpoint.rstrip("/").partition("://")
    region = settings.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    bucket = parts.netloc
    try:
        if region is None and endpoint is None:
            address = (endpoint, scheme, bucket)
            region = ask_service(address, f"s3://{bucket}", lambda: pafs.resolve_s3_region(bucket))
        return _S3(endpoint, scheme, region), f"{bucket}{unquote(parts.path)}".rstrip("/")
    except (OSError, pa.ArrowException) as error:
        raise _explain(error, f"data.path={path}") from error
