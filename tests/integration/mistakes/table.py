"""The tables of README.md beside this, and what a case is: how a mistake is made, and what must hold afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TABLES = Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        mistake: the first cell, by which the case is found.
        exit_code: 2 before work began, 1 after.
        template: what is said, with ``...`` where that varies.
    """

    mistake: str
    exit_code: int
    template: str

    def matches(self, said: str) -> bool:
        """Whether this is what a command wrote to stderr: the kind of error, and what the table says."""
        pattern = re.escape(self.template).replace(r"\.\.\.", ".+")
        return re.fullmatch(rf"\w+Error: {pattern}", " ".join(said.split())) is not None


def read_table() -> list[Row]:
    """The rows of all tables."""
    text = TABLES.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\d) \| `([^`]+)` \|$", text, flags=re.MULTILINE)
    return [Row(mistake, int(exit_code), template) for mistake, exit_code, template in rows]


@dataclass
class Place:
    """Where a mistake is made.

    Attributes:
        folder: the working folder of the command; empty at first.
        teacher: a finished run of ``train-teacher`` on the digits; not to be changed.
        tracking: the override that names a tracking database.
        monkeypatch: undone after the case.
        stack: closed after the case.
        checks: what must hold after the command, besides what holds after every one.
    """

    folder: Path
    teacher: Path
    tracking: str
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack
    checks: list[Callable[[], None]] = field(default_factory=list)

    def train(self, *overrides: str) -> list[str]:
        """A small run of ``train-teacher``."""
        network = ["teacher=mlp", "teacher.hidden=[8]", "train.epochs=1"]
        return ["train-teacher", "run.dir=runs/new", self.tracking, *_without(network, overrides), *overrides]

    def distill(self, *overrides: str) -> list[str]:
        """A small run of ``distill`` from the teacher."""
        networks = ["teacher.width=4", f"teacher.checkpoint={self.teacher}", "student=mlp", "student.hidden=[8]"]
        return [
            "distill", "run.dir=runs/new", self.tracking, "train.epochs=1", *_without(networks, overrides), *overrides
        ]  # fmt: skip


def _without(defaults: list[str], overrides: tuple[str, ...]) -> list[str]:
    """The defaults that say nothing about a network which the overrides choose."""
    chosen = {text.partition("=")[0] for text in overrides if "." not in text.partition("=")[0]}
    return [text for text in defaults if text.split("=")[0].split(".")[0] not in chosen or "checkpoint" in text]


@dataclass(frozen=True)
class Case:
    """A row's case.

    Attributes:
        make: makes the mistake; returns the arguments of the command.
        num_lines: that the answer has; one, unless there are several problems.
        run: folder, below the working folder, of the run that fails where work had begun; none where no run fails.
        on_ray: whether it shows only where there is a cluster.
    """

    make: Callable[[Place], list[str]]
    num_lines: int = 1
    run: str | None = "runs/new"
    on_ray: bool = False


CASES: dict[str, Case] = {}

Make = Callable[[Place], list[str]]


def mistake(
    name: str, *, num_lines: int = 1, run: str | None = "runs/new", on_ray: bool = False
) -> Callable[[Make], Make]:
    """Registers the case of the row ``name``."""

    def register(make: Make) -> Make:
        assert name not in CASES, name
        CASES[name] = Case(make, num_lines, run, on_ray)
        return make

    return register
