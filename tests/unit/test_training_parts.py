"""Arithmetic of a run, schedules, parameter groups, evaluation over workers, and who opens test data."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.contracts.columns import INPUT
from pipeline.data import iterate_rows
from pipeline.data.sources.digits import DigitsParams
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation import EvaluationParams
from pipeline.models import build_classifier
from pipeline.models.mlp import MLPParams
from pipeline.training import EvaluationSet, OptimizerParams, RunPlan, open_test
from pipeline.training.optim import build_optimizer, learning_rate

ROOT = Path(__file__).parents[2]


# --- arithmetic of a run ----------------------------------------------------------------------------------------


def test_run_plan_by_hand() -> None:
    plan = RunPlan(batch_size=10, blocks_per_epoch=7, blocks_per_step=3, num_epochs=3)
    assert (plan.num_steps, plan.num_blocks, plan.rows_per_step) == (7, 21, 30)
    assert plan.steps_per_epoch == pytest.approx(7 / 3)
    # Epochs end at blocks 7, 14 and 21: within steps 3, 5 and 7.
    assert [plan.epoch_of_step(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert [step for step in range(1, 8) if plan.ends_epoch(step)] == [3, 5, 7]


def test_run_is_cut_to_whole_steps() -> None:
    plan = RunPlan(batch_size=10, blocks_per_epoch=5, blocks_per_step=4, num_epochs=3)
    assert (plan.num_steps, plan.num_blocks) == (3, 12)
    assert plan.epoch_of_step(3) == 3  # the last step completes the last epoch, three blocks short of it
    with pytest.raises(ConfigError, match=r"train\.blocks_per_step is 4 but the whole run has 3 blocks of 10 rows"):
        RunPlan(batch_size=10, blocks_per_epoch=1, blocks_per_step=4, num_epochs=3)


def test_run_plan_holds_for_every_shape() -> None:
    for epoch, step, epochs in itertools.product(range(1, 9), range(1, 9), range(1, 5)):
        if epoch * epochs < step:
            continue
        plan = RunPlan(4, epoch, step, epochs)
        assert 0 <= epoch * epochs - plan.num_blocks < step
        assert plan.num_blocks % step == 0
        ends = [number for number in range(1, plan.num_steps + 1) if plan.ends_epoch(number)]
        # An epoch ends with the step that takes its last block, the last one with the run at the latest.
        assert ends == sorted({min(-(-epoch * number // step), plan.num_steps) for number in range(1, epochs + 1)})


# --- optimizer --------------------------------------------------------------------------------------------------

PLAN = RunPlan(batch_size=10, blocks_per_epoch=10, blocks_per_step=2, num_epochs=4)  # 20 steps of 20 samples


def rates(**values: Any) -> list[float]:
    params = OptimizerParams(lr=0.4, **values)
    return [learning_rate(params, PLAN, step) for step in range(PLAN.num_steps)]


def test_constant_rate() -> None:
    assert rates(schedule="constant") == [0.4] * 20


def test_warm_up_rises_in_a_straight_line() -> None:
    # One epoch is 100 samples: five steps of a fifth of the peak each.
    assert rates(schedule="constant", warmup_epochs=1)[:7] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4, 0.4])
    # 50 samples: the third step reaches them in its middle.
    assert rates(schedule="constant", warmup_epochs=0.5)[:4] == pytest.approx([0.16, 0.32, 0.4, 0.4])


def test_cosine_by_hand() -> None:
    without = rates(schedule="cosine")
    # cos(pi/2) = 0 at half of the run, cos(pi/4) = 0.70711 at a quarter.
    assert (without[0], without[5], without[10]) == pytest.approx((0.4, 0.4 * 0.853553, 0.2))
    assert without == sorted(without, reverse=True)
    floor = rates(schedule="cosine", min_lr_ratio=0.1)
    assert floor[10] == pytest.approx(0.04 + 0.36 / 2)
    # After one epoch of warm-up 300 samples are left; step 10 begins a third of them in: (1 + cos(pi/3)) / 2.
    warm = rates(schedule="cosine", warmup_epochs=1)
    assert (warm[4], warm[5], warm[10]) == pytest.approx((0.4, 0.4, 0.3))


def test_steps_by_hand() -> None:
    stepped = rates(schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert stepped == pytest.approx([0.4] * 10 + [0.04] * 5 + [0.004] * 5)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedules_count_samples_not_steps(schedule: Literal["cosine", "step", "constant"]) -> None:
    params = OptimizerParams(schedule=schedule)
    halves = RunPlan(batch_size=5, blocks_per_epoch=20, blocks_per_step=2, num_epochs=4)
    for step in range(PLAN.num_steps):
        assert learning_rate(params, PLAN, step) == learning_rate(params, halves, 2 * step)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_spares_biases_and_normalisation(name: Literal["sgd", "adamw"]) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    network[3].bias.requires_grad_(False)
    decayed, spared = build_optimizer(network, OptimizerParams(name=name, weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert [p.shape for p in decayed["params"]] == [network[0].weight.shape, network[3].weight.shape]
    assert [p.shape for p in spared["params"]] == [(2,), (2,), (2,)]


# --- evaluation over workers ------------------------------------------------------------------------------------


class OneOfMany:
    """A worker among several that are run one after the other; the last one gets the sums."""

    def __init__(self, rank: int, world_size: int, others: list[Tensor]) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")
        self._others = others

    def sum_over_workers(self, values: Tensor) -> Tensor:
        self._others.append(values.clone())
        return torch.stack(self._others).sum(dim=0) if len(self._others) == self.world_size else values


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_evaluation_over_workers_is_one_pass(world_size: int) -> None:
    source = DigitsParams(validation_fraction=0.06).open()
    reader = source.split("validation")
    assert reader.num_rows == 108
    torch.manual_seed(0)
    network = build_classifier(MLPParams(hidden=(16,)), source.spec)
    teacher = np.random.default_rng(0).normal(size=(108, 10)).astype(np.float32)

    def evaluate(rank: int, size: int, others: list[Tensor]) -> Any:
        # Kept rows are not shared, and batches do not divide the rows.
        params = EvaluationParams(batch_size=10)
        rows = EvaluationSet(source.spec, source.decoder("validation"), reader, "validation", params, teacher)
        first = rows.evaluate(network, OneOfMany(rank, size, others))
        if size == 1:
            assert rows.evaluate(network, OneOfMany(0, 1, [])) == first  # from the kept rows
        return first

    alone = evaluate(0, 1, [])
    others: list[Tensor] = []
    together = [evaluate(rank, world_size, others) for rank in range(world_size)][-1]
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert together.metrics["val/num_rows"] == 108
    assert together.per_class == pytest.approx(alone.per_class)
    assert network.training

    # The same by hand, in numpy.
    (rows,) = iterate_rows(source.decoder("validation"), reader, 0, 1, 108)
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(rows[INPUT])).numpy()
    assert alone.metrics["val/top1"] == pytest.approx((logits.argmax(1) == rows["label"]).mean())
    assert alone.metrics["val/agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).mean())


def test_teacher_logits_of_another_split_are_refused() -> None:
    source = DigitsParams().open()
    with pytest.raises(CheckpointError, match="have 3 rows but the validation split has 180; delete the file"):
        EvaluationSet(
            source.spec, source.decoder("validation"), source.split("validation"), "validation", EvaluationParams(),
            np.zeros((3, 10), np.float32),
        )  # fmt: skip


# --- test data --------------------------------------------------------------------------------------------------


def test_opening_test_needs_a_reason() -> None:
    opened = SimpleNamespace(split=lambda name: f"the {name} rows")
    assert open_test(opened, "to see what comes back") == "the test rows"  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(ValueError, match="needs a reason"):
        open_test(opened, "")  # type: ignore[arg-type]


def _calls(name: str) -> list[tuple[str, str, ast.Call]]:
    """File, function and call, of every call of a function or method called ``name`` in the package."""
    found = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and name == getattr(node.func, "attr", getattr(node.func, "id", None)):
                    found.append((str(path.relative_to(ROOT / "pipeline")), function.name, node))
    return found


def test_one_function_opens_test_and_its_callers_are_known() -> None:
    by_name = [
        (file, function)
        for attribute in ("split", "load")
        for file, function, call in _calls(attribute)
        if any(isinstance(node, ast.Constant) and node.value == "test" for node in ast.walk(call))
    ]
    assert by_name == [
        ("data/params.py", "open_rows"),  # rows that the user asks predictions for
        ("training/validation.py", "open_test"),
    ]
    assert {(file, function) for file, function, _ in _calls("open_rows")} == {("stages/predict.py", "_open_rows")}

    # Splits whose name is a variable, which might be test: each is here because it is not.
    by_variable = {
        (file, function)
        for file, function, call in _calls("split")
        if len(call.args) == 1 and isinstance(call.args[0], ast.Name)
    }
    assert by_variable == {
        ("data/sources/gaussians.py", "class_probabilities"),  # called by nothing here, see below
        ("data/sources/source.py", "in_memory"),  # called with "train" alone, see below
        ("data/sources/source.py", "load"),
        ("stages/doctor.py", "_data"),  # train and validation
        ("stages/evaluate.py", "evaluate"),  # open_test where it is test
        ("stages/validate.py", "validate"),  # open_test where it is test
    }
    assert not list(_calls("class_probabilities"))
    loaded = [ast.unparse(call.args[0]) for name in ("in_memory", "load") for _, _, call in _splits_loaded(name)]
    assert set(loaded) <= {"'train'", "name"}

    callers = Counter((file, function) for file, function, _ in _calls("open_test"))
    assert callers == Counter(
        [
            ("stages/evaluate.py", "evaluate"),
            ("stages/predict.py", "_open_rows"),
            ("trials/result.py", "_open_test"),  # after the winner was chosen
            ("execution/training.py", "evaluate_test"),
            ("stages/validate.py", "validate"),
        ]
    )
    for file, function, call in _calls("open_test"):
        assert len(call.args) == 2, f"{function} in {file} gives no reason"


def _splits_loaded(name: str) -> list[tuple[str, str, ast.Call]]:
    return [
        found for found in _calls(name) if found[0] in ("training/job.py", "data/sources/source.py") and found[2].args
    ]
