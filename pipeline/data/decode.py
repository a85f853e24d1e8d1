"""From stored values to arrays: image files, raw pixels, feature vectors."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import ENCODED, SAMPLE_ID
from pipeline.errors import DataError

# What Pillow may try. Fewer formats are faster, and fewer parsers see what others have sent.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
GREY_MODES = ("1", "L")
# Modes with more than 8 bits a channel: converting them clips without a word.
DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class SourceFile:
    """A file of a split, for messages.

    Attributes:
        path: as the user would write it.
        first_row: sample id of its first row.
    """

    path: str
    first_row: int


@dataclass(frozen=True)
class Decoder:
    """Turns the ``encoded`` column of rows into one array; small and picklable.

    Attributes:
        kind: ``"image"`` or ``"features"``.
        shape: (C, H, W) or (F,) of one row.
        files: the split's files in order, for messages.
    """

    kind: Literal["image", "features"]
    shape: tuple[int, ...]
    files: tuple[SourceFile, ...] = ()

    def decode(self, table: pa.Table) -> np.ndarray:
        """Decodes the rows of a table.

        Args:
            table: columns ``sample_id`` and ``encoded``; raw pixels lie as (H, W, C).

        Returns:
            uint8 (B, C, H, W), or float32 (B, F). May be a read-only view of the table's memory.

        Raises:
            DataError: a row is no image, is an image of another size, or holds a value that is not finite; the
                message names the file and the row.
        """
        column = table[ENCODED].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            values = column.flatten().to_numpy()
            if self.kind == "features":
                return self._check_finite(values.reshape(-1, *self.shape), table)
            channels, height, width = self.shape
            pixels = values.reshape(-1, height, width, channels)
        else:
            pixels = self._decode_images(column, table)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def _decode_images(self, column: pa.Array, table: pa.Table) -> np.ndarray:
        channels, height, width = self.shape
        pixels = np.empty((len(column), height, width, channels), np.uint8)
        for row, content in enumerate(column.to_pylist()):
            try:
                pixels[row] = read_image(content, channels, (height, width))
            except DataError as error:
                raise DataError(f"{self._name_row(table, row)} {error.message}", **error.details) from error
        return pixels

    def _check_finite(self, features: np.ndarray, table: pa.Table) -> np.ndarray:
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise DataError(
                f"{self._name_row(table, row)} holds a feature that is NaN or infinite; fix or remove the row."
            )
        return features

    def _name_row(self, table: pa.Table, row: int) -> str:
        return name_row(self.files, table[SAMPLE_ID][row].as_py())


def name_row(files: tuple[SourceFile, ...], sample_id: int) -> str:
    """Names a row for a message: its file and row there, where the files are known."""
    owners = [file for file in files if file.first_row <= sample_id]
    if not owners:
        return f"sample {sample_id}"
    owner = owners[-1]
    return f"{owner.path}: row {sample_id - owner.first_row} (sample {sample_id})"


def open_image(content: bytes) -> Any:
    """Opens an encoded image; its pixels are decoded when they are asked for.

    Raises:
        DataError: not an image, or of more than 8 bits a channel.
    """
    from PIL import Image  # not every data set needs it

    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except Exception as error:  # Pillow's parsers raise almost anything
        raise DataError(
            f"is not an image that can be read ({_first_line(error, len(content))}); expected one of "
            f"{', '.join(IMAGE_FORMATS)}; store it again or remove the row."
        ) from error
    if image.mode.split(";")[0] in DEEP_MODES:
        raise DataError(
            f"is an image of mode {image.mode!r}, with more than 8 bits a channel; store it with 8 bits, or as a list "
            "of floats."
        )
    return image


def read_image(content: bytes, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Decodes an image, to grey for one channel and to RGB for three.

    Args:
        content: the file's bytes.
        channels: 1 or 3.
        size: (H, W) it must have.

    Returns:
        uint8 (H, W, channels).

    Raises:
        DataError: undecodable, or of another size.
    """
    image = open_image(content)
    if image.size != size[::-1]:
        raise DataError(
            f"is an image of height {image.size[1]} and width {image.size[0]}, expected {size[0]} and {size[1]} as the "
            "first image has; resize the images before."
        )
    mode = "L" if channels == 1 else "RGB"
    try:
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:
        raise DataError(
            f"is a damaged image ({_first_line(error, len(content))}); store it again or remove the row."
        ) from error
    return pixels.reshape(*size, channels)


def image_shape(content: bytes) -> tuple[int, int, int]:
    """(C, H, W) of an encoded image: one channel where it is grey, otherwise three."""
    image = open_image(content)
    return (1 if image.mode in GREY_MODES else 3, image.size[1], image.size[0])


def _first_line(error: Exception, num_bytes: int) -> str:
    # Pillow's own text for an unknown format ends in the address of a BytesIO.
    text = str(error).split("\n")[0]
    return f"{num_bytes} bytes of unknown format" if not text or "BytesIO" in text else text
