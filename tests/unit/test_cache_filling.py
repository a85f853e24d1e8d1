"""teacher.source=fill in one process: computes and trains, seals, then reads; whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli.main import main
from pipeline.contracts.events import read_events
from pipeline.data.cache import FillWriter, PartWriter
from pipeline.models import Teacher
from pipeline.training import read_state

VIEWS = 2
ROWS, BATCH, EPOCHS = 1258, 64, 4
LEFT = ROWS % BATCH  # rows of an epoch that are in no block
COMMON = [
    *("teacher=mlp", "teacher.hidden=[16]", "student=mlp", "student.hidden=[8]", "cluster=inprocess"),
    *(f"train.batch_size={BATCH}", "data.augment.crop_padding=1", f"data.num_views={VIEWS}", "cache.dtype=float32"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student that learned from it online, and a cache."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train-teacher", *COMMON, "train.epochs=1", f"run.dir={folder / 'teacher'}"]) == 0
    assert distill(folder, "online", "teacher.source=online") == 0
    assert (
        main(["cache", "build", *taught(folder), f"cache.path={folder / 'built'}", f"run.dir={folder / 'build'}"]) == 0
    )
    return folder


def taught(runs: Path) -> list[str]:
    return [*COMMON, f"teacher.checkpoint={runs / 'teacher'}", f"train.epochs={EPOCHS}"]


def distill(runs: Path, name: str, *overrides: str) -> int:
    return main(["distill", *taught(runs), f"run.dir={runs / name}", *overrides])


def fill(runs: Path, name: str, *overrides: str) -> int:
    return distill(runs, name, "teacher.source=fill", f"cache.path={runs / f'cache-{name}'}", *overrides)


def assert_same_weights(runs: Path, name: str) -> None:
    """As the student that learned online, at the end, to the bit."""
    expected, found = (read_state(runs / run / "checkpoints" / "last") for run in ("online", name))
    assert expected["step"] == found["step"]
    for key, weights in expected["network"].items():
        torch.testing.assert_close(weights, found["network"][key], rtol=0, atol=0)


def assert_same_cache(runs: Path, name: str) -> dict[str, Any]:
    """As the one that was built before, part by part; returns the manifest."""
    (built,), (filled,) = ((runs / cache).iterdir() for cache in ("built", f"cache-{name}"))
    assert built.name == filled.name
    names = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert {str(path.relative_to(filled)) for path in filled.rglob("*") if path.is_file()} == names
    for part in names:
        if part.endswith(".arrow"):
            assert (built / part).read_bytes() == (filled / part).read_bytes()
    manifest: dict[str, Any] = json.loads((filled / "manifest.json").read_text())
    assert manifest["teacher_accuracy"] == json.loads((built / "manifest.json").read_text())["teacher_accuracy"]
    return manifest


def test_filled_equals_online_and_built(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    call = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, inputs: asked.append(len(inputs)) or call(self, inputs))
    assert fill(runs, "filled") == 0
    assert_same_weights(runs, "filled")
    assert_same_cache(runs, "filled")
    assert sum(asked) == VIEWS * ROWS  # each view once; validation and test are known from the run online
    stages = [event.data for event, _ in read_events(runs / "filled" / "events.jsonl") if event.kind == "stage"]
    assert f"{VIEWS * LEFT} rows were in no block" in next(
        e["detail"] for e in stages if e["name"] == "cache" and e["detail"][0].isdigit()
    )

    # Where there is a cache, it is read from the beginning.
    asked.clear()
    assert fill(runs, "again", f"cache.path={runs / 'cache-filled'}") == 0
    assert not asked
    assert_same_weights(runs, "again")


@pytest.mark.parametrize("at", [3, 25, 2 * (ROWS // BATCH) - 1])
def test_a_run_that_is_stopped_while_it_fills_goes_on(runs: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, write = f"stopped-{at}", FillWriter.write

    def fail(self: FillWriter, position: int, *block: Any) -> None:
        if position == at:
            raise RuntimeError("stopped by the test")
        write(self, position, *block)

    monkeypatch.setattr(FillWriter, "write", fail)
    assert fill(runs, name, "train.checkpoint_every=5") == 1
    monkeypatch.undo()
    assert main(["distill", f"resume={runs / name}"]) == 0
    assert_same_weights(runs, name)
    assert_same_cache(runs, name)


def test_a_run_that_is_stopped_while_it_seals_goes_on(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = PartWriter.write_encoded

    def fail(self: PartWriter, view: int, *part: Any) -> None:
        if view == 1:
            raise RuntimeError("stopped by the test")
        write(self, view, *part)

    monkeypatch.setattr(PartWriter, "write_encoded", fail)
    assert fill(runs, "sealing") == 1
    monkeypatch.undo()
    assert not list((runs / "cache-sealing").rglob("manifest.json"))
    assert main(["distill", f"resume={runs / 'sealing'}"]) == 0
    assert_same_weights(runs, "sealing")
    assert_same_cache(runs, "sealing")


def test_what_a_fill_leaves_is_no_cache(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: PartWriter, *part: Any) -> None:
        raise RuntimeError("stopped by the test")

    monkeypatch.setattr(PartWriter, "write_encoded", fail)
    assert fill(runs, "left") == 1
    monkeypatch.undo()
    path = f"cache.path={runs / 'cache-left'}"
    capsys.readouterr()
    assert main(["cache", "info", path, "cluster=inprocess"]) == 0
    assert "incomplete" in capsys.readouterr().out
    assert distill(runs, "refused", "teacher.source=cached", path) == 2
    assert "is not complete" in capsys.readouterr().err
    assert main(["cache", "prune", path, "name=incomplete"]) == 0
    assert not list((runs / "cache-left").rglob("*.arrow"))


def test_a_fill_that_would_never_be_read_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fill(runs, "short", f"train.epochs={VIEWS}") == 2
    assert f"train.epochs: expected more than {VIEWS}" in capsys.readouterr().err
    assert not (runs / "short").exists()
    assert not (runs / "cache-short").exists()
