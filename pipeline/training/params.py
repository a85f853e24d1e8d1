"""Parameters of training: optimizer, schedule, precision, checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.registry import Params


class OptimizerParams(Params):
    """Optimizer and its learning-rate schedule; schedules count samples, not steps."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Which optimizer: SGD with momentum, or AdamW."""
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate, of the whole step: it is not scaled by the number of workers."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only: share of the last step's velocity that is kept."""
    nesterov: bool = False
    """SGD only: Nesterov's momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only: decay of the averages of the gradient and of its square."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay; not applied to parameters of one dimension (biases, normalisation)."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning-rate schedule after the warm-up: ``constant``; ``cosine`` down to ``min_lr_ratio`` of the peak;
    ``step``, times ``gamma`` at each of ``milestones``."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs of linear warm-up of the learning rate from 0, with any schedule; may be a fraction; 0: none."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """``step`` only: shares of the run after which the rate is multiplied by ``gamma``."""
    gamma: float = Field(default=0.1, gt=0)
    """``step`` only: what the rate is multiplied by at each milestone."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """``cosine`` only: the last rate as a share of the peak."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest global gradient norm; none: no clipping."""


class TrainParams(Params):
    """One training run of one network."""

    epochs: int = Field(default=10, ge=1)
    """Passes over the train split; with ``resume=``, ``+N`` adds N to those that the run has."""
    batch_size: int = Field(default=64, ge=1)
    """Rows of a block: the group of BatchNorm and of losses that couple samples."""
    blocks_per_step: int | None = Field(default=None, ge=1)
    """Blocks of one optimizer step, shared by the workers; none: the number of workers at the start."""
    optimizer: OptimizerParams = OptimizerParams()
    """Optimizer and learning-rate schedule."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Exponential moving average of the weights, which is then what is evaluated and kept; none: off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: autocast of the forward pass; losses stay in fp32."""
    channels_last: bool = False
    """Keep weights and images in the memory format that convolutions on GPUs prefer."""
    compile: bool = False
    """``torch.compile`` the network that is trained."""
    sync_batchnorm: bool = False
    """BatchNorm over all workers' blocks of a micro-step; the group is then no longer one block."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between evaluations on validation."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; none: at every evaluation only."""
    select_by: str = "val/top1"
    """The metric that decides which checkpoint is kept; ties go to the earlier."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between records of training metrics."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of each worker's torch; none: its number of CPUs."""
