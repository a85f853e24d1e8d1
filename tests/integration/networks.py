"""Networks for tests of what goes wrong: a student that writes down what it sees and dies on cue, a faulty teacher."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from torch import Tensor, nn

from pipeline.cluster.train import committed_folder
from pipeline.contracts.checkpoints import read_cursor
from pipeline.contracts.columns import InputSpec
from pipeline.errors import CheckpointError

COMMIT_TIMEOUT_S = 60.0


def recording(spec: InputSpec, folder: str, fates: list[dict[str, Any]], num_hidden: int = 8) -> nn.Module:
    """A factory for ``student=custom``; see ``Recording``."""
    return Recording(spec, Path(folder), fates, num_hidden)


class Recording(nn.Module):
    """Two layers over all features but the first, which is the sample id.

    Args:
        folder: gets one file a process, one line a block: rank, world size and sample ids.
        fates: what happens once each, when the block with these ids is seen: ``{"name", "ids", "how": "kill" |
            "raise", "storage", "after_commit"}``; it waits for the commit of the cursor ``after_commit``, if any.
    """

    def __init__(self, spec: InputSpec, folder: Path, fates: list[dict[str, Any]], num_hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(spec.shape[0] - 1, num_hidden), nn.Tanh(), nn.Linear(num_hidden, spec.num_classes)
        )
        self._folder, self._fates = folder, fates

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self._record([int(value) for value in inputs[:, 0]])
        logits: Tensor = self.layers(inputs[:, 1:])
        return logits

    def _record(self, ids: list[int]) -> None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        record = {
            "rank": torch.distributed.get_rank() if together else 0,
            "world_size": torch.distributed.get_world_size() if together else 1,
            "time": time.time(),
            "ids": ids,
        }
        with (self._folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        for fate in self._fates:
            if fate["ids"] == ids:
                self._meet(fate)

    def _meet(self, fate: dict[str, Any]) -> None:
        marker = self._folder / fate["name"]
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        if fate["after_commit"] is not None:
            wait_for_commit(fate["storage"], fate["after_commit"])
        marker.write_text(str(committed_cursor(fate["storage"])))
        if fate["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"the test stops the run here: {fate['name']}")


def committed_cursor(storage: str) -> int:
    """Blocks consumed at the last checkpoint that Ray Train has committed.

    Ray writes its record in place and then deletes what it no longer names, so whoever reads while it runs may find
    half of a record, or one of a checkpoint that is gone: then the next look finds it whole.
    """
    deadline = time.monotonic() + COMMIT_TIMEOUT_S
    while True:
        try:
            folder = committed_folder(storage)
            return 0 if folder is None else read_cursor(folder)
        except (CheckpointManagerInitializationError, CheckpointError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # between two looks


def wait_for_commit(storage: str, cursor: int) -> None:
    deadline = time.monotonic() + COMMIT_TIMEOUT_S
    while committed_cursor(storage) < cursor:
        assert time.monotonic() < deadline, f"block {cursor} was not committed in time"
        time.sleep(0.05)  # between two polls


def faulty(
    spec: InputSpec,
    folder: str,
    spared: int,
    deadly_ids: Sequence[int] = (),
    nan_ids: Sequence[int] = (),
    always_nan: bool = False,
) -> nn.Module:
    """A factory for ``teacher=custom``; see ``Faulty``."""
    return Faulty(spec, Path(folder), spared, deadly_ids, nan_ids, always_nan)


class Faulty(nn.Module):
    """A linear teacher with faults; the batch of two on which every network is tried meets none of them.

    Args:
        spared: process that is never killed.
        deadly_ids: samples (their first feature) that kill its process, once each.
        nan_ids: samples whose logits are NaN.
        always_nan: those of all samples are.
    """

    def __init__(
        self,
        spec: InputSpec,
        folder: Path,
        spared: int,
        deadly_ids: Sequence[int],
        nan_ids: Sequence[int],
        always_nan: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.shape), spec.num_classes))
        self._folder, self._spared, self._deadly_ids = folder, spared, deadly_ids
        self._nan_ids, self._always_nan = list(nan_ids), always_nan

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs)
        ids = inputs.flatten(1)[:, 0]
        if len(inputs) == 2:
            return logits
        for sample_id in self._deadly_ids:
            if (ids == sample_id).any() and os.getpid() != self._spared:
                self._die_once(self._folder / f"killed-{sample_id}")
        broken = torch.isin(ids, torch.tensor(self._nan_ids, dtype=ids.dtype)) | self._always_nan
        return torch.where(broken[:, None], torch.nan, logits)

    def _die_once(self, marker: Path) -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def watching(spec: InputSpec, folder: str, resource: str) -> nn.Module:
    """A factory for ``student=custom``; see ``Watching``."""
    return Watching(spec, Path(folder), resource)


def linear(spec: InputSpec) -> nn.Module:
    """As ``Watching``, blind."""
    return Linear(spec)


class Linear(nn.Module):
    """A linear student."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.shape), spec.num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layers(inputs)
        return logits


class Watching(Linear):
    """A student that writes down at every training step how much of a custom resource of Ray's is free.

    Args:
        folder: gets one file a process, one line a step.
        resource: by its name.
    """

    def __init__(self, spec: InputSpec, folder: Path, resource: str) -> None:
        super().__init__(spec)
        self._folder, self._resource = folder, resource

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            import ray

            with (self._folder / f"{os.getpid()}.free").open("a") as file:
                file.write(f"{ray.available_resources().get(self._resource, 0.0)}\n")
        return super().forward(inputs)
