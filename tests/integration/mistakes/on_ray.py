"""Mistakes that show only where there is a cluster: the tests' own, of eight CPUs and no GPU."""

from __future__ import annotations

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


def _search(place: Place, *overrides: str) -> list[str]:
    return ["search", *place.distill("search=temperature", "cache.path=cache", *overrides)[1:]]
