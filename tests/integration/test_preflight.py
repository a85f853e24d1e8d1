"""What a run needs is checked against the cluster before anything starts, and one run is placed at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline.cli.main import main
from pipeline.cluster.preflight import Demand, admitted, check_demand
from pipeline.cluster.stall import GIVE_UP_AFTER_S, TELL_AFTER_S, StallGuard
from pipeline.errors import ResourceError
from tests.integration.conftest import FAKE_ACCELERATOR, NUM_ACCELERATORS, NUM_CPUS
from tests.recorder import Recorder

pytestmark = pytest.mark.usefixtures("ray_cluster")

TIMEOUT_S = 60.0
WORKERS = Demand("student worker", 2, {"CPU": 1.0}, "cluster.num_workers")
TEACHERS = Demand("teacher actor", 2, {"CPU": 1.0, FAKE_ACCELERATOR: 1.0}, "teacher.pool.min", most=4)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # between two polls


@contextmanager
def taken(num_accelerators: int) -> Iterator[None]:
    """Somebody else holds accelerators of the cluster."""
    group = placement_group([{FAKE_ACCELERATOR: num_accelerators}])
    assert group.wait(TIMEOUT_S)
    try:
        yield
    finally:
        remove_placement_group(group)
        wait_until(lambda: ray.available_resources().get(FAKE_ACCELERATOR) == NUM_ACCELERATORS)


def test_what_fits_is_let_through() -> None:
    check_demand([WORKERS, TEACHERS])


def test_more_than_the_cluster_has_is_refused_with_the_numbers() -> None:
    many = Demand("teacher actor", 5, {FAKE_ACCELERATOR: 1.0}, "teacher.pool.min")
    with pytest.raises(ResourceError) as caught:
        check_demand([Demand("student worker", 1, {"CPU": 1.0, FAKE_ACCELERATOR: 0.5}, "cluster.num_workers"), many])
    assert caught.value.message == (
        f"this run needs 5.5 {FAKE_ACCELERATOR} (1 student worker x 0.5 + 5 teacher actors x 1) but the cluster has 4; "
        "lower cluster.num_workers or teacher.pool.min, or use a larger cluster"
    )
    assert caught.value.details == {"resource": FAKE_ACCELERATOR, "needed": 5.5, "available": 4.0}


def test_resource_of_a_node_that_is_away_is_borne_when_a_run_goes_on() -> None:
    away = [Demand("teacher actor", 1, {"another_accelerator": 1.0}, "teacher.pool.min")]
    check_demand(away, resuming=True)
    with pytest.raises(ResourceError, match=r"needs 1 another_accelerator .* but the cluster has 0"):
        check_demand(away)


def test_command_that_needs_too_much_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    overrides = ["student=mlp", "loss=cross_entropy", f"cluster.num_workers={NUM_CPUS + 1}", f"run.dir={run_dir}"]
    assert main(["distill", *overrides]) == 2
    said = capsys.readouterr()
    # Two CPUs are for reading and decoding.
    assert f"ResourceError: this run needs {NUM_CPUS + 3} CPU" in said.err
    assert f"but the cluster has {NUM_CPUS}; lower cluster.num_workers or cluster.data_cpus" in said.err
    assert said.out.splitlines()[-1] == str(run_dir / "result.json")
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 2)


def test_waits_for_what_others_hold_and_says_so() -> None:
    said: list[str] = []
    with taken(3):
        started = time.monotonic()
        with (
            pytest.raises(ResourceError, match=r"needs .*2 fake_accelerator free at once, but after cluster.wait_s=7"),
            admitted([WORKERS, TEACHERS], "run", 7.0, said.append),
        ):
            pytest.fail("there was no room")
        assert 6.9 <= time.monotonic() - started < 20.0
    (message,) = said
    assert message.startswith(f"waiting up to 7 s for 4 CPU, 2 {FAKE_ACCELERATOR} to be free (now ")
    assert f"1 {FAKE_ACCELERATOR}" in message.split("(now ")[1]


def test_goes_on_once_there_is_room() -> None:
    said: list[str] = []
    with taken(3):
        entered = threading.Event()

        def run() -> None:
            with admitted([TEACHERS], "run", TIMEOUT_S, said.append):
                entered.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        wait_until(lambda: bool(said))
        assert not entered.is_set()
    assert entered.wait(TIMEOUT_S)
    thread.join(TIMEOUT_S)


def test_two_runs_are_not_placed_at_once() -> None:
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with admitted([WORKERS], "second", TIMEOUT_S, said.append):
            order.append("second placed")

    with admitted([WORKERS], "first", TIMEOUT_S, lambda _: None) as release:
        with (
            pytest.raises(ResourceError, match=r"another run was being placed .* all of cluster.wait_s=0.2"),
            admitted([WORKERS], "impatient", 0.2, lambda _: None),
        ):
            pytest.fail("two runs were placed at once")
        thread: Any = threading.Thread(target=second, daemon=True)
        thread.start()
        wait_until(lambda: said == ["waiting for another run to be placed on this cluster"])
        order.append("first runs")
        release()
        thread.join(TIMEOUT_S)
        release()  # again, with every step that is taken: it does nothing
    assert order == ["first runs", "second placed"]


def test_stream_that_stands_still_is_waited_for_only_while_the_cluster_can_go_on() -> None:
    recorder = Recorder()
    guard = StallGuard(recorder, [WORKERS, TEACHERS])
    for waited_s in (1.0, TELL_AFTER_S, TELL_AFTER_S + 5, GIVE_UP_AFTER_S + 5, 5.0, TELL_AFTER_S + 1):
        guard(waited_s)
    assert [data["message"] for data in recorder.of("warning")] == [
        f"no block of the stream has come for {waited_s} s" for waited_s in (60, 61)
    ]

    lost = Demand("teacher actor", 1, {"accelerator_of_a_lost_node": 1.0}, "teacher.pool.min")
    guard.demands = (WORKERS, lost)
    guard(GIVE_UP_AFTER_S - 5)
    sentence = (
        r"no block of the stream has come for 180 s, and will not: this run needs 1 accelerator_of_a_lost_node "
        r"\(1 teacher actor x 1\) but the cluster has 0; .*then resume the run"
    )
    with pytest.raises(ResourceError, match=sentence):
        guard(GIVE_UP_AFTER_S)
