"""From a point of a search space to the configuration of a trial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config.own_code import kept_code
from pipeline.config.schema import Config, get_path, set_path
from pipeline.config.validate import build_config
from pipeline.errors import ConfigError
from pipeline.evaluation.metrics import METRIC_DIRECTIONS
from pipeline.search import Axis, Branch, Draw, Number, RandomChooser, SearchParams, Space, Value, flatten_start

TRIAL_COMMAND = "distill"
_NUM_DRAWS = 64


@dataclass(frozen=True)
class TrialConfigs:
    """Builds the configurations of a search's trials.

    Attributes:
        config: of the search.
    """

    config: Config

    @cached_property
    def params(self) -> SearchParams:
        assert self.config.search is not None  # a rule of the command
        return self.config.search

    @cached_property
    def space(self) -> Space:
        return Space.parse(self.params.space)

    @property
    def maximises(self) -> bool:
        """Whether more of the metric is better."""
        return METRIC_DIRECTIONS[self.params.metric.removeprefix("val/")] == "max"

    def build(self, draw: Draw | None, place: Path, name: str, seed: int | None = None) -> Config:
        """The configuration of a trial, for ``distill``; one of a single worker trains in one process.

        Args:
            draw: none: the search's own configuration.
            place: run folder of the trial.
            name: of its run.
            seed: none: the search's. Views are those of the search whatever the seed is: they are in its cache.

        Raises:
            ConfigError: see ``build_config``.
        """
        raw = self.config.to_dict()
        raw["search"] = None
        raw["run"] = {"dir": str(place), "name": name, "seed": self.config.run.seed if seed is None else seed}
        if self.config.cluster.num_workers == 1:
            set_path(raw, "cluster.name", "inprocess")
        set_path(raw, "data.view_seed", self.config.view_seed)
        set_path(raw, "evaluation.test", False)  # selection never sees it
        for axis, value in self.space.assignments(draw) if draw is not None else ():
            self._assign(raw, axis, value)
        kept = kept_code(Path(self.config.run.dir)) if self.config.run.dir else {}
        if "factory" in raw["student"] and "student.code" in kept:
            set_path(raw, "student.code", kept["student.code"])
        return build_config(raw, TRIAL_COMMAND)

    def _assign(self, raw: dict[str, Any], axis: Axis, value: Any) -> None:
        if isinstance(axis, Branch):
            section = self.params.options.get(axis.path, {}).get(value)
            if section is None:
                raise ConfigError(
                    f"{axis.path}: a choice with axes of its own is that of a configuration group (loss or student)"
                )
            # With its defaults written out: an axis may be an entry of one.
            raw[axis.path] = build_config(raw | {axis.path: section}, None).to_dict()[axis.path]
            return
        if "." not in axis.path:
            raise ConfigError(
                f"{axis.path}: the options of a group are keys, each with axes of its own or none, as in "
                "options: {kd: {}, dkd: {}}"
            )
        try:
            if get_path(raw, axis.path.rpartition(".")[0]) is None:
                raise TypeError(f"{axis.path}: there is no {axis.path.rpartition('.')[0]}")
            set_path(raw, axis.path, value)
        except TypeError as error:
            raise ConfigError(str(error)) from None

    def check(self) -> list[Config]:
        """Builds the configurations at both ends of every axis, of every option and of random draws.

        Returns:
            all of them.

        Raises:
            ConfigError: the first that cannot be, with the values that it has.
        """
        built = []
        for draw in self._samples():
            try:
                built.append(self.build(draw, Path("trial"), "trial"))
            except ConfigError as error:
                raise ConfigError(
                    f"search.space: a trial with {describe_draw(draw)} cannot be: {error.message}"
                ) from None
        return built

    def _samples(self) -> Iterator[Draw]:
        yield from self.space.probes()
        chooser = RandomChooser(self.config.run.seed)
        for _ in range(_NUM_DRAWS):
            yield self.space.draw(chooser)
        if self.params.searcher == "grid":
            yield from self.space.grid()

    def starts(self, selected: tuple[float, ...] = ()) -> list[Draw]:
        """Points to begin with: the search's own configuration, the selected coefficients, those of the space; a grid.

        Args:
            selected: coefficients of PTLoss, the first for the first power.
        """
        if self.params.searcher == "grid":
            return self.space.grid()
        points = [self.default_point]
        if selected:
            values = {f"loss.perturbation.{index}": value for index, value in enumerate(selected)}
            points.append(self._project_known(values))
        points += [self.space.project(flatten_start(point)) for point in self.params.start]
        distinct: list[Draw] = []
        for point in points:
            if point and point not in distinct:
                distinct.append(point)
        return distinct

    @property
    def default_point(self) -> Draw:
        """Where the search's own configuration lies in the space; empty where it has no place in it."""
        try:
            return self.space.draw(_ConfigChooser(self.config.to_dict()))
        except ValueError:
            return {}

    def _project_known(self, values: dict[str, float]) -> Draw:
        """The point at ``values``, moved to the ends of axes that they lie beyond; other axes are left out."""
        draw: Draw = {}
        for axis in self.space.axes:
            if axis.path in values and isinstance(axis, Number):
                draw[axis.name] = axis.nearest(values[axis.path])
        return draw


class _ConfigChooser:
    """Chooses what a configuration has; ValueError where that lies outside an axis."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw

    def choose(self, axis: Axis) -> Value:
        value = get_path(self._raw, f"{axis.path}.name" if isinstance(axis, Branch) else axis.path)
        if not axis.admits(value):
            raise ValueError(f"{axis.path}: {value!r} is not within {axis.show()}")
        return value if not isinstance(axis, Number) else axis.cast(value)


def describe_draw(draw: Draw) -> str:
    """``loss.temperature 4.2, loss.kd_weight 0.9``."""
    parts = []
    for name, value in draw.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.rpartition(': ')[2]} {shown}")
    return ", ".join(parts) or "the configuration as it is"
