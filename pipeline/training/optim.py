"""Optimizer and learning rate; the rate is a function of the samples seen, so it needs no state."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.training.params import OptimizerParams
from pipeline.training.plan import RunPlan


def build_optimizer(network: nn.Module, params: OptimizerParams) -> torch.optim.Optimizer:
    """SGD or AdamW over two groups: weight decay is not applied to one-dimensional parameters."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": params.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if params.name == "sgd":
        return torch.optim.SGD(groups, lr=params.lr, momentum=params.momentum, nesterov=params.nesterov)
    return torch.optim.AdamW(groups, lr=params.lr, betas=params.betas)


def learning_rate(params: OptimizerParams, plan: RunPlan, step: int) -> float:
    """Rate of optimizer step ``step`` (from 0), as a function of the samples seen before its end.

    Warm-up rises linearly to the peak over ``warmup_epochs``; then ``constant``, ``cosine`` down to
    ``min_lr_ratio`` times the peak, or ``step`` (times ``gamma`` at each milestone, a share of the run).
    """
    samples = (step + 1) * plan.rows_per_step
    total = plan.num_steps * plan.rows_per_step
    warmup = params.warmup_epochs * plan.blocks_per_epoch * plan.batch_size
    if samples < warmup:
        return params.lr * samples / warmup
    seen = step * plan.rows_per_step
    if params.schedule == "step":
        passed = sum(seen >= share * total for share in params.milestones)
        return params.lr * params.gamma**passed
    if params.schedule == "cosine":
        progress = min(max((seen - warmup) / max(total - warmup, 1), 0.0), 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return params.lr * (params.min_lr_ratio + (1.0 - params.min_lr_ratio) * cosine)
    return params.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
