"""Checkpoints of a run without Ray are replaced whole, whenever its process ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.checkpoints import find_furthest, read_cursor, write_cursor
from pipeline.contracts.events import Event
from pipeline.training import LocalContext


class Silent:
    def emit(self, event: Event) -> None:
        """Takes events and forgets them."""


class Killed(BaseException):
    """A process that is no more: nothing may catch it."""


def kill_at_call(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes call ``number`` of those that change a folder raise instead, a copy after its first file."""
    calls = [0]

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                if function is copytree:
                    source, target = arguments
                    target.mkdir()
                    shutil.copy(min(source.iterdir()), target)
                raise Killed
            return function(*arguments, **options)

        return counted

    copytree = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", count(copytree))
    monkeypatch.setattr(shutil, "rmtree", count(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", count(Path.rename))
    return calls


@pytest.mark.parametrize("number", range(1, 9))
def test_commit_killed_anywhere_leaves_a_whole_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(step: int) -> Path:
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        (folder / "state.pt").write_text(str(step))
        write_cursor(folder, step, blocks_per_step=1)
        return folder

    def content() -> int:
        folder = context.resume_folder()
        assert folder is not None
        step = read_cursor(folder)
        assert (folder / "state.pt").read_text() == str(step)
        return step

    context = LocalContext(tmp_path / "checkpoints", Silent())
    assert context.resume_folder() is None
    context.commit(write(1), {})
    with monkeypatch.context() as patch:
        calls = kill_at_call(number, patch)
        completed = 1
        try:
            for step in (2, 3):
                context.commit(write(step), {})
                completed = step
        except Killed:
            pass
    assert calls[0] == number, "there is no call of this number: the test covers less than it says"
    assert content() in (completed, completed + 1)
    context.commit(write(9), {})
    assert content() == 9
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last"]


def test_further_checkpoint_kept_elsewhere_counts(tmp_path: Path) -> None:
    """A run may have been carried on under another ``cluster=``, which keeps its checkpoints in another place."""

    def write(name: str, step: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_cursor(folder, step, 2)
        return folder

    elsewhere = write("elsewhere", 5)
    context = LocalContext(tmp_path / "checkpoints", Silent(), start_from=elsewhere)
    assert context.resume_folder() == elsewhere
    context.commit(write("behind", 3), {})
    assert context.resume_folder() == elsewhere
    context.commit(write("ahead", 6), {})
    assert context.resume_folder() == tmp_path / "checkpoints" / "last"
    assert find_furthest([None, tmp_path / "nowhere"]) is None
