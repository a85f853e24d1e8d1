"""Losses keep to the device of the logits, and do not wait for it, as far as a machine without one can tell.

Tensors of torch's fake mode have a device, shapes and no numbers; operations over two devices fail there too. The
backward pass needs a real device: ``make gpu`` has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.evaluation import Tally
from pipeline.losses import Objective, Signals, perturbation, soft_rank
from pipeline.losses.perturbation import Perturbation
from pipeline.losses.ptloss import PTLossParams
from tests.gpu.losses import loss_variants

GROUPS = Perturbation(kind="superclass", num_classes=10, class_groups=(0, 1) * 5, coefficients=((0.5, 0.1), (0.2, 0.0)))
VARIANTS = loss_variants() | {
    "ptloss by confidence": PTLossParams().model_copy(
        update={"selected": Perturbation(kind="confidence", edges=(0.5,), coefficients=((0.5,), (0.1,)))}
    ),
    "ptloss by superclass": PTLossParams().model_copy(update={"selected": GROUPS}),
}


class Crossings(TorchDispatchMode):
    """Notes what is copied between host and device, which waits for all that the device has still to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(args[0] if args else None, Tensor):
            target = getattr(result, "device", None)
            if str(func) == "aten._local_scalar_dense.default" or (
                str(func) == "aten._to_copy.default" and args[0].device != target
            ):
                self.seen.append(f"{func} from {args[0].device} to {target}")
        return result


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def pool(values: Tensor, strength: float) -> tuple[Tensor, ...]:
        order = torch.sort(values, dim=1, descending=True, stable=True).indices
        return torch.empty_like(values), order.new_empty(len(values)), order, order.int()

    monkeypatch.setattr(soft_rank, "_pool_on_gpu", pool)  # a kernel takes no fake tensors
    perturbation._tensor.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    perturbation._tensor.cache_clear()


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_loss_stays_on_the_device_after_its_first_step(name: str) -> None:
    objective = Objective(VARIANTS[name], torch.eye(10))
    student, teacher = (torch.randn(16, 10, device="cuda") for _ in range(2))
    signals = Signals(student.requires_grad_(), torch.randint(10, (16,), device="cuda"), teacher)
    objective(signals, 0.25)
    with Crossings() as crossings:
        total, logged = objective(signals, 0.5)
    assert crossings.seen == []
    assert {value.device.type for value in (total, *logged.values())} == {"cuda"}


@pytest.mark.usefixtures("fake_gpu")
def test_metrics_are_summed_on_the_device() -> None:
    tally = Tally(10, torch.device("cuda"), with_teacher=True)
    logits, labels = torch.randn(16, 10, device="cuda"), torch.randint(10, (16,), device="cuda")
    with Crossings() as crossings:
        tally.update(logits.bfloat16(), labels, logits)
    assert crossings.seen == []
