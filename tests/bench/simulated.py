"""Networks that wait like an accelerator: a fixed time a block, without using the CPU.

Named by ``teacher.factory`` and ``student.factory``; each process that runs one holds a custom
resource in place of an accelerator.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from pipeline.contracts.columns import InputSpec


class Waiting(nn.Module):
    """A linear layer on the mean colour, behind a wait.

    Args:
        wait_s: seconds of each forward pass.
        always: wait in evaluation mode too, as a teacher does.
    """

    def __init__(self, spec: InputSpec, wait_s: float, always: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.shape[0], spec.num_classes)
        self._wait_s, self._always = wait_s, always

    def forward(self, inputs: Tensor) -> Tensor:
        # A network is tried on two rows when it is built.
        if self.training or (self._always and len(inputs) > 2):
            time.sleep(self._wait_s)
        return self.linear(inputs[:, :, ::8, ::8].mean(dim=(2, 3)))


def build_teacher(spec: InputSpec, wait_s: float) -> nn.Module:
    """A teacher whose forward pass takes ``wait_s`` a block."""
    torch.manual_seed(0)
    return Waiting(spec, wait_s, always=True)


def build_student(spec: InputSpec, wait_s: float) -> nn.Module:
    """A student whose training step takes ``wait_s`` a block; evaluation takes no time."""
    return Waiting(spec, wait_s, always=False)
