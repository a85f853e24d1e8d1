"""How long something takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from tests.bench.losses import wait_for
from tests.bench.measure import Series


def seconds_per_call(function: Callable[[], object], device: torch.device, at_least_s: float = 0.1) -> float:
    """Mean over as many calls as take ``at_least_s``; one before them, which is not counted, fills caches."""
    function()
    wait_for(device)
    began, done, more = time.perf_counter(), 0, 1
    while True:
        for _ in range(more):
            function()
        wait_for(device)
        done += more
        elapsed = time.perf_counter() - began
        if elapsed >= at_least_s:
            return elapsed / done
        more = done


def interleave(ways: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, Series]:
    """What each of ``ways`` returns, all of them in turn in each round."""
    found = {name: Series() for name in ways}
    for _ in range(num_rounds):
        for name, function in ways.items():
            found[name].add(function())
    return found
