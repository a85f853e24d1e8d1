"""The image column of a Parquet file: which of the accepted formats it has, and how to bring it into one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.pixels.decode import image_shape, offer_skipping
from pipeline.errors import DataError

ACCEPTED = (
    "encoded images (binary, or struct<bytes: binary, path: string>), raw pixels (uint8 in nested lists of "
    "height, width, channels, or flat with data.image_size), or feature vectors (a list of float32 or float64)"
)


@dataclass(frozen=True)
class ImageColumn:
    """Name and format of the column that networks are given, as it is stored.

    Attributes:
        name: of the column.
        storage: ``"encoded"`` image files, ``"struct"`` of a file's bytes and path, raw ``"pixels"``, ``"features"``.
        list_sizes: of raw pixels and features, the length of each level of lists, outermost first.
        shape: (C, H, W) or (F,) of a row.
    """

    name: str
    storage: Literal["encoded", "struct", "pixels", "features"]
    list_sizes: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def kind(self) -> Literal["image", "features"]:
        return "features" if self.storage == "features" else "image"

    @property
    def leaf(self) -> str:
        """What of the column is read from files."""
        return f"{self.name}.bytes" if self.storage == "struct" else self.name

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one row in memory; none where they differ from row to row."""
        item_bytes = {"pixels": 1, "features": 4}.get(self.storage)
        return None if item_bytes is None else item_bytes * int(np.prod(self.list_sizes))

    def normalise_good(self, array: pa.Array) -> tuple[pa.Array, np.ndarray]:
        """As ``normalise``, with a placeholder for every row that has no such form.

        Returns:
            The rows in the form of the ``encoded`` column, and (N,) bool: is a placeholder.
        """
        try:
            return self.normalise(array, str), np.zeros(len(array), bool)
        except DataError:  # looking at every level of every row is slow, and seldom needed
            bad = self._find_bad(array)
        good = np.flatnonzero(~bad)
        if len(good) == 0:
            return self._make_placeholders(len(array)), bad
        chosen = np.where(bad, good[0], np.arange(len(array)))
        return self.normalise(array.take(pa.array(chosen)), str), bad

    def _find_bad(self, array: pa.Array) -> np.ndarray:
        """(N,) bool: has a null, or a list of another length, at any level."""
        bad = np.zeros(len(array), bool)
        if self.storage == "struct":
            array = pc.struct_field(array, "bytes")
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        rows = np.arange(len(array))  # which row each value of the present level belongs to
        for size in self.list_sizes:
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            bad[rows[lengths != size]] = True
            array, rows = array.flatten(), np.repeat(rows, lengths)
        bad[rows[array.is_null().to_numpy(zero_copy_only=False)]] = True
        return bad

    def _make_placeholders(self, num_rows: int) -> pa.Array:
        if self.storage in ("encoded", "struct"):
            return pa.array([b""] * num_rows, pa.large_binary())
        items = int(np.prod(self.list_sizes))
        values = np.zeros(num_rows * items, np.float32 if self.storage == "features" else np.uint8)
        return pa.FixedSizeListArray.from_arrays(pa.array(values), items)

    def normalise(self, array: pa.Array, name_row: Callable[[int], str]) -> pa.Array:
        """Brings stored values into the form of the ``encoded`` column.

        Args:
            array: the column, or a part of it, as read.
            name_row: names the row at a position of ``array``, for messages.

        Returns:
            large_binary, or a fixed-size list of uint8 or float32. 64-bit offsets, so that whole splits fit.

        Raises:
            DataError: a row is null or of another size than the first.
        """
        if self.storage == "struct":
            array = pc.struct_field(array, "bytes")  # null where the struct is
        if self.storage in ("encoded", "struct"):
            _refuse_nulls(array, 1, name_row)
            return array.cast(pa.large_binary())
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        items = 1  # of the present level, to a row
        for size in self.list_sizes:
            _refuse_nulls(array, items, name_row)
            self._check_lengths(array, size, items, name_row)
            array, items = array.flatten(), items * size
        _refuse_nulls(array, items, name_row)
        if self.storage == "features":
            array = array.cast(pa.float32())
        return pa.FixedSizeListArray.from_arrays(array, items)

    def _check_lengths(self, array: pa.Array, size: int, items: int, name_row: Callable[[int], str]) -> None:
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != size)
        if len(wrong):
            sentence = (
                f"{name_row(int(wrong[0]) // items)} has a list of {lengths[wrong[0]]} values in column {self.name!r}, "
                f"expected {size}; all rows must have one size."
            )
            raise DataError(offer_skipping(sentence))


