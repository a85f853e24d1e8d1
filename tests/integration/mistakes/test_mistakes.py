"""Mistakes, each answered as the tables say: in one sentence, with its exit code, before anything is started."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.cli.main import main
from tests.integration.mistakes.table import CASES, Place, Row, read_table

for _file in sorted(Path(__file__).parent.glob("[io]n_*.py")):
    importlib.import_module(f"tests.integration.mistakes.{_file.stem}")  # which fills CASES
ROWS = read_table()


def test_every_row_has_its_case_and_every_case_its_row() -> None:
    names = [row.mistake for row in ROWS]
    assert len(names) == len(set(names)) >= 35
    assert set(names) == set(CASES)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.mistake) for row in ROWS if row.mistake in CASES and not CASES[row.mistake].on_ray]
)
def test_mistake(row: Row, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[row.mistake]
    monkeypatch.setitem(sys.modules, "pipeline.cluster.session", NoRay("pipeline.cluster.session"))
    arguments = case.make(place)
    before = files_below(place.folder)
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    assert code == row.exit_code, said.err
    assert row.matches(said.err), said.err
    assert len(said.err.splitlines()) == case.num_lines, said.err
    if row.exit_code == 2:
        assert files_below(place.folder) == before
        assert not (place.folder / "runs" / "new").exists()
        assert not list(place.folder.glob("*:"))  # a URI that was taken for a path
    elif case.run is not None:
        result = json.loads((place.folder / case.run / "result.json").read_text())
        assert (result["status"], result["exit_code"]) == ("failed", 1)
        assert result["error"] in said.err
    for check in place.checks:
        check()


class NoRay(ModuleType):
    """Stands for the module that starts Ray or joins one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by whoever looks at all modules
            raise AttributeError(name)
        raise AssertionError(f"{name} was asked for: Ray would have been started")


def files_below(folder: Path) -> set[str]:
    """What a refused command must not have added to; Python keeps the bytecode of a user's module beside it."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
