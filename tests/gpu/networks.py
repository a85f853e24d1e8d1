"""Networks on the card: the teacher as it answers, blocks on their way there, and the student as it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import teacher_classes
from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import Event
from pipeline.losses.kd import KDParams
from pipeline.models import Teacher
from pipeline.models.small_cnn import SmallCNNParams
from pipeline.training import Block, InProcessSource, LocalContext, TrainParams, TrainState, build_job, train
from pipeline.training.job import make_planner, open_training
from pipeline.training.prefetch import prefetch
from tests.bench.workload import write_checkpoint
from tests.gpu.registry import Figures, Place, check
from tests.recorder import Recorder
from tests.unit.fits import DATA, SEED, SGD, SOURCE, make_spec

_FP32_CLOSE = 0.01  # of the range of the logits: convolutions of a GPU round to TF32
_BF16_CLOSE = 0.03


def image_spec(size: int, num_classes: int = 10) -> InputSpec:
    return InputSpec("image", (3, size, size), tuple(map(str, range(num_classes))))


def random_pixels(spec: InputSpec, batch_size: int, count: int) -> list[np.ndarray]:
    """Blocks of (batch, channels, height, width) uint8."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (batch_size, *spec.shape), dtype=np.uint8) for _ in range(count)]


def make_teacher(
    place: Place, spec: InputSpec, batch_size: int, device: str, network: dict[str, Any], **settings: Any
) -> Teacher:
    """A teacher with random weights, the same ones on every device.

    Args:
        network: its parameters, ``name`` first.
        settings: what a teacher has besides, such as ``compile``.
    """
    size = "x".join(map(str, spec.shape))
    path = place.shared / f"{'-'.join(map(str, network.values()))}-{size}.safetensors"
    if not path.exists():
        place.shared.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, **network, spec=spec)
    values = {**network, "checkpoint": str(path), **settings}
    params: Any = teacher_classes()[network["name"]].model_validate(values)
    return Teacher(params, spec, batch_size, torch.device(device))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two logits, as a share of the range of their row."""
    return float((np.abs(one - other).max(axis=1) / np.ptp(other, axis=1)).max())


@check("teacher", limit_s=90)
def teacher_answers(place: Place) -> Figures:
    """The teacher in bf16 and channels_last: its logits against a CPU's, and its one buffer for every block."""
    spec, batch_size = image_spec(32 if place.on_gpu else 8), 64 if place.on_gpu else 4
    network = {"name": "resnet20"}
    blocks = random_pixels(spec, batch_size, 8)
    expected = make_teacher(place, spec, batch_size, "cpu", network, precision="fp32")(blocks[0])
    exact = make_teacher(place, spec, batch_size, place.device, network, precision="fp32")(blocks[0])
    teacher = make_teacher(place, spec, batch_size, place.device, network)
    layouts = _watch_layout(teacher)
    answers = [teacher(block) for block in blocks]
    if place.on_gpu and layouts != {(torch.bfloat16, True)}:
        raise AssertionError(f"expected bfloat16 in channels_last after the first convolution, got {layouts}")
    found = {"fp32": distance(exact, expected), "as it runs": distance(answers[0], expected)}
    if found["fp32"] > _FP32_CLOSE or found["as it runs"] > _BF16_CLOSE:
        raise AssertionError(f"logits differ from the CPU's by {found} of their range")
    if not np.array_equal(teacher(blocks[0][:3]), answers[0][:3]):
        raise AssertionError("rows of a short block have other logits than in a full one")
    order = np.random.default_rng(1).integers(0, len(blocks), 400 if place.on_gpu else 8)
    wrong = sum(not np.array_equal(teacher(blocks[index]), answers[index]) for index in order)
    if wrong:
        raise AssertionError(f"{wrong} of {len(order)} blocks got other logits when they were asked for again")
    return {f"difference, {name}": value for name, value in found.items()} | {"asked again": len(order)}


def _watch_layout(teacher: Teacher) -> set[tuple[torch.dtype, bool]]:
    """Type of what the first convolution gives, and whether it is channels_last; filled when the teacher runs."""
    seen: set[tuple[torch.dtype, bool]] = set()

    def note(module: object, inputs: object, output: Tensor) -> None:
        seen.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))

    convolutions = (module for module in teacher._network.modules() if isinstance(module, torch.nn.Conv2d))
    next(convolutions).register_forward_hook(note)
    return seen


