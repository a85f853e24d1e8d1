"""Trials of several workers: the trial's own process is rank 0, actors beside it in its placement group are the others.

Nothing of it is placed by itself. So a trial that is stopped early gives back all that it holds with its placement
group, on a cluster with or without a dashboard, and the next trial finds its workers where they are.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.cluster.journal import QueueDrain, QueueEmitter
from pipeline.cluster.ray_internals import get_node_ip_address
from pipeline.cluster.tasks import find_pipeline_error
from pipeline.contracts.events import Emitter, Event
from pipeline.errors import PipelineError

# The others meet the end of rank 0 within a step; on a GPU they may wait for it for ever.
_PATIENCE_S = 5.0


class WorkerFunction(Protocol):
    """What a worker beside rank 0 does; it ends itself by SystemExit."""

    def __call__(self, inputs: Any, argument: Any, rank: int, address: str, emitter: Emitter) -> None: ...


class _Member:
    """Actor: one of the other workers, for trial after trial."""

    def is_there(self) -> bool:
        return True

    def run(
        self, function: WorkerFunction, inputs: list[Any], argument: Any, rank: int, address: str, emitter: QueueEmitter
    ) -> None:
        try:
            with contextlib.suppress(SystemExit):  # it would end the actor
                function(ray.get(inputs[0]), argument, rank, address, emitter)
        finally:
            emitter.flush(_PATIENCE_S)


class Team:
    """The other workers of the trials of this process.

    Args:
        size: of a trial, with rank 0.
        bundle: resources of each worker.
        inputs: reference to what all trials share.
    """

    def __init__(self, size: int, bundle: Mapping[str, float], inputs: ray.ObjectRef[Any]) -> None:
        self.size = size
        self._bundle, self._inputs = dict(bundle), inputs
        self._members: list[Any] = []
        self._drain: QueueDrain | None = None
        self._emitter: Emitter | None = None

    def emit(self, event: Event) -> None:
        """Passes what a worker tells on to the trial that it works for."""
        if self._emitter is not None:
            self._emitter.emit(event)

    @contextlib.contextmanager
    def beside(self, function: WorkerFunction, argument: Any, emitter: Emitter) -> Iterator[str]:
        """Calls ``function`` in every other worker for the time of the block, which is what rank 0 does.

        Yields:
            address at which rank 0 is to listen.

        Raises:
            PipelineError: what one of the others found.
        """
        self._gather()
        drain = self._drain = self._drain or QueueDrain(self)
        self._emitter = emitter
        address = _free_address()
        calls = [
            member.run.remote(function, [self._inputs], argument, rank, address, drain.emitter)
            for rank, member in enumerate(self._members, start=1)
        ]
        try:
            yield address
            ray.get(calls)
        except BaseException as error:
            found = self._end(calls)
            if not isinstance(error, Exception) or isinstance(error, PipelineError) or found is None:
                raise
            # Of an error of one worker the others see no more than that it is gone.
            if (own := find_pipeline_error(found)) is not None:
                raise own from None
            causes = (" ".join(str(one).split()) for one in (error, found))
            raise RuntimeError("; another worker: ".join(causes)) from error
        finally:
            drain.flush(_PATIENCE_S)
            self._emitter = None

    def _gather(self) -> None:
        if self._members:
            try:
                ray.get([member.is_there.remote() for member in self._members])
            except RayActorError:  # lost while nobody needed it
                self._dismiss()
            else:
                return
        group = ray.util.get_current_placement_group()
        assert group is not None  # Tune's
        custom = {name: amount for name, amount in self._bundle.items() if name not in ("CPU", "GPU")}
        self._members = [
            ray.remote(_Member)
            .options(
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                resources=custom,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            .remote()
            for rank in range(1, self.size)
        ]
        ray.get([member.is_there.remote() for member in self._members])

    def _end(self, calls: list[ray.ObjectRef[Any]]) -> Exception | None:
        """What one of the others met, our own errors first.

        If one does not end, or is lost, the next trial has new ones.
        """
        ended, waiting = ray.wait(calls, num_returns=len(calls), timeout=_PATIENCE_S)
        met: list[Exception] = []
        for call in ended:
            try:
                ray.get(call)
            except RayError as error:
                met.append(error)
        if waiting or any(isinstance(error, RayActorError) for error in met):
            self._dismiss()
        return next((error for error in met if find_pipeline_error(error)), met[0] if met else None)

    def _dismiss(self) -> None:
        for member in self._members:
            ray.kill(member)
        self._members = []


def _free_address() -> str:
    host = get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"
