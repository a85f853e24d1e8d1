"""The training loop in one process: what it keeps, and mixed labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.pixels.augment import AugmentParams
from pipeline.training import (
    Block,
    Evaluation,
    LocalContext,
    Outcome,
    TrainParams,
    build_job,
    read_state,
    train,
)
from tests.recorder import Recorder
from tests.unit.fits import DATA, NOISY, SGD, SOURCE, Stopped, assert_identical, fit, make_spec, source_of, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what it keeps ----------------------------------------------------------------------------------------------


class ScriptedValidation:
    """Evaluations with values given in advance."""

    def __init__(self, name: str, values: list[float]) -> None:
        self._name, self._values = name, iter(values)

    def evaluate(self, network: nn.Module, worker: Any, autocast: bool = False) -> Evaluation:
        return Evaluation({self._name: next(self._values)}, {})


@pytest.mark.parametrize(
    ("select_by", "values", "best_epoch"),
    [
        ("val/top1", [0.1, 0.5, 0.5, 0.4], 2),
        ("val/nll", [2.0, 1.0, 1.0, 3.0], 2),
        ("val/top1", [0.5, 0.1, 0.2, 0.6], 4),
        ("val/ece", [0.1, 0.1, 0.1, 0.1], 1),
        ("val/nll", [math.nan, math.inf, 3.0, 4.0], 3),
        ("val/top1", [math.nan] * 4, 1),
    ],
)
def test_best_checkpoint_is_kept(select_by: str, values: list[float], best_epoch: int, tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=4, batch_size=16, optimizer=SGD, select_by=select_by))
    job: Any = replace(build_job(spec, SOURCE), validation=ScriptedValidation(select_by, values))  # type: ignore[arg-type]
    kept = []

    class Watching(LocalContext):
        def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
            assert folder is not None
            kept.append(read_state(folder))
            super().commit(folder, metrics)

    recorder = Recorder()
    state = train(job, Watching(tmp_path, recorder, torch.device("cpu")), source_of(spec))
    assert state.best is not None
    assert (state.best.epoch, state.best.step) == (best_epoch, best_epoch * 11)
    assert state.best.value == pytest.approx(values[best_epoch - 1], nan_ok=True)
    assert_identical(state.best.weights, dict(kept[best_epoch - 1]["network"]))
    # A journal that lost them can be given what it was told of this step and of the last.
    told = {event.data["step"]: event.data for event in recorder.events if event.kind == "evaluation"}
    wanted = [told[step] for step in dict.fromkeys((state.best.step, 44))]
    assert json.dumps(Outcome.read(tmp_path / "last").evaluations) == json.dumps(wanted)


def test_checkpoints_of_the_first_versions_know_metrics_and_steps_of_evaluations(tmp_path: Path) -> None:
    spec = make_spec(TrainParams(epochs=2, batch_size=16, optimizer=SGD))
    values = ScriptedValidation("val/top1", [0.5, 0.25])
    job: Any = replace(build_job(spec, SOURCE), validation=values)  # type: ignore[arg-type]
    train(job, LocalContext(tmp_path, Recorder(), torch.device("cpu")), source_of(spec))
    saved = read_state(tmp_path / "last")
    del saved["evaluations"]
    torch.save(saved, tmp_path / "last" / "state.pt")
    expected = {"split": "validation", "per_class": {}}
    assert Outcome.read(tmp_path / "last").evaluations == [
        {**expected, "step": 22, "metrics": {"val/top1": 0.25}, "best": False},
        {**expected, "step": 11, "metrics": {"val/top1": 0.5}, "best": True},
    ]


def test_average_of_the_weights_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    """The average by hand: the first step's weights, then 0.8 of itself plus 0.2 of the new ones."""
    spec = make_spec(TrainParams(epochs=1, batch_size=64, optimizer=SGD, ema_decay=0.8, checkpoint_every=1), NOISY)
    assert spec.plan.num_steps == 2
    seen = []

    class Watching(LocalContext):
        def commit(self, folder: Path | None, metrics: dict[str, float]) -> None:
            assert folder is not None
            seen.append(read_state(folder)["network"])
            super().commit(folder, metrics)

    state = train(build_job(spec, SOURCE), Watching(tmp_path, Recorder(), torch.device("cpu")), source_of(spec))
    assert state.best is not None
    for name, value in state.best.weights.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.8 * seen[0][name] + 0.2 * seen[1][name])


def test_gradients_of_two_blocks_are_those_of_one_large_block(tmp_path: Path) -> None:
    whole, _ = fit(make_spec(TrainParams(epochs=2, batch_size=16, optimizer=SGD)), tmp_path / "whole")
    halves, _ = fit(make_spec(TrainParams(epochs=2, batch_size=8, blocks_per_step=2, optimizer=SGD)), tmp_path / "two")
    assert whole.step == halves.step == 22
    for one, other in zip(whole.classifier.parameters(), halves.classifier.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# --- mixed labels -----------------------------------------------------------------------------------------------


def test_labels_weigh_as_the_block_says(tmp_path: Path) -> None:
    """All the weight on one of two labels is training on that label."""
    spec = make_spec(TrainParams(epochs=1, batch_size=16, optimizer=SGD))

    def mix_in(own: float, shift: int, partner_shift: int) -> Callable[[Block], Block]:
        def change(block: Block) -> Block:
            labels, partners = (block.labels + shift) % 10, (block.labels + partner_shift) % 10
            weights = np.full(16, own, np.float32)
            return replace(block, labels=labels, partner_labels=partners, label_weights=weights)

        return change

    plain, _ = fit(spec, tmp_path / "plain")
    for number, change in enumerate((mix_in(1, 0, 1), mix_in(0, 1, 0), mix_in(0.25, 0, 0))):
        mixed, _ = fit(spec, tmp_path / str(number), change)
        for one, other in zip(plain.classifier.parameters(), mixed.classifier.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    halves, _ = fit(spec, tmp_path / "halves", mix_in(0.5, 0, 1))
    assert any(
        (one - other).abs().max() > 1e-3
        for one, other in zip(plain.classifier.parameters(), halves.classifier.parameters(), strict=True)
    )


def test_run_on_mixed_images_resumes_bit_for_bit(tmp_path: Path) -> None:
    params = TrainParams(epochs=2, batch_size=16, optimizer=SGD, checkpoint_every=3, log_every=22)
    data = DATA.model_copy(update={"augment": AugmentParams(crop_padding=1, mixup=0.4, cutmix=1.0)})
    spec = replace(make_spec(params, NOISY), data=data)
    block = next(source_of(spec).blocks(0))
    assert block.label_weights is not None
    assert 0.2 < block.label_weights.mean() < 0.9
    _, events = fit(spec, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(spec, tmp_path / "parts", stop_at(14))
    fit(spec, tmp_path / "parts")
    assert_identical(read_state(tmp_path / "parts" / "last"), read_state(tmp_path / "whole" / "last"))
    (step,) = (event for event in events if event.kind == "step" and event.data["step"] == 22)
    assert math.isfinite(step.data["metrics"]["train/ce"])
