"""Folders of image files, one folder a class."""

from __future__ import annotations

import hashlib
from typing import Literal

from pipeline.contracts.columns import ENCODED, NO_LABEL, SPLITS, InputSpec, SplitName
from pipeline.data.order.rows import RowSet, divide
from pipeline.data.params import DATASETS, DataParams
from pipeline.data.pixels.augment import check_augment
from pipeline.data.pixels.decode import Decoder, image_shape
from pipeline.data.sources.image_files import ImageFiles, find_all_images, find_images
from pipeline.data.sources.image_reader import ImageReader
from pipeline.data.sources.source import DataSource, SplitReader, check_fits, describe_carved, find_unlabelled
from pipeline.errors import DataError

# Of this many files, one must be an image where bad ones are skipped.
_TRIES = 100


@DATASETS.register
class ImageFolderParams(DataParams):
    """Image files in folders named after their classes."""

    name: Literal["image_folder"] = "image_folder"
    path: str
    """A folder that holds train, validation (also valid, val) and test, or class folders that all splits are carved
    out of; local, or a URI (s3://...)."""
    image_size: tuple[int, int] | None = None
    """Height and width that images are resized to; none: all have those of the first."""

    def open(self) -> ImageFolderSource:
        return ImageFolderSource(self)

    def open_rows(self, spec: InputSpec) -> tuple[SplitReader, Decoder]:
        """Every image below the folder, whatever the folders are called."""
        filesystem, files = find_all_images(self.path)
        reader = ImageReader(filesystem, files, RowSet.whole(len(files)))
        check_fits(spec, "image", _detect_shape(reader, files, self), files.names[0].path, encoded=True)
        return reader, _make_decoder(self, spec, files)


class ImageFolderSource(DataSource):
    """An opened folder of images. Every file has been listed, the first image has been read.

    The fingerprint covers names, order and sizes of the files. A class is part of a name, so other than with Parquet,
    an image that moves to another class changes it.

    Args:
        params: where the files are and how to read them.

    Raises:
        DataError: files are missing, or not where they must be.
        ConfigError: parameters that do not go together.
    """

    def __init__(self, params: ImageFolderParams) -> None:
        self._params = params
        self.memory_bytes = params.memory_bytes
        found = find_images(params.path)
        self._filesystem = found.filesystem
        self._files = {split: found.files(split) for split in found.splits}
        fractions: dict[SplitName, float] = {"validation": params.validation_fraction, "test": params.test_fraction}
        self._rows = divide({split: len(files) for split, files in self._files.items()}, fractions, params.split_seed)
        self.carved = {split: describe_carved(rows) for split, rows in self._rows.items() if split not in self._files}
        found_unlabelled = {
            split: find_unlabelled(self._files_of(split).labels == NO_LABEL, rows, self._files_of(split).names)
            for split, rows in self._rows.items()
        }
        self.unlabelled = {split: rows for split, rows in found_unlabelled.items() if rows is not None}
        shape = _detect_shape(self.split("train"), self._files["train"], params)
        self.spec = InputSpec("image", shape, found.class_names)
        check_augment(params.augment, self.spec)
        self.fingerprint = _fingerprint(self._files, shape)

    def split(self, name: SplitName) -> ImageReader:
        return ImageReader(self._filesystem, self._files_of(name), self._rows[name])

    def decoder(self, name: SplitName) -> Decoder:
        return _make_decoder(self._params, self.spec, self._files_of(name))

    def _files_of(self, name: SplitName) -> ImageFiles:
        return self._files[name if name in self._files else "train"]


def _detect_shape(reader: SplitReader, files: ImageFiles, params: ImageFolderParams) -> tuple[int, int, int]:
    """(C, H, W) of the rows: of the first image, or of the first that is one where bad ones are skipped."""
    last = _TRIES if params.on_bad_row == "skip" else 1
    error: DataError | None = None
    for sample_id in reader.sample_ids[:last]:
        content = reader.read(sample_id[None])[ENCODED][0].as_py()
        try:
            channels, height, width = image_shape(content)
        except DataError as problem:
            error = error or DataError(f"{files.names[int(sample_id)].path} {problem.message}")
            continue
        return (channels, *(params.image_size or (height, width)))
    assert error is not None  # for the type checker: a split has rows
    raise error


def _make_decoder(params: ImageFolderParams, spec: InputSpec, files: ImageFiles) -> Decoder:
    return Decoder(
        spec.kind, spec.shape, files.names, image_size=params.image_size, skip_bad=params.on_bad_row == "skip"
    )


def _fingerprint(splits: dict[SplitName, ImageFiles], shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr(shape).encode())
    for split in SPLITS:
        if split in splits:
            files = splits[split]
            names = "\0".join(files.names.paths.to_pylist())
            digest.update(f"{split} {len(files)} {names}".encode() + files.sizes.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
