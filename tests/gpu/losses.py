"""Losses and ranks on the card against the CPU's numbers, and their times."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.losses import LOSSES, LossParams, Objective, Signals
from pipeline.losses.soft_rank import average_ranks, soft_rank
from tests.bench.losses import SIZES, workloads_of
from tests.gpu.registry import Figures, Place, check
from tests.gpu.timing import seconds_per_call

CLOSE = 1e-5

# Losses whose default parameters leave a part of them out: each of these is a check of its own.
VARIANTS: Mapping[str, tuple[dict[str, object], ...]] = {
    "combined": ({"parts": {"ptloss": {}, "dist": {}}},),
    "levels": tuple(
        {"level": level}
        for level in ("label_smoothing", "partial_teacher", "class_similarity", "partial_and_similarity", "topk")
    ),
    "kd": ({}, {"standardise": True}, {"schedule": {"temperature": {"to": 1.0, "shape": "cosine"}}}),
    "ptloss": ({}, {"perturbation": (0.5, -0.25, 0.1)}),
}


def loss_variants() -> dict[str, LossParams]:
    """Every registered loss, by its name and what differs from its defaults."""
    return {
        " ".join([name, *(f"{key}={value}" for key, value in values.items() if key != "parts")]): cls.model_validate(
            {"name": name, **values}
        )
        for name, cls in LOSSES.entries().items()
        for values in VARIANTS.get(name, ({},))
    }


@check("soft-rank", limit_s=60, on_cpu=False)
def soft_rank_agrees(place: Place) -> Figures:
    """The soft rank's kernels, forward and backward, against the CPU's, to 1e-5 of the largest."""
    generator = torch.Generator().manual_seed(0)
    furthest = {"ranks": 0.0, "gradients": 0.0}
    for dtype in (torch.float32, torch.float64):
        for rows, classes in ((4, 1), (5, 2), (3, 7), (64, 100), (64, 1_000), (8, 10_000)):
            for strength in (0.3 / classes, 1 / classes, 0.3, 3.0):
                values = torch.randn(rows, classes, generator=generator, dtype=torch.float64).to(dtype)
                values[0], values[1, ::2] = 1.0, values[1, 0]  # ties
                weights = torch.randn(rows, classes, generator=generator, dtype=torch.float64).to(dtype)
                there = _rank(values, weights, strength, place.device)
                here = _rank(values, weights, strength, "cpu")
                what = f"{rows} x {classes} {dtype} strength {strength:g}"
                if not torch.equal(there[2], here[2]):
                    raise AssertionError(f"{what}: the numbers of blocks differ")
                for name, one, other in zip(furthest, there, here, strict=False):
                    furthest[name] = max(furthest[name], _distance(one, other, f"{what}: {name}", CLOSE))
    return {**{f"largest difference of {name}": value for name, value in furthest.items()}, **_on_second_card()}


def _rank(values: Tensor, weights: Tensor, strength: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks, a gradient, and numbers of blocks."""
    moved = values.to(device).requires_grad_()
    ranks, num_blocks = soft_rank(moved, strength=strength)
    (gradient,) = torch.autograd.grad(ranks, moved, weights.to(device))
    return ranks.detach().cpu(), gradient.cpu(), num_blocks.cpu()


def _on_second_card() -> Figures:
    """A tensor on a card that is not the current one."""
    if torch.cuda.device_count() < 2:
        return {"on another card": "there is one card only"}
    values = torch.randn(8, 50)
    one, other = (_rank(values, values, 0.1, device)[0] for device in ("cuda:1", "cpu"))
    return {"on another card": _distance(one, other, "on another card", CLOSE)}


def _distance(one: Tensor, other: Tensor, what: str, limit: float) -> float:
    """Largest difference as a share of the largest value, or of 1."""
    if one.dtype != other.dtype or not torch.isfinite(one).all():
        raise AssertionError(f"{what}: {one.dtype} with {int((~torch.isfinite(one)).sum())} values that are not finite")
    one, other = one.double(), other.double()
    distance = ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()
    if distance > limit:
        raise AssertionError(f"{what} differ by {distance:.3g} of the largest, expected at most {limit:g}")
    return distance


