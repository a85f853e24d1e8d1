"""Mistakes with searches; those of a cluster that is too small are among the ones on Ray."""

from __future__ import annotations

from pipeline.cli.main import main
from tests.integration.mistakes.table import Place, mistake


def search(place: Place, *overrides: str) -> list[str]:
    return ["search", *place.distill("search=temperature", "cache.path=cache", *overrides)[1:]]


def axis(path: str, distribution: str, low: float, high: float) -> list[str]:
    values = {"distribution": distribution, "low": low, "high": high}
    return [f"search.space.{path}.{key}={value}" for key, value in values.items()]


@mistake("a search of nothing")
def _(place: Place) -> list[str]:
    return ["search", *place.distill("cache.path=cache")[1:]]


@mistake("a space that does not exist")
def _(place: Place) -> list[str]:
    return ["search", *place.distill("search=temprature")[1:]]


@mistake("a file of a space that is not there")
def _(place: Place) -> list[str]:
    return ["search", *place.distill("search=mine.yaml")[1:]]


@mistake("a misspelt path in a space")
def _(place: Place) -> list[str]:
    space = place.folder / "space.yaml"
    space.write_text("space: {loss: {temprature: {distribution: uniform, low: 1, high: 2}}}")
    return ["search", *place.distill("search=space.yaml", "cache.path=cache")[1:]]


@mistake("a range that is none")
def _(place: Place) -> list[str]:
    return search(place, *axis("loss.temperature", "uniform", 8, 2))


@mistake("a range beyond what a key takes")
def _(place: Place) -> list[str]:
    return search(
        place, *axis("loss.temperature", "uniform", 0, 2), "search.start=[]", "search.space.loss.kd_weight.low=1"
    )


@mistake("a whole number searched by fractions")
def _(place: Place) -> list[str]:
    return search(place, *axis("train.batch_size", "uniform", 32.5, 64))


@mistake("a space over what the teacher is shown")
def _(place: Place) -> list[str]:
    return search(place, *axis("data.num_views", "integer", 1, 4))


@mistake("a metric that no evaluation has")
def _(place: Place) -> list[str]:
    return search(place, "search.metric=val/acc")


@mistake("the worse way round")
def _(place: Place) -> list[str]:
    return search(place, "search.mode=min")


@mistake("a start outside the space")
def _(place: Place) -> list[str]:
    return search(place, "search.start=[{loss: {temperature: 99}}]")


@mistake("a grid larger than the search")
def _(place: Place) -> list[str]:
    return search(place, "search.searcher=grid")


@mistake("a network's size that changes while it trains")
def _(place: Place) -> list[str]:
    return search(place, "search.scheduler=pbt", *axis("student.width", "integer", 8, 16))


@mistake("a population with a time limit")
def _(place: Place) -> list[str]:
    return search(place, "search.scheduler=pbt", "search.time_budget_s=60")


@mistake("a search without Ray")
def _(place: Place) -> list[str]:
    return search(place, "cluster=inprocess")


@mistake("trials that ask the teacher")
def _(place: Place) -> list[str]:
    return search(place, "teacher.source=online")


@mistake("a space for a run that searches nothing")
def _(place: Place) -> list[str]:
    return place.distill("search=temperature")


@mistake("more trials for a run that is no search")
def _(place: Place) -> list[str]:
    assert main(place.distill("cluster=inprocess", "train.epochs=1", "run.dir=runs/student")) == 0
    return ["distill", "resume=runs/student", "search.num_trials=+4"]


@mistake("`search show` of a run that is no search")
def _(place: Place) -> list[str]:
    return ["search", "show", f"run={place.teacher}"]
