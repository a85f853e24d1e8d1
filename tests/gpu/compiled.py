"""What ``torch.compile`` makes of teacher and student. It takes its time, so this comes last."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from pipeline.models import Teacher
from pipeline.training import TrainParams
from tests.gpu.networks import distance, fit_digits, image_spec, make_teacher, random_pixels
from tests.gpu.registry import Figures, Place, check
from tests.gpu.timing import interleave, seconds_per_call
from tests.unit.fits import SGD

_CLOSE = 0.03  # of the range of the logits: compiled bf16 rounds at other places


@check("compiled-teacher", limit_s=150)
def compiled_teacher_answers(place: Place) -> Figures:
    """A compiled teacher: logits, no second compilation, and its rate over that of one that is not compiled."""
    size, batch_size = (224, 256) if place.on_gpu else (16, 8)
    network = {"name": "torchvision", "arch": "resnet50"} if place.on_gpu else {"name": "small_cnn", "width": 8}
    spec = image_spec(size)
    block, other = random_pixels(spec, batch_size, 2)
    torch.compiler.reset()
    plain = make_teacher(place, spec, batch_size, place.device, network)
    compiled = make_teacher(place, spec, batch_size, place.device, network, compile=True)
    began = time.monotonic()
    apart = distance(compiled(block), plain(block))
    compiling = time.monotonic() - began
    if apart > _CLOSE:
        raise AssertionError(f"logits differ by {apart:.3g} of their range")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (other, block[:1], np.concatenate([block, other[:2]])):
            compiled(rows)
        rates = interleave({name: _rate(teacher, block) for name, teacher in _named(plain, compiled)}, 3)
    return {
        "difference": apart,
        "first call, s": compiling,
        "rows/s": rates["compiled"].median,
        "over not compiled": rates["compiled"].median / rates["plain"].median,
    }


def _named(plain: Teacher, compiled: Teacher) -> tuple[tuple[str, Teacher], ...]:
    return ("plain", plain), ("compiled", compiled)


def _rate(teacher: Teacher, block: np.ndarray) -> Callable[[], float]:
    """Rows a second; the teacher waits for the device itself."""
    return lambda: len(block) / seconds_per_call(lambda: teacher(block), torch.device("cpu"), at_least_s=1.0)


@check("compiled-student", limit_s=150)
def compiled_student_learns(place: Place) -> Figures:
    """A compiled student in the training loop, with validation between its steps and without a second compilation."""
    params = TrainParams(
        epochs=12, batch_size=16, optimizer=SGD, compile=True, precision="bf16", channels_last=True, ema_decay=0.9
    )
    torch.compiler.reset()
    began = time.monotonic()
    with torch._dynamo.config.patch(error_on_recompile=True):
        state, _ = fit_digits(place, place.device, "compiled", params)
    top1 = state.last_metrics["val/top1"]
    if top1 < 0.5:
        raise AssertionError(f"val/top1 is {top1:.3g} after {params.epochs} epochs")
    return {"val/top1": top1, "s": time.monotonic() - began}
