"""Work that several terms of an objective share, done once a batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from pipeline.losses.objective import Signals

Result = TypeVar("Result")


class OncePerBatch(Generic[Result]):
    """A function of a batch that computes once for all terms that call it with the same ``Signals``.

    The result, and the graph that hangs on it, is forgotten when the ``Signals`` are.

    Args:
        function: of the batch's signals.
    """

    def __init__(self, function: Callable[[Signals], Result]) -> None:
        self._function = function
        self._signals: weakref.ref[Signals] | None = None
        self._result: Result | None = None

    def __call__(self, signals: Signals) -> Result:
        if self._signals is None or self._signals() is not signals or self._result is None:
            self._result = self._function(signals)
            self._signals = weakref.ref(signals, self._forget)
        return self._result

    def _forget(self, reference: weakref.ref[Signals]) -> None:
        if reference is self._signals:  # not a batch before the present one
            self._signals = self._result = None
