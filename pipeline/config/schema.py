"""The configuration of a run: one frozen model made of every component's own parameter model.

The class is built on first use, because the unions over the registries import torch.
"""

from __future__ import annotations

import copy
import functools
import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, Field, create_model

from pipeline.registry import Params, Registry

if TYPE_CHECKING:
    from pipeline.data import DataParams
    from pipeline.data.cache import CacheParams
    from pipeline.evaluation import EvaluationParams, SelectionParams
    from pipeline.losses import LossParams
    from pipeline.models import ModelParams, TeacherParams
    from pipeline.search import SearchParams
    from pipeline.training import TrainParams

    class TeacherModelParams(ModelParams, TeacherParams):
        """A network's parameters together with those of a teacher, as type checkers see them."""


class RunParams(Params):
    """Where a run is kept, and its seed."""

    dir: str | None = None
    """Folder of the run; none: a new folder under ``runs/``. An existing run is gone on with."""
    name: str | None = None
    """Name shown in the tracker; none: made of data, networks, loss and seed."""
    seed: int = Field(default=0, ge=0)
    """Seed of fresh weights, the order of rows, a search's draws, and the augmentation without ``data.view_seed``."""


class ClusterParams(Params):
    """How and on what the run is carried out; never what it computes."""

    name: Literal["ray", "driver", "inprocess"] = "ray"
    """``ray``: Ray Train workers; ``driver``: the student in this process on Ray's stream; ``inprocess``: no Ray."""
    num_workers: int = Field(default=1, ge=1)
    """Processes that train the student together."""
    num_cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that each worker holds."""
    num_gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that each worker holds; a fraction shares one. 0: the worker trains on CPUs."""
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """Custom resources that each worker holds, by name."""
    address: str | None = None
    """Ray to connect to; none: ``RAY_ADDRESS``, else one started here. ``local`` always starts one."""
    wait_s: float = Field(default=600, ge=0)
    """Longest wait, in seconds, for resources that the cluster has but others hold."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the workers before the run is given up."""
    data_cpus: float | None = Field(default=None, gt=0)
    """Most tasks that read, and most that decode, at a time; none: two that read, and as many that decode as
    workers and teachers leave CPUs for."""
    object_store_bytes: int | None = Field(default=None, ge=1)
    """Most memory of the object store that the stream may fill; none: Ray's own limit."""


class TrackingParams(Params):
    """MLflow."""

    uri: str | None = None
    """Tracking server; none: ``mlflow.db`` (SQLite) in the folder that holds the run's folder."""
    experiment: str = Field(default="distillation", min_length=1)
    """MLflow experiment that the run is logged to; made where there is none."""
    required: bool = True
    """Whether a server that cannot be reached stops the run before it starts."""


