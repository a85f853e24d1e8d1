"""Complete training state as a checkpoint folder: written whole, read with ``weights_only``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.contracts.checkpoints import write_cursor
from pipeline.errors import CheckpointError, TrainingError
from pipeline.models import Classifier
from pipeline.models.classifier import describe_error

STATE_FILE = "state.pt"


@dataclass
class BestRecord:
    """The checkpoint that would be kept if the run ended now."""

    value: float
    step: int
    epoch: int
    metrics: dict[str, float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What training that is over has come to.

    Attributes:
        best: what the run keeps.
        evaluations: see ``TrainState``.
    """

    best: BestRecord
    evaluations: list[dict[str, Any]]

    @classmethod
    def of(cls, best: BestRecord | None, evaluations: list[dict[str, Any]]) -> Outcome:
        """That of a state.

        Raises:
            TrainingError: nothing was evaluated.
        """
        if best is None:
            raise TrainingError("training ended without an evaluated checkpoint")
        return cls(best, evaluations)

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """That of a checkpoint; raises as ``of`` and ``read_state`` do."""
        saved = read_state(folder)
        return cls.of(_best(saved), _evaluations(saved))


@dataclass
class TrainState:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        step: optimizer steps taken; the cursor into the stream is ``step * blocks_per_step``.
        best: the best evaluated weights so far; ties go to the earlier.
        last_metrics: of the latest evaluation.
        evaluations: data of the events of the latest evaluation and of the best one, for a journal that lost them.
    """

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    blocks_per_step: int
    step: int = 0
    best: BestRecord | None = None
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """What a run that ends now has come to; raises as ``Outcome.of`` does."""
        return Outcome.of(self.best, self.evaluations)

    def note_evaluation(self, data: dict[str, Any]) -> None:
        """Keeps the data of an evaluation's event, after ``best`` was set."""
        best = [one for one in self.evaluations if self.best is not None and one["step"] == self.best.step]
        self.evaluations = [*best, data]

    def evaluated(self) -> nn.Module:
        """What is evaluated and kept: the averaged weights where there are some."""
        return self.ema.module if self.ema is not None else self.classifier

    def evaluated_weights(self) -> dict[str, Tensor]:
        """Copy on the CPU of the weights that ``evaluated`` uses, named as in the bare network."""
        classifier = self.evaluated()
        assert isinstance(classifier, Classifier)
        return {name: value.detach().cpu().clone() for name, value in classifier.network.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes the state into an empty folder; whoever commits the folder makes it atomic.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written for another reason.
        """
        best = None if self.best is None else vars(self.best)
        values = {
            "step": self.step,
            "blocks_per_step": self.blocks_per_step,
            "network": self.classifier.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": best,
            "last_metrics": self.last_metrics,
            "evaluations": self.evaluations,
        }
        with explain_writing(folder):
            torch.save(values, folder / STATE_FILE)
            write_cursor(folder, self.step, self.blocks_per_step)

    def load(self, folder: Path) -> None:
        """Restores what ``save`` wrote.

        Raises:
            CheckpointError: the folder is damaged, or of another network or optimizer.
        """
        saved = read_state(folder)
        try:
            self.classifier.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(saved["ema"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint in {folder} does not fit this run's network and optimizer ({describe_error(error)}); "
                "resume with the configuration it was made with, or start a new run"
            ) from error
        if saved["blocks_per_step"] != self.blocks_per_step:
            raise CheckpointError(
                f"the checkpoint in {folder} was made with {saved['blocks_per_step']} blocks per step, this run "
                f"has {self.blocks_per_step}; set train.blocks_per_step={saved['blocks_per_step']}"
            )
        self.step = saved["step"]
        self.best = _best(saved)
        self.last_metrics = saved["last_metrics"]
        self.evaluations = _evaluations(saved)


@contextmanager
def explain_writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses while a checkpoint is written to ``folder`` into a sentence.

    Raises:
        CheckpointError: instead of OSError, and of the RuntimeError that torch makes of one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else describe_error(error)
        elif "inline_container" in str(error):  # torch's writer, which does not say why
            reason = "it is written in part"
        else:
            raise
        raise CheckpointError(
            f"a checkpoint cannot be written to {folder} ({reason}), perhaps because the disk is full; make room, then "
            "resume the run: what it saved before is whole"
        ) from error


def build_ema(classifier: Classifier, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of weights and buffers, or none without a decay."""
    if decay is None:
        return None
    return AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def forget_best(folder: Path) -> None:
    """Takes the best weights so far out of a checkpoint: whoever goes on from it begins to count anew.

    Raises:
        CheckpointError: it cannot be read.
        OSError, RuntimeError: it cannot be written; see ``explain_writing``.
    """
    torch.save({**read_state(folder), "best": None}, folder / STATE_FILE)


def _best(saved: dict[str, Any]) -> BestRecord | None:
    return None if saved["best"] is None else BestRecord(**saved["best"])


def _evaluations(saved: dict[str, Any]) -> list[dict[str, Any]]:
    if "evaluations" in saved:
        found: list[dict[str, Any]] = saved["evaluations"]
        return found
    # The first versions kept metrics alone. Those of the latest evaluation are asked for at the end of a run, and there
    # they are of this step.
    best = _best(saved)
    values = {saved["step"]: saved["last_metrics"]}
    if best is not None:
        values[best.step] = best.metrics
    return [
        {
            "split": "validation",
            "step": step,
            "metrics": metrics,
            "per_class": {},
            "best": best is not None and step == best.step,
        }
        for step, metrics in values.items()
        if metrics
    ]


def read_state(folder: Path) -> dict[str, Any]:
    """The raw content of a checkpoint folder, on the CPU."""
    try:
        saved: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        # Torch's own text for the first of them is advice to run what the file holds.
        damaged = isinstance(error, pickle.UnpicklingError)
        reason = "not a whole file of torch.save" if damaged else describe_error(error)
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be read ({reason}); "
            "delete the folder to begin again from the previous state of the run"
        ) from error
    return saved
