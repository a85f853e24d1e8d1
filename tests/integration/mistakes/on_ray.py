"""Mistakes that show only where there is a cluster: the tests' own, of eight CPUs and no GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.cluster import stall, train
from pipeline.cluster.preflight import Demand, check_demand
from pipeline.contracts import read_ahead
from tests.integration.mistakes.table import Place, mistake


@mistake("more workers than the cluster holds", on_ray=True)
def _(place: Place) -> list[str]:
    return place.distill("cluster.num_workers=9")


@mistake("a GPU where there is none", on_ray=True)
def _(place: Place) -> list[str]:
    return place.distill("cluster.num_gpus_per_worker=1")


@mistake("no CPU left for the teachers", on_ray=True)
def _(place: Place) -> list[str]:
    return place.distill("teacher.pool.min=6", "teacher.pool.max=6", "cluster.num_workers=2")


@mistake("a trial larger than the cluster", on_ray=True)
def _(place: Place) -> list[str]:
    return _search(place, "cluster.num_cpus_per_worker=9")


@mistake("trials of more workers than the cluster holds", on_ray=True)
def _(place: Place) -> list[str]:
    return _search(place, "cluster.num_workers=9")


@mistake("a node of the teachers that is lost for good", on_ray=True)
def _(place: Place) -> list[str]:
    # The stream stands still, and the cluster no longer has what a teacher was placed by.
    over = threading.Event()
    place.stack.callback(over.set)

    def wait(shards: Iterator[Any], with_teacher: bool) -> Iterator[dict[str, Any]]:
        next(shards)
        over.wait()
        yield from ()

    def check_without_node(demands: list[Demand]) -> None:
        check_demand([replace(demand, bundle={**demand.bundle, "teacher_slot": 1.0}) for demand in demands[:1]])

    place.monkeypatch.setattr(train, "iterate_stream", wait)
    place.monkeypatch.setattr(stall, "GIVE_UP_AFTER_S", 0.0)
    place.monkeypatch.setattr(stall, "check_demand", check_without_node)
    place.monkeypatch.setattr(read_ahead, "LOOK_S", 0.2)
    return place.distill("cluster=driver")


def _search(place: Place, *overrides: str) -> list[str]:
    return ["search", *place.distill("search=temperature", "cache.path=cache", *overrides)[1:]]