class Config(Params):
    """Everything a command needs. The concrete class comes from ``config_class``."""

    if TYPE_CHECKING:
        run: RunParams
        data: DataParams
        teacher: TeacherModelParams
        student: ModelParams
        loss: LossParams
        train: TrainParams
        evaluation: EvaluationParams
        selection: SelectionParams
        cache: CacheParams
        search: SearchParams | None
        cluster: ClusterParams
        tracking: TrackingParams

    @property
    def view_seed(self) -> int:
        """Seed of the augmentation."""
        return self.run.seed if self.data.view_seed is None else self.data.view_seed

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable values of every field, defaults included."""
        return self.model_dump(mode="json")

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """A validated copy with ``{"train.epochs": 5}`` and the like put in."""
        raw = self.to_dict()
        for path, value in values.items():
            set_path(raw, path, value)
        return config_from_dict(raw)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so another process could not find it by its name.
        return (config_from_dict, (self.to_dict(),))


class _Teacher(Params):
    def __reduce__(self) -> tuple[Any, ...]:
        return (_teacher_from_dict, (self.model_dump(mode="json"),))


@functools.cache
def teacher_classes() -> dict[str, type[Params]]:
    """For every network a parameter model that adds ``source``, ``pool`` and what else a teacher has."""
    from pipeline.models import MODELS, TeacherParams

    return {
        name: create_model(
            f"Teacher{params.__name__}", __base__=(params, TeacherParams, _Teacher), __doc__=params.__doc__
        )
        for name, params in MODELS.entries().items()
    }


@functools.cache
def config_class() -> type[Config]:
    """The ``Config`` over everything that is registered; imports data, losses, models and training."""
    from pipeline.data import DATASETS
    from pipeline.data.cache import CacheParams
    from pipeline.evaluation import EvaluationParams, SelectionParams
    from pipeline.losses import LOSSES
    from pipeline.models import MODELS
    from pipeline.search import SearchParams
    from pipeline.training import TrainParams

    fields: dict[str, Any] = {
        "run": (RunParams, RunParams()),
        "data": (_union(_entries(DATASETS)), ...),
        "teacher": (_union(teacher_classes()), ...),
        "student": (_union(_entries(MODELS)), ...),
        "loss": (_union(_entries(LOSSES)), ...),
        "train": (TrainParams, TrainParams()),
        "evaluation": (EvaluationParams, EvaluationParams()),
        "selection": (SelectionParams, SelectionParams()),
        "cache": (CacheParams, CacheParams()),
        "search": (SearchParams | None, None),
        "cluster": (ClusterParams, ClusterParams()),
        "tracking": (TrackingParams, TrackingParams()),
    }
    return create_model("Config", __base__=Config, **fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The parameter models that a field's type names, at its top level or one below."""
    options = (annotation, *typing.get_args(annotation))
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def config_from_dict(raw: Mapping[str, Any]) -> Config:
    """Validates plain values; a key never changes its type, so ``"3"`` is no number.

    Raises:
        pydantic.ValidationError: see ``pipeline.config.validate`` for the version users meet.
    """
    # JSON's strict mode is the one that takes lists for tuples and integers for floats, and nothing else.
    return config_class().model_validate_json(json.dumps(raw), strict=True)


def _teacher_from_dict(raw: dict[str, Any]) -> Params:
    return teacher_classes()[raw["name"]].model_validate_json(json.dumps(raw), strict=True)


def _entries(registry: Registry[Any]) -> dict[str, type[Params]]:
    return dict(registry.entries())


def _union(classes: dict[str, type[Params]]) -> Any:
    """A union told apart by ``name``."""
    members = tuple(classes.values())
    return Annotated[Union[members], Field(discriminator="name")] if len(members) > 1 else members[0]  # noqa: UP007


# --- nested dictionaries by dotted path ---------------------------------------------------------------------------

_ABSENT = object()


def get_path(raw: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at ``"train.optimizer.lr"``, or ``default`` where any part of the path is absent."""
    node: Any = raw
    for key in path.split("."):
        if isinstance(node, list | tuple):
            node = node[int(key)] if key.isdigit() and int(key) < len(node) else _ABSENT
        else:
            node = node.get(key, _ABSENT) if isinstance(node, Mapping) else _ABSENT
        if node is _ABSENT:
            return default
    return node


def set_path(raw: dict[str, Any], path: str, value: Any) -> None:
    """Puts a copy of ``value`` at ``path``, making the mappings on the way; a number names an entry of a list."""
    parent, _, last = path.rpartition(".")
    node: Any = raw
    for key in parent.split(".") if parent else ():
        child = node[int(key)] if isinstance(node, list) else node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict | list):
            raise TypeError(f"{path}: {key} is not a mapping")
        node = child
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise TypeError(f"{path}: expected the number of one of {len(node)} entries, from 0")
        node[int(last)] = copy.deepcopy(value)
    else:
        node[last] = copy.deepcopy(value)


def drop_path(raw: dict[str, Any], path: str) -> None:
    """Removes what is at ``path``, if anything."""
    parent, _, last = path.rpartition(".")
    node = get_path(raw, parent) if parent else raw
    if isinstance(node, dict):
        node.pop(last, None)


def flatten(raw: Mapping[str, Any] | Config, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted path to scalar, for the tracker and for comparisons; lists as JSON, none as ``null``."""
    if isinstance(raw, Config):
        raw = raw.to_dict()
    flat: dict[str, str | int | float | bool] = {}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        elif value is None or isinstance(value, list | tuple):
            flat[path] = json.dumps(value)
        else:
            flat[path] = value
    return flat
