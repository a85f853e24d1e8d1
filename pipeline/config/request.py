"""What the command line asks of a stage. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One command as typed.

    Attributes:
        command: name of the subcommand (``"distill"``).
        overrides: ``group=choice`` and ``path.to.key=value``, in the order given.
        conf_dirs: folders with the user's own configuration groups; the first one wins.
        debug: whether errors are shown with their traceback.
    """

    command: str
    overrides: tuple[str, ...] = ()
    conf_dirs: tuple[Path, ...] = ()
    debug: bool = False
