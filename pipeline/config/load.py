"""From a request to a validated configuration, with ``resume=RUN`` and ``train.epochs=+N``."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.compose import ParsedOverride, compose, parse_overrides
from pipeline.config.own_code import kept_code
from pipeline.config.places import refuse_uri
from pipeline.config.request import Request
from pipeline.config.schema import Config, drop_path, get_path, set_path
from pipeline.config.stored import EXTENDABLE, StoredRun, find_run, never_began, read_run
from pipeline.config.validate import build_config
from pipeline.errors import ConfigError, RunError
from pipeline.search import Branch, Space

_ABSENT = object()
_PLACES = ("resume", "run", "out")


@dataclass(frozen=True)
class LoadedConfig:
    """What a request amounts to.

    Attributes:
        config: validated; ``run.dir`` is set if the request goes on with a run.
        extends: whether the request raises a total of a stored run (``train.epochs=+N``).
    """

    config: Config
    extends: bool = False


def load_config(request: Request, defaults: Sequence[str] = (), runs_root: Path = Path("runs")) -> LoadedConfig:
    """Composes and validates what the request says.

    Args:
        request: command and overrides; ``resume=RUN`` (a run folder, or its name under ``runs_root``) starts
            from that run's configuration instead of the defaults.
        defaults: overrides that the command starts from; the user's go before them.
        runs_root: where run names are looked up.

    Raises:
        ConfigError: see ``compose`` and ``build_config``.
        RunError: no such run, or one that another command made.
    """
    resume, overrides = take_run(request.overrides, "resume")
    composed = compose(overrides, request.conf_dirs, defaults)
    if resume is None:
        raw = composed
        folder = get_path(raw, "run.dir")
        stored = read_run(Path(folder)) if isinstance(folder, str) and (Path(folder) / "run.json").exists() else None
    else:
        stored = read_run(find_run(resume, runs_root))
        if stored.command != request.command:
            raise RunError(
                f"resume={resume}: {stored.dir} was made by {stored.command}, not {request.command}; "
                f"use `python -m pipeline {stored.command} resume={resume}`"
            )
        raw = _overlay(stored.raw, composed, parse_overrides(overrides, request.conf_dirs))
        set_path(raw, "run.dir", str(stored.dir))
    if stored is not None and not never_began(stored.dir):
        _use_kept_code(raw, stored.dir)
    extends = _extend(raw, stored)
    if request.command == "search":
        _fill_options(raw, request.conf_dirs)
    return LoadedConfig(build_config(raw, request.command), extends)


def load_stored(run: StoredRun, overrides: Sequence[str], conf_dirs: Sequence[Path] = ()) -> Config:
    """The configuration of a run with what the overrides name in its place, for a command that trains nothing.

    Rules of training are not checked: a network that GPUs trained together may well predict on one CPU.

    Raises:
        ConfigError: see ``compose`` and ``build_config``.
    """
    raw = _overlay(run.raw, compose(overrides, conf_dirs), parse_overrides(overrides, conf_dirs))
    _use_kept_code(raw, run.dir)
    return build_config(raw, None)


def take_run(
    overrides: Sequence[str], key: str, expected: str = "a run folder or a name under runs/"
) -> tuple[str | None, list[str]]:
    """Separates ``key=RUN`` (``resume``, or ``run`` of evaluate) from the overrides of the configuration.

    Args:
        expected: what the value is, for messages, where it is no run (``out`` of predict).

    Returns:
        The value, none if it is not given, and the other overrides.

    Raises:
        ConfigError: given more than once, without a value, or as a URI where a path has to be.
    """
    given = [text.removeprefix(f"{key}=") for text in overrides if text.startswith(f"{key}=")]
    if len(given) > 1:
        raise ConfigError(f"{key} is given {len(given)} times ({', '.join(given)}); give it once")
    if given and not given[0]:
        raise ConfigError(f"{key}=: expected {expected}, got nothing")
    if given and key in _PLACES:
        refuse_uri(key, given[0])
    return (given[0] if given else None), [text for text in overrides if not text.startswith(f"{key}=")]


def _fill_options(raw: dict[str, Any], conf_dirs: Sequence[Path]) -> None:
    """Puts into ``search.options`` what the choices of a group begin with, so that the run keeps it."""
    if not isinstance(get_path(raw, "search.space"), dict):
        return
    try:
        axes = Space.parse(get_path(raw, "search.space")).axes
    except ValueError:  # reported with everything else that is wrong
        return
    for axis in axes:
        for option in axis.options if isinstance(axis, Branch) else ():
            path = f"search.options.{axis.path}.{option}"
            if "." not in axis.path and get_path(raw, path) is None:
                set_path(raw, path, compose([f"{axis.path}={option}"], conf_dirs)[axis.path])


def _use_kept_code(raw: dict[str, Any], run_dir: Path) -> None:
    """The networks of a run are built by the modules that it keeps, wherever it goes on."""
    for path, folder in kept_code(run_dir).items():
        if "factory" in (raw.get(path.partition(".")[0]) or {}):
            set_path(raw, path, folder)


def _overlay(stored: dict[str, Any], composed: dict[str, Any], overrides: Sequence[ParsedOverride]) -> dict[str, Any]:
    """The stored configuration with only what the user names now taken from the composed one."""
    raw = copy.deepcopy(stored)
    for override in sorted(overrides, key=lambda override: not override.is_group):
        if override.is_group and override.key not in composed:
            raise ConfigError(
                f"{override.text}: cannot be combined with resume=, which keeps what the run began with; "
                "give the single keys instead"
            )
        if override.key == "run.dir":
            raise ConfigError("run.dir: cannot be combined with resume=, which already names the folder; give one")
        value = get_path(composed, override.key, _ABSENT)
        if value is _ABSENT:
            drop_path(raw, override.key)
        else:
            set_path(raw, override.key, value)
    return raw


def _extend(raw: dict[str, Any], stored: StoredRun | None) -> bool:
    """Turns ``+N`` into the stored total plus N."""
    extends = False
    for path in EXTENDABLE:
        value = get_path(raw, path)
        if not (isinstance(value, str) and re.fullmatch(r"\+\d+", value)):
            continue
        if stored is None:
            raise ConfigError(
                f"{path}={value}: adds to a run that exists; name it with resume=RUN, or give a total ({path}=N)"
            )
        total = get_path(stored.raw, path)
        if not isinstance(total, int):
            raise ConfigError(f"{path}={value}: {stored.dir} has no {path} to add to; leave it out")
        set_path(raw, path, total + int(value))
        extends = True
    return extends
