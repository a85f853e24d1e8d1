"""Commands of the product on the card: a run that is killed, teacher pool and Ray Train, caches, a search."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.cli.main import main
from pipeline.contracts.events import read_events
from tests.gpu.registry import Figures, Place, check

_FAKE = "fake_accelerator"  # a custom resource, in place of a GPU
_EXACT_ON_CPU = 0.0
_CLOSE_ON_GPU = 1e-3  # a GPU may add up in another order each time
_NUM_CPUS = 16  # logical ones: a count, not a promise of speed
_STUDENT = ("student=small_cnn", "student.width=4", "train.precision=bf16", "train.channels_last=true")


def command(place: Place, *arguments: str) -> dict[str, Any]:
    """Carries out a command in this process; returns its result.

    Raises:
        AssertionError: it ends with another code than 0; says what it said last.
    """
    with (
        (place.folder / "commands.log").open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        code = main(arguments)
    lines = [line for line in (place.folder / "commands.log").read_text().splitlines() if line.strip()]
    if code:
        raise AssertionError(f"{' '.join(arguments[:1])} ended with {code}: {lines[-1]}")
    result: dict[str, Any] = json.loads(Path(lines[-1]).read_text()) if lines[-1].endswith("result.json") else {}
    return result


def trained_teacher(place: Place) -> list[str]:
    """Keys that name a teacher of the digits, which the first check that wants it has trained."""
    network = ["teacher=small_cnn", "teacher.width=8"]
    folder = place.shared / "runs" / "teacher"
    if not (folder / "result.json").exists():
        command(place, "train-teacher", *network, "cluster=inprocess", "train.epochs=3", f"run.dir={folder}")
    return [*network, f"teacher.checkpoint={folder}"]


def holds(place: Place, share: float) -> tuple[list[str], list[str]]:
    """Keys by which each teacher, and each worker, holds a share of the card (or of what stands for it)."""
    if place.on_gpu:
        return [f"teacher.pool.num_gpus={share}"], [f"cluster.num_gpus_per_worker={share}"]
    resource = f"{{{_FAKE}: {share}}}"
    return [f"teacher.pool.resources={resource}"], [f"cluster.resources_per_worker={resource}"]


@functools.cache
def start_ray(device: str, log: Path) -> contextlib.ExitStack:
    """A Ray for all checks of this process, which ends with it."""
    from pipeline.cluster.session import own_ray

    stack = contextlib.ExitStack()
    stack.enter_context(own_ray(_NUM_CPUS, log, None if device == "cuda" else {_FAKE: 1}))
    atexit.register(stack.close)  # before Ray's own, which leaves what does not end by itself
    return stack


def use_ray(place: Place) -> None:
    start_ray(place.device, place.shared / "ray.log")


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event.data for event, _ in read_events(run_dir / "events.jsonl") if event.kind == kind]


def speed_of(run_dir: Path) -> float:
    """Rows a second at the last record of a run."""
    return float(events_of(run_dir, "step")[-1]["samples_per_s"])


def check_memory(place: Place, run_dir: Path) -> None:
    """Whoever trained must have used the card."""
    used = [event.get("gpu_bytes", 0) for event in events_of(run_dir, "system")]
    if place.on_gpu and not any(used):
        raise AssertionError(f"no worker of {run_dir.name} used the card's memory")


@check("killed", limit_s=120)
def killed_run_goes_on(place: Place) -> Figures:
    """A run that is killed and resumed: its weights against those of one that was left alone."""
    from safetensors.numpy import load_file

    epochs = 40 if place.on_gpu else 4
    keys = ["train-teacher", "teacher=small_cnn", "teacher.width=8", "cluster=inprocess", f"train.epochs={epochs}"]
    keys += ["train.checkpoint_every=5", "train.num_threads=1"]
    whole, killed = place.folder / "whole", place.folder / "killed"
    command(place, *keys, f"run.dir={whole}")
    with (place.folder / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *keys, f"run.dir={killed}"], stdout=log, stderr=log
        )
        deadline = time.monotonic() + 60
        while not _num_checkpoints(killed) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # between two polls
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise AssertionError(f"the run ended with {process.returncode} before it was killed")
    before = _num_checkpoints(killed)
    command(place, "train-teacher", f"resume={killed}")
    starts = [event["start_step"] for event in events_of(killed, "plan")]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    apart = max(float(abs(one[name] - other[name]).max()) for name in one)
    if not before or starts[-1] == 0 or apart > (_CLOSE_ON_GPU if place.on_gpu else _EXACT_ON_CPU):
        raise AssertionError(f"resumed at step {starts[-1]}, weights differ by {apart:.3g}")
    return {"resumed at step": starts[-1], "weights differ by": apart}


def _num_checkpoints(run_dir: Path) -> int:
    return len(events_of(run_dir, "checkpoint")) if (run_dir / "events.jsonl").exists() else 0


@check("pool-on-quarters", limit_s=180, on_ray=True)
def pool_and_worker_share_the_card(place: Place) -> Figures:
    """Two teacher actors and a Ray Train worker on a quarter of the card each, with a loss of soft ranks."""
    teacher = trained_teacher(place)
    use_ray(place)
    of_teachers, of_workers = holds(place, 0.25)
    run_dir = place.folder / "student"
    keys = [*teacher, *of_teachers, *of_workers, *_STUDENT, "teacher.pool.min=2", "teacher.pool.max=2", "loss=cmkd"]
    began = time.monotonic()
    result = command(place, "distill", *keys, "train.epochs=3", f"run.dir={run_dir}")
    check_memory(place, run_dir)
    actors = {event["actor"] for event in events_of(run_dir, "pool")}
    return {
        "val/top1": result["metrics"]["val/top1"],
        "teachers that told of their use": len(actors),
        "rows/s": speed_of(run_dir),
        "s": time.monotonic() - began,
    }


@check("cache", limit_s=240, on_ray=True)
def cache_is_built_and_read(place: Place) -> Figures:
    """A cache by a teacher that holds the whole card, verified; then a Ray Train worker on the card reads it."""
    use_ray(place)
    keys, of_workers = _cached(place)
    began = time.monotonic()
    built = command(place, "cache", "build", *keys, f"run.dir={place.shared / 'runs' / 'cached'}")
    build_s = time.monotonic() - began
    command(place, "cache", "verify", *keys, "rows=all")
    told = (place.folder / "commands.log").read_text().splitlines()
    deviation = next(line for line in told if "largest deviation" in line)
    run_dir = place.shared / "runs" / "student"
    command(place, "distill", *keys, *of_workers, *_STUDENT, "teacher.source=cached", f"run.dir={run_dir}")
    check_memory(place, run_dir)
    return {
        "rows": built["metrics"]["cache/num_rows"],
        "build, s": build_s,
        "largest deviation of a logit": deviation.split()[-1],
        "rows/s of the worker": speed_of(run_dir),
    }


def _cached(place: Place) -> tuple[list[str], list[str]]:
    """Keys of a cache and its teacher, which holds the whole card; and of a worker that does."""
    of_teachers, of_workers = holds(place, 1)
    return [*trained_teacher(place), *of_teachers, f"cache.path={place.shared / 'cache'}", "train.epochs=3"], of_workers


@check("search", limit_s=240, on_ray=True)
def search_shares_the_card(place: Place) -> Figures:
    """A search of four trials with a quarter of the card each, over a cache."""
    use_ray(place)
    keys, _ = _cached(place)
    if not (place.shared / "cache").exists():
        command(place, "cache", "build", *keys, f"run.dir={place.shared / 'runs' / 'cached'}")
    run_dir = place.shared / "runs" / "search"
    keys += [*holds(place, 0.25)[1], *_STUDENT, "search=temperature", "search.num_trials=4", "search.scheduler=none"]
    keys += ["search.confirm.top=1", "search.confirm.seeds=1"]
    began = time.monotonic()
    command(place, "search", *keys, f"run.dir={run_dir}")
    trials = [json.loads(path.read_text()) for path in (run_dir / "search" / "trials").glob("*.json")]
    states: dict[str, int] = {}
    for trial in trials:
        states[trial["state"]] = states.get(trial["state"], 0) + 1
    if set(states) != {"finished"}:
        raise AssertionError(f"trials ended as {states}")
    folders = [path.parent for path in (run_dir / "trials").rglob("events.jsonl")]
    for folder in folders:
        check_memory(place, folder)
    return {"trials": len(trials), "s": time.monotonic() - began}
