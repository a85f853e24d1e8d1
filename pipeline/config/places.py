"""Where a value has to be a path: a URI is refused there, and never made a folder of that name.

``data.path`` and ``cache.path`` may be on object storage, and ``tracking.uri`` is a server or a database.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import ConfigError

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_USER = re.compile(r"//[^/@]*@")  # may hold a password
_DATABASE = "sqlite:///"
_PLACES = re.compile(
    r"run\.dir|(teacher|student)\.(checkpoint|code)|data\.root|loss\.(.+\.)?perturbation_from|tracking\.uri"
)


def find_uris(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path of every URI in a configuration where a path has to be, and what is wrong with it."""
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from find_uris(value, f"{path}.")
        elif isinstance(value, str) and _PLACES.fullmatch(path):
            place = value.removeprefix(_DATABASE)
            if _URI.match(place) and (path != "tracking.uri" or place != value):
                yield path, _describe(value)


def refuse_uri(key: str, value: str) -> None:
    """Refuses a URI as the value of ``key``, which is a path.

    Raises:
        ConfigError: it is one.
    """
    if _URI.match(value):
        raise ConfigError(f"{key}: {_describe(value)}")


def _describe(uri: str) -> str:
    shown = _USER.sub("//...@", uri.partition("?")[0])
    return (
        f"expected a path on a disk of this machine or on storage that it mounts, got {shown}; only data.path and "
        "cache.path may be on object storage, so give such a path"
    )
