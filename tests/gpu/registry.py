"""What a check is, and the list of all."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Figures = dict[str, float | str]
"""What a check measured, by what it is called in print."""

# With checks, in the order in which these run: what says most in little time comes first.
MODULES = ("losses", "networks", "runs", "rates", "compiled")


@dataclass(frozen=True)
class Place:
    """Where a check runs.

    Attributes:
        device: ``cuda``, or ``cpu``, where sizes are tiny.
        folder: its own, empty.
        shared: of all checks; what one has made there, the next ones find.
    """

    device: str
    folder: Path
    shared: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


class Skipped(Exception):
    """A check cannot be made here; says why."""


@dataclass(frozen=True)
class Check:
    """One path of the product.

    Attributes:
        function: ``module:name`` of what makes the check; it returns figures, and raises where the path does not work.
            By name, because it is called in another process, and this one need not import torch.
        summary: for people.
        limit_s: after which it is taken to hang.
        on_cpu: whether it says anything on a CPU.
        on_ray: whether it starts a Ray.
    """

    name: str
    function: str
    summary: str
    limit_s: float
    on_cpu: bool
    on_ray: bool


_CHECKS: dict[str, Check] = {}


def check(
    name: str, limit_s: float, *, on_cpu: bool = True, on_ray: bool = False
) -> Callable[[Callable[[Place], Figures]], Callable[[Place], Figures]]:
    """Registers a function as a check; its docstring's first line says what is checked."""

    def register(function: Callable[[Place], Figures]) -> Callable[[Place], Figures]:
        summary = (function.__doc__ or "").splitlines()[0].rstrip(".")
        where = f"{function.__module__}:{function.__name__}"
        _CHECKS[name] = Check(name, where, summary, limit_s, on_cpu, on_ray)
        return function

    return register


def all_checks(modules: Iterable[str] = MODULES) -> list[Check]:
    """The checks of ``modules``, in the order in which they run; imports what they import, torch and all."""
    for module in modules:
        importlib.import_module(f"tests.gpu.{module}")
    return list(_CHECKS.values())


def call(one: Check, place: Place) -> Figures:
    """Makes a check, here."""
    module, _, name = one.function.partition(":")
    figures: Figures = getattr(importlib.import_module(module), name)(place)
    return figures


def choose(checks: Iterable[Check], prefixes: Iterable[str]) -> list[Check]:
    """The checks whose names begin with one of ``prefixes``; all of them without any.

    Raises:
        ValueError: no name begins so; says which there are.
    """
    checks, prefixes = list(checks), [prefix for prefix in prefixes if prefix]
    for prefix in prefixes:
        if not any(one.name.startswith(prefix) for one in checks):
            known = ", ".join(one.name for one in checks)
            raise ValueError(f"ONLY={prefix}: no check has a name that begins so; there are {known}")
    return [one for one in checks if not prefixes or one.name.startswith(tuple(prefixes))]