def _refuse_nulls(array: pa.Array, items: int, name_row: Callable[[int], str]) -> None:
    if array.null_count:
        position = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(offer_skipping(f"{name_row(position // items)} holds a null; fill it in or remove the row."))


def detect_column(
    name: str, arrow_type: pa.DataType, first: pa.Array, image_size: tuple[int, int] | None, path: str
) -> ImageColumn:
    """Finds out the format of the image column from its type and its first row.

    Args:
        name: of the column.
        arrow_type: its type.
        first: its first row, an array of length 1.
        image_size: ``data.image_size``: (H, W) of flat raw pixels.
        path: of the file, for messages.

    Raises:
        DataError: not one of the accepted formats.
    """
    where = f"{path}: column {name!r}"
    if first.null_count:
        raise DataError(f"{where} is null in its first row; fill it in or remove the row.")
    tensor_shape: tuple[int, ...] | None = None
    if isinstance(arrow_type, pa.FixedShapeTensorType):
        if arrow_type.permutation is not None and list(arrow_type.permutation) != sorted(arrow_type.permutation):
            raise DataError(f"{where} stores permuted tensors; store them as (height, width, channels) in that order.")
        tensor_shape = tuple(arrow_type.shape)
    if isinstance(arrow_type, pa.BaseExtensionType):
        arrow_type, first = arrow_type.storage_type, first.storage
    if _is_binary(arrow_type):
        return _detect_images(name, "encoded", first, where)
    if pa.types.is_struct(arrow_type):
        field = arrow_type.get_field_index("bytes")
        if field >= 0 and _is_binary(arrow_type.field(field).type):
            return _detect_images(name, "struct", pc.struct_field(first, "bytes"), where)
    elif _is_list(arrow_type):
        return _detect_lists(name, arrow_type, first, tensor_shape, image_size, where)
    raise DataError(
        f"{where} has type {arrow_type}, expected {ACCEPTED}; store it so, or name another column in data.image_column."
    )


def _detect_images(name: str, storage: Literal["encoded", "struct"], first: pa.Array, where: str) -> ImageColumn:
    content = first[0].as_py()
    if content is None:
        raise DataError(f"{where} holds no bytes in its first row; store the images inside the file, not their paths.")
    try:
        return ImageColumn(name, storage, (), image_shape(content))
    except DataError as error:
        raise DataError(f"{where}: the first row {error.message}") from error


def _detect_lists(
    name: str,
    arrow_type: pa.DataType,
    first: pa.Array,
    tensor_shape: tuple[int, ...] | None,
    image_size: tuple[int, int] | None,
    where: str,
) -> ImageColumn:
    sizes: list[int] = []
    while _is_list(arrow_type):
        sizes.append(int(pc.list_value_length(first)[0].as_py() or 0))
        if sizes[-1] == 0:
            raise DataError(f"{where} is an empty list in its first row; fill it in or remove the row.")
        arrow_type, first = arrow_type.value_type, first.flatten()
    if len(sizes) == 1 and tensor_shape is None and pa.types.is_floating(arrow_type):
        return ImageColumn(name, "features", tuple(sizes), tuple(sizes))
    if not pa.types.is_uint8(arrow_type):
        raise DataError(f"{where} holds lists of {arrow_type}, {len(sizes)} deep, expected {ACCEPTED}.")
    pixel_shape = tensor_shape or tuple(sizes)
    if len(pixel_shape) == 1:
        pixel_shape = _unflatten(pixel_shape[0], image_size, where)
    if len(pixel_shape) == 2:
        pixel_shape = (*pixel_shape, 1)
    if len(pixel_shape) != 3 or pixel_shape[2] > 4:
        raise DataError(
            f"{where} holds pixels of shape {pixel_shape}, expected (height, width) or (height, width, channels) with "
            "at most 4 channels; store the channels last."
        )
    height, width, channels = pixel_shape
    return ImageColumn(name, "pixels", tuple(sizes), (channels, height, width))


def _unflatten(length: int, image_size: tuple[int, int] | None, where: str) -> tuple[int, ...]:
    if image_size is None:
        raise DataError(
            f"{where} holds flat lists of {length} uint8 values; give their height and width, "
            "as in data.image_size=[32,32]."
        )
    height, width = image_size
    if length % (height * width):
        raise DataError(
            f"{where} holds {length} values a row, which is no multiple of data.image_size {height} x {width} = "
            f"{height * width}; correct data.image_size."
        )
    return (height, width, length // (height * width))


def _is_binary(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type))


def _is_list(arrow_type: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(arrow_type) for is_kind in kinds)
