"""A multi-layer perceptron, for features or flattened images."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.models.params import MODELS, ModelParams


@MODELS.register
class MLPParams(ModelParams):
    """Linear layers with ReLU and dropout between them."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128, 128)
    """Width of each hidden layer; empty: a linear classifier."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each hidden layer's units dropped in training."""

    def build_network(self, spec: InputSpec) -> nn.Module:
        widths = (math.prod(spec.shape), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for num_in, num_out in itertools.pairwise(widths):
            layers += [nn.Linear(num_in, num_out), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(widths[-1], spec.num_classes))
