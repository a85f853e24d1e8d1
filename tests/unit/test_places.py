"""A URI where a path has to be is refused, and nothing of that name is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.config.load import load_config, load_stored
from pipeline.config.places import find_uris, refuse_uri
from pipeline.config.request import Request
from pipeline.config.stored import read_run
from pipeline.errors import ConfigError
from tests.unit.runs import open_and_close

URI = "s3://bucket/folder"
WEIGHTS = "teacher.checkpoint=weights.pt"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"run.dir={URI}", WEIGHTS],
        [f"teacher.checkpoint={URI}"],
        [f"student.checkpoint={URI}", WEIGHTS],
        ["student=custom", "student.factory=nets:build", f"student.code={URI}", WEIGHTS],
        ["teacher=custom", "teacher.factory=nets:build", f"teacher.code={URI}", WEIGHTS],
        ["loss=ptloss", f"loss.perturbation_from={URI}", WEIGHTS],
        ["loss=combined", f"loss.parts={{ptloss: {{perturbation_from: '{URI}'}}, dist: {{}}}}", WEIGHTS],
        ["data=torchvision", "data.dataset=MNIST", f"data.root={URI}", WEIGHTS],
        [f"tracking.uri=sqlite:///{URI}/mlflow.db", WEIGHTS],
        [f"resume={URI}"],
        [f"student={URI}/mine.yaml", WEIGHTS],
        ["run.dir=file:///runs/new", WEIGHTS],
        ["run.dir=s3:/bucket/folder", WEIGHTS],
    ],
)
def test_a_uri_is_no_path(overrides: list[str], working_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Request("distill", tuple(overrides)))
    message = caught.value.message
    assert "expected a path on a disk of this machine or on storage that it mounts, got " in message
    assert message.endswith("so give such a path")
    assert "\n" not in message
    assert list(working_folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", f"run={URI}"],
        ["predict", f"run={URI}", "out=x.parquet"],
        ["predict", "run=runs/student", f"out={URI}/x.parquet"],
        ["search show", f"run={URI}"],
        ["search show", URI],
        ["search show", "run=runs/search", f"out={URI}.csv"],
        ["doctor", f"run.dir={URI}"],
        ["validate", "--conf", URI],
    ],
)
def test_commands_refuse_it_before_anything_else(
    arguments: list[str], working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments[0].split(), *arguments[1:]]) == 2
    assert "expected a path on a disk of this machine" in capsys.readouterr().err
    assert list(working_folder.iterdir()) == []


def test_several_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems in the configuration:") as caught:
        load_config(Request("distill", (f"run.dir={URI}", f"teacher.checkpoint={URI}")))
    problems = {problem.partition(":")[0] for problem in caught.value.details["problems"]}
    assert problems == {"run.dir", "teacher.checkpoint"}


def test_a_stored_run_is_asked_the_same(working_folder: Path) -> None:
    run = open_and_close("run.dir=runs/student")
    with pytest.raises(ConfigError, match=r"^student.checkpoint: expected a path"):
        load_stored(read_run(run.dir), [f"student.checkpoint={URI}"])


def test_what_may_be_an_address_stays_one() -> None:
    raw = {
        "data": {"path": URI},
        "cache": {"path": URI},
        "tracking": {"uri": "http://host:5000"},
        "student": {"kwargs": {"checkpoint": URI}, "checkpoint": None},
        "run": {"dir": "/shared/s3:/runs"},
    }
    assert list(find_uris(raw)) == []
    assert list(find_uris({"tracking": {"uri": "sqlite:////shared/mlflow.db"}})) == []
    refuse_uri("out", "C:/x.parquet")


def test_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_uri("out", "s3://key:secret@bucket/x?secret_key=secret")
    assert "secret" not in caught.value.message
