"""Parameter models and the registries that find them by name.

A component (loss, network, data set) is one module in its package holding one parameter model: a
frozen pydantic class whose ``name`` is a ``Literal``. Importing the package's modules registers
them, so there is no list to edit.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from pipeline.errors import ConfigError


class Params(BaseModel):
    """Base of every parameter model: frozen, no unknown keys, no silent coercion of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


P = TypeVar("P", bound=Params)


class Registry(Generic[P]):
    """Parameter models of one kind, keyed by the value of their ``name`` field.

    Args:
        kind: what an entry is, for messages (``"loss"``).
        package: package whose modules register entries when imported (``"pipeline.losses"``).
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, type[P]] = {}
        self._loaded = False

    def register(self, params: type[P]) -> type[P]:
        """Class decorator: adds ``params`` under the default of its ``name`` field."""
        name = params.model_fields["name"].default
        if not isinstance(name, str):
            raise TypeError(f"{params.__name__}.name must be a Literal with a default")
        if self._entries.setdefault(name, params) is not params:
            raise ValueError(f"two {self.kind} entries are called {name!r}")
        return params

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def entries(self) -> dict[str, type[P]]:
        """Name to parameter model, in order of name."""
        self._load()
        return {name: self._entries[name] for name in sorted(self._entries)}

    def get(self, name: str) -> type[P]:
        """The parameter model called ``name``.

        Raises:
            ConfigError: no such entry; the message names the nearest one.
        """
        self._load()
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._entries))}.{hint}")
        return self._entries[name]
