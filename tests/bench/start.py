"""``start``: from ``fit`` to the first step, and which processes import torch."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.contracts.events import Event
from tests.bench.measure import CpuClock, Process, Series, loads_torch, process_tree, say, table, verdict, write_section
from tests.bench.runs import Watcher, distill, local_ray
from tests.bench.workload import write_checkpoint, write_images

MAY_IMPORT_TORCH = ("driver", "student", "teacher", "train controller")


def measure(rounds: int) -> None:
    """Interleaved: an empty fit, a pool's actor, the pipeline; writes the section."""
    empty, empty_whole, pool, ours = Series(), Series(), Series(), Series()
    found: list[tuple[Process, bool]] = []
    cpu: dict[str, Series] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        write_images(folder / "data", 640, 64)
        checkpoint = write_checkpoint(folder / "teacher.safetensors", "resnet20")
        with local_ray(4, folder / "ray.log"), CpuClock() as clock:
            for index in range(rounds):
                with say(f"round {index + 1}: empty fit"):
                    to_worker, whole = _empty_fit(folder, index)
                empty.add(to_worker)
                empty_whole.add(whole)
                with say(f"round {index + 1}: an actor of the pool"):
                    pool.add(_start_actor(folder, checkpoint))
                with say(f"round {index + 1}: pipeline"):
                    run_dir = folder / "runs" / str(index)
                    with Watcher(run_dir, lambda event: _look(event, found)):
                        journal = distill(run_dir, _overrides(folder, checkpoint))
                begin, end = journal.stage_started("training"), min(journal.steps.values())
                ours.add(end - begin)
                for role, seconds in clock.used(begin, end).items():
                    cpu.setdefault(role, Series()).add(seconds)
    write_section("start", _report(empty, empty_whole, pool, ours, cpu, found))


def look_for_torch() -> list[tuple[Process, bool]]:
    """Every process of the tree, and whether torch is loaded there."""
    return [(process, loads_torch(process.pid)) for process in process_tree()]


def _look(event: Event, found: list[tuple[Process, bool]]) -> None:
    # Evaluation later runs in a plain task, whose worker keeps torch; the first run shows the stream alone.
    if event.kind == "step" and event.data["step"] == 5 and not found:
        found.extend(look_for_torch())


def _empty_worker(config: dict[str, Any]) -> None:
    import torch

    torch.zeros(1)
    Path(config["mark"]).write_text(str(time.time()))


def _empty_fit(folder: Path, index: int) -> tuple[float, float]:
    """Seconds from ``fit`` until the worker's function has imported torch, and until ``fit`` returns."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    mark = folder / f"mark-{index}"
    began = time.time()
    TorchTrainer(
        _empty_worker,
        train_loop_config={"mark": str(mark)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name=f"empty-{index}", storage_path=str(folder / "empty")),
    ).fit()
    return float(mark.read_text()) - began, time.time() - began


def _start_actor(folder: Path, checkpoint: Path) -> float:
    """Seconds until an actor of the pool is ready."""
    import ray

    from pipeline.cluster.pool import TeacherActor
    from pipeline.data.sources.parquet import ParquetParams
    from pipeline.models import MODELS
    from pipeline.training import teacher_arguments

    params = MODELS.entries()["resnet20"].model_validate({"name": "resnet20", "checkpoint": str(checkpoint)})
    build = pickle.dumps(teacher_arguments(params, ParquetParams(path=str(folder / "data")).open(), 64))
    began = time.time()
    remote: Any = ray.remote(num_cpus=1)(TeacherActor)
    actor = remote.remote(build, None, 1)
    ray.get(actor.__ray_ready__.remote())
    seconds = time.time() - began
    ray.kill(actor)
    return seconds


def _overrides(folder: Path, checkpoint: Path) -> list[str]:
    return [
        "data=parquet", f"data.path={folder / 'data'}", "teacher=resnet20", f"teacher.checkpoint={checkpoint}",
        "student=small_cnn", "train.batch_size=64", "train.epochs=2", "train.evaluate_every=1000", "train.log_every=1",
        "train.optimizer.lr=0.01", "evaluation.test=false",
    ]  # fmt: skip


def _report(
    empty: Series,
    empty_whole: Series,
    pool: Series,
    ours: Series,
    cpu: dict[str, Series],
    found: list[tuple[Process, bool]],
) -> str:
    allowed = Series([1.3 * a + b for a, b in zip(empty.values, pool.values, strict=True)])
    allowed_whole = Series([1.3 * a + b for a, b in zip(empty_whole.values, pool.values, strict=True)])
    rows = [
        ["empty TorchTrainer.fit, until its worker has imported torch", empty.show(1)],
        ["the same, until fit returns", empty_whole.show(1)],
        ["an actor of the pool, until it is ready", pool.show(1)],
        ["pipeline, from before fit to the first step's record", ours.show(1)],
        ["allowed: 1.3 x empty fit until its worker runs + actor", allowed.show(1)],
        ["allowed: 1.3 x whole empty fit + actor", allowed_whole.show(1)],
    ]
    roles: dict[str, list[bool]] = {}
    for process, torch_loaded in found:
        roles.setdefault(process.role, []).append(torch_loaded)
    loaded = [[role, f"{sum(flags)} of {len(flags)}"] for role, flags in sorted(roles.items())]
    strangers = [p.title for p, torch_loaded in found if torch_loaded and p.role not in MAY_IMPORT_TORCH]
    profile = sorted(cpu.items(), key=lambda item: -item[1].median)
    return "\n\n".join(
        [
            f"One worker, one actor, {os.cpu_count()} cores shared by all; a Ray that runs already. Seconds, median "
            "and range; each round has one of each.",
            table(("", "s"), rows),
            f"At most 1.3 x an empty fit, plus a pool's start: {verdict(ours.median <= allowed.median)} counted to the "
            f"empty fit's worker, {verdict(ours.median <= allowed_whole.median)} counted to its return.",
            "CPU seconds from fit to the first step:\n\n"
            + table(("", "s"), [[role, value.show(1)] for role, value in profile if value.median >= 0.1]),
            "Processes with torch loaded, at step 5 of the first run:\n\n" + table(("", "with torch"), loaded),
            "Only driver, workers, teachers and Train's controller import torch: "
            + (verdict(True) if not strangers else f"{verdict(False)} ({'; '.join(strangers)})")
            + ".",
        ]
    )
