"""An iterator that is read ahead of, and waits that take long."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.contracts.read_ahead import ReadAhead, read_ahead


def test_items_come_in_order_and_end() -> None:
    ahead = ReadAhead(iter(range(5)), depth=2)
    assert list(ahead) == [0, 1, 2, 3, 4]
    assert ahead.waited_s >= 0.0


def test_what_goes_wrong_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second item")

    ahead = ReadAhead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no second item"):
        next(ahead)


def test_long_wait_is_told_again_and_again_until_it_is_ended() -> None:
    released = threading.Event()
    told: list[float] = []

    def items() -> Iterator[int]:
        yield 1
        released.wait(60.0)
        yield 2

    def overdue(waited_s: float) -> None:
        told.append(waited_s)
        if len(told) == 3:
            raise TimeoutError("nothing will come")

    ahead = ReadAhead(items(), overdue=overdue, look_s=0.01)
    assert next(ahead) == 1
    with pytest.raises(TimeoutError, match="nothing will come"):
        next(ahead)
    assert told == sorted(told)
    released.set()
    assert next(ahead) == 2  # a wait that ended is no loss of items


def test_whoever_stops_early_ends_the_thread() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.set()

    reading = read_ahead(items(), lambda waited_s: None)
    assert next(reading) == 0
    reading.close()  # type: ignore[attr-defined]
    assert ended.wait(30.0)
