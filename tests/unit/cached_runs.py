"""Commands on small pictures, with a teacher and caches of its logits."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.cli.main import main
from pipeline.contracts.columns import InputSpec
from pipeline.contracts.events import read_events
from pipeline.data.cache import CacheKey, LoadedLogits, Manifest, decode_logits, load_logits, open_manifest
from pipeline.data.cache.opened import Cache
from pipeline.models import build_classifier
from pipeline.models.mlp import MLPParams

NUM_ROWS, GROUP_ROWS, NUM_CLASSES, SIZE = 240, 20, 3, 12
NUM_TRAINED = 216  # a tenth is validation
BATCH_SIZE = 16
LABELS = np.arange(NUM_ROWS) % NUM_CLASSES
VIEWS = ("data.augment.flip=true", "data.augment.crop_padding=1", "data.num_views=3")
CACHED = "teacher.source=cached"
EXACT = "cache.dtype=float32"
_NETWORKS = ("teacher=mlp", "teacher.hidden=[16]", "student=mlp", "student.hidden=[8]")


def draw_pictures(num_rows: int, seed: int = 0) -> list[bytes]:
    """Noise, brighter by class, as PNG."""
    random = np.random.default_rng(seed)
    files = []
    for label in np.arange(num_rows) % NUM_CLASSES:
        file = BytesIO()
        pixels = random.integers(0, 100, (SIZE, SIZE, 3)) + 70 * label
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def damage(picture: bytes) -> bytes:
    """A file of the same size that cannot be decoded."""
    return picture[: len(picture) // 2] + bytes(len(picture) - len(picture) // 2)


def write_pictures(
    folder: Path, *, num_rows: int = NUM_ROWS, labels: np.ndarray = LABELS, damaged: Collection[int] = ()
) -> None:
    """``train.parquet`` in row groups, and ``test.parquet``; not compressed, so that what they take is known."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in (("train", draw_pictures(num_rows)), ("test", draw_pictures(30, seed=1))):
        if name == "train":
            files = [damage(file) if row in damaged else file for row, file in enumerate(files)]
        table = pa.table({"image": pa.array(files, pa.binary()), "label": labels[: len(files)]})
        pq.write_table(
            table, folder / f"{name}.parquet", row_group_size=GROUP_ROWS, compression="none", use_dictionary=False
        )


def save_teacher(path: Path, *, hidden: int = 16, seed: int = 0, num_classes: int = NUM_CLASSES) -> Path:
    """Weights of ``teacher=mlp`` for the pictures."""
    torch.manual_seed(seed)
    spec = InputSpec("image", (3, SIZE, SIZE), tuple(map(str, range(num_classes))))
    torch.save(build_classifier(MLPParams(hidden=(hidden,)), spec).network.state_dict(), path)
    return path


@dataclass(frozen=True)
class Workplace:
    """A folder with data, a teacher, and what commands leave there.

    Attributes:
        folder: holds ``data``, ``teacher.pt``, ``cache`` and ``runs``.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Workplace:
        """With pictures and a teacher of random weights."""
        write_pictures(folder / "data")
        save_teacher(folder / "teacher.pt")
        return cls(folder)

    @property
    def caches(self) -> Path:
        return self.folder / "cache"

    def arguments(self, command: str, name: str, *overrides: str) -> list[str]:
        """A small command; what is overridden comes last, and wins."""
        places = [f"data.path={self.folder / 'data'}", f"teacher.checkpoint={self.folder / 'teacher.pt'}"]
        places += [f"cache.path={self.caches}", f"run.dir={self.folder / 'runs' / name}"]
        places += [f"tracking.uri=sqlite:///{self.folder / 'mlflow.db'}"]
        settings = ["data=parquet", *_NETWORKS, "cluster=inprocess", f"train.batch_size={BATCH_SIZE}", "train.epochs=4"]
        chosen = {text.partition("=")[0] for text in overrides if "." not in text.partition("=")[0]}
        kept = [text for text in settings if text.partition("=")[0].partition(".")[0] not in chosen]
        kept += [text for text in places if "data" not in chosen or not text.startswith("data.path=")]
        return [*command.split(), *kept, *overrides]

    def run(self, command: str, name: str, *overrides: str) -> int:
        """The command's exit code."""
        return main(self.arguments(command, name, *overrides))

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads((self.folder / "runs" / name / "result.json").read_text())
        return result

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "runs" / name / "model" / "model.safetensors")

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / name / "events.jsonl"
        return [event.data for event, _ in read_events(path) if event.kind == kind]

    def manifest(self, name: str, caches: Path | None = None) -> Manifest:
        """Of the cache that a run of ``cache build`` made."""
        return open_manifest(str(caches or self.caches), self.result(name)["key"])[1]

    def logits(self, name: str) -> tuple[CacheKey, LoadedLogits]:
        """What is in the cache that a run of ``cache build`` made."""
        folder, manifest = open_manifest(str(self.caches), self.result(name)["key"])
        return manifest.key, load_logits(Cache(folder, manifest, manifest.rows.row_set))


def read_view(key: CacheKey, logits: LoadedLogits, view: int) -> np.ndarray:
    """(rows, classes) float32, in the order of sample ids."""
    return decode_logits(logits.read(view, logits.rows.ids), key.num_classes, 1.0)


def assert_same_student(place: Workplace, one: str, other: str) -> None:
    """The same weights, bit for bit, and the same figures."""
    weights, expected = place.weights(one), place.weights(other)
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        assert values.dtype == expected[name].dtype
        assert torch.equal(values, expected[name]), name
    results = [place.result(name) for name in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["best_step"] == results[1]["best_step"]
    steps = [[event["metrics"] for event in place.events(name, "step")] for name in (one, other)]
    assert steps[0] == steps[1]