@check("prefetch", limit_s=60)
def blocks_arrive_whole(place: Place) -> Figures:
    """Pinned blocks that are copied ahead of a slow device: each must hold what it held on the host."""
    count, size = (300, 2**20) if place.on_gpu else (20, 2**10)
    random = np.random.default_rng(0)
    rows = [random.integers(0, 256, (4, size // 4), dtype=np.uint8) for _ in range(7)]
    labels = np.arange(4)
    logits = random.normal(size=(4, 10)).astype(np.float32)
    blocks = (Block(i, rows[i % 7], labels + i, labels, logits + i) for i in range(count))
    sums = []
    ahead = prefetch(blocks, torch.device(place.device))
    for block in ahead:
        if place.on_gpu:
            torch.cuda._sleep(1_000_000)  # about half a millisecond, so that the host runs far ahead
        assert block.teacher_logits is not None
        sums.append(block.inputs.sum(dtype=torch.float64) + 2 * block.labels.sum() + block.teacher_logits.mean())
    ahead.close()
    expected = [rows[i % 7].sum() + 2 * (labels + i).sum() + (logits + i).mean() for i in range(count)]
    found = torch.stack(sums).cpu().numpy()
    wrong = int((np.abs(found - expected) > 0.01).sum())
    if wrong or len(found) != count:
        raise AssertionError(f"{wrong} of {len(found)} blocks held other numbers than on the host")
    return {"blocks": count, "MB": count * size / 1e6}


def fit_digits(place: Place, device: str, name: str, params: TrainParams) -> tuple[TrainState, list[Event]]:
    """Trains ``small_cnn`` on a part of the digits beside a teacher, in this process; returns the events too."""
    spec = make_spec(params, SmallCNNParams(width=16), KDParams(kd_weight=0.1, ce_weight=1.0))
    teacher = make_teacher(place, SOURCE.spec, params.batch_size, device, {"name": "small_cnn", "width": 8})
    reader, recorder = open_training(SOURCE), Recorder()
    planner = make_planner(DATA, reader, params, SEED)
    source = InProcessSource(SOURCE, reader, planner, DATA, SEED, spec.plan.num_blocks, teacher)
    context = LocalContext(place.folder / name, recorder, torch.device(device))
    return train(build_job(spec, SOURCE), context, source), recorder.events


@check("student", limit_s=90)
def student_learns(place: Place) -> Figures:
    """The training loop: its steps in fp32 against a CPU's, and with bf16, channels_last and averaged weights."""
    plain = TrainParams(epochs=2, batch_size=16, optimizer=SGD, log_every=1)
    losses = []
    for name, device in (("there", place.device), ("here", "cpu")):
        with torch.backends.cudnn.flags(allow_tf32=False):
            _, events = fit_digits(place, device, name, plain)
        losses.append([event.data["metrics"]["train/loss"] for event in events if event.kind == "step"])
    apart = max(abs(one - other) / other for one, other in zip(*losses, strict=True))
    if not apart < 0.01:
        raise AssertionError(f"losses of {len(losses[0])} steps differ from a CPU's by up to {apart:.3g} of them")
    mixed = {"precision": "bf16", "channels_last": True, "ema_decay": 0.9, "blocks_per_step": 2}
    state, events = fit_digits(place, place.device, "mixed", TrainParams(**{**dict(plain), **mixed, "epochs": 12}))
    used = [event.data.get("gpu_bytes", 0) for event in events if event.kind == "system"]
    if place.on_gpu and not (used and used[-1] > 0):
        raise AssertionError("no event tells how much of the card's memory was used")
    devices = {weight.device.type for weight in state.classifier.parameters()}
    top1 = state.last_metrics["val/top1"]
    if devices != {place.device} or top1 < 0.5:
        raise AssertionError(f"weights are on {devices}, val/top1 is {top1:.3g}")
    return {"losses differ by": apart, "val/top1 in bf16": top1}
