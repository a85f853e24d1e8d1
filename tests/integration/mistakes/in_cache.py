"""Mistakes with caches of teacher logits."""

from __future__ import annotations

import fcntl
import json
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cli.main import main
from pipeline.contracts.columns import InputSpec
from tests.integration.mistakes.in_data import IMAGES, LABELS, PARQUET, write
from tests.integration.mistakes.in_networks import DIGITS, own_teacher, save_mlp
from tests.integration.mistakes.table import Place, mistake

HERE = "cluster=inprocess"
MLP = ("teacher=mlp", "teacher.hidden=[8]", "teacher.checkpoint=weights.pt")
PICTURES = InputSpec("image", (3, 6, 5), tuple("012"))


def build(place: Place, *overrides: str) -> list[str]:
    return ["cache", "build", *place.distill("cache.path=cache", HERE, *overrides)[1:]]


def cached(place: Place, *overrides: str) -> list[str]:
    return place.distill("cache.path=cache", "teacher.source=cached", HERE, *overrides)


def build_now(place: Place, *overrides: str) -> Path:
    """The folder of a cache that is complete."""
    assert main([*build(place, *overrides), "run.dir=runs/built"]) == 0
    return Path(json.loads((place.folder / "runs" / "built" / "result.json").read_text())["cache"])


def first_part(place: Place) -> Path:
    return build_now(place) / "view-0000" / "part-000000.arrow"


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- which cache --------------------------------------------------------------------------------------------------


@mistake("a cached run without a folder of caches")
def _(place: Place) -> list[str]:
    return place.distill("teacher.source=cached")


@mistake("a cached run before there is a cache")
def _(place: Place) -> list[str]:
    return cached(place)


@mistake("augmented images without a number of views")
def _(place: Place) -> list[str]:
    return build(place, "data.augment.flip=true")


@mistake("a cache of other augmentation")
def _(place: Place) -> list[str]:
    flip = ("data.augment.flip=true", "data.num_views=2")
    build_now(place, *flip)
    return cached(place, *flip, "data.augment.crop_padding=1")


@mistake("a cache of another teacher's logits")
def _(place: Place) -> list[str]:
    save_mlp(place, DIGITS)
    build_now(place, *MLP)
    save_mlp(place, DIGITS)
    return cached(place, *MLP)


@mistake("a cache of rows that have changed")
def _(place: Place) -> list[str]:
    save_mlp(place, PICTURES)
    write(place)
    build_now(place, *MLP, *PARQUET)
    write(place, image=IMAGES[1:], label=LABELS[1:])
    return cached(place, *MLP, *PARQUET)


@mistake("a cache of another split")
def _(place: Place) -> list[str]:
    build_now(place)
    return cached(place, "data.validation_fraction=0.05")


@mistake("an image that was repaired after its cache was built")
def _(place: Place) -> list[str]:
    """The files look the same: only the image itself tells."""

    def store(images: list[bytes]) -> None:
        table = pa.table({"image": images, "label": LABELS})
        pq.write_table(table, path, compression="none", use_dictionary=False)

    path, skip = write(place), (*MLP, *PARQUET, "data.on_bad_row=skip")
    save_mlp(place, PICTURES)
    store([image[:-40] + bytes(40) if row % 2 else image for row, image in enumerate(IMAGES)])
    build_now(place, *skip)
    store(IMAGES)
    return cached(place, *skip)


@mistake("a cache whose build was interrupted")
def _(place: Place) -> list[str]:
    (build_now(place) / "manifest.json").unlink()
    return cached(place)


