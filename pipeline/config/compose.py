"""Puts a configuration together from YAML groups and overrides. The only importer of Hydra.

Only Hydra's Compose API is used: no working folders, no logging, no instantiation. What the values
mean, and which keys exist, is the business of the parameter models.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import pipeline
from pipeline.config.places import refuse_uri
from pipeline.errors import ConfigError

_EXTENSION = re.compile(r"([\w.]+)=(\+\d+)")


@dataclass(frozen=True)
class ParsedOverride:
    """One override of the command line.

    Attributes:
        key: a group (``"student"``) or a dotted path (``"train.epochs"``).
        is_group: whether it chooses a file of a group.
        text: the override in Hydra's syntax.
        file: what a group is given as ``group=FILE.yaml``, instead of the name of a choice.
    """

    key: str
    is_group: bool
    text: str
    file: Path | None = None


def shipped_conf() -> Path:
    """The folder of configuration groups: inside the package when installed, beside it in a checkout."""
    package = Path(pipeline.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str], conf_dirs: Sequence[Path] = (), defaults: Sequence[str] = ()) -> dict[str, Any]:
    """The values that ``config.yaml``, the chosen groups and the overrides add up to.

    Args:
        overrides: ``group=choice``, ``group=FILE.yaml`` and ``path.to.key=value``; keys need not be in any file.
            ``key=+N`` comes out as the string ``"+N"``.
        conf_dirs: folders of groups that go before the shipped ones.
        defaults: overrides that a command starts from; they give way to the user's.

    Raises:
        ConfigError: a choice or value that cannot be read, with the nearest known choice.
    """
    folders = _folders(conf_dirs)
    parsed = parse_overrides(overrides, conf_dirs)
    chosen = {override.key for override in parsed}
    merged = [override for override in parse_overrides(defaults, conf_dirs) if override.key not in chosen] + parsed
    texts = [override.text for override in merged]
    texts.append(f"hydra.searchpath=[{','.join(_quote(f'file://{folder}') for folder in folders)}]")
    try:
        # Hydra looks for config.yaml in one folder only, and there before all others for everything else.
        with tempfile.TemporaryDirectory() as main:
            shutil.copy(next(filter(Path.is_file, (folder / "config.yaml" for folder in folders))), main)
            for override in merged:
                if override.file is not None:
                    (Path(main) / override.key).mkdir(exist_ok=True)
                    shutil.copy(override.file, Path(main) / override.key)
            with initialize_config_dir(main, job_name="distill", version_base=None):
                config = hydra_compose("config", overrides=texts)
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingConfigException as error:
        raise _missing_choice(error, merged) from None
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"the configuration cannot be put together: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config.yaml: expected keys and values, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def parse_overrides(overrides: Sequence[str], conf_dirs: Sequence[Path] = ()) -> list[ParsedOverride]:
    """Splits overrides into choices of groups and values.

    Raises:
        ConfigError: lists every override that cannot be read.
    """
    groups = _groups(_folders(conf_dirs))
    parsed: list[ParsedOverride] = []
    problems: list[str] = []
    for text in overrides:
        try:
            parsed.append(_parse(text, groups))
        except ConfigError as error:
            problems.append(error.message)
    seen: set[str] = set()
    for override in parsed:
        if override.is_group and override.key in seen:
            problems.append(f"{override.key} is chosen more than once; give it once")
        seen.add(override.key)
    if problems:
        message = problems[0] if len(problems) == 1 else "\n  - ".join(["overrides that cannot be read:", *problems])
        raise ConfigError(message, problems=problems)
    return parsed


def _parse(text: str, groups: set[str]) -> ParsedOverride:
    if "=" not in text and not text.startswith("~"):
        near = difflib.get_close_matches(text, groups, n=1)
        hint = f"; did you mean {near[0]}=...?" if near else ""
        raise ConfigError(f"{text}: expected group=choice or path.to.key=value{hint}")
    extension = _EXTENSION.fullmatch(text)
    if extension:  # Hydra would read +5 as 5
        return ParsedOverride(extension[1], False, f"++{extension[1]}='{extension[2]}'")
    override = _read(text)
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"{text}: Hydra's own settings are not used here; remove it")
    if override.is_sweep_override():
        raise ConfigError(
            f"{text}: expected one value, got several; quote it (\"{key}='...'\") or write a list ([a,b])"
        )
    is_group = key in groups and not isinstance(override.value(), dict)
    if is_group and not override.is_delete() and not isinstance(override.value(), str | QuotedString):
        raise ConfigError(f"{text}: expected the name of a choice of group {key}, got {text.partition('=')[2]}")
    if is_group and str(override.value()).endswith((".yaml", ".yml")):
        refuse_uri(key, str(override.value()))
        file = Path(str(override.value())).expanduser()
        if not file.is_file():
            raise ConfigError(f"{text}: there is no such file; give a file of group {key}, or the name of a choice")
        return ParsedOverride(key, True, f"{key}={_quote(file.stem)}", file)
    source = override.input_line or text
    plain = not text.startswith(("+", "~"))
    return ParsedOverride(key, is_group, f"++{source}" if plain and not is_group else source)


def _read(text: str) -> Override:
    key, _, value = text.partition("=")
    try:
        return _parse_hydra(text)
    except (HydraException, ValueError) as error:
        # Paths and addresses hold characters of Hydra's grammar (~, =, #, parentheses): those are plain strings.
        if not value.startswith(("[", "{", "'", '"')) and "${" not in value:
            with contextlib.suppress(HydraException, ValueError):
                return _parse_hydra(f"{key}={_quote(value)}")
        raise ConfigError(
            f"{text}: cannot be read ({_first_line(error)}); expected key=value, with quotes inside those of the shell "
            f"where the value is text: \"{key}='...'\""
        ) from None


def _parse_hydra(text: str) -> Override:
    override: Override = OverridesParser.create().parse_override(text)
    return override


def _folders(conf_dirs: Sequence[Path]) -> list[Path]:
    for folder in conf_dirs:
        refuse_uri("--conf", str(folder))
        if not folder.is_dir():
            raise ConfigError(f"--conf {folder}: expected a folder of configuration groups, found none; check the path")
    return [*(folder.resolve() for folder in conf_dirs), shipped_conf()]


def _groups(folders: Sequence[Path]) -> set[str]:
    return {group.name for folder in folders for group in folder.iterdir() if group.is_dir()}


def _missing_choice(error: MissingConfigException, overrides: Sequence[ParsedOverride]) -> ConfigError:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    given = any(override.is_group and override.key == group for override in overrides)
    where = f"{group}={choice}" if given else f"{group}: {choice} (named in a defaults list)"
    options = sorted(error.options or ())
    near = difflib.get_close_matches(choice, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f" Known: {', '.join(options)}." if options else ""
    return ConfigError(f"{where}: no such choice in group {group}{hint}{'' if hint else '.'}{known}")


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _first_line(error: BaseException) -> str:
    cause: BaseException = error
    while not str(cause).strip() and cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(cause).__name__
