"""Mistakes in data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.contracts.columns import InputSpec
from pipeline.data import waiting
from tests.integration.mistakes.in_networks import save_mlp
from tests.integration.mistakes.server import serve
from tests.integration.mistakes.table import Place, mistake

PARQUET = ("data=parquet", "data.path=data", "train.batch_size=4")
RGB = np.random.default_rng(0).integers(0, 256, (24, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(24) % 3


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [encode(pixels) for pixels in RGB]


def write(place: Place, name: str = "train.parquet", metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A Parquet file below ``data``: coloured images of three classes, unless ``columns`` say otherwise."""
    path = place.folder / "data" / name
    path.parent.mkdir(exist_ok=True)
    table = pa.table(columns or {"image": IMAGES, "label": LABELS})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def swap(row: int, content: bytes) -> list[bytes]:
    """The images, with another in one row."""
    return [*IMAGES[:row], content, *IMAGES[row + 1 :]]


# --- files and columns --------------------------------------------------------------------------------------------


@mistake("no path")
def _(place: Place) -> list[str]:
    return place.train("data=parquet")


@mistake("a path where nothing is")
def _(place: Place) -> list[str]:
    return place.train(*PARQUET)


@mistake("a folder without files of train")
def _(place: Place) -> list[str]:
    write(place, "flowers.parquet")
    return place.train(*PARQUET)


@mistake("a file in `data.files` that is not there")
def _(place: Place) -> list[str]:
    write(place)
    return place.train(*PARQUET, "data.files.train=part-*.parquet")


@mistake("a Parquet file that is cut short")
def _(place: Place) -> list[str]:
    path = write(place)
    path.write_bytes(path.read_bytes()[:-10])
    return place.train(*PARQUET)


@mistake("images under another name")
def _(place: Place) -> list[str]:
    write(place, images=IMAGES, label=LABELS)
    return place.train(*PARQUET)


@mistake("labels under another name")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES, labels=LABELS)
    return place.train(*PARQUET)


@mistake("paths of images for images")
def _(place: Place) -> list[str]:
    write(place, image=[f"{number}.png" for number in range(24)], label=LABELS)
    return place.train(*PARQUET)


@mistake("an empty split")
def _(place: Place) -> list[str]:
    write(place)
    write(place, "test.parquet", image=pa.array([], pa.binary()), label=pa.array([], pa.int64()))
    return place.train(*PARQUET)


@mistake("too few rows to carve splits from")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES[:2], label=[0, 1])
    return place.train(*PARQUET)


@mistake("a batch larger than the split")
def _(place: Place) -> list[str]:
    return place.train("train.batch_size=100000")


# --- object storage -----------------------------------------------------------------------------------------------


