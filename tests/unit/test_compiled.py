"""What `train.compile` has compiled, and how often; by a backend that makes no machine code, which takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training import TrainParams
from pipeline.trials.trial import _own_process_state
from tests.unit.fits import NOISY, SGD, fit, make_spec
from tests.unit.runs import build

PARAMS = TrainParams(epochs=3, batch_size=16, optimizer=SGD)
COMPILED = PARAMS.model_copy(update={"compile": True})


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shape of the first input of everything that is compiled."""
    shapes: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        shapes.append(tuple(next(one.shape for one in inputs if isinstance(one, torch.Tensor) and one.ndim > 2)))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield shapes
    torch.compiler.reset()


def test_a_student_is_compiled_once_whatever_is_evaluated_between_its_steps(
    compilations: list[tuple[int, ...]], tmp_path: Path
) -> None:
    state, _ = fit(make_spec(COMPILED, NOISY), tmp_path / "compiled")
    assert compilations == [(16, 1, 8, 8)]
    plain, _ = fit(make_spec(PARAMS, NOISY), tmp_path / "plain")
    assert state.last_metrics["val/nll"] == pytest.approx(plain.last_metrics["val/nll"], rel=1e-4)


def test_another_batch_size_in_the_same_process_is_compiled_for_itself(
    compilations: list[tuple[int, ...]], tmp_path: Path
) -> None:
    for size in (16, 32, 8):
        fit(make_spec(COMPILED.model_copy(update={"batch_size": size})), tmp_path / str(size))
    assert compilations == [(16, 1, 8, 8), (32, 1, 8, 8), (8, 1, 8, 8)]  # a symbol would stand for 32 and 8


def test_trials_of_one_process_leave_nothing_compiled(compilations: list[tuple[int, ...]]) -> None:
    function = torch.compile(lambda values: values + 1)
    for _ in range(2):
        with _own_process_state(build("train.compile=true")):
            function(torch.ones(1, 2, 3))
            function(torch.ones(1, 2, 3))
    assert compilations == [(1, 2, 3)] * 2
