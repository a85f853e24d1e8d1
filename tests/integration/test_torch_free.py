"""Torch costs half a gigabyte and several seconds: only processes that compute with it may load it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.contracts.events import read_events
from tests.bench.measure import loads_torch, process_tree
from tests.bench.start import MAY_IMPORT_TORCH
from tests.bench.workload import write_checkpoint, write_images

DEADLINE_S = 240.0


@pytest.mark.slow
def test_no_torch_in_data_processes(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", 640, 64)
    checkpoint = write_checkpoint(tmp_path / "teacher.safetensors", "small_cnn", width=4)
    command = [
        sys.executable, "-m", "pipeline", "distill", f"run.dir={tmp_path / 'run'}",
        "data=parquet", f"data.path={data}", "data.augment.crop_padding=4", "data.augment.flip=true",
        "teacher=small_cnn", "teacher.width=4", f"teacher.checkpoint={checkpoint}",
        "student=small_cnn", "student.width=4", "cluster.address=local",
        "train.batch_size=32", "train.epochs=500", "train.evaluate_every=500",
    ]  # fmt: skip
    with (tmp_path / "output.txt").open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for_steps(run, tmp_path)
        found = [(process, loads_torch(process.pid)) for process in process_tree(run.pid)]
    finally:
        run.terminate()
        run.wait(timeout=30)

    roles = {process.role for process, _ in found}
    assert {"driver", "student", "teacher", "split coordinator", "data tasks and idle workers"} <= roles
    assert {"student", "teacher"} <= {process.role for process, loaded in found if loaded}
    assert not [process for process, loaded in found if loaded and process.role not in MAY_IMPORT_TORCH]


def _wait_for_steps(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Until some steps were taken, so that every process of the stream has done its work at least once."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert run.poll() is None, (folder / "output.txt").read_text()
        if any(event.kind == "step" for event, _ in read_events(folder / "run" / "events.jsonl")):
            return
        time.sleep(0.2)  # between two polls
    pytest.fail(f"no step in {DEADLINE_S:.0f} s: {(folder / 'output.txt').read_text()}")
