"""``conf/README.md`` says what the parameter models and the files beside it say: every key and every choice."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from pipeline.config.keys import keys_below
from pipeline.config.load import load_config
from pipeline.config.reference import render
from pipeline.config.request import Request
from pipeline.config.schema import config_class
from pipeline.registry import Params
from pipeline.stages.search import SEARCH_DEFAULTS

CONF = Path(__file__).parents[2] / "conf"
TEXT = (CONF / "README.md").read_text(encoding="utf-8")
SCHEMA = config_class().model_json_schema()
CHOICES = sorted(file.relative_to(CONF) for file in CONF.glob("*/*.yaml"))


def rows_of(title: str) -> dict[str, list[str]]:
    """The rows of a section's tables, those of its subsections left out, by what stands in the first cell."""
    section = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines = section[1].splitlines() if section else []
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row] for row in rows}


def models_in(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that a part of the JSON schema may be; ``loss.parts`` has those of other choices, by their names."""
    options = [node, *node.get("anyOf", ()), *node.get("oneOf", ())]
    names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return [SCHEMA["$defs"][name] for name in names if name != "LossParams"]


def paths_below(model: dict[str, Any], prefix: str) -> Iterator[str]:
    """Every key of a model of the JSON schema, which pydantic writes, and not what is tested here."""
    for name, node in model["properties"].items():
        yield f"{prefix}{name}"
        for nested in models_in(node):
            yield from paths_below(nested, f"{prefix}{name}.")
        entries = node.get("additionalProperties")
        for nested in models_in(entries) if isinstance(entries, dict) else ():
            yield from paths_below(nested, f"{prefix}{name}.KEY.")


def test_file_is_what_make_reference_writes() -> None:
    assert render() == TEXT, "conf/README.md is not what the models and files say now: run `make reference`"


@pytest.mark.parametrize("group", SCHEMA["properties"])
def test_every_key_has_type_default_and_meaning(group: str) -> None:
    models = models_in(SCHEMA["properties"][group])
    assert models
    for model in models:
        choice = model["properties"].get("name", {}).get("const")
        rows = {path: row for path, row in (rows_of(group) | rows_of(f"{group}={choice}")).items() if "=" not in path}
        assert set(rows) == set(paths_below(model, f"{group}."))
        for row in rows.values():
            assert len(row) == 4
            assert all(row), f"{row[0]} needs a docstring in its model"
            assert max(map(len, row)) <= 310, f"{row[0]} says too much for a cell"


@pytest.mark.parametrize("file", CHOICES, ids=str)
def test_every_choice_has_a_line(file: Path) -> None:
    label, about = rows_of(file.parent.name)[f"{file.parent.name}={file.stem}"]
    assert label
    assert about.endswith("."), f"conf/{file} needs a comment at its head: a sentence"


def test_words_for_types() -> None:
    class Inner(Params):
        name: Literal["a", "b", "c"] | None = None

    class Outer(Params):
        share: float = Field(default=1.0, gt=0, le=1)
        sizes: tuple[int, ...] = (1, 2)
        pair: tuple[float, float] | None = None
        size_bytes: int | None = Field(default=2**27, ge=1)
        text: str | tuple[str, ...]
        on: bool = False
        inner: Inner = Inner()
        by_name: dict[str, Inner] = Field(default_factory=dict)
        amounts: dict[str, float] = Field(default_factory=dict)

    rows = {key.path: (key.type, key.default) for key in keys_below(Outer, "x.")}
    assert rows == {
        "x.share": ("number > 0 and <= 1", "`1`"),
        "x.sizes": ("list of integers", "`[1, 2]`"),
        "x.pair": ("list of 2 numbers or none", "none"),
        "x.size_bytes": ("integer >= 1 or none", "`134217728` (128 MiB)"),
        "x.text": ("text or list of texts", "must be given"),
        "x.on": ("`true` or `false`", "`false`"),
        "x.inner": ("mapping", "as below"),
        "x.inner.name": ("`a`, `b`, `c` or none", "none"),
        "x.by_name": ("mapping", "`{}`"),
        "x.by_name.KEY.name": ("`a`, `b`, `c` or none", "none"),
        "x.amounts": ("mapping of names to numbers", "`{}`"),
    }


def test_default_is_followed_by_what_choices_set() -> None:
    rows = rows_of("train")
    assert rows["train.optimizer.lr"][2] == "`0.1`; `train=cifar`: `0.05`; `experiment=digits_demo`: `0.05`"
    assert rows["train.optimizer.gamma"][2] == "`0.1`"
    assert rows_of("student=mlp")["student.hidden"][2] == "`[128, 128]`; `experiment=digits_demo`: `[32]`"


def test_links_lead_to_headings() -> None:
    headings = {re.sub(r"[^\w ]", "", title).lower() for title in re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([\w ]+)\)", TEXT))
    assert set(SCHEMA["properties"]) <= links <= headings


def test_introduction_is_true() -> None:
    introduction = TEXT.split("\n## Groups\n")[0].replace("\\\n", " ")
    assert f"`search` with `{' '.join(SEARCH_DEFAULTS)}`" in introduction
    commands = re.findall(r"^python -m pipeline (\S+) (.+)$", introduction, re.MULTILINE)
    assert len(commands) == 2
    for name, overrides in commands:
        load_config(Request(name, tuple(shlex.split(overrides)), ()))
