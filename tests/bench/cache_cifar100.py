"""``cifar100``: caches of all of CIFAR-100 in several views, dense and top-10: sizes, errors and times."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.contracts.events import read_events
from pipeline.data.cache import Manifest, estimate_bytes, open_manifest
from tests.bench.measure import Series, say, table, time_command, verdict, write_section

DEFAULT_TEACHER = Path("runs/cifar100/teacher")
NUM_VIEWS = 4
BATCH_SIZE = 128
TEACHER = "resnet20"
FORMATS = {
    "dense, float16": ("cache=dense",),
    "dense, float32": ("cache=dense", "cache.dtype=float32"),
    "top-10, float16": ("cache=topk", "cache.k=10"),
}
CLUSTERS = {
    "inprocess": ("cluster=inprocess",),
    "ray": ("cluster.address=local", "teacher.pool.min=2", "teacher.pool.max=2"),
}
ROWS_COMPARED = 1_000


@dataclass
class _Cache:
    """One format: what it takes, and the times of its commands in each round.

    Attributes:
        times: wall and CPU seconds by command.
        rows_per_s: of the build, once its first rows had come.
        printed: by the last ``cache verify`` with the teacher, but for how far it was, and where.
    """

    times: dict[str, tuple[Series, Series]] = field(default_factory=dict)
    rows_per_s: Series = field(default_factory=Series)
    result: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    errors: str = ""
    printed: str = ""

    def add(self, name: str, cost: tuple[float, float]) -> None:
        for series, seconds in zip(self.times.setdefault(name, (Series(), Series())), cost, strict=True):
            series.add(seconds)


def measure(
    rounds: int,
    teacher: Path = DEFAULT_TEACHER,
    views: Sequence[int] = (NUM_VIEWS,),
    clusters: Sequence[str] = ("ray",),
) -> None:
    """Builds and verifies each cache in interleaved rounds, each in a folder of its own; writes the section."""
    if not (teacher / "model").exists():
        raise SystemExit(
            f"{teacher} holds no teacher; make it with `python -m tests.bench.cifar100`, or give --teacher"
        )
    data = Path(os.environ["DISTILL_DATA"]).absolute() / "cifar100"
    caches = {(label, v, c): _Cache() for v in views for c in clusters for label in FORMATS}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        for index in range(rounds):
            for number, ((label, num_views, cluster), cache) in enumerate(caches.items()):
                shared = [
                    "data=parquet", f"data.path={data}", "data.augment.crop_padding=4", "data.augment.flip=true",
                    f"data.num_views={num_views}", f"teacher={TEACHER}", f"teacher.checkpoint={teacher.absolute()}",
                    f"train.batch_size={BATCH_SIZE}", f"cache.path={folder / 'caches' / f'{index}-{number}'}",
                    *FORMATS[label],
                ]  # fmt: skip
                with say(f"round {index + 1}: {label}, {num_views} views, {cluster}"):
                    _build_and_verify(folder, f"{index}-{number}", shared, CLUSTERS[cluster], cache)
    write_section("cache-cifar100", _report(caches))


def _build_and_verify(folder: Path, name: str, shared: list[str], cluster: Sequence[str], cache: _Cache) -> None:
    run_dir, output = folder / "runs" / name, folder / f"{name}.txt"
    run_dir.parent.mkdir(exist_ok=True)
    cache.add("build", time_command(["pipeline", "cache", "build", *shared, *cluster, f"run.dir={run_dir}"], output))
    cache.result = json.loads((run_dir / "result.json").read_text())
    path = next(setting.removeprefix("cache.path=") for setting in shared if setting.startswith("cache.path="))
    cache.manifest = open_manifest(path, cache.result["key"])[1]
    rates = [event.data["rows_per_s"] for event, _ in read_events(run_dir / "events.jsonl") if event.kind == "rows"]
    if rates and rates[-1] is not None:
        cache.rows_per_s.add(rates[-1])
    errors = run_dir / "topk_errors.txt"
    cache.errors = errors.read_text() if errors.exists() else ""
    files_only = ["pipeline", "cache", "verify", f"cache.path={path}", f"name={cache.result['key']}"]
    cache.add("verify, files", time_command(files_only, output))
    printed = folder / f"{name}-verify.txt"
    compared = ["pipeline", "cache", "verify", *shared, f"rows={ROWS_COMPARED}", "cluster=inprocess"]
    cache.add("verify, teacher", time_command(compared, printed))
    lines = printed.read_text().splitlines()
    cache.printed = "\n".join(line for line in lines if "rows/s" not in line and not line.startswith("checking"))


def _report(caches: dict[tuple[str, int, str], _Cache]) -> str:
    sizes, times, exact = [], [], True
    for (label, num_views, cluster), cache in caches.items():
        manifest, metrics = cache.manifest, cache.result["metrics"]
        assert manifest is not None
        num_rows = manifest.rows.stop - manifest.rows.start
        parts = len(manifest.layout.indexes)
        estimate = estimate_bytes(num_rows, num_views, manifest.key.num_classes, manifest.key, parts)
        exact = exact and abs(estimate / manifest.num_bytes - 1) <= 0.02
        name = f"{label}, V={num_views}, {cluster}"
        sizes.append(
            [
                name, f"{manifest.num_rows:,}", f"{manifest.num_bytes / 1e6:,.1f}", f"{estimate / 1e6:,.1f}",
                f"{manifest.num_bytes / manifest.num_rows:,.0f}", len(manifest.parts),
                f"{metrics['cache/rows_forwarded']:,.0f}",
            ]
        )  # fmt: skip
        costs = [series.show() for pair in cache.times.values() for series in pair]
        times.append([name, cache.rows_per_s.show(), *costs])
    shown = {label: cache for (label, _, _), cache in caches.items()}
    time_columns = (
        "cache", "rows/s of the build", "build s", "build CPU s", "verify files s", "CPU s", "verify with teacher s",
        "CPU s",
    )  # fmt: skip
    errors = next((cache.errors for cache in shown.values() if cache.errors), "")
    accuracy = next(iter(caches.values())).result["metrics"]["cache/teacher_val_top1"]
    return "\n\n".join(
        [
            f"The train files of CIFAR-100 less what is carved out for validation, from Parquet, with crop and flip in "
            f"V views, by the teacher of the section cifar100 ({TEACHER}, val/top1 {accuracy:.4f}). Times are of whole "
            f"commands, start included; on Ray two teacher actors and a Ray of its own. `cache verify` runs in one "
            f"process: once over the files alone (name=...), once with the teacher and {ROWS_COMPARED:,} random rows.",
            table(("cache", "rows", "MB", "estimated MB", "bytes a row", "files", "rows the teacher saw"), sizes),
            f"Estimated within 2 %: {verdict(exact)}.",
            table(time_columns, times),
            f"What top-10 loses, as `cache build` measures and prints it:\n\n```text\n{errors.rstrip()}\n```",
            "What `cache verify` says with the teacher:\n\n"
            + "\n\n".join(f"{label}\n\n```text\n{cache.printed.rstrip()}\n```" for label, cache in shown.items()),
        ]
    )
