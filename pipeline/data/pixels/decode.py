"""From stored values to arrays: image files, raw pixels, feature vectors."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.contracts.columns import ENCODED, LABEL, NO_LABEL, SAMPLE_ID
from pipeline.errors import DataError

# Column of the rows whose stored values a reader could not bring into the form of ``encoded``.
BAD = "bad"

# What Pillow may try. Fewer formats are faster, and fewer parsers see what others have sent.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
GREY_MODES = ("1", "L")
# Modes with more than 8 bits a channel: converting them clips without a word.
DEEP_MODES = ("I", "F")

Boxes = Callable[[np.ndarray], np.ndarray]
"""(B, 2) int64 (height, width) of stored images to (B, 4) int64 (left, top, right, bottom) of what is cut out."""

_Note = Callable[[int, str], None]


@dataclass(frozen=True)
class SourceFile:
    """A file of a split, for messages.

    Attributes:
        path: as the user would write it.
        first_row: sample id of its first row.
        is_row: the file is the row, as one image is.
    """

    path: str
    first_row: int
    is_row: bool = False


@dataclass(frozen=True)
class Decoder:
    """Turns the ``encoded`` column of rows into one array; small and picklable.

    Attributes:
        kind: ``"image"`` or ``"features"``.
        shape: (C, H, W) or (F,) of one row.
        files: the split's files in order, for messages.
        image_size: (H, W) that images are brought to: resized (bilinear, antialiased) until they just cover it, then
            cut around the centre, as torchvision's Resize and CenterCrop do. None: they must have it.
        num_classes: labels must lie below it; none: not looked at.
        skip_bad: ``decode_rows`` returns what is wrong with a row instead of raising it.
        stored_size: (H, W) of raw pixels, where it is not that of ``shape``.
    """

    kind: Literal["image", "features"]
    shape: tuple[int, ...]
    files: Sequence[SourceFile] = ()
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    skip_bad: bool = False
    stored_size: tuple[int, ...] | None = None

    def decode(self, table: pa.Table, boxes: Boxes | None = None) -> np.ndarray:
        """Decodes the rows of a table.

        Args:
            table: columns ``sample_id`` and ``encoded``; raw pixels lie as (H, W, C).
            boxes: what is cut out of each image and resized to (H, W) (bilinear, antialiased); none: see
                ``image_size``.

        Returns:
            uint8 (B, C, H, W), or float32 (B, F). May be a read-only view of the table's memory.

        Raises:
            DataError: a row is no image, is an image of another size, holds a value that is not finite, or has a
                label that is not one of the classes; the message names the file and the row.
        """
        return self._decode(table, boxes, skip_bad=False)[0]

    def decode_rows(self, table: pa.Table, boxes: Boxes | None = None) -> tuple[np.ndarray, dict[int, str]]:
        """As ``decode``, but with ``skip_bad`` a bad row raises nothing.

        Returns:
            The array, in which bad rows are zeros; and by position in ``table`` what is wrong with each of them.
        """
        return self._decode(table, boxes, self.skip_bad)

    def _decode(self, table: pa.Table, boxes: Boxes | None, skip_bad: bool) -> tuple[np.ndarray, dict[int, str]]:
        bad: dict[int, str] = {}

        def note(row: int, problem: str) -> None:
            sentence = f"{self._name_row(table, row)} {problem}"
            if not skip_bad:
                raise DataError(offer_skipping(sentence), sample_id=table[SAMPLE_ID][row].as_py())
            bad.setdefault(row, sentence)

        _note_unreadable(table, note)
        self._note_wrong_labels(table, note)
        column = table[ENCODED].combine_chunks()
        if not pa.types.is_fixed_size_list(column.type):
            inputs = _channels_first(self._decode_images(column, boxes, note))
        elif self.kind == "features":
            inputs = column.flatten().to_numpy().reshape(-1, *self.shape)
            for row in np.flatnonzero(~np.isfinite(inputs).all(axis=1)).tolist():
                note(row, "holds a feature that is NaN or infinite; fix or remove the row.")
        else:
            inputs = _channels_first(self._fit_pixels(column.flatten().to_numpy(), boxes))
        if bad:
            inputs = inputs.copy()
            inputs[list(bad)] = 0
        return inputs, bad

    def _note_wrong_labels(self, table: pa.Table, note: _Note) -> None:
        if self.num_classes is None or LABEL not in table.column_names:
            return
        labels = table[LABEL].to_numpy()
        for row in np.flatnonzero((labels < NO_LABEL) | (labels >= self.num_classes)).tolist():
            note(row, describe_wrong_label(labels[row], self.num_classes))

    def _decode_images(self, column: pa.Array, boxes: Boxes | None, note: _Note) -> np.ndarray:
        channels, height, width = self.shape
        mode = "L" if channels == 1 else "RGB"
        pixels = np.zeros((len(column), height, width, channels), np.uint8)
        contents = column.to_pylist()
        images: list[Any] = [None] * len(contents)
        for row, content in enumerate(contents):
            try:
                image = open_image(content)
                if boxes is None and self.image_size is None:
                    _check_size(image.size[::-1], (height, width))
                images[row] = image
            except DataError as error:
                note(row, error.message)
        # Every row gets its box, a bad one too: they are drawn by position.
        chosen = _draw_boxes(boxes, [(height, width) if image is None else image.size[::-1] for image in images])
        for row, box in enumerate(chosen):
            image, images[row] = images[row], None  # a decoded image is large, and this one is needed no more
            if image is None:
                continue
            try:
                converted = image if image.mode == mode else image.convert(mode)
                pixels[row] = np.asarray(_fit(converted, (height, width), box)).reshape(height, width, channels)
            except Exception as error:  # Pillow's parsers raise almost anything
                reason = _first_line(error, len(contents[row]))
                note(row, f"is a damaged image ({reason}); store it again or remove the row.")
        return pixels

    def _fit_pixels(self, values: np.ndarray, boxes: Boxes | None) -> np.ndarray:
        """(B, H, W, C) out of raw pixels; each channel is an image of its own, or Pillow would weigh by the fourth."""
        from PIL import Image  # not every data set needs it

        channels, height, width = self.shape
        stored = self.stored_size or (height, width)
        pixels = values.reshape(-1, *stored, channels)
        if boxes is None and stored == (height, width):
            return pixels
        fitted = np.empty((len(pixels), height, width, channels), np.uint8)
        for row, box in enumerate(_draw_boxes(boxes, [stored] * len(pixels))):
            for channel in range(channels):
                image = Image.fromarray(np.ascontiguousarray(pixels[row, :, :, channel]))
                fitted[row, :, :, channel] = np.asarray(_fit(image, (height, width), box))
        return fitted

    def _name_row(self, table: pa.Table, row: int) -> str:
        return name_row(self.files, table[SAMPLE_ID][row].as_py())


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _note_unreadable(table: pa.Table, note: _Note) -> None:
    if BAD in table.column_names:
        # Tables of which one had no such column may have been put together.
        for row in np.flatnonzero(table[BAD].fill_null(False).to_numpy()).tolist():
            note(row, "holds a null, a list of another length than the first row, or a label below 0; correct the row.")


def offer_skipping(sentence: str) -> str:
    """What is wrong with a row, with the way to go on without it."""
    return f"{sentence.rstrip('.')}; or set data.on_bad_row=skip to go on without such rows."


def describe_wrong_label(label: int, num_classes: int) -> str:
    """What is wrong with a label, to follow the name of its row."""
    return (
        f"has label {label}, expected 0 to {num_classes - 1}; correct the labels (classes count from 0) or set "
        "data.num_classes."
    )


def name_row(files: Sequence[SourceFile], sample_id: int) -> str:
    """Names a row for a message: its file and row there, where the files are known."""
    owner = bisect_right(files, sample_id, key=lambda file: file.first_row) - 1
    if owner < 0:
        return f"sample {sample_id}"
    file = files[owner]
    place = "" if file.is_row else f": row {sample_id - file.first_row}"
    return f"{file.path}{place} (sample {sample_id})"


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


def _check_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    if size != expected:
        raise DataError(
            f"is an image of height {size[0]} and width {size[1]}, expected {expected[0]} and {expected[1]} as the "
            f"first image has; set data.image_size=[{expected[0]},{expected[1]}], to which all images are resized."
        )


def _draw_boxes(boxes: Boxes | None, sizes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...] | None]:
    """The box of each image, or none for each."""
    if boxes is None:
        return [None] * len(sizes)
    return [tuple(box) for box in boxes(np.array(sizes, np.int64)).tolist()]


def _fit(image: Any, size: tuple[int, int], box: tuple[int, ...] | None) -> Any:
    """A Pillow image brought to ``size`` (H, W): what ``box`` cuts out of it, or the middle of what just covers it."""
    from PIL import Image

    height, width = size
    if box is not None:
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    wide, high = image.size
    if (high, wide) == size:
        return image
    # As torchvision rounds: down in the direction that is cut, and half to even where the cut begins.
    narrow = high * width >= wide * height
    covering = (width, high * width // wide) if narrow else (wide * height // high, height)
    resized = image if image.size == covering else image.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def image_shape(content: bytes) -> tuple[int, int, int]:
    """(C, H, W) of an encoded image: one channel where it is grey, otherwise three."""
    image = open_image(content)
    return (1 if image.mode in GREY_MODES else 3, image.size[1], image.size[0])


def _first_line(error: Exception, num_bytes: int) -> str:
    # Pillow's own text for an unknown format ends in the address of a BytesIO.
    text = str(error).split("\n")[0]
    return f"{num_bytes} bytes of unknown format" if not text or "BytesIO" in text else text
