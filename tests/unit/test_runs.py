"""Run folders: what is the same run, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.runs import default_run_name, open_run
from pipeline.config.stored import hash_config, list_differences, read_run
from pipeline.errors import ConfigError, RunError
from tests.unit.runs import TEACHER, build, go_on, load, open_and_close

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("working_folder")

# --- a new run ----------------------------------------------------------------------------------------------------


def test_a_new_run_has_its_files(tmp_path: Path) -> None:
    with open_run("distill", build("train.epochs=3"), provenance=lambda: {"data": "abc", "teacher": "def"}) as run:
        assert run.dir.parent == tmp_path / "runs"
        assert run.dir.name.endswith("-digits-small_cnn-small_cnn-kd-s0")
        assert (run.resumed, run.finished) == (False, False)
        assert run.read_status() == "new"
        stored = yaml.safe_load((run.dir / "config.yaml").read_text())
        assert stored == run.config.to_dict()
        assert stored["train"]["epochs"] == 3
        facts = run.read_provenance()
        assert (facts["data"], facts["teacher"], facts["config_hash"]) == ("abc", "def", run.config_hash)
        assert facts["versions"]["torch"]
        assert json.loads((run.dir / "run.json").read_text())["command"] == "distill"
        assert run.resume_command == f"python -m pipeline distill resume={run.dir}"
        assert not list(run.dir.glob("*.tmp"))


def test_two_runs_of_one_second_have_two_folders() -> None:
    assert len({open_and_close().dir for _ in range(3)}) == 3


def test_what_is_settled_at_the_start(tmp_path: Path) -> None:
    config = open_and_close("run.dir=here", "data=parquet", "data.path=~/data", "cluster.num_workers=3").config
    assert config.run.dir == str(tmp_path / "here")
    assert config.data.path == str(Path.home() / "data")  # type: ignore[attr-defined]
    assert config.teacher.checkpoint == str(tmp_path / "teacher.safetensors")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert config.train.blocks_per_step == 3
    assert open_and_close("tracking.uri=sqlite:///db/x.db").config.tracking.uri == f"sqlite:///{tmp_path}/db/x.db"
    for uri in ("http://host:5000", "databricks"):
        assert open_and_close(f"tracking.uri={uri}").config.tracking.uri == uri
    s3 = open_and_close("data=parquet", "data.path=s3://bucket/data")
    assert s3.config.data.path == "s3://bucket/data"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "command", "name"),
    [
        (["teacher=resnet20"], "distill", "digits/small_cnn<-resnet20/kd/s0"),
        (["loss=cross_entropy", "run.seed=3"], "distill", "digits/small_cnn/cross_entropy/s3"),
        (["teacher=resnet20", "loss=cross_entropy"], "train-teacher", "digits/teacher-resnet20/cross_entropy/s0"),
        (["student=torchvision", "student.arch=resnet18"], "distill", "digits/resnet18<-small_cnn/kd/s0"),
    ],
)
def test_default_names(overrides: list[str], command: str, name: str) -> None:
    assert default_run_name(build(*overrides, command=command), command) == name
    assert open_and_close(*overrides, command=command).name == name
    assert open_and_close(*overrides, "run.name=mine", command=command).name == "mine"


# --- the same run -------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_gone_on_with() -> None:
    facts: Callable[[], dict[str, Any]] = lambda: {"data": "first"}  # noqa: E731
    first = open_run("distill", build("run.dir=a"), provenance=facts)
    first.close()

    def fail() -> dict[str, Any]:
        raise AssertionError("provenance belongs to the start")

    with open_run("distill", build("run.dir=a"), provenance=fail) as second:
        assert (second.resumed, second.finished) == (True, False)
        assert second.config_hash == first.config_hash
        assert second.read_provenance()["data"] == "first"


def test_a_finished_run_says_so() -> None:
    open_and_close("run.dir=a", finish=True)
    again = open_and_close("run.dir=a")
    assert (again.resumed, again.finished) == (False, True)
    assert again.read_result()["metrics"] == {"val/top1": 0.5}


def test_another_configuration_is_refused_with_what_differs() -> None:
    open_and_close("run.dir=a")
    with pytest.raises(RunError) as caught:
        open_and_close("run.dir=a", "loss.temperature=2", "train.optimizer.lr=0.2", "student=mlp")
    assert "loss.temperature: 4.0 -> 2.0" in caught.value.details["differences"]
    assert "train.optimizer.lr: 0.1 -> 0.2" in caught.value.message
    assert "student.name: small_cnn -> mlp" in caught.value.message
    assert "student.width: 32 -> (absent)" in caught.value.message
    assert "give another run.dir" in caught.value.message


def test_another_command_is_refused() -> None:
    open_and_close("run.dir=a", "loss=cross_entropy")
    with pytest.raises(RunError, match=r"holds a run of distill, not train-teacher; give another run.dir"):
        open_and_close("run.dir=a", "loss=cross_entropy", command="train-teacher")


def test_where_it_runs_may_change() -> None:
    first = open_and_close("run.dir=a")
    second = open_and_close(
        "run.dir=a",
        "run.name=other",
        "cluster=driver",
        "cluster.num_gpus_per_worker=1",
        "tracking.uri=http://host:5000",
        "teacher.pool.max=4",
    )
    assert second.resumed
    assert second.config_hash == first.config_hash
    assert second.name == first.name
    assert second.config.tracking.uri == "http://host:5000"
    assert second.config.teacher.pool.max == 4


def test_the_blocks_of_a_step_stay_as_they_began() -> None:
    assert open_and_close("run.dir=a", "cluster.num_workers=4").config.train.blocks_per_step == 4
    assert open_and_close("run.dir=a", "cluster.num_workers=2").config.train.blocks_per_step == 4
    with pytest.raises(ConfigError, match=r"expected a multiple of cluster.num_workers=3, got 4"):
        open_and_close("run.dir=a", "cluster.num_workers=3")
    with pytest.raises(RunError, match=r"train.blocks_per_step: 4 -> 8"):
        open_and_close("run.dir=a", "train.blocks_per_step=8")


def test_the_hash_depends_on_what_is_computed_only() -> None:
    base = hash_config(build())
    assert len(base) == 12
    assert int(base, 16) >= 0
    assert hash_config(build("train.optimizer.lr=0.1", "loss.temperature=4")) == base  # the defaults, and 4 for 4.0
    assert hash_config(build("cluster=driver", "run.dir=x", "run.name=y", "teacher.pool.max=2")) == base
    for change in ("run.seed=1", "train.epochs=11", "loss.temperature=3", "evaluation.test=false", "teacher.width=8"):
        assert hash_config(build(change)) != base


def test_the_hash_is_the_same_in_another_process() -> None:
    code = (
        "from pipeline.config.compose import compose; from pipeline.config.validate import build_config;"
        "from pipeline.config.stored import hash_config;"
        f"print(hash_config(build_config(compose(['run.seed=7', {TEACHER!r}]), 'distill')))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == hash_config(build("run.seed=7"))


def test_differences_name_the_paths() -> None:
    assert list_differences(build(), build()) == []
    assert list_differences(build(), build("train.epochs=12")) == ["train.epochs: 10 -> 12"]


# --- resume=RUN and +N --------------------------------------------------------------------------------------------


def test_resume_takes_the_stored_configuration() -> None:
    run = open_and_close("loss.temperature=2", "student=mlp", "cluster.num_workers=2")
    for name in (str(run.dir), run.dir.name, f"runs/{run.dir.name}"):
        again = go_on(f"resume={name}")
        assert again.resumed
        assert again.dir == run.dir
        assert again.config == run.config


def test_resume_with_another_cluster() -> None:
    run = open_and_close("cluster.num_workers=2")
    again = go_on(f"resume={run.dir}", "cluster.num_workers=1", "tracking.required=false")
    assert again.config.cluster.num_workers == 1
    assert again.config.train.blocks_per_step == 2
    assert not again.config.tracking.required
    in_driver = go_on(f"resume={run.dir}", "cluster=driver")
    assert in_driver.config.cluster == build("cluster=driver").cluster
    assert go_on(f"resume={run.dir}").config.cluster.num_workers == 2  # the next one starts from the beginning again


def test_resume_with_another_loss_is_refused() -> None:
    run = open_and_close()
    with pytest.raises(RunError, match=r"loss.temperature: 4.0 -> 2.0"):
        go_on(f"resume={run.dir}", "loss.temperature=2")
    with pytest.raises(RunError, match=r"student.name: small_cnn -> mlp"):
        go_on(f"resume={run.dir}", "student=mlp")
    with pytest.raises(ConfigError, match=r"experiment=digits_demo: cannot be combined with resume="):
        go_on(f"resume={run.dir}", "experiment=digits_demo")
    with pytest.raises(ConfigError, match=r"run.dir: cannot be combined with resume="):
        go_on(f"resume={run.dir}", "run.dir=b")


def test_a_moved_run_is_resumed_where_it_is(tmp_path: Path) -> None:
    run = open_and_close("run.dir=a")
    (tmp_path / "b").mkdir()
    moved = run.dir.rename(tmp_path / "b" / "a")
    assert go_on("resume=b/a").dir == moved


def test_extending_a_finished_run() -> None:
    run = open_and_close("run.dir=a", "train.epochs=4", finish=True)
    longer = go_on("resume=a", "train.epochs=+3")
    assert (longer.resumed, longer.finished) == (True, False)
    assert longer.config.train.epochs == 7
    assert longer.config_hash != run.config_hash
    assert longer.read_provenance()["config_hash"] == run.config_hash
    stored = read_run(longer.dir)
    assert (stored.status, stored.config_hash, stored.raw["train"]["epochs"]) == ("new", longer.config_hash, 7)
    assert go_on("resume=a").config.train.epochs == 7  # a second start does not extend again


def test_extending_by_run_dir() -> None:
    open_and_close("run.dir=a", "train.epochs=4", finish=True)
    assert go_on("run.dir=a", TEACHER, "train.epochs=+1").config.train.epochs == 5
    with pytest.raises(RunError, match=r"loss.temperature: 4.0 -> 3.0; train.epochs: 5 -> 6"):
        go_on("run.dir=a", TEACHER, "train.epochs=+1", "loss.temperature=3")


def test_a_larger_total_is_no_extension() -> None:
    open_and_close("run.dir=a", "train.epochs=4")
    with pytest.raises(RunError, match=r"train.epochs: 4 -> 5"):
        go_on("resume=a", "train.epochs=5")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.epochs=+5"], r"train.epochs=\+5: adds to a run that exists; name it with resume=RUN"),
        (["resume=nothing"], r"no run 'nothing': expected a run folder .* at nothing and runs/nothing"),
        (["resume="], r"resume=: expected a run folder"),
        (["resume=a", "resume=b"], r"resume is given 2 times \(a, b\)"),
        (["train.batch_size=+5"], r"train.batch_size: expected an integer, got the string"),
    ],
)
def test_what_cannot_be_resumed(overrides: list[str], sentence: str) -> None:
    with pytest.raises((ConfigError, RunError), match=sentence):
        load(*overrides, TEACHER)


def test_resume_names_the_command_to_use() -> None:
    open_and_close("run.dir=a", "loss=cross_entropy", command="train-teacher")
    with pytest.raises(RunError, match=r"use `python -m pipeline train-teacher resume=a`"):
        load("resume=a")
