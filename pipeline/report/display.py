"""Where a command shows how far it is: something that moves on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Generic, Self, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

Moving = TypeVar("Moving", Live, Progress)


class Display(ABC, Generic[Moving]):
    """Shown for the time of a ``with`` block.

    Args:
        console: where to write; stdout unless given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._moving: Moving | None = None  # none: lines are printed

    @abstractmethod
    def _make_moving(self) -> Moving:
        """What is shown on a terminal, not yet started."""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._moving = self._make_moving()
            self._moving.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves what was shown last standing; lines need no closing."""
        if self._moving:
            self._moving.stop()
            self._moving = None

    def _print_line(self, line: str, at: float | None = None) -> None:
        """Prints ``line`` behind the time of day ``at``, in seconds since the epoch; none: now."""
        self._console.print(Text(f"{time.strftime('%H:%M:%S', time.localtime(at))} {line}"), soft_wrap=True)