@check("average-ranks", limit_s=30, on_cpu=False)
def average_ranks_agree(place: Place) -> Figures:
    """Hard ranks with ties, against the CPU's, exactly."""
    generator = torch.Generator().manual_seed(0)
    for rows, classes in ((3, 1), (50, 9), (64, 1_000), (8, 10_000)):
        values = torch.randint(-classes // 4 - 1, classes // 4 + 2, (rows, classes), generator=generator).float()
        if not torch.equal(average_ranks(values.to(place.device)).cpu(), average_ranks(values)):
            raise AssertionError(f"{rows} x {classes}: the ranks differ")
    return {"largest difference": 0.0}


@check("losses", limit_s=90)
def losses_agree(place: Place) -> Figures:
    """Every registered loss, forward and backward, against the CPU's; and how often it waits for the device."""
    generator = torch.Generator().manual_seed(0)
    furthest, waiting = 0.0, []
    for name, params in loss_variants().items():
        waits = 0
        for rows, classes in ((64, 100), (32, 1_000)) if place.on_gpu else ((8, 12),):
            batch = _Batch.draw(rows, classes, generator)
            objective, other = Objective(params, batch.similarity), Objective(params, batch.similarity)
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                there, here = batch.learn(objective, dtype, place.device), batch.learn(other, dtype, "cpu")
                what = f"{name}, {rows} x {classes} {dtype}"
                furthest = max(furthest, _compare(there, here, what, exact=dtype == torch.float64))
            if place.on_gpu:
                waits = max(waits, batch.count_waits(objective, place.device))
        if waits:
            waiting.append(f"{name} ({waits})")
    return {
        "losses": len(loss_variants()),
        "largest difference": furthest,
        "that wait for the device within a step": "; ".join(waiting) or "none",
    }


def _compare(there: tuple[Tensor, Tensor], here: tuple[Tensor, Tensor], what: str, exact: bool) -> float:
    """The larger distance. In less than float64, gradients of ranks jump where values are nearly equal."""
    if exact:
        named = zip(("loss", "gradient"), there, here, strict=True)
        return max(_distance(one, other, f"{what}: {name}", CLOSE) for name, one, other in named)
    _distance(there[0], here[0], f"{what}: loss", 1e-3)
    one, other = (gradient.double() for gradient in (there[1], here[1]))
    apart = ((one - other).norm() / other.norm()).item()
    if not apart < 0.02:
        raise AssertionError(f"{what}: gradients differ by {apart:.3g} of their length, expected at most 0.02")
    return 0.0


@dataclass(frozen=True)
class _Batch:
    student: Tensor
    teacher: Tensor
    labels: Tensor
    similarity: Tensor

    @classmethod
    def draw(cls, rows: int, classes: int, generator: torch.Generator) -> Self:
        student, teacher = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
        directions = torch.nn.functional.normalize(torch.randn(classes, 16, generator=generator), dim=1)
        labels = torch.randint(classes, (rows,), generator=generator)
        return cls(student, teacher, labels, directions @ directions.T)

    def signals(self, dtype: torch.dtype, device: str) -> Signals:
        """As a training step has them: the teacher's logits are float32, unless all is float64."""
        student = self.student.to(device, dtype).requires_grad_()
        return Signals(
            student, self.labels.to(device), self.teacher.to(device, torch.promote_types(dtype, torch.float32))
        )

    def learn(self, objective: Objective, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient times the number of rows, both on the CPU."""
        signals = self.signals(dtype, device)
        loss, _ = objective(signals, 0.5)
        (gradient,) = torch.autograd.grad(loss, signals.student_logits)
        return loss.detach().cpu(), gradient.cpu() * len(gradient)

    def count_waits(self, objective: Objective, device: str) -> int:
        """How often the host waits for the device in a step, as torch notices it."""
        signals = self.signals(torch.float32, device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                objective(signals, 0.5)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(one.message) for one in caught)


@check("losses-times", limit_s=90)
def losses_take(place: Place) -> Figures:
    """Milliseconds of each loss, of the soft rank and of a sort, forward and backward, for 100 to 10,000 classes."""
    figures: Figures = {}
    device = torch.device(place.device)
    for rows, classes in SIZES if place.on_gpu else ((8, 100),):
        workloads = workloads_of(rows, classes, device)
        ms = {name: 1e3 * seconds_per_call(function, device) for name, function in workloads.items()}
        figures |= {f"{name}, {rows} x {classes}, ms": value for name, value in ms.items()}
        figures[f"soft rank over sort, {rows} x {classes}"] = ms["soft rank"] / ms["torch.sort"]
    return figures
