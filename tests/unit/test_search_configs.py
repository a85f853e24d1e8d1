"""Configurations of a search and of its trials: every shipped space works, and every mistake is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.config.runs import open_run
from pipeline.config.schema import Config
from pipeline.config.stored import hash_config
from pipeline.config.validate import build_config
from pipeline.errors import ConfigError, PipelineError
from pipeline.losses import LOSSES
from pipeline.search import Axis, Draw, Value
from pipeline.trials.configs import TrialConfigs, describe_draw
from tests.unit.runs import open_and_close

ROOT = Path(__file__).parents[2]
SPACES = sorted(path.stem for path in (ROOT / "conf" / "search").glob("*.yaml"))
TEACHER = "teacher.checkpoint=teacher.safetensors"
DEFAULTS = ("teacher.source=cached", "cache.path=runs/cache")
KD = "search=temperature"


def load(*overrides: str, command: str = "search") -> Config:
    defaults = DEFAULTS if command == "search" else ()
    return load_config(Request(command, (TEACHER, *overrides)), defaults).config


def configs(*overrides: str) -> TrialConfigs:
    return TrialConfigs(load(*overrides))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configs(*overrides).check()
    return caught.value.message


class Completed:
    """Chooses what a point has, and the middle of what it leaves out."""

    def __init__(self, point: Draw) -> None:
        self._point = point

    def choose(self, axis: Axis) -> Value:
        return self._point.get(axis.name, axis.middle)


def trial(configs: TrialConfigs, draw: Draw | None, seed: int | None = None) -> Config:
    return configs.build(draw, Path("runs/s/trials/0000"), "s/0000", seed)


# --- what is shipped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_every_shipped_space_builds(name: str) -> None:
    """With the loss of its name, or the one that a search begins with."""
    loss = [f"loss={name}"] if name in LOSSES.names() else []
    found = configs(f"search={name}", *loss)
    built = found.check()
    assert len(built) == 64 + len(list(found.space.probes()))
    assert len({hash_config(config) for config in built}) > 64
    starts = found.starts()
    assert len(starts) >= len(found.params.start) > 0
    for point in starts:
        trial(found, found.space.draw(Completed(point)))


def test_a_grid_is_checked_as_a_whole() -> None:
    found = configs(KD, "search.searcher=grid", "search.num_trials=25")
    assert len(found.check()) == 64 + len(list(found.space.probes())) + 25
    assert found.starts() == found.space.grid()
    assert len(found.starts()) == 25


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(
        "space: {train: {optimizer: {lr: {distribution: loguniform, low: 0.001, high: 1}}}}\n"
        "start: [{train: {optimizer: {lr: 0.05}}}]\nnum_trials: 7\n"
    )
    found = configs(f"search={file}", "search.num_trials=9", "train.optimizer.lr=0.2")
    assert found.params.num_trials == 9
    assert found.starts() == [{"train.optimizer.lr": 0.2}, {"train.optimizer.lr": 0.05}]
    assert trial(found, {"train.optimizer.lr": 0.5}).train.optimizer.lr == 0.5


def test_the_space_is_changed_on_the_command_line() -> None:
    found = configs(
        KD,
        "search.space.loss.temperature.high=32",
        "search.space.student.width={distribution:integer,low:8,high:64,step:8}",
        "student.width=16",
    )
    assert [(axis.path, axis.show()) for axis in found.space.axes] == [
        ("loss.temperature", "loguniform 1 to 32"),
        ("loss.kd_weight", "uniform 0.1 to 2"),
        ("student.width", "integer 8 to 64 by 8"),
    ]
    assert found.default_point["student.width"] == 16
    assert {config.student.width for config in found.check()} == set(range(8, 65, 8))  # type: ignore[attr-defined]


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        ([], ["search: not set; choose what is varied, with search=temperature, ptloss, cmkd or losses"]),
        (["search=temperatur"], ["no such choice in group search; did you mean temperature?"]),
        ([KD, "search.num_trial=3"], ["search.num_trial: unknown key; did you mean search.num_trials?"]),
        (
            [KD, "search.space.loss.temprature={distribution:uniform,low:1,high:2}"],
            ["loss.temprature 1.5 cannot be", "loss.temprature: unknown key; did you mean loss.temperature?"],
        ),
        ([KD, "search.space.student.n.width={distribution:integer,low:8,high:9}"], ["there is no student.n"]),
        ([KD, "search.space.loss.temperature.low=20"], ["loss.temperature: expected low below high, got low 20"]),
        (
            [KD, "search.space.student.width={distribution:integer,low:0,high:64}"],
            ["student.width 0 cannot be: student.width: expected a value >= 1, got 0"],
        ),
        ([KD, "search.space.data.seed={distribution:integer,low:0,high:9}"], [
            "search.space.data.seed: expected a key of loss, student, train; data is the same for all trials",
        ]),
        ([KD, "search.space.teacher.width={distribution:integer,low:8,high:9}"], ["search.space.teacher.width: "]),
        ([KD, "search.start=[{loss:{temperature:99}}]"], [
            "search.start.0: loss.temperature: 99.0 is not within loguniform 1 to 16",
        ]),
        ([KD, "search.start=[{loss:{temperature:4}},{loss:{t:4}}]"], ["search.start.1: loss.t: no axis of the space"]),
        (["search=losses", "search.start=[{loss:{name:[kd]}}]"], ["search.start.0: loss: ['kd'] is not"]),
        ([KD, "search.metric=val/tp1"], ["search.metric: expected one of val/top1", "did you mean val/top1?"]),
        ([KD, "search.metric=test/top1"], ["search.metric: expected one of val/top1"]),
        ([KD, "search.mode=min"], ["search.mode: expected max, which is better for val/top1, got min; leave it out"]),
        ([KD, "search.metric=val/nll", "search.mode=max"], ["search.mode: expected min, which is better for val/nll"]),
        ([KD, "search.searcher=grid"], ["search.num_trials: expected at least 25, the points of the grid, got 16"]),
        ([KD, "cluster=inprocess"], ["cluster.name: trials run on Ray, but cluster=inprocess; use cluster=ray"]),
        ([KD, "teacher.source=online"], ["teacher.source: a trial never asks the teacher, so expected cached"]),
        (["search=ptloss"], ["loss.perturbation.0: there is no loss.perturbation"]),
        (["search=ptloss", "loss=ptloss", "loss.perturbation=[0,0]"], [
            "loss.perturbation.2: expected the number of one of 2 entries",
        ]),
        ([KD, "search.space.train.optimizer={distribution:choice,options:{a:{},b:{}}}"], [
            "train.optimizer: a choice with axes of its own is that of a configuration group (loss or student)",
        ]),
        ([KD, "search.space.student={distribution:choice,options:{mlp:{},resnt20:{}}}"], ["did you mean resnet20?"]),
    ],
)  # fmt: skip
def test_mistakes_are_answered(overrides: list[str], sentences: list[str]) -> None:
    message = refusal(*overrides)
    assert [sentence for sentence in sentences if sentence not in message] == []


def test_a_group_with_a_plain_list_of_choices_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("space: {loss: {distribution: choice, options: [kd, dkd]}}\n")
    message = refusal(f"search={file}")
    assert not message.endswith("there is no ")
    assert "options" in message


def test_a_whole_axis_has_whole_start_points() -> None:
    axis = "search.space.student.width={distribution:integer,low:8,high:64}"
    assert "search.start.0: student.width: 8.5 is not within" in refusal(
        KD, axis, "search.start=[{student:{width:8.5}}]"
    )


def test_wrong_keys_are_all_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(KD, "search.metric=val/none", "cluster=inprocess", "teacher.source=online")
    paths = {str(problem).partition(":")[0] for problem in caught.value.details["problems"]}
    assert paths == {"search.metric", "cluster.name", "teacher.source"}


# --- where a search begins ----------------------------------------------------------------------------------------


def test_a_search_begins_with_the_configuration_itself() -> None:
    found = configs(KD, "loss.temperature=3", "loss.kd_weight=1.5")
    assert found.default_point == {"loss.temperature": 3.0, "loss.kd_weight": 1.5}
    assert found.starts()[0] == found.default_point
    assert len(found.starts()) == 4
    assert trial(found, found.default_point).loss == trial(found, None).loss


def test_a_configuration_outside_the_space_is_no_start() -> None:
    found = configs(KD, "loss.temperature=32")
    assert found.default_point == {}
    assert len(found.starts()) == len(found.params.start) == 3


def test_a_point_is_begun_with_once() -> None:
    found = configs(KD, "loss.temperature=2", "loss.kd_weight=0.5")
    assert found.starts()[0] == {"loss.temperature": 2.0, "loss.kd_weight": 0.5}
    assert len(found.starts()) == 3


def test_a_configuration_lies_at_the_option_of_its_own_loss() -> None:
    found = configs("search=losses", "loss=dist", "loss.inter_weight=3")
    assert found.default_point["loss"] == "dist"
    assert found.default_point["loss=dist: loss.inter_weight"] == 3.0
    assert configs("search=losses", "loss=levels").default_point == {}


def test_selected_coefficients_are_moved_into_the_space() -> None:
    found = configs("search=ptloss", "loss=ptloss")
    points = found.starts((7.0, 0.25, -5.0, 1.0))
    assert points[0] == found.default_point
    assert points[1] == {"loss.perturbation.0": 3.0, "loss.perturbation.1": 0.25, "loss.perturbation.2": -0.333}
    assert found.starts((7.0,))[1] == {"loss.perturbation.0": 3.0}


def test_selected_coefficients_keep_to_the_steps(tmp_path: Path) -> None:
    file = tmp_path / "coarse.yaml"
    file.write_text(
        'space: {loss: {perturbation: {"0": {distribution: uniform, low: -1, high: 3, step: 0.5}}}}\n'
        "start_from_selection: true\n"
    )
    points = configs(f"search={file}", "loss=ptloss").starts((0.7,))
    assert points == [{"loss.perturbation.0": 1.0}, {"loss.perturbation.0": 0.5}]


# --- trials -------------------------------------------------------------------------------------------------------


def test_a_trial_is_a_distillation_in_one_process_that_never_sees_test() -> None:
    found = configs(KD, "run.seed=3", "data.augment.flip=true", "data.num_views=2", "evaluation.test=true")
    for seed, expected in ((None, 3), (11, 11)):
        config = trial(found, {"loss.temperature": 2.0, "loss.kd_weight": 0.5}, seed)
        assert (config.run.seed, config.run.name, config.run.dir) == (expected, "s/0000", "runs/s/trials/0000")
        assert config.view_seed == 3
        assert config.cluster.name == "inprocess"
        assert config.evaluation.test is False
        assert config.search is None
        assert (config.loss.temperature, config.loss.kd_weight) == (2.0, 0.5)  # type: ignore[attr-defined]
    assert trial(configs(KD, "run.seed=3", "data.view_seed=8"), None, 11).view_seed == 8


def test_a_trial_without_a_point_is_the_configuration_itself() -> None:
    found = configs(KD, "loss.temperature=5", "train.epochs=3")
    assert trial(found, None).loss == found.config.loss
    assert trial(found, None).train == found.config.train
    assert trial(found, None).student == found.config.student


def test_a_trial_of_another_loss_has_that_losss_defaults() -> None:
    found = configs("search=losses", "loss=kd", "loss.temperature=7")
    built = trial(found, {"loss": "ptloss", "loss=ptloss: loss.perturbation.0": 0.5}).loss
    assert built.name == "ptloss"
    assert built.perturbation == (0.5, 0.0, 0.0, 0.0, 0.0)  # type: ignore[attr-defined]
    assert built.temperature == 1.0  # type: ignore[attr-defined]


def test_options_begin_with_the_files_of_the_group(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "dist.yaml").write_text("# My own.\nname: dist\nintra_weight: 3.5\n")
    request = Request("search", (TEACHER, "search=losses"), (tmp_path,))
    found = TrialConfigs(load_config(request, DEFAULTS).config)
    assert found.params.options["loss"]["dist"] == {"name": "dist", "intra_weight": 3.5}
    draw: Draw = {"loss": "dist", "loss=dist: loss.temperature": 2.0, "loss=dist: loss.inter_weight": 1.0}
    assert trial(found, draw | {"loss=dist: loss.intra_weight": 2.5}).loss.intra_weight == 2.5  # type: ignore[attr-defined]
    (axis,) = found.space.axes
    assert list(found.params.options["loss"]) == axis.grid


def test_a_stored_search_needs_no_files() -> None:
    config = load("search=losses")
    again = build_config(config.to_dict(), "search")
    assert again == config
    assert len(TrialConfigs(again).check()) > 64


def test_points_are_described_by_their_paths() -> None:
    draw: Draw = {"loss": "kd", "loss=kd: loss.temperature": 4.23456, "loss=kd: loss.kd_weight": 1}
    assert describe_draw(draw) == "loss kd, loss.temperature 4.235, loss.kd_weight 1"
    assert describe_draw({}) == "the configuration as it is"


@pytest.mark.parametrize(("metric", "maximises"), [("val/top1", True), ("val/nll", False), ("val/agreement", True)])
def test_which_way_is_better(metric: str, maximises: bool) -> None:
    assert configs(KD, f"search.metric={metric}").maximises is maximises


# --- other commands, and what makes a search another ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["distill", "validate"])
def test_other_commands_have_no_search(command: str) -> None:
    assert load(command=command).search is None


def test_adding_trials_to_a_distillation_is_one_sentence(working_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("search.num_trials=+4", command="distill")
    assert caught.value.message.startswith("search.num_trials=+4: adds to a run that exists; name it with resume=RUN")
    open_and_close("run.dir=runs/a")
    with pytest.raises(PipelineError) as stored:
        load_config(Request("distill", ("resume=runs/a", "search.num_trials=+4")))
    assert stored.value.message.startswith("search.num_trials=+4: ")
    assert stored.value.message.endswith("/runs/a has no search.num_trials to add to; leave it out")


def test_trials_are_added_to_a_search(working_folder: Path) -> None:
    """The search keeps its space, whatever its file says by now."""
    chosen = ("search=losses", "cache.path=runs/cache", "teacher.source=cached")
    with pytest.raises(PipelineError, match="expected low below high"):
        load(*chosen, "search.space.loss.options.kd.temperature.low=17")
    with open_run("search", load(*chosen, "run.dir=runs/s", "search.num_trials=5")) as run:
        begun = run.config
    loaded = load_config(Request("search", ("resume=runs/s", "search.num_trials=+4")), DEFAULTS)
    assert loaded.extends
    assert loaded.config.search is not None
    assert loaded.config.search.num_trials == 9
    assert loaded.config.with_values({"search.num_trials": 5}) == begun


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("search.max_concurrent=2", True),
        ("search.time_budget_s=60", True),
        ("cluster.num_cpus_per_worker=2", True),
        ("search.num_trials=17", False),
        ("search.space.loss.temperature.high=8", False),
        ("search.confirm.seeds=5", False),
        ("search.scheduler=none", False),
    ],
)
def test_what_a_search_computes_is_its_identity(override: str, same: bool) -> None:
    assert (hash_config(load(KD)) == hash_config(load(KD, override))) is same


def test_how_a_search_is_carried_out_reaches_no_trial() -> None:
    plain = hash_config(trial(configs(KD), None))
    for other in ("search.max_concurrent=2", "search.num_trials=3", "cluster.num_cpus_per_worker=2"):
        assert hash_config(trial(configs(KD, other), None)) == plain
    assert hash_config(trial(configs(KD, "run.seed=1"), None)) != plain
