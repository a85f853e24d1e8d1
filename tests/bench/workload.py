"""Data and teachers that are measured: made here, so that a benchmark needs nothing but the checkout."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.contracts.columns import InputSpec

NUM_CLASSES = 10
SIZE = 32  # pixels

# A balanced pair: the student's forward and backward pass costs what the teacher's forward pass does.
TEACHER = "resnet20"
STUDENT_WIDTH = 32  # of small_cnn
PAIR = f"{TEACHER} and small_cnn(width={STUDENT_WIDTH})"


def write_images(folder: Path, num_train: int, num_validation: int, encoding: str = "PNG") -> Path:
    """CIFAR-sized colour images in Parquet, smooth with a little noise so that they compress as photographs do.

    Args:
        encoding: ``"PNG"`` or ``"WEBP"``, or ``"raw"`` for uint8 pixels that need no decoding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, num_rows in (("train", num_train), ("validation", num_validation), ("test", 16)):
        coarse = random.integers(0, 256, (num_rows, 6, 6, 3)).repeat(6, 1).repeat(6, 2)[:, 2:34, 2:34]
        pixels = np.clip(coarse + random.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)
        labels = random.integers(0, NUM_CLASSES, num_rows)
        if encoding == "raw":
            flat = pa.array(pixels.reshape(-1))
            images = pa.FixedSizeListArray.from_arrays(flat, SIZE * SIZE * 3)
        else:
            images = pa.array([_encode(image, encoding) for image in pixels], pa.binary())
        names = {b"class_names": json.dumps([str(label) for label in range(NUM_CLASSES)]).encode()}
        schema = pa.schema([("image", images.type), ("label", pa.int64())], metadata=names)
        pq.write_table(pa.table([images, pa.array(labels)], schema=schema), folder / f"{split}.parquet")
    return folder


def _encode(pixels: np.ndarray, encoding: str) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, encoding, quality=90)
    return stream.getvalue()


def write_checkpoint(path: Path, name: str, spec: InputSpec | None = None, **settings: object) -> Path:
    """Fresh weights of a registered network; a benchmark's teacher need not know anything.

    Args:
        spec: none: that of ``write_images``.
    """
    import torch
    from safetensors.torch import save_file

    from pipeline.models import MODELS, build_classifier

    torch.manual_seed(0)
    spec = spec or InputSpec("image", (3, SIZE, SIZE), tuple(str(label) for label in range(NUM_CLASSES)))
    params = MODELS.entries()[name].model_validate({"name": name, **settings})
    save_file(build_classifier(params, spec).network.state_dict(), path)
    return path
