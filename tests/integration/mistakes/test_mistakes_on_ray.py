"""The mistakes that show only where there is a cluster."""

from __future__ import annotations

import json

import pytest

from pipeline.cli.main import main
from tests.integration.mistakes import on_ray
from tests.integration.mistakes.table import CASES, Place, Row, read_table

assert on_ray  # importing it fills CASES
ROWS = [row for row in read_table() if row.mistake in CASES and CASES[row.mistake].on_ray]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("row", [pytest.param(row, id=row.mistake) for row in ROWS])
def test_mistake_on_ray(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = CASES[row.mistake].make(place)
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    assert code == row.exit_code, said.err
    assert row.matches(said.err), said.err
    assert len(said.err.splitlines()) == 1, said.err
    result = json.loads((place.folder / "runs" / "new" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", row.exit_code)
