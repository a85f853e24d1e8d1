"""An emitter for tests."""

from __future__ import annotations

from typing import Any

from pipeline.contracts.events import Event


class Recorder:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of a kind, in their order."""
        return [event.data for event in self.events if event.kind == kind]
