"""How fast teacher and student are on the card, beside what the card does without this product."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec
from pipeline.evaluation import METRIC_DIRECTIONS
from pipeline.losses import Objective
from pipeline.losses.kd import KDParams, kl_divergence
from pipeline.models import build_classifier
from pipeline.models.torchvision_zoo import TorchvisionParams
from pipeline.training import Block, LocalContext, OptimizerParams, RunPlan, TrainJob, TrainParams, train
from pipeline.training.validation import Evaluation
from tests.bench.measure import Series, ratio
from tests.gpu.networks import image_spec, make_teacher, random_pixels
from tests.gpu.registry import Figures, Place, check
from tests.gpu.timing import interleave, seconds_per_call
from tests.recorder import Recorder

_HOST = torch.device("cpu")  # of what waits for the device itself


@dataclass(frozen=True)
class Size:
    """How much is measured: images of ``pixels`` by ``pixels``."""

    pixels: int
    batch_size: int
    num_classes: int
    num_rounds: int
    round_s: float
    num_steps: int

    @classmethod
    def of(cls, place: Place) -> Size:
        return cls(224, 256, 1_000, 5, 0.8, 30) if place.on_gpu else cls(32, 2, 10, 1, 0.01, 4)

    @property
    def spec(self) -> InputSpec:
        return image_spec(self.pixels, self.num_classes)


# --- the teacher --------------------------------------------------------------------------------------------------


@check("rates-resnet50", limit_s=90)
def resnet50_answers(place: Place) -> Figures:
    """Forward passes of a resnet50 teacher at 224 pixels, against the bare network with its data on the card."""
    return _rate_teacher(place, "resnet50" if place.on_gpu else "resnet18")


@check("rates-vit", limit_s=90)
def vit_answers(place: Place) -> Figures:
    """The same of a vit_b_16."""
    return _rate_teacher(place, "vit_b_16" if place.on_gpu else "squeezenet1_1")


def _rate_teacher(place: Place, arch: str) -> Figures:
    size, device = Size.of(place), torch.device(place.device)
    teacher = make_teacher(place, size.spec, size.batch_size, place.device, {"name": "torchvision", "arch": arch})
    blocks = itertools.cycle(random_pixels(size.spec, size.batch_size, 4))
    on_device = torch.from_numpy(next(blocks)).to(device)

    @torch.inference_mode()
    def on_card() -> Tensor:
        """The teacher's network as it is, without the way to the card and back."""
        with torch.autocast(device.type, torch.bfloat16):
            logits: Tensor = teacher._network(on_device)
        return logits

    def rate(function: Callable[[], object], waits_for: torch.device) -> Callable[[], float]:
        return lambda: size.batch_size / seconds_per_call(function, waits_for, size.round_s)

    bare, tuned = _bare_network(arch, size, device)
    ways = {
        "teacher": rate(lambda: teacher(next(blocks)), _HOST),
        "its network": rate(on_card, device),
        "bare": rate(bare, device),
        "bare, cudnn.benchmark": rate(tuned, device),
    }
    rates = interleave(ways, size.num_rounds)
    peak = Series([max(pair) for pair in zip(rates["bare"].values, rates["bare, cudnn.benchmark"].values, strict=True)])
    copy_s = seconds_per_call(lambda: teacher._block.numpy().__setitem__(slice(None), next(blocks)), _HOST, 0.05)
    move_s = seconds_per_call(lambda: teacher._block.to(device, non_blocking=True), device, 0.05)
    return {
        "teacher over peak": ratio(rates["teacher"], peak).show(3),
        **{f"{name}, rows/s": series.show() for name, series in rates.items()},
        "to fill the buffer, ms a block": 1e3 * copy_s,
        "to move it, ms a block": 1e3 * move_s,
    }


