"""Parameters that every data set has, and the registry of data sets."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from pipeline.data.augment import AugmentParams
from pipeline.registry import Params, Registry

if TYPE_CHECKING:
    from pipeline.data.source import DataSource


class DataParams(Params):
    """One data set with its splits."""

    name: str
    augment: AugmentParams = AugmentParams()
    num_views: int | None = Field(default=None, ge=1)
    """Different augmented views of a sample; epoch e shows view e modulo this. None: every epoch a new one."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the train files' rows that becomes validation where there are no files for it."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the train files' rows that becomes test where there are no files for it."""
    split_seed: int = Field(default=0, ge=0)
    """Draws the rows of splits that have no files."""
    memory_bytes: int = Field(default=2**30, ge=0)
    """A train split of more encoded bytes is shuffled by windows of whole row groups instead of all rows at once."""
    window_bytes: int = Field(default=2**27, ge=1)
    """Largest window of that shuffle; every process that reads keeps up to two of them."""

    @model_validator(mode="after")
    def _leave_rows_for_train(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction must be below 1, got {self.validation_fraction} + "
                f"{self.test_fraction}"
            )
        return self

    @abstractmethod
    def open(self) -> DataSource:
        """Opens the data set and checks what can be checked without reading its pixels.

        Raises:
            DataError: something is missing or not as described.
            ConfigError: parameters that do not go together.
        """


DATASETS: Registry[DataParams] = Registry("data set", "pipeline.data")
