"""Drawing the points of a search, through Ray Tune's OptunaSearch."""

from __future__ import annotations

from typing import Literal

import pytest

from pipeline.cluster.sampler import Sampler
from pipeline.search import Draw, Space
from pipeline.search.study import PastTrial

SPACE = Space.parse(
    {
        "loss": {
            "temperature": {"distribution": "loguniform", "low": 1, "high": 16},
            "kd_weight": {"distribution": "uniform", "low": 0, "high": 1},
        }
    }
)


def ask(sampler: Sampler, number: int) -> list[Draw]:
    return [sampler.ask(f"{index:04d}") for index in range(number)]


def test_points_to_begin_with_come_first_and_what_they_leave_out_is_drawn() -> None:
    start: list[Draw] = [{"loss.temperature": 4.0, "loss.kd_weight": 0.5}, {"loss.temperature": 2.0}]
    first, second, third = ask(Sampler(SPACE, "random", "max", 0, start), 3)
    assert first == start[0]
    assert second["loss.temperature"] == 2.0
    assert 0 <= float(second["loss.kd_weight"]) <= 1
    assert third["loss.temperature"] not in (2.0, 4.0)


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_search_that_goes_on_draws_other_points_also_where_none_is_over(kind: Literal["random", "optuna"]) -> None:
    before = ask(Sampler(SPACE, kind, "max", 0), 6)
    assert ask(Sampler(SPACE, kind, "max", 0), 6) == before
    after = ask(Sampler(SPACE, kind, "max", 0, num_drawn=6), 6)
    assert all(point not in before for point in after)


def test_optuna_s_sampler_learns_from_earlier_starts() -> None:
    """Low temperatures were good, so low ones are drawn."""
    past = [
        PastTrial(f"{index:04d}", {"loss.temperature": 1.0 + index * 0.5, "loss.kd_weight": 0.5}, 1.0 - index / 30)
        for index in range(30)
    ]
    drawn = ask(Sampler(SPACE, "optuna", "max", 0, past=past, num_drawn=30), 12)
    assert sum(float(point["loss.temperature"]) < 4.0 for point in drawn) > 9  # at random: every second one
