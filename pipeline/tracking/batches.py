"""Turns events of the journal into what MLflow stores. No mlflow here, and nothing is sent."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.contracts.events import Event
from pipeline.tracking.progress import Progress

MAX_POINTS = 1000  # MLflow's limit of metrics in one request
STATUSES = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
WARNINGS_FILE = "warnings.txt"
# These are costly or change the run's state: the offset is stored right after each of them.
_ENDS_BATCH = frozenset({"artifact", "model", "status"})
_BAD_CHARACTERS = re.compile(r"[^/\w.\- :]")


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass
class Batch:
    """Consecutive events, translated; sending one twice leaves MLflow as sending it once.

    Attributes:
        progress: how far the run's record is sent once this batch is; while the batch is filled, how far it got.
        files: (path in the run folder, folder among the run's artifacts).
        documents: path among the run's artifacts to what is written there as JSON.
        status: MLflow's name for the run's new status, and the time of the change in milliseconds.
    """

    progress: Progress
    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[tuple[Path, str]] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    status: tuple[str, int] | None = None

    @property
    def has_uploads(self) -> bool:
        return bool(self.warnings or self.documents or self.files or self.models)

    def add_points(self, event: Event, values: Mapping[str, Any], step: int) -> bool:
        """Adds numbers at ``step``, leaving out what was sent for that step or a later one before.

        A resumed run repeats the steps since its checkpoint and journals them again with the same
        values and another time; MLflow would show both. Returns whether anything was new.
        """
        is_new = False
        for name, value in values.items():
            key = clean_key(name)
            if _is_number(value) and step > self.progress.sent_steps.get(key, -1):
                self.progress.sent_steps[key] = step
                self._append(event, key, value, step)
                is_new = True
        return is_new

    def add_samples(self, event: Event, values: Mapping[str, Any], step: int) -> None:
        """Adds numbers of which there may be many at one step, such as the memory in use."""
        for name, value in values.items():
            if _is_number(value):
                self._append(event, clean_key(name), value, step)

    def _append(self, event: Event, key: str, value: Any, step: int) -> None:
        self.points.append(Point(key, float(value), int(event.time * 1000), step))


def collect(events: Iterable[tuple[Event, int]], progress: Progress) -> Batch | None:
    """The next batch after ``progress``, or None when there is no further event."""
    batch = Batch(progress.copy())
    for event, end in events:
        if translate := _TRANSLATORS.get(event.kind):
            translate(batch, event)
        batch.progress.offset = end
        if len(batch.points) >= MAX_POINTS or event.kind in _ENDS_BATCH:
            break
    return batch if batch.progress.offset != progress.offset else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested configuration to MLflow parameters: ``{"train": {"epochs": 3}}`` to ``{"train.epochs": "3"}``.

    Text stays as it is; everything else is written as in YAML (``true``, ``null``, ``[1, 2]``).
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = clean_key(f"{prefix}{name}")
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, prefix=f"{prefix}{name}."))
        else:
            flat[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def clean_key(name: str) -> str:
    """``name`` with what MLflow refuses in a key replaced; keys are read as relative paths."""
    parts = [part for part in _BAD_CHARACTERS.sub("_", name).split("/") if part.strip(".")]
    return "/".join(parts)[:250] or "_"


def format_warning(event: Event) -> str:
    """A line of ``warnings.txt``."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(event.time))} UTC {event.data.get('message', '')}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _step_of(event: Event) -> int:
    return int(event.data.get("step", 0))


def _translate_status(batch: Batch, event: Event) -> None:
    status = STATUSES.get(event.data.get("status", ""))
    if status:
        batch.status = (status, int(event.time * 1000))
        # Never left as it is: what an earlier start failed of says nothing about a run that was gone on with.
        batch.tags["status_message"] = str(event.data.get("message") or event.data["status"])
    if event.data.get("outcome"):
        batch.tags["outcome"] = str(event.data["outcome"])


def _translate_plan(batch: Batch, event: Event) -> None:
    batch.tags.update({f"plan.{name}": str(value) for name, value in event.data.items()})


def _translate_step(batch: Batch, event: Event) -> None:
    step = _step_of(event)
    speed = {f"train/{name}": event.data.get(name) for name in ("samples_per_s", "data_wait")}
    batch.add_points(event, {**event.data.get("metrics", {}), **speed}, step)
    batch.progress.step = max(batch.progress.step, step)


def _translate_evaluation(batch: Batch, event: Event) -> None:
    data, step = event.data, _step_of(event)
    split = data.get("split", "validation")
    # The number of rows is the same every time; it is in the journal and in result.json.
    metrics = {name: value for name, value in data.get("metrics", {}).items() if not name.endswith("/num_rows")}
    if batch.add_points(event, metrics, step) and split == "validation" and data.get("epoch") is not None:
        # The same again over epochs: what people compare between runs of different batch sizes.
        by_epoch = {name.replace("/", "_by_epoch/", 1): value for name, value in metrics.items()}
        batch.add_samples(event, by_epoch, int(data["epoch"]))
    if data.get("per_class") and (data.get("best") or split == "test"):
        accuracy = {name: _finite_or_none(value) for name, value in data["per_class"].items()}
        batch.documents[f"per_class/{split}/step_{step:08d}.json"] = accuracy
    if data.get("best"):
        batch.tags["best_step"] = str(step)


def _finite_or_none(value: Any) -> float | None:
    """A class without rows has no accuracy; JSON has no NaN."""
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _translate_checkpoint(batch: Batch, event: Event) -> None:
    batch.tags["last_checkpoint_step"] = str(_step_of(event))


def _translate_rows(batch: Batch, event: Event) -> None:
    batch.add_points(event, {"rows/rows_per_s": event.data.get("rows_per_s")}, int(event.data["done"]))


def _translate_figures(batch: Batch, event: Event) -> None:
    batch.add_points(event, event.data.get("metrics", {}), 0)
    # The second is what MLflow shows as the run's description.
    batch.tags["summary"] = batch.tags["mlflow.note.content"] = str(event.data.get("message", ""))


def _translate_trial(batch: Batch, event: Event) -> None:
    data = event.data
    if data.get("state") in ("finished", "pruned") and _is_number(data.get("value")):
        number = int(data["num_done"])
        batch.add_points(event, {f"{data['phase']}/value": data["value"]}, number)
    batch.tags[f"{data['phase']}.done"] = f"{data['num_done']} of {data['num_trials']}"


def _translate_pool(batch: Batch, event: Event) -> None:
    # Actors come and go under new names; one curve of all of them is what can be read.
    values = {f"system/pool/{name}": event.data.get(name) for name in ("rows_per_s", "busy")}
    batch.add_samples(event, values, batch.progress.step)


def _translate_system(batch: Batch, event: Event) -> None:
    process = event.data.get("process", "driver")
    values = {f"system/{process}/{name}": event.data.get(name) for name in ("rss_bytes", "cpu_s", "gpu_bytes")}
    batch.add_samples(event, values, batch.progress.step)


def _translate_warning(batch: Batch, event: Event) -> None:
    batch.warnings.append(format_warning(event))
    batch.tags["last_warning"] = str(event.data.get("message", ""))


def _translate_artifact(batch: Batch, event: Event) -> None:
    batch.files.append((Path(event.data["path"]), str(event.data.get("folder") or "")))


def _translate_model(batch: Batch, event: Event) -> None:
    batch.models.append(Path(event.data["path"]))


_TRANSLATORS: dict[str, Callable[[Batch, Event], None]] = {
    "status": _translate_status,
    "plan": _translate_plan,
    "step": _translate_step,
    "evaluation": _translate_evaluation,
    "checkpoint": _translate_checkpoint,
    "rows": _translate_rows,
    "figures": _translate_figures,
    "trial": _translate_trial,
    "pool": _translate_pool,
    "system": _translate_system,
    "warning": _translate_warning,
    "artifact": _translate_artifact,
    "model": _translate_model,
}
