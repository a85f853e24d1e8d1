"""A network from the user's own code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.contracts.own_code import collect_code, import_own
from pipeline.errors import ModelError
from pipeline.models.classifier import describe_error
from pipeline.models.params import MODELS, ModelParams


def _import_factory(factory: str, code: str | None) -> Callable[..., Any]:
    """The callable that ``module:function`` names."""
    module_name, _, function_name = factory.partition(":")
    try:
        module = import_own(module_name, code)
    except Exception as error:  # whatever the user's module raises when it is imported
        raise _cannot_import(factory, code, error) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        problem = "has no" if function is None else "has something that cannot be called under"
        raise ModelError(f"factory {factory!r}: {module.__file__} {problem} {function_name!r}; name a function in it.")
    return function


def _cannot_import(factory: str, code: str | None, error: Exception) -> ModelError:
    module_name = factory.partition(":")[0]
    return ModelError(
        f"factory {factory!r}: module {module_name!r} cannot be imported from {code or os.getcwd()} or the installed "
        f"packages ({describe_error(error)}); check its name, or start the command in its folder."
    )


@MODELS.register
class CustomParams(ModelParams):
    """A network that a function of the user's returns."""

    name: Literal["custom"] = "custom"
    factory: str = Field(pattern=r"^[\w.]+:\w+$")
    """``module:function``; called as ``function(spec, **kwargs)`` with an ``InputSpec``, returns a
    ``torch.nn.Module`` from normalised float32 input (B, *spec.shape) to logits (B, spec.num_classes)."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the function, by name."""
    code: str | None = None
    """Folder that the module is imported from; none: the current one, or an installed package. A run copies the modules
    into its own folder when it begins, and means that from then on."""

    def architecture(self) -> dict[str, Any]:
        return {key: value for key, value in super().architecture().items() if key != "code"}

    @property
    def code_folder(self) -> Path | None:
        """``code`` as a path."""
        return None if self.code is None else Path(self.code)

    def collect_code(self) -> dict[str, bytes]:
        """The modules of the user's that ``factory`` needs, by path; see ``own_code``.

        Raises:
            ModelError: the module cannot be imported.
        """
        try:
            return collect_code(self.factory.partition(":")[0], self.code)
        except Exception as error:
            raise _cannot_import(self.factory, self.code, error) from error

    def build_network(self, spec: InputSpec) -> nn.Module:
        function = _import_factory(self.factory, self.code)
        try:
            network: nn.Module = function(spec, **self.kwargs)
        except Exception as error:  # whatever the user's function raises
            given = ", ".join(["spec", *(f"{key}={value!r}" for key, value in self.kwargs.items())])
            raise ModelError(
                f"factory {self.factory!r} called with ({given}) raised {describe_error(error)}; "
                "check its arguments (kwargs) and its code."
            ) from error
        return network
