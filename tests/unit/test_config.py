"""Composition and validation: every shipped file works, and every mistake is answered with path and remedy."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from pipeline.config.compose import compose, shipped_conf
from pipeline.config.schema import Config, config_class, flatten, get_path, set_path
from pipeline.config.validate import build_config
from pipeline.data import DATASETS
from pipeline.errors import ConfigError
from pipeline.losses import LOSSES
from pipeline.models import MODELS
from pipeline.models.teacher import TeacherParams

ROOT = Path(__file__).parents[2]
TEACHER = "teacher.checkpoint=teacher.safetensors"
CONF_FILES = sorted(str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml"))
# What a file leaves to the user.
REQUIRED = {
    "data/image_folder.yaml": ["data.path=data"],
    "data/parquet.yaml": ["data.path=data"],
    "data/torchvision.yaml": ["data.dataset=CIFAR100"],
    "student/custom.yaml": ["student.factory=mine:build"],
    "student/timm.yaml": ["student.arch=resnet18"],
    "teacher/custom.yaml": ["teacher.factory=mine:build"],
    "teacher/timm.yaml": ["teacher.arch=resnet18"],
    "student/torchvision.yaml": ["student.arch=resnet18"],
    "teacher/torchvision.yaml": ["teacher.arch=resnet18"],
}


def build(*overrides: str, command: str = "distill") -> Config:
    return build_config(compose([TEACHER, *overrides]), command)


def problems_of(*overrides: str, command: str = "distill") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(*overrides, command=command)
    return list(caught.value.details["problems"])


# --- what is shipped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONF_FILES)
def test_every_shipped_file_composes_and_validates(file: str) -> None:
    group, _, choice = file.removesuffix(".yaml").rpartition("/")
    choose = [f"{group}={choice}"] if group else []
    config = build(*choose, *REQUIRED.get(file, []), command="validate" if group == "search" else "distill")
    if group in ("data", "teacher", "student", "loss", "cluster"):
        assert getattr(config, group).name == choice


@pytest.mark.parametrize("file", CONF_FILES)
def test_every_shipped_file_says_what_it_is(file: str) -> None:
    lines = (ROOT / "conf" / file).read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ") and not line.startswith("# @package")]
    assert comments
    assert max(map(len, lines)) <= 120


def test_every_registered_component_has_a_file() -> None:
    for group, registry in (("data", DATASETS), ("student", MODELS), ("teacher", MODELS), ("loss", LOSSES)):
        assert {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} == set(registry.names())


def test_defaults() -> None:
    config = build()
    names = (config.data.name, config.teacher.name, config.student.name, config.loss.name, config.cluster.name)
    assert names == ("digits", "small_cnn", "small_cnn", "kd", "ray")
    assert config.run.seed == 0
    assert isinstance(config.teacher, TeacherParams)
    assert config.tracking.uri is None


# --- composing ----------------------------------------------------------------------------------------------------


def test_keys_need_not_be_in_any_file() -> None:
    config = build("train.optimizer.betas=[0.8,0.9]", "cluster.resources_per_worker.fake=2", "train.epochs=7")
    assert config.train.optimizer.betas == (0.8, 0.9)
    assert config.cluster.resources_per_worker == {"fake": 2.0}
    assert config.train.epochs == 7


def test_an_override_beats_the_experiment() -> None:
    assert build("experiment=digits_demo").teacher.width == 64  # type: ignore[attr-defined]
    assert build("experiment=digits_demo", "teacher.width=8").teacher.width == 8  # type: ignore[attr-defined]
    assert build("teacher.width=8", "experiment=digits_demo").teacher.width == 8  # type: ignore[attr-defined]


def test_a_commands_defaults_give_way_to_the_user() -> None:
    assert compose([], defaults=["loss=cross_entropy"])["loss"]["name"] == "cross_entropy"
    assert compose(["loss=logit_mse"], defaults=["loss=cross_entropy"])["loss"]["name"] == "logit_mse"
    assert compose(["experiment=digits_demo"], defaults=["loss=cross_entropy"])["loss"]["name"] == "cross_entropy"


@pytest.mark.parametrize(
    "value",
    ["~/data sets", "/data/a(1)", "http://host:5000/a?b=c", "sqlite:////data/x.db", "a#b", "C:/x", "s3://bucket/a%20b"],
)
def test_paths_and_addresses_need_no_quotes(value: str) -> None:
    assert compose([f"tracking.uri={value}"])["tracking"]["uri"] == value


def test_additions_stay_text() -> None:
    assert compose(["train.epochs=+5"])["train"]["epochs"] == "+5"
    assert compose(["train.epochs=5"])["train"]["epochs"] == 5


def test_own_groups_go_before_the_shipped_ones(tmp_path: Path) -> None:
    folder = tmp_path / "my conf, new"
    (folder / "student").mkdir(parents=True)
    (folder / "loss").mkdir()
    (folder / "student" / "tiny.yaml").write_text("name: mlp\nhidden: [4]\n")
    (folder / "loss" / "kd.yaml").write_text("name: kd\ntemperature: 2.5\n")
    values = compose(["student=tiny"], [folder])
    assert values["student"] == {"name": "mlp", "hidden": [4]}
    assert values["loss"]["temperature"] == 2.5
    assert values["data"] == {"name": "digits"}  # the shipped ones are still there
    with pytest.raises(ConfigError, match=r"student=tny: .* did you mean tiny\?"):
        compose(["student=tny"], [folder])


def test_hydra_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose([])
    with pytest.raises(ConfigError):
        compose(["student=nothing_like_it"])
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_the_checkouts_groups_are_found() -> None:
    assert shipped_conf() == ROOT / "conf"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["student=smal_cnn"], r"^student=smal_cnn: no such choice in group student; did you mean small_cnn\?"),
        (["student=zzz"], r"^student=zzz: no such choice in group student\. Known: custom, mlp, resnet110"),
        (["studen"], r"^studen: expected group=choice or path.to.key=value; did you mean student=...\?$"),
        (["student"], r"^student: expected group=choice"),
        (["train=5"], r"^train=5: expected the name of a choice of group train, got 5$"),
        (["student=[mlp]"], r"expected the name of a choice of group student, got \[mlp\]$"),
        (["student=mlp", "student=mlp"], r"^student is chosen more than once; give it once$"),
        (["run.name=a,b"], r"^run.name=a,b: expected one value, got several; quote it"),
        (
            ["train.milestones=[1,2"],
            r"^train.milestones=\[1,2: cannot be read .* with quotes inside those of the shell",
        ),
        (["run.name='a"], r"^run.name='a: cannot be read"),
        (["hydra.run.dir=x"], r"^hydra.run.dir=x: Hydra's own settings are not used here; remove it$"),
        (["data.path=${nope}"], r"Interpolation key 'nope' not found"),
        (["~train.epochs"], r"'train.epochs' does not exist"),
    ],
)
def test_what_cannot_be_composed_is_said_in_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        compose(overrides)
    assert "\n" not in caught.value.message


def test_all_unreadable_overrides_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["a", "b=[", "c=1,2"])
    assert [problem[0] for problem in caught.value.details["problems"]] == ["a", "b", "c"]


def test_a_folder_of_groups_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="--conf nowhere: expected a folder"):
        compose([], [Path("nowhere")])


# --- validating ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["train.epohcs=3"], "train.epohcs: unknown key; did you mean train.epochs?"),
        (["trian.epochs=3"], "trian: unknown key; did you mean train?"),
        (["train.lr=3"], "train.lr: unknown key; did you mean train.optimizer.lr?"),
        (["loss.temprature=3"], "loss.temprature: unknown key; did you mean loss.temperature?"),
        (["teacher.pool.mx=3"], "teacher.pool.mx: unknown key; did you mean teacher.pool.max?"),
        (["teacher.factory=a:b"], "teacher.factory: unknown key; known here: teacher.checkpoint, teacher.compile"),
        (["train.epochs='3'"], 'train.epochs: expected an integer, got the string "3"'),
        (["train.epochs=3.0"], "train.epochs: expected an integer, got 3.0"),
        (["train.epochs=true"], "train.epochs: expected an integer, got true"),
        (["train.epochs=0"], "train.epochs: expected a value >= 1, got 0"),
        (["train.epochs=null"], "train.epochs: expected an integer, got null"),
        (["train.optimizer.lr=fast"], 'train.optimizer.lr: expected a number, got the string "fast"'),
        (["train.optimizer.lr=0"], "train.optimizer.lr: expected a value > 0, got 0"),
        (["train.optimizer.lr=inf"], "train.optimizer.lr: expected a finite number, got inf"),
        (["train.optimizer.betas=[0.9]"], "train.optimizer.betas: expected at least 2 entries, got [0.9]"),
        (["train.compile=1"], "train.compile: expected true or false, got 1"),
        (["train.precision=fp16"], "train.precision: expected one of 'fp32' or 'bf16', got the string \"fp16\""),
        (["run.name=12"], "run.name: expected a string, got 12; quote it on the command line: \"run.name='12'\""),
        (["cluster.resources_per_worker.x=y"], 'cluster.resources_per_worker.x: expected a number, got the string "y"'),
        (["run=somewhere"], 'run: expected keys and values, got the string "somewhere"'),
        (["data=parquet"], "data.path: must be given (data.path=...)"),
        (["~student"], "student: must be given (student=...)"),
        (["train.select_by=val/top_1"], "did you mean val/top1?"),
        (["train.select_by=test/top1"], "got 'test/top1'"),
        (["train.blocks_per_step=3", "cluster.num_workers=2"], "expected a multiple of cluster.num_workers=2, got 3"),
        (["cluster=driver", "cluster.num_workers=2"], "cluster.num_workers: cluster=driver trains in one process"),
        (["cluster=inprocess", "cluster.num_workers=2"], "use cluster=ray for several workers"),
        (
            ["teacher.source=fill", "cache.path=c", "train.epochs=1"],
            "train.epochs: expected more than 1, the views that teacher.source=fill computes",
        ),
        (["teacher.source=cached"], "cache.path: not set; give the folder that holds caches"),
        (
            ["teacher.source=cached", "cache.path=c", "data.augment.flip=true"],
            "data.num_views: not set, but a cache holds a fixed number of augmented views",
        ),
        (
            ["teacher.source=cached", "cache.path=c", "cache=topk", "loss=dist"],
            "cache.format: a top-k cache lacks most of the classes that loss=dist compares",
        ),
        (
            ["teacher.source=cached", "cache.path=c", "cache=topk", "loss.standardise=true"],
            "cache.format: a top-k cache lacks most of the classes that loss=kd compares",
        ),
        (
            [
                *("teacher.source=cached", "cache.path=c", "cache=topk", "loss=combined"),
                "loss.parts={kd: {temperature: 2}, levels: {level: topk, temperature: 4}}",
            ],
            "loss: a top-k cache is read at one temperature, but the parts have 2, 4",
        ),
        (["cache=topk", "cache.k=null"], "cache: format=topk keeps the k likeliest classes, expected k, got none"),
        (["cache.k=3"], "cache: format=dense keeps every class, expected no k, got k=3"),
        (["teacher.pool.min=3", "teacher.pool.max=2"], "teacher.pool: max=2 is below min=3"),
        (
            ["train.optimizer.warmup_epochs=20"],
            "train.optimizer.warmup_epochs: expected at most train.epochs=10, got 20",
        ),
        (["loss=cross_entropy", "train.select_by=val/agreement"], "train.select_by: expected one of val/top1"),
    ],
)
def test_one_problem_is_one_sentence(overrides: list[str], problem: str) -> None:
    problems = problems_of(*overrides)
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_wrong_name_lists_the_known_and_the_nearest() -> None:
    (problem,) = problems_of("student.name=resnet_20")
    assert re.match(
        r"student.name: expected one of 'custom', 'mlp', .*, got the string .*; did you mean resnet20\?", problem
    )


def test_everything_wrong_is_reported_at_once() -> None:
    problems = problems_of(
        "train.epohcs=3",
        "train.batch_size=0",
        "loss.kd_weight=inf",
        "train.optimizer.lr='1'",
        "teacher.source=fill",  # rules over several fields are checked all the same
        "cluster.num_workers=2",
        "train.blocks_per_step=3",
    )
    paths = {problem.partition(":")[0] for problem in problems}
    assert paths == {
        "train.epohcs",
        "train.batch_size",
        "loss.kd_weight",
        "train.optimizer.lr",
        "cache.path",
        "train.blocks_per_step",
    }


def test_a_bad_value_is_not_reported_again_by_a_rule() -> None:
    problems = problems_of("teacher.checkpoint=3")
    assert problems == ["teacher.checkpoint: expected a string, got 3"]


def test_a_loss_that_needs_a_teacher_needs_a_checkpoint() -> None:
    raw = compose([])
    with pytest.raises(
        ConfigError, match=r"^teacher.checkpoint: not set, but loss=kd learns from a teacher; train one"
    ):
        build_config(raw, "distill")
    assert build_config(raw, "doctor").loss.name == "kd"
    assert build_config(compose(["loss=cross_entropy"]), "distill").teacher.checkpoint is None


def test_a_teacher_is_not_trained_by_a_loss_that_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"^loss: kd learns from a teacher, .* use loss=cross_entropy$"):
        build_config(compose([]), "train-teacher")


def test_a_password_is_refused_and_not_repeated() -> None:
    (problem,) = problems_of("tracking.uri=http://me:hunter2@host:5000")
    assert "holds a password" in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    "path", ["s3://AKIA:hun/ter2@flowers/rows", "s3://flowers?access_key=AKIA&secret_key=hun/ter2", "s3://me:hun@[/x"]
)
def test_a_secret_in_the_path_of_data_is_refused_and_not_repeated(path: str) -> None:
    for data in ("parquet", "image_folder"):
        (problem,) = problems_of(f"data={data}", f"data.path='{path}'")
        assert problem.startswith("data.path: holds a password")
        assert "AWS_SECRET_ACCESS_KEY" in problem
        assert "hun" not in problem


@pytest.mark.parametrize("path", ["s3://flowers/a:b@c?region=eu-west-1", "C:/data/token=1", "/data/[x]?secret=1"])
def test_a_path_without_a_secret_is_none(path: str) -> None:
    assert build("data=parquet", f"data.path='{path}'").to_dict()["data"]["path"] == path


def test_plain_values_come_back_the_same() -> None:
    config = build("student=mlp", "student.hidden=[3,4]", "cluster.resources_per_worker={gpu_fake: 1}")
    again = build_config(json.loads(json.dumps(config.to_dict())), "distill")
    assert again == config
    assert config.with_values({"train.epochs": 3}).train.epochs == 3
    assert config.train.epochs == 10


def test_it_travels_between_processes() -> None:
    config = build()
    assert pickle.loads(pickle.dumps(config)) == config
    teacher = pickle.loads(pickle.dumps(config.teacher))
    assert teacher == config.teacher
    assert type(teacher) is type(config.teacher)


def test_values_are_frozen() -> None:
    config = build()
    with pytest.raises(ValueError, match="frozen"):
        config.run = config.run


def test_flat_values_cover_every_field() -> None:
    flat = flatten(build("train.optimizer.betas=[0.5,0.6]"))
    assert flat["train.optimizer.betas"] == "[0.5, 0.6]"
    assert flat["train.epochs"] == 10
    assert flat["teacher.pool.max"] == "null"
    assert {path.partition(".")[0] for path in flat} == set(config_class().model_fields)


def test_paths_into_nested_values() -> None:
    raw: dict[str, object] = {"a": {"b": 1}}
    set_path(raw, "a.c.d", [1])
    assert raw == {"a": {"b": 1, "c": {"d": [1]}}}
    assert get_path(raw, "a.b.c", "none") == "none"
