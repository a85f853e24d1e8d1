"""A trial on its way to a process."""

from __future__ import annotations

from typing import NamedTuple


class TrialTask(NamedTuple):
    """A trial to be run.

    Attributes:
        label: its name.
        config: its configuration as JSON.
        judged: whether the scheduler may stop it early.
        start_from: folder of the checkpoint that it begins with; empty: none.
    """

    label: str
    config: str
    judged: bool
    start_from: str = ""
