"""Parameters that every data set has, and the registry of data sets."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.contracts.columns import InputSpec
from pipeline.data.pixels.augment import AugmentParams
from pipeline.data.pixels.decode import Decoder
from pipeline.data.sources.source import DataSource, SplitReader, check_fits
from pipeline.registry import Params, Registry


class DataParams(Params):
    """One data set with its splits."""

    name: str
    """Which data set; ``data=NAME`` sets it."""
    augment: AugmentParams = AugmentParams()
    """Random changes to training images; the default of each switches it off."""
    num_views: int | None = Field(default=None, ge=1)
    """Different augmented views of a sample; epoch e shows view e modulo this. None: every epoch a new one."""
    view_seed: int | None = Field(default=None, ge=0)
    """Seed of the augmentation; none: that of the run. Runs of several seeds see the same views, and share a cache of
    the teacher's logits, where it is set."""
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
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a row that cannot be used: damaged, null, of another size, not finite, or of a class that is
    none. error: the run ends and names it. skip: it is left out; in training the next good row of its block stands in
    for it."""

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

    def open_rows(self, spec: InputSpec) -> tuple[SplitReader, Decoder]:
        """All rows as one set in the order of sample ids, for a network to predict; labels are not read.

        Here the test split, where there is no better meaning of all rows.

        Args:
            spec: what the network was trained on.

        Raises:
            DataError: the rows are of another kind or size, or cannot be read.
        """
        source = self.open()
        check_fits(spec, source.spec.kind, source.spec.shape, f"data={self.name}")
        return source.split("test"), source.decoder("test")


DATASETS: Registry[DataParams] = Registry("data set", "pipeline.data.sources")
