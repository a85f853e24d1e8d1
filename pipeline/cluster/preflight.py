"""Who needs what of the cluster, checked before anything starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.cluster.ray_internals import available_resources, cluster_resources, declared_resources, nodes
from pipeline.errors import ResourceError

ADMISSION = "distill-pipeline-admission"
_SOON_S = 5  # a wait of so long is not worth a word


@dataclass(frozen=True)
class Demand:
    """One kind of process of a run.

    Attributes:
        who: for the table ("student worker").
        count: how many there are; ``most`` where the number may grow.
        bundle: logical resources of each.
        knob: the configuration key that lowers the number.
    """

    who: str
    count: int
    bundle: dict[str, float]
    knob: str
    most: int | None = None

    def total(self) -> dict[str, float]:
        return {name: amount * self.count for name, amount in self.bundle.items()}


def total_demand(demands: list[Demand], at_most: bool = False) -> dict[str, float]:
    """Sum over all processes; with ``at_most`` for the largest number of each."""
    sums: dict[str, float] = {}
    for demand in demands:
        count = (demand.most or demand.count) if at_most else demand.count
        for name, amount in demand.bundle.items():
            sums[name] = sums.get(name, 0.0) + amount * count
    return {name: amount for name, amount in sums.items() if amount}


def demand_rows(demands: list[Demand]) -> list[list[str]]:
    """Rows of the preflight table: who, how many, what each takes, in sum."""
    rows = [
        [
            demand.who,
            str(demand.count) if demand.most in (None, demand.count) else f"{demand.count} to {demand.most}",
            show_resources(demand.bundle),
            show_resources(demand.total()),
        ]
        for demand in demands
    ]
    rows.append(["all", "", "", show_resources(total_demand(demands))])
    return rows


def show_resources(resources: dict[str, float]) -> str:
    """``2 CPU, 1 GPU``; what is zero is left out."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "-"


def check_demand(demands: list[Demand], resuming: bool = False) -> None:
    """Refuses what the cluster can never hold.

    A cluster with an autoscaler is judged by its declared maximum. When a run is resumed, a custom
    resource that is missing altogether is borne: its node may be away and come back.

    Raises:
        ResourceError: with the numbers, and the keys to turn.
    """
    capacity = cluster_capacity()
    needs = total_demand(demands)
    for name, amount in needs.items():
        have = capacity.get(name, 0.0)
        if amount <= have or (resuming and have == 0.0 and name not in ("CPU", "GPU", "memory")):
            continue
        users = [demand for demand in demands if demand.bundle.get(name)]
        parts = " + ".join(
            f"{demand.count} {demand.who}{'s' * (demand.count > 1)} x {demand.bundle[name]:g}" for demand in users
        )
        knobs = " or ".join(dict.fromkeys(demand.knob for demand in users))
        raise ResourceError(
            f"this run needs {amount:g} {name} ({parts}) but the cluster has {have:g}; "
            f"lower {knobs}, or use a larger cluster",
            resource=name,
            needed=amount,
            available=have,
        )
    alive = [node["Resources"] for node in nodes() if node["Alive"]]
    for demand in demands:
        fits = any(all(node.get(name, 0.0) >= amount for name, amount in demand.bundle.items()) for node in alive)
        if not fits and not resuming and not declared_resources():
            raise ResourceError(
                f"one {demand.who} needs {show_resources(demand.bundle)} on one node, but no node of the cluster "
                f"has that; lower {demand.knob} or its resources"
            )


def cluster_capacity() -> dict[str, float]:
    """Total resources, or what the autoscaler may grow to where that is declared."""
    capacity = {name: float(amount) for name, amount in cluster_resources().items()}
    for name, amount in declared_resources().items():
        capacity[name] = max(capacity.get(name, 0.0), amount)
    return capacity


class _Admission:
    """Named actor that stands for the right to be placed; it dies with the run that holds it."""

    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        return self._holder


@contextmanager
def admitted(
    demands: list[Demand], run_name: str, wait_s: float, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Waits until everything fits at once, and keeps other runs from being placed meanwhile.

    Ray Train makes its own placement group and Ray Data its own actors, so the resources cannot be
    handed over; instead one run at a time is placed. Yields a function that ends the turn, to be
    called once workers and pool run.

    Raises:
        ResourceError: not enough was free within ``wait_s``.
    """
    deadline = time.monotonic() + wait_s
    turn = _take_turn(run_name, deadline, wait_s, say)
    released = False

    def release() -> None:
        nonlocal released
        if not released:
            released = True
            ray.kill(turn)

    try:
        _wait_for_room(demands, deadline, wait_s, say)
        yield release
    finally:
        release()


def _take_turn(run_name: str, deadline: float, wait_s: float, say: Callable[[str], None]) -> Any:
    told = False
    while True:
        try:
            turn: Any = ray.remote(num_cpus=0)(_Admission).options(name=ADMISSION, namespace=ADMISSION).remote(run_name)
            ray.get(turn.holder.remote(), timeout=60)
            return turn
        except (ValueError, ray.exceptions.GetTimeoutError):  # the name is taken, or the cluster too busy to say
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"another run was being placed on this cluster for all of cluster.wait_s={wait_s:g}; try again"
                ) from None
            if not told:
                say("waiting for another run to be placed on this cluster")
                told = True
            time.sleep(0.5)  # between two polls, up to cluster.wait_s


def _wait_for_room(demands: list[Demand], deadline: float, wait_s: float, say: Callable[[str], None]) -> None:
    bundles = [{n: a for n, a in demand.bundle.items() if a} for demand in demands for _ in range(demand.count)]
    group = placement_group([bundle for bundle in bundles if bundle], strategy="PACK")
    try:
        if not group.wait(min(_SOON_S, math.ceil(wait_s))):
            needs = total_demand(demands)
            free = available_resources()
            say(
                f"waiting up to {wait_s:g} s for {show_resources(needs)} to be free "
                f"(now {show_resources({name: free.get(name, 0.0) for name in needs}) or 'none'})"
            )
            if not group.wait(math.ceil(max(deadline - time.monotonic(), 0.0))):  # it takes whole seconds
                free = available_resources()
                had = show_resources({name: free.get(name, 0.0) for name in needs})
                raise ResourceError(
                    f"this run needs {show_resources(needs)} free at once, but after cluster.wait_s={wait_s:g} only "
                    f"{had} was; end other work or raise cluster.wait_s"
                )
    finally:
        remove_placement_group(group)
