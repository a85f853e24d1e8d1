"""What losses take and return: shapes by name, and the precision that they compute in."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Logits = Float[Tensor, "batch classes"]
Labels = Int64[Tensor, " batch"]
Weights = Float[Tensor, " batch"]
Scalar = Float[Tensor, ""]


def widen(logits: Tensor) -> Tensor:
    """``logits`` in float32, or unchanged where they are wider: losses lose too much in bf16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
