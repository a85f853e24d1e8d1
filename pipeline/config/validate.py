"""From plain values to a ``Config``; everything that is wrong is reported at once, by path."""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.places import find_uris
from pipeline.config.rules import Problem, check_rules
from pipeline.config.schema import Config, config_class, config_from_dict, drop_path, get_path, models_in
from pipeline.errors import ConfigError

# What pydantic calls an error -> what was expected. Anything else falls back on pydantic's own words.
_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "literal_error": "one of {expected}",
    "greater_than": "a value > {gt}",
    "greater_than_equal": "a value >= {ge}",
    "less_than": "a value < {lt}",
    "less_than_equal": "a value <= {le}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "at least {min_length} characters",
    "union_tag_invalid": "one of {expected_tags}",
}


def build_config(raw: Mapping[str, Any], command: str | None) -> Config:
    """Validates plain values and checks the rules over several fields.

    Args:
        command: whose rules; none: only the fields themselves are checked.

    Raises:
        ConfigError: lists every problem with its path, what was expected and what was given.
    """
    problems = [*_non_finite(raw), *(Problem(path, text) for path, text in find_uris(raw))]
    checkable = _without(raw, problems)  # JSON has no infinity, and no field wants one
    try:
        config = config_from_dict(checkable)
    except ValidationError as error:
        problems += _describe(error, checkable)
        problems += _check_remaining(raw, command, problems)
    else:
        reported = {problem.path for problem in problems}
        problems += [problem for problem in check_rules(config, command) if problem.path not in reported]
    if problems:
        raise _config_error(problems)
    return config


def _config_error(problems: list[Problem]) -> ConfigError:
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        return ConfigError(lines[0], problems=lines)
    return ConfigError("\n  - ".join([f"{len(lines)} problems in the configuration:", *lines]), problems=lines)


def _check_remaining(raw: Mapping[str, Any], command: str | None, bad: Sequence[Problem]) -> list[Problem]:
    """Problems of the rules, as far as what is left without the bad values can be validated."""
    try:
        config = config_from_dict(_without(raw, bad))
    except ValidationError:
        return []
    # A rule that reads a dropped value sees its default; its own field was reported already.
    reported = {problem.path for problem in bad}
    return [problem for problem in check_rules(config, command) if problem.path not in reported]


def _without(raw: Mapping[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    remaining = copy.deepcopy(dict(raw))
    for problem in problems:
        drop_path(remaining, re.sub(r"(\.\d+)+$", "", problem.path))  # a list goes as a whole
    return remaining


def _non_finite(raw: Any, path: str = "") -> Iterator[Problem]:
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from _non_finite(value, f"{path}.{key}" if path else str(key))
    elif isinstance(raw, list | tuple):
        for index, value in enumerate(raw):
            yield from _non_finite(value, f"{path}.{index}")
    elif isinstance(raw, float) and not math.isfinite(raw):
        yield Problem(path, f"expected a finite number, got {raw}")


def _describe(error: ValidationError, raw: Mapping[str, Any]) -> list[Problem]:
    expected: dict[str, list[str]] = {}
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        path = _path(detail, raw)
        if detail["type"] == "extra_forbidden":
            problems.append(Problem(path, f"unknown key{_nearest(path, raw)}"))
        elif detail["type"] == "missing" and isinstance(detail["loc"][-1], int):
            path, _, index = path.rpartition(".")
            expected.setdefault(path, []).append(f"at least {int(index) + 1} entries")
        elif detail["type"] == "missing":
            problems.append(Problem(path, f"must be given ({path}=...)"))
        elif detail["type"] == "union_tag_not_found":
            problems.append(_choice_missing(path, detail))
        elif detail["type"] == "value_error":
            problems.append(Problem(path, str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"]))
        else:
            expected.setdefault(path, []).append(_expectation(detail))
    for path, alternatives in expected.items():  # a union has one error per member
        problems.append(Problem(path, f"expected {' or '.join(dict.fromkeys(alternatives))}, {_got(path, raw)}"))
    return problems


def _path(detail: ErrorDetails, raw: Mapping[str, Any]) -> str:
    """Dotted path as a user writes it: pydantic also names the chosen member of a union."""
    location = list(detail["loc"])
    if len(location) > 1 and isinstance(get_path(raw, f"{location[0]}.name"), str) and location[0] in _UNIONS:
        del location[1]
    node: Any = raw
    path: list[str] = []
    for position, key in enumerate(location):
        known = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ()
        if key in known:
            node = node[key]
        elif not (position == len(location) - 1 and detail["type"] == "missing"):
            continue
        path.append(str(key))
    if detail["type"] == "union_tag_invalid":
        path.append("name")
    return ".".join(path)


_UNIONS = frozenset({"data", "teacher", "student", "loss"})


def _choice_missing(path: str, detail: ErrorDetails) -> Problem:
    if isinstance(detail["input"], Mapping):
        return Problem(f"{path}.name", f"must be given; choose with {path}=<name>")
    return Problem(path, f"expected keys and values, got {_show(detail['input'])}")


def _expectation(detail: ErrorDetails) -> str:
    phrase = _EXPECTED.get(detail["type"])
    if phrase is None:
        return detail["msg"][:1].lower() + detail["msg"][1:]
    return phrase.format(**{key: _plain(value) for key, value in detail.get("ctx", {}).items()})


def _got(path: str, raw: Mapping[str, Any]) -> str:
    value = _value(path, raw)
    text = f"got {_show(value)}"
    if path.endswith(".name") and isinstance(value, str) and path.removesuffix(".name") in _UNIONS:
        near = difflib.get_close_matches(value, _members(path.removesuffix(".name")), n=1)
        return text + (f"; did you mean {near[0]}?" if near else "")
    if path in ("run.name", "tracking.experiment") and isinstance(value, int | float) and not isinstance(value, bool):
        text += f"""; quote it on the command line: "{path}='{value}'\""""
    return text


def _value(path: str, raw: Any) -> Any:
    for key in path.split("."):
        raw = raw[int(key)] if isinstance(raw, list) else raw[key]
    return raw


def _plain(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the string {text}" if isinstance(value, str) else text


# --- the nearest known name ---------------------------------------------------------------------------------------


def _nearest(path: str, raw: Mapping[str, Any]) -> str:
    """``; did you mean train.epochs?``: a close name beside it, the same name elsewhere, or a close path."""
    known = list(_known_paths(config_class(), raw))
    parent, _, leaf = path.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    leaves = {other.rpartition(".")[2]: other for other in siblings}
    near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]
    near += [other for other in known if other.rpartition(".")[2] == leaf]
    near += difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(sorted(siblings))}" if siblings else ""


def _known_paths(model: type[BaseModel], raw: Any, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        value = raw.get(name) if isinstance(raw, Mapping) else None
        nested = _nested_model(field.annotation, value)
        if nested is not None:
            yield from _known_paths(nested, value, f"{prefix}{name}.")


def _nested_model(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The parameter model behind a field; of several, the one that ``value`` names."""
    models = models_in(annotation)
    if len(models) > 1:
        name = value.get("name") if isinstance(value, Mapping) else None
        models = [model for model in models if model.model_fields["name"].default == name]
    return models[0] if models else None


def _members(union: str) -> list[str]:
    return [member.model_fields["name"].default for member in models_in(config_class().model_fields[union].annotation)]
