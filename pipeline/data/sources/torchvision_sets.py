"""The classification data sets of torchvision, by name."""

from __future__ import annotations

import hashlib
import io
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.contracts.columns import InputSpec, SplitName
from pipeline.data.order.rows import divide
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.pixels.augment import check_augment
from pipeline.data.pixels.decode import GREY_MODES, Decoder, image_shape
from pipeline.data.sources.source import DataSource, TableReader, describe_carved, make_table
from pipeline.data.sources.torchvision_files import load_sets
from pipeline.errors import DataError


@DATASETS.register
class TorchvisionParams(DataParams):
    """A classification data set of torchvision, held in memory."""

    name: Literal["torchvision"] = "torchvision"
    dataset: str
    """Class of torchvision.datasets, such as CIFAR100."""
    root: str = "~/.cache/torchvision"
    """Folder that holds the files, or is to hold them."""
    download: bool = True
    """Whether files that are not there are downloaded."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further arguments of the class, as {split: letters} of EMNIST."""
    image_size: tuple[int, int] | None = None
    """Height and width that images are resized to; none: all have those of the first."""

    def open(self) -> TorchvisionSource:
        return TorchvisionSource(self)


class TorchvisionSource(DataSource):
    """The data set in memory. Nothing of torchvision is kept, so processes that only read never import it.

    Images of one size are kept as raw pixels, others as the files they are, or losslessly as PNG.

    Args:
        params: which one, and where its files are.

    Raises:
        DataError: no such data set, none for classification, its files are not there, or it is too large.
        ConfigError: parameters that do not go together.
    """

    def __init__(self, params: TorchvisionParams) -> None:
        self._params = params
        self.memory_bytes = params.memory_bytes
        sets = load_sets(params.dataset, params.root, params.download, params.options)
        images = {split: _collect(dataset, params) for split, dataset in sets.items()}
        if len({found.pixel_shape for found in images.values()}) > 1:
            for found in images.values():
                found.encode()
        shape = images["train"].shape(params.image_size)
        self.spec = InputSpec("image", shape, _name_classes(sets["train"], images, params.dataset))
        check_augment(params.augment, self.spec)
        pixel_shape = images["train"].pixel_shape
        self._stored_size = None if pixel_shape is None else pixel_shape[:2]
        columns = {split: found.column() for split, found in images.items()}
        self.fingerprint = _fingerprint(columns, shape)
        fractions: dict[SplitName, float] = {"validation": params.validation_fraction, "test": params.test_fraction}
        rows = divide({split: len(found.labels) for split, found in images.items()}, fractions, params.split_seed)
        self.carved = {split: describe_carved(own) for split, own in rows.items() if split not in images}
        self._readers: dict[SplitName, TableReader] = {}
        for split, own in rows.items():
            owner = split if split in images else "train"
            ids = pa.array(own.ids)
            labels = pa.array(images[owner].labels, pa.int64()).take(ids)
            self._readers[split] = TableReader(make_table(own.ids, columns[owner].take(ids), labels), own)

    def split(self, name: SplitName) -> TableReader:
        return self._readers[name]

    def decoder(self, name: SplitName) -> Decoder:
        return Decoder(
            self.spec.kind,
            self.spec.shape,
            image_size=self._params.image_size,
            skip_bad=self._params.on_bad_row == "skip",
            stored_size=self._stored_size,
        )


