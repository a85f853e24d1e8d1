"""Search spaces: how they are read, drawn from, probed and laid out as a grid."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.search import Branch, Choice, Draw, Number, RandomChooser, SearchParams, Space, flatten_start

UNIFORM = {"distribution": "uniform", "low": 0.5, "high": 2.5}
LOG = {"distribution": "loguniform", "low": 1, "high": 16}
INTEGER = {"distribution": "integer", "low": 2, "high": 9}
CHOICE = {"distribution": "choice", "options": ["entropy", 3, False]}
BRANCH = {
    "distribution": "choice",
    "options": {"kd": {"temperature": LOG, "kd_weight": UNIFORM}, "dist": {"temperature": UNIFORM}, "plain": {}},
}


def parse(**axes: Any) -> Space:
    return Space.parse(axes)


def values_of(name: str, draws: list[Draw], kind: type) -> list[Any]:
    """Which all are of that type."""
    values = [draw[name] for draw in draws]
    assert {type(value) for value in values} == {kind}
    return values


def draw_many(space: Space, seed: int = 0, count: int = 200) -> list[Draw]:
    chooser = RandomChooser(seed)
    return [space.draw(chooser) for _ in range(count)]


# --- reading ------------------------------------------------------------------------------------------------------


def test_each_distribution_is_read() -> None:
    space = Space.parse(
        {"loss": {"t": LOG, "w": UNIFORM | {"step": 0.5, "points": 3}}, "train": {"n": INTEGER, "c": CHOICE}}
    )
    assert space.axes == (
        Number("loss.t", "loss.t", 1.0, 16.0, log=True, integer=False, step=None, points=5),
        Number("loss.w", "loss.w", 0.5, 2.5, log=False, integer=False, step=0.5, points=3),
        Number("train.n", "train.n", 2, 9, log=False, integer=True, step=1, points=5),
        Choice("train.c", "train.c", ("entropy", 3, False)),
    )
    assert [axis.show() for axis in space.axes] == [
        "loguniform 1 to 16", "uniform 0.5 to 2.5 by 0.5", "integer 2 to 9", "one of entropy, 3, False",
    ]  # fmt: skip


def test_options_have_axes_of_their_own() -> None:
    (branch,) = parse(loss=BRANCH).axes
    assert isinstance(branch, Branch)
    assert {option: [axis.path for axis in axes] for option, axes in branch.options.items()} == {
        "kd": ["loss.temperature", "loss.kd_weight"],
        "dist": ["loss.temperature"],
        "plain": [],
    }


def test_names_are_distinct_though_paths_are_not() -> None:
    axes = list(parse(loss=BRANCH, train={"lr": LOG}).all_axes())
    names = [axis.name for axis in axes]
    assert len(names) == len(set(names)) == 5
    assert [axis.path for axis in axes].count("loss.temperature") == 2
    assert "loss=dist: loss.temperature" in names


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, "expected at least one key with a distribution, got none"),
        ({"loss": {}}, "expected at least one key with a distribution, got none"),
        ({"loss": {"t": 3}}, "loss.t: expected a distribution, as in {distribution: uniform, low: 0, high: 1}, got 3"),
        ({"a": {"distribution": "normal"}}, "a.distribution: expected one of uniform, loguniform, integer, choice"),
        ({"loss": {"t": UNIFORM | {"low": 3}}}, "loss.t: expected low below high, got low 3 and high 2.5"),
        ({"loss": {"t": UNIFORM | {"low": 2.5}}}, "loss.t: expected low below high, got low 2.5 and high 2.5"),
        ({"loss": {"t": {"distribution": "uniform", "low": 1}}}, "loss.t.high: "),
        ({"loss": {"t": UNIFORM | {"low": "a"}}}, "loss.t.low: "),
        ({"loss": {"t": UNIFORM | {"step": 0}}}, "loss.t.step: "),
        ({"loss": {"t": UNIFORM | {"step": 5}}}, "loss.t"),
        ({"loss": {"t": UNIFORM | {"points": 1}}}, "loss.t.points: "),
        ({"loss": {"t": UNIFORM | {"hihg": 1}}}, "loss.t.hihg: "),
        ({"loss": {"t": LOG | {"low": 0}}}, "loss.t: loguniform expects low above 0, got 0"),
        ({"loss": {"t": LOG | {"step": 1}}}, "loss.t: loguniform has no step; leave it out, or use uniform"),
        ({"train": {"n": INTEGER | {"low": 0.5}}}, "train.n: integer expects whole numbers for low, high and step"),
        ({"train": {"n": INTEGER | {"step": 1.5}}}, "train.n: integer expects whole numbers for low, high and step"),
        ({"loss": {"c": {"distribution": "choice"}}}, "loss.c.options: "),
        ({"loss": {"c": {"distribution": "choice", "options": []}}}, "loss.c.options: "),
        ({"loss": {"c": {"distribution": "choice", "options": {}}}}, "loss.c.options: "),
        ({"loss": {"distribution": "choice", "options": {"kd": {"t": 3}}}}, "loss.t: expected a distribution"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_path(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        Space.parse(raw)


def test_a_branch_under_a_branch_is_refused() -> None:
    inner = {"distribution": "choice", "options": {"a": {}, "b": {}}}
    nested = {"loss": {"distribution": "choice", "options": {"kd": {"schedule": inner}}}}
    sentence = "loss.schedule: a choice with axes of its own cannot stand under another one (loss=kd)"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Space.parse(nested)


def test_an_option_without_axes_may_be_left_empty() -> None:
    """As YAML reads ``kd:`` with nothing below it."""
    (branch,) = parse(loss={"distribution": "choice", "options": {"kd": None, "dist": {"temperature": LOG}}}).axes
    assert branch.grid == ["kd", "dist"]


def test_the_parameters_check_the_space() -> None:
    params = SearchParams(space={"loss": {"t": UNIFORM}})
    assert (params.num_trials, params.searcher, params.scheduler, params.confirm.seeds) == (16, "optuna", "asha", 3)
    with pytest.raises(ValidationError, match=r"loss\.t: expected low below high"):
        SearchParams(space={"loss": {"t": UNIFORM | {"low": 3}}})


# --- drawing ------------------------------------------------------------------------------------------------------


def test_draws_have_the_range_and_type_of_their_axes() -> None:
    draws = draw_many(parse(t=LOG, w=UNIFORM, n=INTEGER, c=CHOICE))
    assert all(1 <= value <= 16 for value in values_of("t", draws, float))
    assert all(0.5 <= value <= 2.5 for value in values_of("w", draws, float))
    assert set(values_of("n", draws, int)) == set(range(2, 10))
    assert {(type(draw["c"]), draw["c"]) for draw in draws} == {(str, "entropy"), (int, 3), (bool, False)}


def test_a_loguniform_axis_is_drawn_by_its_logarithm() -> None:
    below = sum(value < 4 for value in values_of("t", draw_many(parse(t=LOG), count=1000), float))
    assert 430 <= below <= 570


def test_draws_keep_to_the_steps() -> None:
    draws = draw_many(parse(w=UNIFORM | {"high": 1.8, "step": 0.5}, n=INTEGER | {"high": 10, "step": 3}))
    assert {draw["w"] for draw in draws} == {0.5, 1.0, 1.5}
    assert {draw["n"] for draw in draws} == {2, 5, 8}


def test_a_seed_draws_the_same_again() -> None:
    space = parse(loss=BRANCH, c=CHOICE)
    assert draw_many(space, seed=4) == draw_many(space, seed=4)
    assert draw_many(space, seed=4) != draw_many(space, seed=5)


def test_axes_of_options_that_were_not_taken_are_absent() -> None:
    expected = {
        "kd": {"loss", "loss=kd: loss.temperature", "loss=kd: loss.kd_weight"},
        "dist": {"loss", "loss=dist: loss.temperature"},
        "plain": {"loss"},
    }
    draws = draw_many(parse(loss=BRANCH))
    assert {draw["loss"] for draw in draws} == set(expected)
    assert all(draw.keys() == expected[str(draw["loss"])] for draw in draws)


def test_assignments_put_the_option_before_what_depends_on_it() -> None:
    space = parse(loss=BRANCH, n=INTEGER)
    draw: Draw = {"n": 3, "loss=dist: loss.temperature": 1.5, "loss": "dist"}
    assert [(axis.path, value) for axis, value in space.assignments(draw)] == [
        ("loss", "dist"), ("loss.temperature", 1.5), ("n", 3),
    ]  # fmt: skip


# --- probes -------------------------------------------------------------------------------------------------------


def test_probes_reach_both_ends_and_every_option() -> None:
    space = parse(t=LOG, n=INTEGER, c=CHOICE)
    probes = list(space.probes())
    for axis in space.axes:
        found = {probe[axis.name] for probe in probes}
        expected = {axis.low, axis.high} if isinstance(axis, Number) else set(axis.grid)
        assert expected <= found
    assert probes[0] == {"t": 4.0, "n": 5, "c": "entropy"}
    assert all(sum(probe[name] != probes[0][name] for name in probe) <= 1 for probe in probes)


def test_probes_go_through_the_axes_of_every_option() -> None:
    probes = list(parse(loss=BRANCH, n=INTEGER).probes())
    assert all("n" in probe for probe in probes)
    for name, ends in {
        "loss=kd: loss.temperature": {1.0, 16.0},
        "loss=kd: loss.kd_weight": {0.5, 2.5},
        "loss=dist: loss.temperature": {0.5, 2.5},
    }.items():
        assert ends <= {probe[name] for probe in probes if name in probe}
    assert {"loss": "plain", "n": 5} in probes
    assert all(
        probe["loss"] == name[5:].split(":")[0] for probe in probes for name in probe if name.startswith("loss=")
    )


def test_probes_keep_to_the_steps() -> None:
    (axis,) = (space := parse(n=INTEGER | {"high": 10, "step": 3})).axes
    assert {probe["n"] for probe in space.probes()} <= set(axis.grid)


# --- grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        (UNIFORM, [0.5, 1.0, 1.5, 2.0, 2.5]),
        (UNIFORM | {"points": 3}, [0.5, 1.5, 2.5]),
        (LOG, [1.0, 2.0, 4.0, 8.0, 16.0]),
        (UNIFORM | {"step": 1}, [0.5, 1.5, 2.5]),
        (UNIFORM | {"step": 0.25, "points": 3}, [0.5, 1.5, 2.5]),
        (INTEGER, [2, 4, 6, 7, 9]),
        (INTEGER | {"high": 4}, [2, 3, 4]),
        (INTEGER | {"step": 3}, [2, 5, 8]),
        (CHOICE, ["entropy", 3, False]),
    ],
)
def test_the_grid_of_an_axis(axis: dict[str, Any], values: list[Any]) -> None:
    found = [draw["a"] for draw in parse(a=axis).grid()]
    assert found == pytest.approx(values) if axis is not CHOICE else found == values
    assert list(map(type, found)) == list(map(type, values))


def test_a_grid_stays_within_its_ends() -> None:
    (axis,) = parse(a={"distribution": "loguniform", "low": 0.001, "high": 0.7, "points": 13}).axes
    assert axis.grid[0] == 0.001
    assert all(axis.admits(value) for value in axis.grid)
    assert axis.grid[-1] == pytest.approx(0.7)


def test_a_grid_has_every_combination_once() -> None:
    grid = parse(t=LOG | {"points": 3}, c=CHOICE, n=INTEGER | {"high": 3}).grid()
    assert len(grid) == len({tuple(draw.items()) for draw in grid}) == 3 * 3 * 2


def test_a_grid_has_the_points_of_each_option_only() -> None:
    grid = parse(loss=BRANCH, n=INTEGER | {"high": 3}).grid()
    counts = {option: sum(draw["loss"] == option for draw in grid) for option in ("kd", "dist", "plain")}
    assert counts == {"kd": 25 * 2, "dist": 5 * 2, "plain": 2}
    assert all(draw.keys() == {"loss", "n"} for draw in grid if draw["loss"] == "plain")


# --- points that are given ----------------------------------------------------------------------------------------


def test_a_point_is_flattened() -> None:
    raw = {"loss": {"name": "kd", "temperature": 4, "perturbation": [0, 1.5]}, "train": {"optimizer": {"lr": 0.1}}}
    assert flatten_start(raw) == {
        "loss": "kd", "loss.temperature": 4, "loss.perturbation.0": 0, "loss.perturbation.1": 1.5,
        "train.optimizer.lr": 0.1,
    }  # fmt: skip


def test_a_point_is_projected_onto_the_axes_of_its_option() -> None:
    space = parse(loss=BRANCH, n=INTEGER)
    values = {"loss": "dist", "loss.temperature": 2, "n": 3}
    projected = space.project(values)
    assert projected == {"loss": "dist", "loss=dist: loss.temperature": 2.0, "n": 3}
    assert (type(projected["loss=dist: loss.temperature"]), type(projected["n"])) == (float, int)


def test_a_point_may_leave_axes_out() -> None:
    assert parse(t=LOG, n=INTEGER).project({"n": 3}) == {"n": 3}
    assert parse(t=LOG).project({}) == {}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"t": 17}, "t: 17.0 is not within loguniform 1 to 16"),
        ({"t": True}, "t: True is not within loguniform 1 to 16"),
        ({"t": "4"}, "t: '4' is not within loguniform 1 to 16"),
        ({"t": math.nan}, "t: nan is not within loguniform 1 to 16"),
        ({"c": "margin"}, "c: 'margin' is not within one of entropy, 3, False"),
        ({"c": 0}, "c: 0 is not within one of entropy, 3, False"),
        ({"loss": "dkd"}, "loss: 'dkd' is not within one of kd, dist, plain"),
        ({"loss": ["kd"]}, "loss: ['kd'] is not within one of kd, dist, plain"),
        ({"loss": "dist", "loss.kd_weight": 1}, "loss.kd_weight: no axis of the space, which has t, c, n, w, loss"),
        ({"x": 1}, "x: no axis of the space, which has t, c, n, w, loss, loss.temperature, loss.kd_weight"),
        ({"n": 2.5}, "n: 2.5 is not within integer 2 to 9"),
        ({"w": 0.7}, "w: 0.7 is not within uniform 0.5 to 2.5 by 0.5"),
    ],
)
def test_a_point_outside_is_refused(values: dict[str, Any], sentence: str) -> None:
    space = parse(t=LOG, c=CHOICE, n=INTEGER, w=UNIFORM | {"step": 0.5}, loss=BRANCH)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        space.project(values)
