"""``cache build``: the teacher's logits of every view of every training row, computed once and kept."""

from __future__ import annotations

from typing import Any

from pipeline.config.request import Request
from pipeline.config.results import write_json
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.contracts.events import Event
from pipeline.data import DataSource
from pipeline.data.cache import (
    Cache,
    check_classes,
    open_manifest,
)
from pipeline.execution.completing import CacheWork, complete_cache, prepare_cache
from pipeline.execution.session import RunSession
from pipeline.execution.skipped import SkippedRows
from pipeline.execution.story import Story, tell
from pipeline.execution.work import check_validation_labels
from pipeline.report.cache import format_bytes, render_manifest


def build_cache(request: Request) -> int:
    """Returns 0; a cache that is complete is left as it is."""
    return tell(Story(_check, prepare_cache, _carry_out, _show, dataset=_describe), request)


def _check(config: Config, source: DataSource) -> None:
    check_validation_labels(config, source, "the teacher is measured by them")
    check_classes(config.cache, source.spec.num_classes)


def _describe(work: CacheWork) -> dict[str, Any]:
    """What the tracker records: the cache itself, as a data set of its own."""
    num_rows = work.key.num_views * work.reader.num_rows
    name = f"{work.run.config.data.name}-logits"
    return {"name": name, "fingerprint": work.key.digest, "num_rows": num_rows, "path": work.folder}


def _carry_out(work: CacheWork, session: RunSession) -> None:
    _finish(work, *complete_cache(work, session), session)


def _finish(work: CacheWork, cache: Cache, rows: dict[str, int], session: RunSession) -> None:
    manifest = cache.manifest
    path = work.run.dir / "cache.json"
    write_json(path, {"folder": work.folder, **manifest.model_dump(mode="json", exclude={"first_rows", "parts"})})
    session.journal.emit(Event("artifact", {"path": str(path), "folder": "cache"}))
    metrics = {
        "cache/num_rows": float(manifest.num_rows),
        "cache/num_bytes": float(manifest.num_bytes),
        "cache/rows_computed": float(rows["computed"]),
        "cache/rows_forwarded": float(rows["forwarded"]),
    }
    if manifest.teacher_accuracy is not None:
        metrics["cache/teacher_val_top1"] = manifest.teacher_accuracy
    message = f"{work.folder}: {manifest.num_rows:,} rows, {format_bytes(manifest.num_bytes)}"
    session.journal.emit(Event("figures", {"message": message, "metrics": metrics}))
    session.finish(metrics, {"cache": work.folder, "key": work.key.digest})


def _show(run: Run) -> None:
    result = run.read_result()
    folder, manifest = open_manifest(run.config.cache.path or "", result["key"])
    print(render_manifest(folder.shown, manifest))
    if summary := SkippedRows(run.dir, None).summary():
        print(summary)
    print(f"use it: python -m pipeline distill teacher.source=cached cache.path={run.config.cache.path}")
    print(run.result_path, flush=True)
