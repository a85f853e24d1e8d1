"""Every key of the configuration in words, from the parameter models, and every choice, from the files of ``conf/``."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.compose import shipped_conf
from pipeline.config.schema import config_class, models_in

_WORDS = {int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, and its type, default and meaning in words, with code between backticks."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Choice:
    """A file of a group.

    Attributes:
        label: as typed, ``train=cifar``.
        about: its head comment.
        text: what stands below that.
        values: what it sets, by group and key, but for its name.
    """

    label: str
    about: str
    text: str
    values: dict[str, Any]


def choices_of(group: str) -> list[Choice]:
    """The choices of a group, in order of name; none where it has no folder."""
    return [_read_choice(group, file) for file in sorted((shipped_conf() / group).glob("*.yaml"))]


def _read_choice(group: str, file: Path) -> Choice:
    lines = file.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = [line.removeprefix("#").strip() for line in lines[:end]]
    values = {key: value for key, value in yaml.safe_load("\n".join(lines)).items() if key not in ("name", "defaults")}
    if values and "@package _global_" not in head:
        values = {group: values}
    about = " ".join(line for line in head if not line.startswith("@package"))
    return Choice(f"{group}={file.stem}", about, "\n".join(lines[end:]), values)


def keys_of(group: str) -> dict[str, list[Key]]:
    """Every key of a group, by the choice that has it; those that all choices have under the empty name."""
    annotation = config_class().model_fields[group].annotation
    models = models_in(annotation)
    if len(models) == 1:
        return {"": list(keys_below(models[0], f"{group}."))}
    by_choice = {model.model_fields["name"].default: list(keys_below(model, f"{group}.")) for model in models}
    first, *others = by_choice.values()
    shared = [key for key in first if all(key in other for other in others)]
    config = yaml.safe_load((shipped_conf() / "config.yaml").read_text(encoding="utf-8"))
    default = next(entry[group] for entry in config["defaults"] if group in entry)
    name = Key(f"{group}.name", _type(Literal[tuple(by_choice)]), code(default), _meaning(models[0], "name"))
    own = {
        choice: [key for key in keys if key not in shared and key.path != name.path]
        for choice, keys in by_choice.items()
    }
    return {"": [name, *shared], **own}


def keys_below(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    """Every key of a model and of those in it; ``KEY`` stands for the names of a mapping."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        default = "must be given" if field.is_required() else show(field.get_default(call_default_factory=True))
        yield Key(path, _type(field.annotation, field.metadata), default, _meaning(model, name))
        for nested in models_in(field.annotation):
            yield from keys_below(nested, f"{path}.KEY." if typing.get_origin(field.annotation) is dict else f"{path}.")


def _meaning(model: type[BaseModel], name: str) -> str:
    """The docstring below the field, or below the field that it overrides."""
    fields = (base.model_fields.get(name) for base in model.__mro__ if issubclass(base, BaseModel))
    found = next((field.description for field in fields if field is not None and field.description), "")
    return " ".join(found.replace("``", "`").split())


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    *most, last = sorted(_alternatives(annotation, metadata), key="none".__eq__)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [entry.metadata if isinstance(entry, FieldInfo) else [entry] for entry in arguments[1:]]
        return _alternatives(arguments[0], [*metadata, *(entry for entries in inner for entry in entries)])
    if origin in (typing.Union, types.UnionType):
        return [words for option in arguments for words in _alternatives(option, metadata)]
    if origin is Literal:
        return [code(str(value)) for value in arguments]
    if origin is tuple:
        number = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return [f"list of {number}{_plural(_type(arguments[0]))}"]
    if origin is dict and arguments[1] in _WORDS:
        return [f"mapping of names to {_plural(_type(arguments[1]))}"]
    if origin is dict or models_in(annotation):
        return ["mapping"]
    if annotation is type(None):
        return ["none"]
    if annotation is bool:
        return ["`true`", "`false`"]
    return [_WORDS[annotation] + _range(metadata)]


def _range(metadata: Sequence[Any]) -> str:
    if any(getattr(bound, "min_length", None) for bound in metadata):
        return ", not empty"
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for name, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}.items()
        for bound in metadata
        if hasattr(bound, name)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _plural(words: str) -> str:
    first, *others = words.split(" ")
    return " ".join((f"{first}s", *others))


def show(value: Any) -> str:
    """A value as one types it."""
    if value is None or isinstance(value, BaseModel):
        return "none" if value is None else "as below"
    size = f" ({value >> 20} MiB)" if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0 else ""
    text = yaml.safe_dump([_plain(value)], default_flow_style=True, sort_keys=False, width=sys.maxsize)
    return code(text[1:-2]) + size


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def code(text: str) -> str:
    """Between backticks."""
    return f"`{text}`"
