"""Caches of teacher logits, as a run uses them: their key, opening one, filling one."""

from __future__ import annotations

import hashlib
import platform
import time
from dataclasses import dataclass
from typing import Any

from pipeline.config.provenance import find_version
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.data import DataSource, SplitReader, TableReader
from pipeline.data.cache import (
    FILL,
    MANIFEST,
    BuildRecord,
    CacheKey,
    FillWriter,
    LogitsDecoder,
    LogitsReader,
    LogitsToCome,
    PartLayout,
    WindowedLogits,
    check_classes,
    check_temperature,
    load_logits,
    open_cache,
    open_folder,
    row_bytes,
    write_build,
)
from pipeline.data.sealing import SealPlan
from pipeline.execution.teacher import CheckedTeacher
from pipeline.training import RunPlan

_PACKAGES = ("distill-pipeline", "torch", "torchvision", "numpy", "pillow", "pyarrow")


def cache_key(config: Config, source: DataSource, teacher: CheckedTeacher) -> CacheKey:
    """Everything that the logits in a cache of this configuration depend on."""
    augment, cache = config.data.augment, config.cache
    return CacheKey(
        teacher=teacher.fingerprint,
        architecture=dict(teacher.architecture),
        preprocessing=dict(teacher.preprocessing),
        precision=teacher.precision,
        data=source.fingerprint,
        augment=augment.model_dump(mode="json"),
        seed=config.view_seed if augment.varies else None,
        num_views=(config.data.num_views or 1) if augment.varies else 1,  # otherwise all views are the same
        num_classes=source.spec.num_classes,
        format=cache.format,
        k=cache.k,
        dtype=cache.dtype,
    )


def cache_folder(config: Config, key: CacheKey) -> str:
    """The folder of a cache, for people: without the settings that an address may hold."""
    return open_folder(config.cache.path or "").below(key.digest).shown


def is_complete(config: Config, key: CacheKey) -> bool:
    """Whether there is a cache of this key."""
    return open_folder(config.cache.path or "").below(key.digest).exists(MANIFEST)


def open_cached(config: Config, key: CacheKey, reader: SplitReader) -> tuple[LogitsReader, LogitsDecoder]:
    """The cache of this configuration: in memory where the split is, otherwise read by the windows of its shuffle.

    Raises:
        CacheError: there is none, it is not complete, damaged, or lacks rows.
        ConfigError: the encoding does not fit the classes, or not what the loss needs.
    """
    check_classes(key, key.num_classes)
    decoder = make_decoder(config, key)
    return open_logits(config, key, reader), decoder


def open_logits(config: Config, key: CacheKey, reader: SplitReader) -> LogitsReader:
    """The cache of this configuration as ``open_cached`` has it, to be decoded for several losses."""
    cache = open_cache(config.cache.path or "", key, reader)
    return (
        load_logits(cache)
        if isinstance(reader, TableReader)
        else WindowedLogits(cache, _limit_bytes(config, key, reader))
    )


def make_decoder(config: Config, key: CacheKey) -> LogitsDecoder:
    """Decodes what is read out of a cache, for the loss of this configuration.

    Raises:
        ConfigError: a top-k cache, and a temperature that it does not serve.
    """
    temperature = 1.0
    if key.format == "topk":
        (temperature,) = config.loss.topk_temperatures
        check_temperature(temperature)
    return LogitsDecoder(key.num_classes, temperature)


def _limit_bytes(config: Config, key: CacheKey, reader: SplitReader) -> int:
    """Of the logits that a reading process keeps: those of two windows, or of all rows in a view and a half."""
    rows: float = reader.num_rows
    if not isinstance(reader, TableReader):
        rows = min(rows, config.data.window_bytes * reader.num_rows / max(reader.encoded_bytes, 1))
    return int(3 * rows) * row_bytes(key.num_classes, key)


def describe_origin(run: Run) -> dict[str, Any]:
    """Where a cache comes from, for its manifest; nothing is compared with it."""
    import torch

    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {name: found for name in _PACKAGES if (found := find_version(name))},
        "run": run.name,
        "batch_size": run.config.train.batch_size,
    }


@dataclass(frozen=True)
class Fill:
    """A cache that is filled while training.

    Attributes:
        writer: keeps what the teacher says.
        end: the block from which on the cache is read.
        logits: reads it then.
        decoder: of what it reads.
    """

    writer: FillWriter
    end: int
    logits: LogitsToCome
    decoder: LogitsDecoder


def plan_fill(run: Run, plan: RunPlan, reader: SplitReader, key: CacheKey) -> Fill:
    """The first views are computed, kept and trained on; every later epoch is read.

    Raises:
        CacheError: the folder cannot be written.
        ConfigError: the encoding does not fit the classes, or not what the loss needs.
    """
    config = run.config
    check_classes(key, key.num_classes)
    folder = open_folder(config.cache.path or "").below(key.digest)
    write_build(folder, BuildRecord.of(key, PartLayout.of(reader)))
    writer = FillWriter(folder, key, FILL + hashlib.sha256(str(run.dir).encode()).hexdigest()[:8])
    # Whole steps: a stream that ends within one would be cut into parts.
    steps = -(-key.num_views * plan.blocks_per_epoch // plan.blocks_per_step)
    limit = _limit_bytes(config, key, reader)
    logits = LogitsToCome(config.cache.path or "", key, reader, limit)
    return Fill(writer, min(steps * plan.blocks_per_step, plan.num_blocks), logits, make_decoder(config, key))


def plan_seal(run: Run, source: DataSource, fill: Fill, teacher_accuracy: float | None) -> SealPlan:
    """What is done between filling and reading."""
    config = run.config
    return SealPlan(
        config.cache.path or "",
        fill.writer,
        source.decoder("train"),
        config.data.augment,
        config.view_seed,
        config.train.batch_size,
        teacher_accuracy,
        describe_origin(run),
    )
