"""A network from the user's own code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.errors import ModelError
from pipeline.models.classifier import describe_error
from pipeline.models.params import MODELS, ModelParams


def _import_factory(factory: str) -> Callable[..., Any]:
    """The callable that ``module:function`` names; the current folder is searched first, as ``python -m`` does."""
    module_name, _, function_name = factory.partition(":")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises when it is imported
        raise ModelError(
            f"factory {factory!r}: module {module_name!r} cannot be imported from {folder} or the installed packages "
            f"({describe_error(error)}); check its name, or start the command in its folder."
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        problem = "has no" if function is None else "has something that cannot be called under"
        raise ModelError(f"factory {factory!r}: {module.__file__} {problem} {function_name!r}; name a function in it.")
    return function


@MODELS.register
class CustomParams(ModelParams):
    """A network that a function of the user's returns."""

    name: Literal["custom"] = "custom"
    factory: str = Field(pattern=r"^[\w.]+:\w+$")
    """``module:function``; called as ``function(spec, **kwargs)`` with an ``InputSpec``, returns a
    ``torch.nn.Module`` from normalised float32 input (B, *spec.shape) to logits (B, spec.num_classes)."""
    kwargs: dict[str, Any] = Field(default_factory=dict)

    def build_network(self, spec: InputSpec) -> nn.Module:
        function = _import_factory(self.factory)
        try:
            network: nn.Module = function(spec, **self.kwargs)
        except Exception as error:  # whatever the user's function raises
            given = ", ".join(["spec", *(f"{key}={value!r}" for key, value in self.kwargs.items())])
            raise ModelError(
                f"factory {self.factory!r} called with ({given}) raised {describe_error(error)}; "
                "check its arguments (kwargs) and its code."
            ) from error
        return network