@mistake("a cache that another process builds")
def _(place: Place) -> list[str]:
    lock = place.stack.enter_context((build_now(place) / ".lock").open("w"))
    lock.write("process 4242 on another-host\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return build(place)


@mistake("a file where the folder of caches should be")
def _(place: Place) -> list[str]:
    (place.folder / "cache").write_text("mine")
    return build(place)


@mistake("a password in `cache.path`")
def _(place: Place) -> list[str]:
    return build(place, "cache.path=s3://AKIA0000:hunter2@bucket/cache")


# --- what is in it ------------------------------------------------------------------------------------------------


@mistake("a flipped bit in a cache")
def _(place: Place) -> list[str]:
    flip_byte(first_part(place))
    return cached(place)


@mistake("a file of a cache that is cut short")
def _(place: Place) -> list[str]:
    part = first_part(place)
    part.write_bytes(part.read_bytes()[:-1])
    return cached(place)


@mistake("a file of a cache that is gone")
def _(place: Place) -> list[str]:
    first_part(place).unlink()
    return cached(place)


@mistake("a manifest that was edited")
def _(place: Place) -> list[str]:
    path = build_now(place) / "manifest.json"
    path.write_text(path.read_text().replace('"teacher_accuracy": 0.', '"teacher_accuracy": 1.'))
    return cached(place)


@mistake("a cache made by a newer version")
def _(place: Place) -> list[str]:
    path = build_now(place) / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    return cached(place)


@mistake("`cache verify` of a damaged cache", num_lines=2, run=None)
def _(place: Place) -> list[str]:
    part = first_part(place)
    flip_byte(part)
    return ["cache", "verify", "cache.path=cache", f"name={part.parents[1].name}"]


@mistake("`cache verify` of a cache with another file in it", num_lines=2, run=None)
def _(place: Place) -> list[str]:
    folder = build_now(place)
    (folder / "notes.txt").write_text("mine")
    return ["cache", "verify", "cache.path=cache", f"name={folder.name}"]


# --- top-k --------------------------------------------------------------------------------------------------------


@mistake("more classes to keep than there are")
def _(place: Place) -> list[str]:
    return build(place, "cache=topk", "cache.k=11")


@mistake("more classes than top-k can number")
def _(place: Place) -> list[str]:
    write(place)
    return build(place, *PARQUET, "data.num_classes=70000", "cache=topk")


@mistake("a loss that needs every class")
def _(place: Place) -> list[str]:
    return cached(place, "cache=topk", "loss=dist")


@mistake("a temperature that top-k does not know")
def _(place: Place) -> list[str]:
    return cached(place, "cache=topk", "loss.temperature=30")


# --- a build that fails -------------------------------------------------------------------------------------------


@mistake("a cache of a teacher whose logits are NaN")
def _(place: Place) -> list[str]:
    save_mlp(place, DIGITS)
    weights = torch.load("weights.pt", weights_only=True)
    torch.save({name: torch.full_like(values, torch.nan) for name, values in weights.items()}, "weights.pt")
    return build(place, *MLP)


@mistake("logits too far apart for half precision")
def _(place: Place) -> list[str]:
    save_mlp(place, DIGITS)
    weights = torch.load("weights.pt", weights_only=True)
    torch.save({name: 1000 * values for name, values in weights.items()}, "weights.pt")
    return build(place, *MLP)


@mistake("a cache inside a job's unpacked copy")
def _(place: Place) -> list[str]:
    command = [*build(place), f"run.dir={place.folder}/runs/build"]
    folder = place.folder / "working_dir_files" / "package"
    folder.mkdir(parents=True)
    place.monkeypatch.chdir(folder)
    return [f"teacher.checkpoint={place.teacher}" if "teacher.checkpoint" in part else part for part in command]


@mistake("a disk that is full while a cache is built")
def _(place: Place) -> list[str]:
    """A limit on the size of files stands in for the disk: only the parts are larger."""
    num_classes = 100_000
    write(place)
    code = f"""from torch import nn

def build(spec): return nn.Sequential(nn.Flatten(), nn.Linear(90, 1), nn.Linear(1, {num_classes}))
"""
    values = {"1.weight": (1, 90), "1.bias": (1,), "2.weight": (num_classes, 1), "2.bias": (num_classes,)}
    torch.save({name: torch.zeros(shape) for name, shape in values.items()}, place.folder / "wide.pt")
    wide = own_teacher(place, code, "teacher.checkpoint=wide.pt", *PARQUET, f"data.num_classes={num_classes}")
    arguments = ["cache", "build", *wide[1:], "cache.path=cache", "cache.dtype=float32", HERE]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    def check() -> None:
        lift()
        assert list((place.folder / "cache").rglob("*.tmp")) == []
        assert list((place.folder / "cache").rglob("*.arrow")) == []
        assert main(["cache", "build", "resume=runs/new"]) == 0

    place.checks.append(check)
    place.stack.callback(lift)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, unlimited[1]))
    return arguments


# --- looking after them -------------------------------------------------------------------------------------------


@mistake("`cache verify` without a name or a teacher")
def _(place: Place) -> list[str]:
    return ["cache", "verify", "cache.path=cache"]


@mistake("rows to compare without a teacher")
def _(place: Place) -> list[str]:
    return ["cache", "verify", "cache.path=cache", "name=0123456789abcdef", "rows=all"]


@mistake("`cache prune` without a name")
def _(place: Place) -> list[str]:
    return ["cache", "prune", "cache.path=cache"]


@mistake("`cache prune` of what is no cache")
def _(place: Place) -> list[str]:
    (place.folder / "cache" / "thesis").mkdir(parents=True)
    (place.folder / "cache" / "thesis" / "chapter.tex").write_text("mine")
    return ["cache", "prune", "cache.path=cache", "name=thesis"]


@mistake("a plan without classes")
def _(place: Place) -> list[str]:
    return ["cache", "info", "plan.rows=1281167"]