def stored(place: Place, status: int) -> list[str]:
    """Data on an S3 server that answers everything with this status."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        place.monkeypatch.setenv(name, "mistyped")
    address = f"s3://flowers/2024?endpoint_override={serve(place.stack, status)}&scheme=http&region=us-east-1"
    return place.train("data=parquet", f"data.path='{address}'")


@mistake("a bucket that does not exist")
def _(place: Place) -> list[str]:
    return stored(place, 404)


@mistake("a mistyped key of object storage")
def _(place: Place) -> list[str]:
    return stored(place, 403)


@mistake("an address of object storage where nothing is")
def _(place: Place) -> list[str]:
    place.monkeypatch.setattr(waiting, "PATIENCE", waiting.Patience(start_s=0.1))
    return place.train("data=parquet", "data.path='s3://flowers/2024?endpoint_override=127.0.0.1:9&scheme=http'")


@mistake("object storage that is away")
def _(place: Place) -> list[str]:
    place.monkeypatch.setattr(waiting, "PATIENCE", waiting.Patience(total_s=0.1))
    return stored(place, 503)


@mistake("a secret in `data.path`")
def _(place: Place) -> list[str]:
    return place.train("data=parquet", "data.path=s3://me:secret@flowers/2024")


# --- labels -------------------------------------------------------------------------------------------------------


@mistake("words for labels")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES, label=["cat", "dog"] * 12)
    return place.train(*PARQUET)


@mistake("a label beyond `data.num_classes`")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES, label=np.where(np.arange(24) == 7, 10, LABELS))
    return place.train(*PARQUET, "data.num_classes=10")


@mistake("class names that are not `data.num_classes` many")
def _(place: Place) -> list[str]:
    write(place, metadata={"class_names": '["rose", "tulip", "daisy"]'})
    return place.train(*PARQUET, "data.num_classes=10")


@mistake("one class only")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES, label=[0] * 24)
    return place.train(*PARQUET)


@mistake("rows without labels for a loss that needs them")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES, label=pa.array([0, 1, 2, None] * 6))
    write(place, "validation.parquet")
    return place.train(*PARQUET)


@mistake("validation carved from rows without labels")
def _(place: Place) -> list[str]:
    write(place, image=IMAGES, label=pa.array([0, 1, 2, None] * 6))
    write(place, "test.parquet")
    path = save_mlp(place, InputSpec("image", (3, 6, 5), ("a", "b", "c")))
    teacher = ("teacher=mlp", "teacher.hidden=[8]", f"teacher.checkpoint={path}")
    return place.distill(*PARQUET, *teacher, "loss.ce_weight=0", "data.num_classes=3")


# --- images and features ------------------------------------------------------------------------------------------


@mistake("pixels without their height and width")
def _(place: Place) -> list[str]:
    write(place, image=pa.FixedSizeListArray.from_arrays(pa.array(RGB.reshape(-1)), 90), label=LABELS)
    return place.train(*PARQUET)


@mistake("pixels with the channels first")
def _(place: Place) -> list[str]:
    pixels = pa.array(RGB.transpose(0, 3, 1, 2).tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    write(place, image=pixels, label=LABELS)
    return place.train(*PARQUET)


@mistake("images of several sizes")
def _(place: Place) -> list[str]:
    write(place, image=swap(5, encode(RGB[5, :3, :4])), label=LABELS)
    return place.train(*PARQUET, "cluster=inprocess")


@mistake("an image that is cut short")
def _(place: Place) -> list[str]:
    write(place, image=swap(5, IMAGES[5][:90]), label=LABELS)
    return place.train(*PARQUET, "cluster=inprocess")


@mistake("a file that is no image")
def _(place: Place) -> list[str]:
    write(place, image=swap(5, b"<html>not found</html>"), label=LABELS)
    return place.train(*PARQUET, "cluster=inprocess")


@mistake("a feature that is NaN")
def _(place: Place) -> list[str]:
    values = np.zeros((24, 2))
    values[5, 1] = np.nan
    write(place, image=values.tolist(), label=LABELS)
    return place.train(*PARQUET, "cluster=inprocess")


@mistake("features for a network of images")
def _(place: Place) -> list[str]:
    write(place, image=RGB[:, 0, 0].astype(np.float32).tolist(), label=LABELS)
    return place.train(*PARQUET, "teacher=small_cnn")


@mistake("augmentation of features")
def _(place: Place) -> list[str]:
    write(place, image=RGB[:, 0, 0].astype(np.float32).tolist(), label=LABELS)
    return place.train(*PARQUET, "data.augment.flip=true")


@mistake("two ways to crop")
def _(place: Place) -> list[str]:
    return place.train("data.augment.crop_padding=4", "data.augment.random_resized_crop=[0.1,1]")


# --- folders of images, and what torchvision has ------------------------------------------------------------------


@mistake("a folder of images without images")
def _(place: Place) -> list[str]:
    (place.folder / "data" / "train" / "rose").mkdir(parents=True)
    (place.folder / "data" / "train" / "rose" / "notes.txt").touch()
    return place.train("data=image_folder", "data.path=data")


@mistake("images that lie in no class folder")
def _(place: Place) -> list[str]:
    (place.folder / "data" / "train").mkdir(parents=True)
    for number, image in enumerate(IMAGES):
        (place.folder / "data" / "train" / f"{number}.png").write_bytes(image)
    return place.train("data=image_folder", "data.path=data")


@mistake("a data set that torchvision does not have")
def _(place: Place) -> list[str]:
    return place.train("data=torchvision", "data.dataset=CIFAR1000")


@mistake("a data set of torchvision that is not there")
def _(place: Place) -> list[str]:
    return place.train("data=torchvision", "data.dataset=CIFAR100", "data.root=sets", "data.download=false")
