"""Tables of caches of teacher logits: which there are, what one holds, what one costs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.cache import CacheEntry, CacheKey, CachePlan, Manifest, TopkError
from pipeline.report.tables import render_table

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def format_bytes(number: float) -> str:
    """``12.3 GB``, in powers of 1000."""
    power = 0
    while number >= 999.5 and power < len(_UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.0f} {_UNITS[power]}" if power == 0 else f"{number:.3g} {_UNITS[power]}"


def render_caches(path: str, entries: Sequence[CacheEntry]) -> str:
    """What lies below ``cache.path``."""
    rows = []
    for entry in entries:
        manifest = entry.manifest
        rows.append(
            [
                entry.name,
                entry.state,
                None if entry.key is None else _format(entry.key),
                None if entry.key is None else entry.key.num_views,
                None if manifest is None else manifest.num_rows,
                format_bytes(entry.num_bytes),
                None if manifest is None else manifest.teacher_accuracy,
            ]
        )
    columns = ("name", "state", "format", "views", "rows in all", "size", "teacher, val")
    return render_table(f"caches in {path}", columns, rows)


def render_manifest(folder: str, manifest: Manifest) -> str:
    """What a cache holds, and all that its logits depend on."""
    key, rows = manifest.key, manifest.rows
    facts: list[list[object]] = [
        ["format", _format(key)],
        ["rows", f"{manifest.num_rows:,}: {key.num_views} views of {rows.stop - rows.start:,}"],
        ["size", f"{format_bytes(manifest.num_bytes)} in {len(manifest.parts):,} parts"],
        ["could not be decoded", len(manifest.absent)],
        ["teacher on validation", manifest.teacher_accuracy],
        ["teacher", key.teacher],
        *([f"teacher.{name}", value] for name, value in {**key.architecture, **key.preprocessing}.items()),
        ["precision", key.precision],
        ["data", key.data],
        ["augmentation", ", ".join(f"{name} {value}" for name, value in _switched_on(key).items()) or "none"],
        ["seed of the views", key.seed],
        ["built", manifest.recorded.get("created")],
        ["on", f"{manifest.recorded.get('host')}, {manifest.recorded.get('device')}"],
        *([name, number] for name, number in (manifest.recorded.get("versions") or {}).items()),
    ]
    return render_table(f"cache {folder}", ("what", "value"), [[name, _text(value)] for name, value in facts])


def render_plan(plan: CachePlan, rate: float | None, samples_per_s: float | None) -> str:
    """What a cache of a stated size costs."""
    rows: list[list[object]] = [
        ["rows in all", f"{plan.num_rows:,}"],
        ["size", f"{format_bytes(plan.num_bytes)} ({plan.num_bytes:,} bytes)"],
        ["files", f"{plan.num_files:,}"],
    ]
    if rate is not None:
        rows.append([f"build, one accelerator at {rate:,.0f} rows/s", f"{plan.build_hours:,.3g} hours"])
    if samples_per_s is not None:
        rows.append([f"reading at {samples_per_s:,.0f} samples/s", f"{format_bytes(plan.read_bytes_per_s)}/s"])
    return render_table("", ("what", "value"), rows)


def render_topk_errors(errors: Sequence[TopkError], key: CacheKey) -> str:
    """What is lost by keeping the likeliest classes only, by temperature."""
    columns = (
        "temperature", "others' mass", "kept p, mean error", "kept p, largest", "KL, mean nats", "KL, largest"
    )  # fmt: skip
    rows = [
        [f"{e.temperature:g}", e.tail_mass, f"{e.head_mean:.1e}", f"{e.head_largest:.1e}", e.kl_mean, e.kl_largest]
        for e in errors
    ]
    title = f"what is lost by keeping {key.k} of {key.num_classes} classes, on validation rows"
    return render_table(title, columns, rows)


def _format(key: CacheKey) -> str:
    return f"{key.format}{'' if key.k is None else f' {key.k}'} of {key.num_classes:,}, {key.dtype}"


def _switched_on(key: CacheKey) -> dict[str, object]:
    unused = () if key.augment.get("randaugment") else ("randaugment_magnitude",)
    return {name: value for name, value in key.augment.items() if value and name not in unused}


def _text(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
