"""The winner of a search: which runs confirm it, what is gained, and the choice that trains it again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from pipeline.config.load import load_config
from pipeline.config.request import Request
from pipeline.config.schema import Config, drop_path
from pipeline.config.stored import identity
from pipeline.evaluation.seeds import mean_over_seeds
from pipeline.search import Draw
from pipeline.trials.configs import TrialConfigs
from pipeline.trials.records import Trial
from pipeline.trials.winner import (
    DEFAULTS,
    Confirmed,
    confirmations,
    describe,
    paired_gain,
    rank,
    write_choice,
)

TEACHER = "teacher.checkpoint=/data/teacher.safetensors"
PLACES = ("teacher.source=cached", "cache.path=/data/cache")
NOT_KEPT = ("evaluation.test", "run", "search")


def configs(*overrides: str) -> TrialConfigs:
    given = overrides or ("search=temperature", "search.confirm.top=2", "search.confirm.seeds=2")
    return TrialConfigs(load_config(Request("search", (TEACHER, *given)), PLACES).config)


def finished(label: str, temperature: float, value: float = 0.5) -> Trial:
    return Trial(label, {"loss.temperature": temperature, "loss.kd_weight": 0.9}, state="finished", value=value)


def repeat(label: str, seed: int, value: float | None, state: Any = "finished") -> Trial:
    return Trial(f"{label}-s{seed}", {"loss.temperature": 2.0}, seed, label, state=state, value=value)


def point(label: str, **values: float) -> Confirmed:
    repeats = {int(name[1:]): repeat(label, int(name[1:]), value) for name, value in values.items()}
    return Confirmed(label, None if label == DEFAULTS else {"loss.temperature": 2.0}, 0.5, repeats)


# --- intervals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(0.5, 0.7), (0.9, 0.91, 0.87), (-3.0, 12.0, 0.25, 1.0, 7.5)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_is_students(values: tuple[float, ...], confidence: float) -> None:
    found = mean_over_seeds(values, confidence)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=found.mean, scale=stats.sem(values))
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_an_interval_by_hand() -> None:
    """Of two values one standard error is half their distance, and the quantile is 12.706."""
    found = mean_over_seeds([1.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_equal_values_leave_no_doubt() -> None:
    found = mean_over_seeds([0.25, 0.25, 0.25])
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_one_seed_has_no_bounds() -> None:
    found = mean_over_seeds([0.75])
    assert found.mean == 0.75
    assert math.isnan(found.low)
    assert math.isnan(found.high)


# --- what is confirmed --------------------------------------------------------------------------------------------


def test_the_best_and_the_defaults_are_trained_again() -> None:
    best = [finished("0003", 2.0, 0.9), finished("0001", 3.0, 0.8), finished("0002", 5.0, 0.7)]
    confirmed, missing = confirmations(configs(), best, {trial.label: trial for trial in best})
    assert [(entry.label, entry.first) for entry in confirmed] == [("0003", 0.9), ("0001", 0.8), (DEFAULTS, None)]
    assert [trial.label for trial in missing] == [
        "0003-s1", "0003-s2", "0001-s1", "0001-s2", "defaults-s1", "defaults-s2",
    ]  # fmt: skip
    assert [trial.confirms for trial in missing] == ["0003"] * 2 + ["0001"] * 2 + [DEFAULTS] * 2
    assert [trial.seed for trial in missing] == [1, 2] * 3
    assert missing[0].draw == best[0].draw
    assert missing[-1].draw is None


def test_fresh_seeds_come_after_that_of_the_search() -> None:
    found = configs("search=temperature", "run.seed=10", "search.confirm.seeds=3")
    _, missing = confirmations(found, [], {})
    assert [trial.label for trial in missing] == ["defaults-s11", "defaults-s12", "defaults-s13"]


def test_the_defaults_are_not_confirmed_twice() -> None:
    best = [finished("0003", 2.0, 0.9), finished("0000", 4.0, 0.8), finished("0001", 3.0, 0.7), finished("0002", 5.0)]
    confirmed, missing = confirmations(configs(), best, {})
    assert [(entry.label, entry.first) for entry in confirmed] == [("0003", 0.9), ("0001", 0.7), (DEFAULTS, 0.8)]
    assert len(missing) == 6


def test_runs_that_are_there_are_not_made_again() -> None:
    found = [
        repeat("0003", 1, 0.9),
        repeat("0003", 2, None, "failed"),
        repeat(DEFAULTS, 1, None, "running"),
        repeat(DEFAULTS, 2, 0.4),
        repeat("0003", 7, 0.1),
    ]
    confirmed, missing = confirmations(configs(), [finished("0003", 2.0)], {trial.label: trial for trial in found})
    assert [entry.values for entry in confirmed] == [{1: 0.9}, {2: 0.4}]
    assert missing == [found[1], found[2]]


# --- who wins -----------------------------------------------------------------------------------------------------


def test_points_are_ranked_by_their_mean_over_fresh_seeds() -> None:
    points = [point("0001", s1=0.9, s2=0.1), point("0002", s1=0.6, s2=0.6), point(DEFAULTS, s1=0.55), point("0003")]
    assert [entry.label for entry in rank(points, True)] == ["0002", DEFAULTS, "0001"]
    assert [entry.label for entry in rank(points, False)] == ["0001", DEFAULTS, "0002"]


def test_a_run_without_a_value_is_no_value() -> None:
    broken = Confirmed("0001", {}, 0.5, {1: repeat("0001", 1, None), 2: repeat("0001", 2, 0.5)})
    assert broken.values == {2: 0.5}


def test_a_gain_is_over_shared_seeds_only() -> None:
    gain = paired_gain({1: 0.9, 2: 0.7, 3: 0.1}, {1: 0.6, 2: 0.6, 4: 100.0}, True)
    expected = mean_over_seeds([0.9 - 0.6, 0.7 - 0.6])
    assert gain.mean == pytest.approx(0.2)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    assert paired_gain({1: 0.9}, {2: 0.6}, True) is None


def test_less_may_be_the_gain() -> None:
    gain = paired_gain({1: 0.2, 2: 0.3}, {1: 0.5, 2: 0.5}, False)
    assert gain.mean == pytest.approx(0.25)


def test_candidates_say_what_they_gain_over_the_defaults() -> None:
    ranked = [point("0002", s1=0.75, s2=0.5), point(DEFAULTS, s1=0.5, s2=0.25), point("0001", s1=0.25)]
    best, defaults, worst = describe(ranked, True)
    assert (best.label, best.first, best.num_seeds, best.mean) == ("0002", 0.5, 2, mean_over_seeds([0.75, 0.5]))
    assert best.gain is not None
    assert (best.gain.mean, best.gain.low) == (0.25, 0.25)
    assert defaults.gain is None
    assert worst.gain is not None
    assert worst.gain.mean == -0.25
    assert math.isnan(worst.gain.low)


def test_without_defaults_there_is_no_gain() -> None:
    (candidate,) = describe([point("0002", s1=0.75)], True)
    assert candidate.gain is None


# --- the choice ---------------------------------------------------------------------------------------------------


def kept(config: Config) -> dict[str, Any]:
    raw = identity(config.to_dict())
    for path in NOT_KEPT:
        drop_path(raw, path)
    return raw


def train_again(found: TrialConfigs, draw: Draw | None, folder: Path) -> Config:
    label = DEFAULTS if draw is None else "0003"
    command = write_choice(found, Confirmed(label, draw, None, {}), folder, "trial 0003 wins: val/top1 0.9000")
    assert command == f"python -m pipeline distill --conf {folder / 'conf'} experiment=winner"
    return load_config(Request("distill", ("experiment=winner",), (folder / "conf",))).config


KD: Draw = {"loss.temperature": 2.000010000000001, "loss.kd_weight": 0.7}
OTHER: Draw = {"loss": "dist", "loss=dist: loss.temperature": 2.5, "loss=dist: loss.inter_weight": 1.5}


@pytest.mark.parametrize(
    ("overrides", "draw"),
    [
        (("search=temperature",), KD),
        (("search=temperature",), None),
        (("search=temperature", "run.seed=5", "data.augment.flip=true", "data.num_views=2"), KD),
        (("search=temperature", "train.optimizer.lr=1e-05", "train.optimizer.betas=[0.8,0.9]", "student=resnet20"), KD),
        (("search=temperature", "cache=topk", "cache.k=3", "teacher=mlp", "teacher.hidden=[8,8]"), KD),
        (("search=temperature", "train=cifar", "experiment=digits_demo", "train.epochs=3"), KD),
        (("search=temperature", "selection.upper=3"), KD),
        (("search=losses", "loss=kd", "loss.temperature=7"), OTHER | {"loss=dist: loss.intra_weight": 0.0}),
        (("search=losses", "loss=kd"), {"loss": "ptloss", "loss=ptloss: loss.perturbation.0": -0.5}),
        (("search=ptloss", "loss=ptloss"), {f"loss.perturbation.{index}": 0.25 for index in range(3)}),
        (
            ("search=cmkd", "loss=cmkd"),
            {
                "loss.pearson_weight": 1.5,
                "loss.spearman_weight": 0.0,
                "loss.soft_rank_strength": 0.001,
                "loss.difficulty": "margin",
            },
        ),
    ],
)
def test_the_choice_trains_the_winner_again(tmp_path: Path, overrides: tuple[str, ...], draw: Draw | None) -> None:
    found = configs(*overrides)
    again = train_again(found, draw, tmp_path / "winner")
    assert kept(again) == kept(found.build(draw, Path("trial"), "trial"))
    assert again.search is None
    assert again.evaluation.test == found.config.evaluation.test


def test_the_choice_gives_way_to_the_command_line(tmp_path: Path) -> None:
    train_again(configs(), KD, tmp_path)
    request = Request("distill", ("experiment=winner", "loss.temperature=9", "run.seed=4"), (tmp_path / "conf",))
    config = load_config(request).config
    assert config.loss.temperature == 9  # type: ignore[attr-defined]
    assert config.run.seed == 4


def test_the_choice_says_what_it_is(tmp_path: Path) -> None:
    train_again(configs(), KD, tmp_path)
    lines = (tmp_path / "conf" / "experiment" / "winner.yaml").read_text().splitlines()
    assert lines[:4] == [
        "# @package _global_",
        f"# python -m pipeline distill --conf {tmp_path / 'conf'} experiment=winner",
        "# trial 0003 wins: val/top1 0.9000",
        "# loss.temperature 2, loss.kd_weight 0.7",
    ]