class _Images:
    """The images of a split on their way into one column: raw pixels as long as all have one shape, else files.

    Attributes:
        pixels: (H, W, C) uint8 of each image, or
        files: the content of a file of each image; one of the two is empty.
        labels: of each image.
        num_bytes: of all images.
    """

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.files: list[bytes] = []
        self.labels: list[int] = []
        self.num_bytes = 0

    def add(self, image: bytes | np.ndarray, label: int) -> None:
        """Takes an image: its pixels or the content of its file."""
        self.labels.append(label)
        if isinstance(image, bytes) or self.files or (self.pixels and self.pixels[0].shape != image.shape):
            self.encode()
            self.files.append(image if isinstance(image, bytes) else _encode(image))
            self.num_bytes += len(self.files[-1])
        else:
            self.pixels.append(image)
            self.num_bytes += image.nbytes

    def encode(self) -> None:
        """Goes over to files."""
        if self.pixels:
            self.files, self.pixels = [_encode(pixels) for pixels in self.pixels], []
            self.num_bytes = sum(map(len, self.files))

    @property
    def pixel_shape(self) -> tuple[int, ...] | None:
        """(H, W, C) of raw pixels; none where files are kept."""
        return self.pixels[0].shape if self.pixels else None

    def shape(self, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, H, W) of the rows: what the first image has, unless images are resized."""
        if self.pixels:
            height, width, channels = self.pixels[0].shape
        else:
            channels, height, width = image_shape(self.files[0])
        return (channels, *(image_size or (height, width)))

    def column(self) -> pa.Array:
        """The ``encoded`` column."""
        if self.files:
            return pa.array(self.files, pa.large_binary())
        pixels = np.stack(self.pixels)
        return pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels[0].size)


def _collect(dataset: Any, params: TorchvisionParams) -> _Images:
    """Every row of a split."""
    images = _Images()
    for index in range(len(dataset)):
        image, label = _read_row(dataset, index, params)
        images.add(image, label)
        if images.num_bytes > params.memory_bytes:
            raise DataError(
                f"data.dataset={params.dataset} has more than data.memory_bytes={params.memory_bytes} of images; raise "
                "it if the memory is there, or use data=image_folder or data=parquet."
            )
    if not images.labels:
        raise DataError(f"data.dataset={params.dataset} has a split without rows in {params.root}; fetch it again.")
    return images


def _read_row(dataset: Any, index: int, params: TorchvisionParams) -> tuple[bytes | np.ndarray, int]:
    """Content of a file, or (H, W, C) uint8 pixels; and the class number."""
    try:
        row = dataset[index]
        image = row[0]
        if hasattr(image, "convert"):
            image = _to_pixels(image)
    except Exception as error:  # Pillow's parsers and those of archives raise almost anything
        raise DataError(
            f"data.dataset={params.dataset}: row {index} cannot be read ({error}); delete its files in {params.root} "
            "and fetch them again."
        ) from error
    try:
        _, label = row
        if isinstance(image, (bytes, np.ndarray)):
            return image, operator.index(label)
    except (TypeError, ValueError):
        pass  # other things than a pair, and than a number
    raise DataError(
        f"data.dataset={params.dataset} is none for classification: its row {index} is no pair of an image and a class "
        "number; choose another one."
    )


def _to_pixels(image: Any) -> np.ndarray:
    """(H, W, C) uint8 of a Pillow image: grey or RGB."""
    pixels = np.asarray(image.convert("L" if image.mode in GREY_MODES else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _encode(pixels: np.ndarray) -> bytes:
    from PIL import Image  # not every data set needs it

    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _name_classes(dataset: Any, images: Mapping[SplitName, _Images], name: str) -> tuple[str, ...]:
    labels = [label for found in images.values() for label in found.labels]
    if min(labels) < 0 or max(labels) == 0:
        raise DataError(
            f"data.dataset={name} has labels from {min(labels)} to {max(labels)}, expected two or more classes counted "
            "from 0; choose another data set."
        )
    stored = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if isinstance(stored, Sequence) and len(stored) > max(labels):
        # ImageNet has several names for a class.
        names = tuple(str(entry[0] if isinstance(entry, tuple) else entry) for entry in stored)
        if len(set(names)) == len(names):
            return names
    return tuple(str(number) for number in range(max(labels) + 1))


def _fingerprint(columns: Mapping[SplitName, pa.Array], shape: tuple[int, ...]) -> str:
    """Hash of the images themselves."""
    digest = hashlib.sha256(repr(shape).encode())
    for split, column in columns.items():
        digest.update(f"{split} {len(column)} {column.type}".encode())
        for buffer in column.buffers():
            if buffer is not None:
                digest.update(buffer)
    return digest.hexdigest()[:16]