def _bare_network(arch: str, size: Size, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward passes of torchvision's network in bf16 and channels_last; the second lets cuDNN try its ways first."""
    extra = {"image_size": size.pixels} if arch.startswith("vit") else {}
    network = torchvision.models.get_model(arch, weights=None, num_classes=size.num_classes, **extra)
    network = network.eval().to(device, torch.bfloat16, memory_format=torch.channels_last)
    shape = (size.batch_size, 3, size.pixels, size.pixels)
    inputs = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> object:
        return network(inputs)

    def tuned() -> object:
        with torch.backends.cudnn.flags(benchmark=True):
            return bare()

    return bare, tuned


# --- the student --------------------------------------------------------------------------------------------------


@check("rates-student", limit_s=120)
def student_steps(place: Place) -> Figures:
    """Steps of a resnet18 student in the training loop, against a hand-tuned loop of plain PyTorch; both in bf16."""
    return _rate_student(place, Size.of(place))


@check("rates-small-student", limit_s=60, on_cpu=False)
def small_student_steps(place: Place) -> Figures:
    """The same for images of 32 pixels, where launching what the card does takes longer than doing it."""
    return _rate_student(place, Size(32, 128, 100, 5, 0, 150))


def _rate_student(place: Place, size: Size) -> Figures:
    device = torch.device(place.device)
    pixels, random = random_pixels(size.spec, size.batch_size, 4), np.random.default_rng(0)
    blocks = [
        Block(
            position,
            inputs,
            random.integers(0, size.num_classes, size.batch_size),
            np.arange(size.batch_size),
            random.normal(size=(size.batch_size, size.num_classes)).astype(np.float32),
        )
        for position, inputs in enumerate(pixels)
    ]
    plain = _PlainLoop(blocks, size, device)
    waits = Series()  # share of the loop's time in which it waited for a block
    ways = {"loop": lambda: _rate_loop(place, blocks, size, waits), "plain": lambda: plain.rate(size.num_steps)}
    interleave(ways, 1)  # the first of each finds no kernel loaded
    rates = interleave(ways, size.num_rounds)
    return {
        "loop over plain": ratio(rates["loop"], rates["plain"]).show(3),
        **{f"{name}, rows/s": series.show() for name, series in rates.items()},
        "share that the loop waited for blocks": waits.show(3),
    }


class _Ready:
    """Blocks that are in memory, in the place of a stream."""

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = blocks

    def blocks(self, start: int) -> Iterator[Block]:
        for position in itertools.count(start):
            ready = self._blocks[position % len(self._blocks)]
            yield Block(position, ready.inputs, ready.labels, ready.sample_ids, ready.teacher_logits)


class _NoValidation:
    """Stands for the validation set, which is not measured."""

    def evaluate(self, *_: object, **__: object) -> Evaluation:
        return Evaluation({f"val/{name}": 0.0 for name in METRIC_DIRECTIONS}, {})


def _rate_loop(place: Place, blocks: list[Block], size: Size, waits: Series) -> float:
    """Rows a second of the product's training loop, by its own record of all steps but the first few."""
    warmup = max(1, size.num_steps // 4)
    num_steps = warmup + size.num_steps
    params = TrainParams(
        epochs=1,
        batch_size=size.batch_size,
        optimizer=OptimizerParams(lr=0.01, schedule="constant"),
        precision="bf16",
        channels_last=True,
        log_every=warmup,
    )
    validation: Any = _NoValidation()
    job = TrainJob(
        build_classifier(TorchvisionParams(arch="resnet18"), size.spec),
        Objective(KDParams()),
        params,
        RunPlan(size.batch_size, num_steps, 1, 1),
        validation,
        seed=0,
    )
    recorder = Recorder()
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        train(job, LocalContext(Path(folder), recorder, torch.device(place.device)), _Ready(blocks))
    steps = [event.data for event in recorder.events if event.kind == "step"][1:]
    waits.add(Series([step["data_wait"] for step in steps]).median)
    return Series([step["samples_per_s"] for step in steps]).median


class _PlainLoop:
    """The same steps, tuned by hand: pinned blocks, copies on a stream of their own, fused SGD, and no wait."""

    def __init__(self, blocks: list[Block], size: Size, device: torch.device) -> None:
        self._device, self._size = device, size
        network = build_classifier(TorchvisionParams(arch="resnet18"), size.spec)
        self._network = network.to(device, memory_format=torch.channels_last).train()
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=on_gpu or None
        )
        tensors = [tuple(map(torch.from_numpy, (one.inputs, one.labels, one.teacher_logits))) for one in blocks]
        self._blocks = [tuple(part.pin_memory() if on_gpu else part for part in parts) for parts in tensors]
        self._copies = torch.cuda.Stream(device) if on_gpu else None

    def rate(self, num_steps: int) -> float:
        """Rows a second."""
        moved = self._moved()
        with torch.backends.cudnn.flags(benchmark=True):
            seconds = seconds_per_call(lambda: [self._step(next(moved)) for _ in range(num_steps)], self._device, 0)
        return num_steps * self._size.batch_size / seconds

    def _moved(self) -> Iterator[tuple[Tensor, ...]]:
        """Blocks on the device, each copied while the step before it runs."""
        ahead = self._move(self._blocks[0])
        for index in itertools.count(1):
            if self._copies is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._copies)
                for part in ahead:
                    part.record_stream(torch.cuda.current_stream(self._device))
            current, ahead = ahead, self._move(self._blocks[index % len(self._blocks)])
            yield current

    def _move(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.cuda.stream(self._copies):
            return tuple(part.to(self._device, non_blocking=True) for part in parts)

    def _step(self, parts: tuple[Tensor, ...]) -> None:
        inputs, labels, teacher = parts
        with torch.autocast(self._device.type, torch.bfloat16):
            logits = self._network(inputs.contiguous(memory_format=torch.channels_last))
            loss = kl_divergence(logits, teacher, temperature=4.0) + nn.functional.cross_entropy(logits, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
