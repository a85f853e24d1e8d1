"""A stream that stands still: whoever waits for it says so, and does not wait for what the cluster has lost."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cluster.preflight import Demand, check_demand
from pipeline.contracts.events import Emitter, Event
from pipeline.errors import ResourceError

TELL_AFTER_S = 60.0  # the first block of a stream takes half as long
GIVE_UP_AFTER_S = 180.0


class StallGuard:
    """What becomes of a long wait for a block; see ``pipeline.contracts.read_ahead.ReadAhead``.

    Ray waits without end, and without a word, for a teacher whose node is gone: one worker in the stream, the others
    in a collective operation with it.

    Args:
        emitter: is told of every long wait, once.

    Attributes:
        demands: what the stream that is waited for needs of the cluster.
    """

    def __init__(self, emitter: Emitter | None, demands: Sequence[Demand] = ()) -> None:
        self.demands = tuple(demands)
        self._emitter = emitter
        self._told = False

    def __call__(self, waited_s: float) -> None:
        """Raises ResourceError once the wait is long and the cluster lacks what the stream needs."""
        if waited_s < TELL_AFTER_S:  # another wait than the one that was told
            self._told = False
        elif not self._told and self._emitter is not None:
            self._told = True
            self._emitter.emit(Event("warning", {"message": f"no block of the stream has come for {waited_s:.0f} s"}))
        if waited_s < GIVE_UP_AFTER_S:
            return
        try:
            check_demand(list(self.demands))
        except ResourceError as error:
            raise ResourceError(
                f"no block of the stream has come for {waited_s:.0f} s, and will not: {error.message}; or wait until "
                "the nodes that were lost are back, then resume the run",
                **error.details,
            ) from None
