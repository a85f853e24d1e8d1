"""``cache info``, ``cache verify`` and ``cache prune``: looking after caches of teacher logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pipeline.config.load import load_config, take_run
from pipeline.config.request import Request
from pipeline.config.runs import settle
from pipeline.config.schema import Config
from pipeline.contracts.columns import INPUT, SAMPLE_ID
from pipeline.data import DataSource, SplitReader, decode_block, read_blocks
from pipeline.data.bad_rows import NO_SAMPLE
from pipeline.data.cache import (
    Cache,
    CacheKey,
    LogitsDecoder,
    WindowedLogits,
    check_classes,
    find_deviations,
    list_caches,
    open_cache,
    open_manifest,
    plan_cache,
    remove_cache,
    tolerance,
    verify_files,
)
from pipeline.data.order.epochs import BlockPlan
from pipeline.errors import CacheError, ConfigError, StorageError
from pipeline.execution.caching import cache_key
from pipeline.execution.logits import teacher_here
from pipeline.execution.teacher import check_teacher
from pipeline.report.cache import format_bytes, render_caches, render_manifest, render_plan
from pipeline.report.rows import RowProgress
from pipeline.report.tables import render_table
from pipeline.training import open_training

_NAME = "the name of a cache, as `cache info` shows it"
_WHOLE = ("rows", "classes", "views")
_PLAN = (*_WHOLE, "teacher_rows_per_s", "samples_per_s")
_ROWS_COMPARED = 1000


def show_caches(request: Request) -> int:
    """Prints the caches below ``cache.path``, one of them in full, or what one would cost; returns 0."""
    name, overrides = take_run(request.overrides, "name", _NAME)
    plan, overrides = _take_plan(overrides)
    if plan:
        config = load_config(Request("validate", ("loss=cross_entropy", *overrides), request.conf_dirs)).config
        _show_plan(config, plan)
        return 0
    config = _load(request, overrides)
    path = config.cache.path or ""
    if name is not None:
        folder, manifest = open_manifest(path, name)
        print(render_manifest(folder.shown, manifest))
        return 0
    entries = list_caches(path)
    print(render_caches(path, entries) if entries else f"cache.path={path} holds no caches")
    for entry in entries:
        if entry.problem:
            print(entry.problem)
    if config.teacher.has_weights:
        _, _, key = _find_key(config)
        states = {entry.name: entry.state for entry in entries}
        print(f"this configuration asks for {key.digest}: {states.get(key.digest, 'not there')}")
    return 0


def verify_cache(request: Request) -> int:
    """Checks all files of a cache and, where the teacher is given, compares rows with it; returns 0.

    Raises:
        CacheError: with ``exit_code`` 1 in its details: files are damaged, or the teacher says otherwise.
        StorageError: with ``exit_code`` 1 in its details: the cache could not be read to its end.
    """
    name, overrides = take_run(request.overrides, "name", _NAME)
    rows, overrides = take_run(overrides, "rows", "a number of rows, or all")
    config = _load(request, overrides)
    path = config.cache.path or ""
    cache, source = None, None
    if name is None:
        if not config.teacher.has_weights:
            raise ConfigError(
                "cache verify needs name=NAME (files only), or the teacher (teacher.checkpoint=...) and the "
                "configuration that the cache was built with"
            )
        source, reader, key = _find_key(config)
        cache = open_cache(path, key, reader)
        name = key.digest
    elif rows is not None:
        raise ConfigError(
            f"rows={rows}: rows are compared with the teacher, but name={name} has files checked only; leave out one "
            "of them"
        )
    num_rows = 0 if cache is None else _count_rows(rows, cache)
    folder, manifest = open_manifest(path, name)
    print(f"checking {len(manifest.parts):,} parts of {folder.shown}", flush=True)
    try:
        if problems := verify_files(folder):
            files = f"{len(problems)} file{'s' * (len(problems) > 1)}"
            raise CacheError("\n  - ".join([f"{files} of {folder.shown}:", *problems]))
        print(f"ok: {len(manifest.parts):,} parts, {manifest.num_rows:,} rows, {format_bytes(manifest.num_bytes)}")
        if cache is not None and source is not None:
            _compare(config, source, cache, num_rows)
    except (CacheError, StorageError) as error:
        error.details["exit_code"] = 1
        raise
    return 0


def prune_caches(request: Request) -> int:
    """Deletes one cache, or all that are not complete; returns 0."""
    name, overrides = take_run(request.overrides, "name", _NAME)
    if name is None:
        raise ConfigError("cache prune needs name=NAME of a cache, or name=incomplete; see `cache info`")
    path = _load(request, overrides).cache.path or ""
    entries = {entry.name: entry for entry in list_caches(path)}
    names = [name]
    if name == "incomplete":
        names = [entry.name for entry in entries.values() if entry.state in ("incomplete", "damaged")]
    for chosen in names:
        left = remove_cache(path, chosen)
        print(f"deleted {chosen}, {format_bytes(entries[chosen].num_bytes)}")
        if left:
            print(f"left, because no build has made them: {', '.join(left)}")
    if not names:
        print(f"nothing to delete: every cache in {path} is complete")
    return 0


def _load(request: Request, overrides: list[str]) -> Config:
    return settle(load_config(Request(request.command, tuple(overrides), request.conf_dirs, request.debug)).config)


def _find_key(config: Config) -> tuple[DataSource, SplitReader, CacheKey]:
    source = config.data.open()
    teacher = check_teacher(config, source)
    return source, open_training(source), cache_key(config, source, teacher)


# --- cache info plan.* --------------------------------------------------------------------------------------------


def _take_plan(overrides: list[str]) -> tuple[dict[str, float], list[str]]:
    """Numbers of ``plan.KEY=NUMBER``, and the other overrides."""
    plan: dict[str, float] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if not key.startswith("plan."):
            continue
        name = key.removeprefix("plan.")
        try:
            plan[name] = float(value)
        except ValueError:
            plan[name] = 0.0
        if name not in _PLAN or not 0 < plan[name] < math.inf:
            raise ConfigError(f"{text}: expected a number above 0 for one of {', '.join(f'plan.{n}' for n in _PLAN)}")
        if name in _WHOLE and plan[name] % 1:
            raise ConfigError(f"{text}: expected a whole number")
    return plan, [text for text in overrides if not text.startswith("plan.")]


def _show_plan(config: Config, plan: dict[str, float]) -> None:
    if missing := [f"plan.{name}" for name in ("rows", "classes") if name not in plan]:
        raise ConfigError(f"{' and '.join(missing)}: must be given, as in plan.rows=1281167 plan.classes=1000")
    check_classes(config.cache, int(plan["classes"]))
    rate, samples_per_s = plan.get("teacher_rows_per_s"), plan.get("samples_per_s")
    views = plan.get("views", config.data.num_views or 1)
    planned = plan_cache(
        int(plan["rows"]), int(views), int(plan["classes"]), config.cache, rate or 1.0, samples_per_s or 1.0
    )
    print(render_plan(planned, rate, samples_per_s))


# --- cache verify -------------------------------------------------------------------------------------------------


def _count_rows(given: str | None, cache: Cache) -> int:
    num_rows = cache.manifest.key.num_views * cache.rows.num_rows
    if given == "all":
        return num_rows
    if given is not None and not given.isdecimal():
        raise ConfigError(f"rows={given}: expected a number of rows, or all")
    return min(int(given or _ROWS_COMPARED), num_rows)


def _compare(config: Config, source: DataSource, cache: Cache, num_rows: int) -> None:
    """Compares random rows of the cache with what the teacher says of them now, in this process.

    Raises:
        CacheError: they are further apart than rounding explains; a row can be decoded now, but could not be then.
    """
    if num_rows == 0:
        return
    teacher = teacher_here(config, source)
    reader, key = open_training(source), cache.manifest.key
    logits, stored = WindowedLogits(cache, limit_bytes=0), LogitsDecoder(key.num_classes)
    decoder, augment = source.decoder("train"), config.data.augment
    deviations, largest_logit = [], 0.0
    with RowProgress(num_rows) as progress:
        for plan in _draw_blocks(cache, num_rows, config.train.batch_size):
            table = read_blocks(reader, [plan], augment, config.view_seed, logits)
            rows = decode_block(table, decoder, augment, config.view_seed, substitute=False, logits=stored)
            live = teacher(rows[INPUT])
            found = find_deviations(table, live, key)
            good = rows[SAMPLE_ID] != NO_SAMPLE
            deviations.append(found[good])
            largest_logit = max(largest_logit, float(np.ptp(live[good], axis=1).max(initial=0)))
            progress.advance(len(plan.sample_ids))
    values = np.concatenate(deviations)
    limit = tolerance(key) * max(largest_logit, 1.0)
    figures = [["rows compared", len(values)], ["largest deviation of a logit", float(values.max(initial=0))]]
    figures += [["mean over rows", float(values.mean())], ["bound", limit]]
    print(render_table("cache against the live teacher", ("what", "value"), figures))
    if values.max(initial=0) > limit:
        raise CacheError(
            f"{cache.folder.shown}: the teacher now gives logits that differ by up to {values.max():.3g}, more than "
            f"rounding explains ({limit:.3g}); delete it with `cache prune name={key.digest}` and build it again."
        )


def _draw_blocks(cache: Cache, num_rows: int, batch_size: int) -> Iterator[BlockPlan]:
    """Rows of all views, drawn without replacement, as blocks of one view each."""
    ids, num_views = cache.rows.ids, cache.manifest.key.num_views  # the cache may hold more
    drawn = np.sort(np.random.default_rng().permutation(len(ids) * num_views)[:num_rows])
    position = 0
    for view in range(num_views):
        chosen = ids[drawn[(drawn // len(ids)) == view] % len(ids)]
        for begin in range(0, len(chosen), batch_size):
            yield BlockPlan(position, view, view, chosen[begin : begin + batch_size])
            position += 1
