"""Coefficients selected by the pool's logits are those of one process, by the command and at the start of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.execution.selection import read_selection
from pipeline.losses import Perturbation
from tests.integration.commands import read_result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("ray_cluster")]

COMMON = ["teacher=mlp", "teacher.hidden=[16]", "data.validation_fraction=0.3", "selection.num_candidates=32"]


def test_by_the_pool_as_in_one_process(tmp_path: Path) -> None:
    """No fit: the student is trained in this process."""
    teacher = tmp_path / "teachers" / "one"
    assert main(["train-teacher", *COMMON, "cluster=inprocess", "train.epochs=3", f"run.dir={teacher}"]) == 0
    taught = [*COMMON, f"teacher.checkpoint={teacher}", "student=mlp", "student.hidden=[8]", "train.epochs=2"]
    # Each in a folder of its own, or the second would find the first one's logits.
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    assert main(["select-perturbation", *taught, "cluster=inprocess", f"run.dir={here}"]) == 0
    assert main(["select-perturbation", *taught, f"run.dir={there}"]) == 0
    assert read_selection(here) == read_selection(there)
    assert Perturbation.read(here) == Perturbation.read(there)

    auto = ["loss=ptloss", "loss.perturbation_from=auto"]
    driver, alone = tmp_path / "driver" / "run", tmp_path / "alone" / "run"
    assert main(["distill", *taught, *auto, "cluster=driver", f"run.dir={driver}"]) == 0
    assert main(["distill", *taught, *auto, "cluster=inprocess", f"run.dir={alone}"]) == 0
    assert read_selection(driver) == read_selection(here)
    assert read_result(driver)["metrics"] == pytest.approx(read_result(alone)["metrics"], abs=1e-6)
