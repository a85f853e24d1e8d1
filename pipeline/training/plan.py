"""Arithmetic of a run: blocks, steps and epochs. Pure integers, the same in every process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class RunPlan:
    """How many blocks a run consumes and where its epochs end.

    Blocks are numbered through the whole run; epochs follow each other without padding. An optimizer
    step consumes ``blocks_per_step`` consecutive blocks whatever the number of workers, and the
    run's total is cut to a multiple of it.

    Attributes:
        batch_size: rows of a block.
        blocks_per_epoch: whole blocks in one pass over the training split.
        blocks_per_step: blocks of one optimizer step.
        num_epochs: passes over the training split.
    """

    batch_size: int
    blocks_per_epoch: int
    blocks_per_step: int
    num_epochs: int

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(
                f"train.blocks_per_step is {self.blocks_per_step} but the whole run has "
                f"{self.num_epochs * self.blocks_per_epoch} blocks of {self.batch_size} rows; "
                "lower train.blocks_per_step or train.batch_size, or raise train.epochs"
            )

    @property
    def num_steps(self) -> int:
        return self.num_epochs * self.blocks_per_epoch // self.blocks_per_step

    @property
    def num_blocks(self) -> int:
        """Blocks that are consumed: a multiple of ``blocks_per_step``."""
        return self.num_steps * self.blocks_per_step

    @property
    def rows_per_step(self) -> int:
        return self.blocks_per_step * self.batch_size

    @property
    def steps_per_epoch(self) -> float:
        return self.blocks_per_epoch / self.blocks_per_step

    def epoch_of_step(self, step: int) -> int:
        """Epochs completed after ``step`` optimizer steps; the last step completes the last epoch."""
        if step >= self.num_steps:
            return self.num_epochs
        return step * self.blocks_per_step // self.blocks_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether the step that made it ``step`` steps in all completed an epoch."""
        return self.epoch_of_step(step) > self.epoch_of_step(step - 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
