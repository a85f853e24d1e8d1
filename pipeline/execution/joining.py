"""Joining a Ray cluster for a run: what it needs is checked, its turn waited for, its events gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.config.runs import Run
from pipeline.execution.session import RunSession

if TYPE_CHECKING:  # importing ray takes seconds, and not every way needs it
    from pipeline.cluster.journal import QueueDrain
    from pipeline.cluster.preflight import Demand


@contextmanager
def join_cluster(run: Run, session: RunSession, demands: Sequence[Demand], placed_by: str) -> Iterator[QueueDrain]:
    """Connects to the cluster that ``cluster.address`` names, or to one started here, for as long as the run needs it.

    Args:
        placed_by: kind of the event by which everything that the run asked for is placed: then the next run may be.

    Yields:
        Where processes on Ray send their events.

    Raises:
        ResourceError: the cluster cannot be joined or cannot hold the run.
    """
    from pipeline.cluster.journal import QueueDrain
    from pipeline.cluster.preflight import admitted, check_demand

    cluster = run.config.cluster
    with connect(run, session, demands):
        check_demand(list(demands), resuming=run.resumed)
        with admitted(
            list(demands), run.name, cluster.wait_s, lambda detail: session.say("placement", detail=detail)
        ) as release:
            session.listen(lambda event: release() if event.kind == placed_by else None)
            drain = QueueDrain(session.skipped)
            session.before_kill(lambda: drain.abandon(0.3))
            try:
                yield drain
            finally:
                drain.close()


@contextmanager
def connect(run: Run, session: RunSession, demands: Sequence[Demand]) -> Iterator[None]:
    """The cluster of a run, found or started here for ``demands``; nothing where this process has joined it already.

    Raises:
        ResourceError: the cluster cannot be joined.
    """
    from pipeline.cluster.session import is_joined, ray_session

    if is_joined():
        yield
        return
    session.say("ray", detail="connecting to the cluster, or starting one here")
    with ray_session(run.config.cluster.address, list(demands), run.dir / "ray.log"):
        session.say("ray", "finished")
        yield
