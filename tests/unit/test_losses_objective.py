"""Schedules, combined losses, the teacher's last layer, and what of a loss the configuration refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.config.compose import compose
from pipeline.config.validate import build_config
from pipeline.contracts.columns import InputSpec
from pipeline.errors import ConfigError, ModelError
from pipeline.losses import LossParams, Objective, Signals
from pipeline.losses.cmkd import CMKDParams
from pipeline.losses.combined import CombinedParams
from pipeline.losses.dist import DISTParams
from pipeline.losses.dkd import DKDParams
from pipeline.losses.kd import KDParams, kl_divergence
from pipeline.losses.levels import LevelsParams
from pipeline.losses.ptloss import PTLossParams
from pipeline.losses.schedule import Schedule
from pipeline.losses.standardise import standardise
from pipeline.models import Classifier, class_similarity

GENERATOR = torch.Generator().manual_seed(3)
STUDENT, TEACHER = torch.randn(2, 16, 5, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(5, (16,), generator=GENERATOR)


def value(params: LossParams, progress: float = 0.0) -> float:
    return Objective(params)(Signals(STUDENT, LABELS, TEACHER), progress)[0].item()


# --- schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(to=2.0), [4.0, 3.5, 3.0, 2.0]),
        (Schedule(to=2.0, end=0.5), [4.0, 3.0, 2.0, 2.0]),
        (Schedule(to=2.0, begin=0.5), [4.0, 4.0, 4.0, 2.0]),
        (Schedule(to=2.0, shape="cosine"), [4.0, 2 + (1 + np.cos(np.pi / 4)), 3.0, 2.0]),
    ],
)
def test_a_schedule_goes_from_the_losses_value_to_its_own(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule.value(4.0, progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx(expected)


def test_an_objective_follows_its_schedule_and_logs_it() -> None:
    params = KDParams(schedule={"temperature": {"to": 1.0}, "ce_weight": {"to": 0.0}})
    for progress, temperature, ce_weight in ((0.0, 4.0, 0.1), (0.5, 2.5, 0.05), (1.0, 1.0, 0.0)):
        total, logged = Objective(params)(Signals(STUDENT, LABELS, TEACHER), progress)
        assert total.item() == pytest.approx(value(KDParams(temperature=temperature, ce_weight=ce_weight)))
        assert logged["temperature"].item() == pytest.approx(temperature)
        assert logged["ce_weight"].item() == pytest.approx(ce_weight)
        assert ("ce" in logged) == (ce_weight > 0)


def test_labels_are_needed_where_a_schedule_turns_to_them() -> None:
    assert not KDParams(ce_weight=0).needs_labels
    assert KDParams(ce_weight=0, schedule={"ce_weight": {"to": 1.0}}).needs_labels


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"schedule": {"temprature": {"to": 1}}}, "schedule.temprature: expected one of temperature, kd_weight"),
        ({"schedule": {"temperature": {"to": 0}}}, "schedule.temperature.to=0: Input should be greater than 0"),
        ({"schedule": {"kd_weight": {"to": -1}}}, "schedule.kd_weight.to=-1: Input should be greater than or equal"),
        ({"schedule": {"kd_weight": {"to": 1, "begin": 0.5, "end": 0.5}}}, "begin=0.5 must be before end=0.5"),
        (
            {"ce_weight": 0, "schedule": {"kd_weight": {"to": 0}}},
            "every term (kd, ce) has weight 0 at the end of training, so nothing is learnt",
        ),
    ],
)
def test_what_a_schedule_cannot_be(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        KDParams.model_validate(values)


# --- several losses at once -------------------------------------------------------------------------------------


def test_a_combined_loss_is_the_sum_of_its_parts() -> None:
    params = CombinedParams(
        parts={"kd": {"temperature": 2.0}, "cmkd": {}, "dist": {"intra_weight": 0.5}}, ce_weight=0.3
    )
    parts = [KDParams(temperature=2.0, ce_weight=0), CMKDParams(ce_weight=0), DISTParams(intra_weight=0.5, ce_weight=0)]
    entropy = -torch.log_softmax(STUDENT, dim=1).gather(1, LABELS[:, None]).mean().item()
    assert value(params) == pytest.approx(sum(map(value, parts)) + 0.3 * entropy)
    assert params.couples_batch
    assert params.needs == {"full", "topk"}
    _, logged = Objective(params)(Signals(STUDENT, LABELS, TEACHER))
    assert logged.keys() == {
        *("kd/kd", "cmkd/pearson", "cmkd/spearman", "cmkd/hard_rows", "cmkd/linear_rows"),
        *("dist/inter", "dist/intra", "ce", "group_rows"),
    }
    assert logged["group_rows"].item() == 16


def test_the_default_parts_are_validated_like_others() -> None:
    assert isinstance(CombinedParams().parts["cmkd"], CMKDParams)
    assert CombinedParams.model_validate(CombinedParams().model_dump(mode="json")) == CombinedParams()


def test_a_schedule_may_belong_to_a_part_or_to_the_whole() -> None:
    parts = {"kd": {"schedule": {"temperature": {"to": 2.0}}}}
    params = CombinedParams(parts=parts, schedule={"ce_weight": {"to": 0.0}})
    assert value(params, 1.0) == pytest.approx(value(KDParams(temperature=2.0, ce_weight=0)))
    _, logged = Objective(params)(Signals(STUDENT, LABELS, TEACHER), 0.5)
    assert logged["kd/temperature"].item() == 3.0
    assert logged["ce_weight"].item() == 0.5


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({}, "expected at least one loss by name"),
        ({"kdd": {}}, "unknown loss 'kdd'; known: .* Did you mean 'kd'"),
        ({"kd": {"temperature": 0}}, "kd.temperature: Input should be greater than 0"),
        ({"kd": {"temperature": "2"}}, "kd.temperature: Input should be a valid number"),
        ({"kd": 3}, "kd: expected the parameters of a loss"),
        ({"combined": {}}, "combined cannot be a part of itself"),
    ],
)
def test_what_a_part_cannot_be(parts: object, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        CombinedParams.model_validate({"parts": parts})


# --- standardised logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [KDParams, PTLossParams, DISTParams, DKDParams, CMKDParams, LevelsParams])
def test_standardised_losses_do_not_see_scale_and_offset(build: type[LossParams]) -> None:
    params = build.model_validate({"standardise": True, "ce_weight": 0})
    one = Objective(params)(Signals(STUDENT, LABELS, TEACHER))[0].item()
    other = Objective(params)(Signals(3 * STUDENT + 5, LABELS, TEACHER))[0].item()
    assert other == pytest.approx(one, abs=1e-5)
    plain = build.model_validate({"standardise": False, "ce_weight": 0})
    assert value(plain) != pytest.approx(one, abs=1e-3)


def test_standardised_distillation_is_distillation_of_standardised_logits() -> None:
    expected = kl_divergence(standardise(STUDENT), standardise(TEACHER), temperature=2.0).item()
    params = KDParams(standardise=True, temperature=2.0, kd_weight=9.0, ce_weight=0)
    assert value(params) == pytest.approx(9 * expected)


# --- the teacher's last layer -----------------------------------------------------------------------------------


def classifier(*layers: nn.Module) -> Classifier:
    return Classifier(nn.Sequential(*layers), InputSpec("features", (3,), ("a", "b", "c", "d")), None)


def test_class_similarity_is_the_cosine_of_the_last_layers_rows() -> None:
    last = nn.Linear(3, 4)
    rows = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 2]])
    with torch.no_grad():
        last.weight.copy_(rows)
    similarity = class_similarity(classifier(nn.Linear(3, 3), last))
    np.testing.assert_allclose(similarity[0], [1, 0.8, 0, 0], atol=1e-7)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-7)

    def levels(similarity: Tensor | None) -> float:
        objective = Objective(LevelsParams(level="class_similarity", ce_weight=0), similarity)
        return objective(Signals(STUDENT[:, :4], LABELS % 4))[0].item()

    assert levels(torch.from_numpy(similarity)) > 0
    with pytest.raises(ConfigError, match="needs the similarity of the classes in the teacher's last layer"):
        levels(None)


def test_a_network_without_a_last_linear_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer with 4 outputs"):
        class_similarity(classifier(nn.Linear(3, 5)))


# --- what does not go together ----------------------------------------------------------------------------------


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(compose(["teacher.checkpoint=teacher.safetensors", *overrides]), "distill")
    return list(caught.value.details["problems"])


def test_losses_that_couple_rows_want_blocks_of_eight() -> None:
    (problem,) = problems_of("loss=dist", "train.batch_size=7")
    assert problem.startswith("train.batch_size: expected at least 8, got 7; loss=dist correlates the rows of a block")
    build_config(compose(["teacher.checkpoint=x", "loss=dist", "loss.intra_weight=0", "train.batch_size=7"]), "distill")


def test_losses_of_one_label_a_row_refuse_mixed_images() -> None:
    (problem,) = problems_of("loss=dkd", "data=image_folder", "data.path=data", "data.augment.mixup=0.2")
    assert problem.startswith("data.augment: mixup and cutmix give a row two labels, but target and nontarget of")


def test_parts_are_chosen_on_the_command_line() -> None:
    overrides = ["loss=combined", "loss.parts={ptloss: {temperature: 2}, dist: {}}", "loss.ce_weight=0"]
    loss = build_config(compose(["teacher.checkpoint=x", *overrides]), "distill").loss
    assert isinstance(loss, CombinedParams)
    assert list(loss.parts) == ["ptloss", "dist"]
    assert not loss.needs_labels
