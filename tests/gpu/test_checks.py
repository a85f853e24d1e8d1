"""Each check of ``make gpu`` as a test: on the card, and what of it needs none on a CPU, at tiny sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.registry import Check, all_checks
from tests.gpu.worker import Worker

CHECKS = all_checks()
# What starts a Ray has tests of its own in tests/integration, and so has what is compiled nowhere else: on two cores a
# C++ compiler takes two minutes for it.
ON_CPU = [one for one in CHECKS if one.on_cpu and not one.on_ray and not one.name.startswith("compiled")]


def name_of(one: Check) -> str:
    return one.name


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    made = {device: Worker(device, tmp_path_factory.mktemp(device)) for device in ("cuda", "cpu")}
    yield made
    for worker in made.values():
        worker.end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA on this machine")
@pytest.mark.parametrize("one", CHECKS, ids=name_of)
def test_on_the_card(one: Check, workers: dict[str, Worker]) -> None:
    outcome = workers["cuda"].make(one, one.limit_s)
    assert outcome.state == "ok", f"{outcome.reason}\n{outcome.detail}"


@pytest.mark.slow
@pytest.mark.parametrize("one", ON_CPU, ids=name_of)
def test_on_a_cpu(one: Check, workers: dict[str, Worker]) -> None:
    outcome = workers["cpu"].make(one, one.limit_s)
    assert outcome.state == "ok", f"{outcome.reason}\n{outcome.detail}"
    assert outcome.figures


def test_every_check_says_what_it_checks() -> None:
    assert len({one.name for one in CHECKS}) == len(CHECKS) > 12
    assert all(one.summary for one in CHECKS)
