"""Perturbation: the coefficients of PTLoss for every row of a batch, and the file they are kept in."""

from __future__ import annotations

import itertools
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int64
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.losses.tensors import Logits, widen
from pipeline.registry import Params

Coefficients = Float[Tensor, "*rows powers"]

MAX_GROUPS = 8
IN_RUN = Path("selection", "perturbation.json")
"""Where the run of a command keeps what it selected."""


def check_coefficients(coefficients: tuple[float, ...], where: str = "") -> None:
    """Refuses coefficients whose proxy teacher is not unique; ValueError with a sentence.

    From ``-1/m`` on, every class's term stays convex and decreasing in the student's probability, so that
    the loss has one minimum: the proxy teacher.
    """
    for power, coefficient in enumerate(coefficients, start=1):
        if not math.isfinite(coefficient) or coefficient < -1 / power:
            raise ValueError(
                f"{where}coefficient {power} is {coefficient:g}, expected a finite number of at least -1/{power}: "
                "below it the loss has no unique minimum"
            )


@lru_cache(maxsize=8)  # the same at every step; slow to make of thousands of numbers, and a GPU is waited for
@torch.inference_mode(False)
def _tensor(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


class Perturbation(Params):
    """Coefficients ``eps_1 .. eps_M`` of PTLoss: shared, of groups of rows, or of each class.

    A row's group is found from the teacher's logits alone: by its confidence, the largest probability at
    temperature 1, or by the super-class of its likeliest class.
    """

    kind: Literal["shared", "confidence", "superclass", "class"] = "shared"
    """What has coefficients of its own: nothing, a group of rows by confidence or by super-class, or each class."""
    coefficients: tuple[tuple[float, ...], ...]
    """(1, M), (groups, M) or (classes, M) by ``kind``; column m-1 multiplies ``(1 - p)^m`` and is at least -1/m."""
    num_classes: int | None = Field(default=None, ge=2)
    """Number of classes it was made for; none: any, which only shared coefficients and confidence groups allow."""
    edges: tuple[float, ...] = ()
    """Kind ``confidence``: inner bounds of the groups, increasing in (0, 1); an edge belongs to the group below."""
    class_groups: tuple[int, ...] = ()
    """Kind ``superclass``: the group of each class."""
    teacher_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What the teacher's logits are divided by before they are perturbed; a row's group is not touched by it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        orders = {len(row) for row in self.coefficients}
        if len(orders) != 1 or 0 in orders:
            raise ValueError("coefficients: expected at least one row, and the same number of at least 1 in every row")
        for index, row in enumerate(self.coefficients):
            check_coefficients(row, f"coefficients[{index}]: ")
        if len(self.coefficients) != (expected := self._expected_rows()):
            raise ValueError(
                f"coefficients: {len(self.coefficients)} rows, expected {expected} for kind {self.kind!r} "
                "(one; one more than edges; one for each group; one for each class)"
            )
        if self.kind in ("confidence", "superclass") and len(self.coefficients) > MAX_GROUPS:
            raise ValueError(f"coefficients: {len(self.coefficients)} groups, expected at most {MAX_GROUPS}")
        return self

    def _expected_rows(self) -> int:
        """Rows of ``coefficients`` by the other fields, which are checked on the way."""
        if (self.kind == "confidence") != bool(self.edges):
            raise ValueError("edges: expected with kind 'confidence' and with no other")
        if (self.kind == "superclass") != bool(self.class_groups):
            raise ValueError("class_groups: expected with kind 'superclass' and with no other")
        bounds = (0.0, *self.edges, 1.0)
        if any(not low < high for low, high in itertools.pairwise(bounds)):
            raise ValueError(f"edges: {self.edges}, expected increasing numbers in (0, 1)")
        if self.kind in ("superclass", "class") and self.num_classes is None:
            raise ValueError(f"num_classes: expected with kind {self.kind!r}")
        if self.kind == "class":
            return self.num_classes or 0
        if self.kind == "confidence":
            return len(self.edges) + 1
        if self.kind == "shared":
            return 1
        groups = set(self.class_groups)
        if len(self.class_groups) != self.num_classes or groups != set(range(len(groups))):
            raise ValueError(
                f"class_groups: expected {self.num_classes} numbers, one a class, that together are 0, 1, .. "
                "without gaps"
            )
        return len(groups)

    @classmethod
    def shared(cls, coefficients: tuple[float, ...], num_classes: int | None = None) -> Self:
        """The same coefficients for all rows and classes."""
        return cls(coefficients=(coefficients,), num_classes=num_classes)

    @property
    def order(self) -> int:
        """The highest power, M."""
        return len(self.coefficients[0])

    def for_rows(self, teacher_logits: Logits) -> Coefficients:
        """The coefficients of a batch, in the shape that ``perturbed_kl`` takes.

        Args:
            teacher_logits: (B, C) logits or log-probabilities, free of temperature.

        Returns:
            (M,) for shared coefficients, (C, M) for those of classes, (B, 1, M) for those of groups; of the
            logits' device, and their type but at least float32. No gradient.

        Raises:
            ConfigError: the coefficients were made for another number of classes.
        """
        num_classes = teacher_logits.shape[1]
        if self.num_classes is not None and num_classes != self.num_classes:
            raise ConfigError(
                f"the perturbation was made for {self.num_classes} classes but the teacher has {num_classes}: "
                "select one from this teacher's validation logits."
            )
        dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
        table = _tensor(self.coefficients, teacher_logits.device, dtype)
        if self.kind == "shared":
            return table[0]
        if self.kind == "class":
            return table
        return table[self.groups_of(teacher_logits)][:, None, :]

    @torch.no_grad()
    def groups_of(self, teacher_logits: Logits) -> Int64[Tensor, " batch"]:
        """The group of each row, 0..groups-1; zeros where coefficients are shared or of classes."""
        if self.kind == "confidence":
            confidence = torch.log_softmax(widen(teacher_logits), dim=1).amax(dim=1).exp()
            edges = _tensor(self.edges, confidence.device, confidence.dtype)
            return torch.bucketize(confidence, edges)
        if self.kind == "superclass":
            groups = _tensor(self.class_groups, teacher_logits.device, torch.int64)
            return groups[teacher_logits.argmax(dim=1)]
        return torch.zeros(len(teacher_logits), dtype=torch.int64, device=teacher_logits.device)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What ``write`` wrote.

        Args:
            path: of the file, or of the folder of a run that selected coefficients.

        Raises:
            ConfigError: the file cannot be read, or its content is no perturbation.
        """
        file = path / IN_RUN if path.is_dir() else path
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"the perturbation file {file} cannot be read ({error.strerror}): give a run of select-perturbation "
                "that has finished, or a file that it wrote."
            ) from error
        except ValidationError as error:
            problems = "; ".join(
                ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
                for problem in error.errors()
            )
            raise ConfigError(
                f"the perturbation file {file} is none ({problems}): give a file that select-perturbation wrote."
            ) from error

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        temporary = path.with_name(f"{path.name}.part")
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
