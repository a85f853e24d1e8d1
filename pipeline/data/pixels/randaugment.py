"""RandAugment (arXiv 1909.13719) and colour jitter, on Pillow images.

The operations, their magnitudes and their order are those of torchvision's ``RandAugment`` (31 magnitudes, nearest
neighbour, black outside) and ``ColorJitter``. They are done here and not by torchvision, because its transforms draw
from torch's global generator and take no other (none in ``torchvision.transforms.v2`` of 0.29 has such an argument),
and because importing torch costs every decode process 600 MB.

A grey image has no colour: saturation leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.pixels.draws import Number, draw

if TYPE_CHECKING:  # functions import Pillow where they need it: the registry of data sets imports this module
    from PIL import Image

MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class Operation:
    """One way to change an image.

    Attributes:
        name: torchvision's.
        apply: makes the changed image; the second argument is the amount, whatever that is for the operation.
        largest: height and width of the image to the amount at the largest magnitude; it grows from 0 in proportion
            to the magnitude.
        signed: half of the images take the amount with a minus sign.
    """

    name: str
    apply: Callable[[Image.Image, float], Image.Image]
    largest: Callable[[int, int], float] = lambda height, width: 0.0
    signed: bool = False

    def amount(self, magnitude: int, height: int, width: int) -> float:
        """The amount at ``magnitude`` in 0..30, without its sign."""
        return self.largest(height, width) * magnitude / MAX_MAGNITUDE


# An operation and its amount, to be done one after the other.
Changes = list[tuple[Operation, float]]


def _identity(image: Image.Image, amount: float) -> Image.Image:
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """``matrix`` takes pixels of the result to pixels of ``image``."""
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0)


def _shear_x(image: Image.Image, amount: float) -> Image.Image:
    return _affine(image, (1.0, amount, 0.0, 0.0, 1.0, 0.0))


def _shear_y(image: Image.Image, amount: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, amount, 1.0, 0.0))


def _translate_x(image: Image.Image, amount: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, -float(int(amount)), 0.0, 1.0, 0.0))


def _translate_y(image: Image.Image, amount: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(amount))))


def _rotate(image: Image.Image, amount: float) -> Image.Image:
    from PIL import Image

    return image.rotate(amount, Image.Resampling.NEAREST, fillcolor=0)


def _enhance(kind: str, image: Image.Image, amount: float) -> Image.Image:
    from PIL import ImageEnhance

    enhanced: Image.Image = getattr(ImageEnhance, kind)(image).enhance(1 + amount)
    return enhanced


def _color(image: Image.Image, amount: float) -> Image.Image:
    return image if image.mode == "L" else _enhance("Color", image, amount)


def _posterize(image: Image.Image, amount: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(amount))


def _solarize(image: Image.Image, amount: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, 255 - amount)  # type: ignore[arg-type]  # torchvision's thresholds are fractions


def _auto_contrast(image: Image.Image, amount: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, amount: float) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


BRIGHTNESS = Operation("Brightness", partial(_enhance, "Brightness"), lambda height, width: 0.9, signed=True)
CONTRAST = Operation("Contrast", partial(_enhance, "Contrast"), lambda height, width: 0.9, signed=True)
SATURATION = Operation("Color", _color, lambda height, width: 0.9, signed=True)

OPERATIONS = (
    Operation("Identity", _identity),
    Operation("ShearX", _shear_x, lambda height, width: 0.3, signed=True),
    Operation("ShearY", _shear_y, lambda height, width: 0.3, signed=True),
    Operation("TranslateX", _translate_x, lambda height, width: 150 * width / 331, signed=True),
    Operation("TranslateY", _translate_y, lambda height, width: 150 * height / 331, signed=True),
    Operation("Rotate", _rotate, lambda height, width: 30.0, signed=True),
    BRIGHTNESS,
    SATURATION,
    CONTRAST,
    Operation("Sharpness", partial(_enhance, "Sharpness"), lambda height, width: 0.9, signed=True),
    Operation("Posterize", _posterize, lambda height, width: 4.0),
    Operation("Solarize", _solarize, lambda height, width: 255.0),
    Operation("AutoContrast", _auto_contrast),
    Operation("Equalize", _equalize),
)


def draw_operations(keys: np.ndarray, num_operations: int, magnitude: int, height: int, width: int) -> list[Changes]:
    """What RandAugment does to each image: operations drawn uniformly, with repetition, all of one magnitude.

    Args:
        keys: (B,) uint64 of ``sample_keys``.
        num_operations: an image.
        magnitude: 0 to 30.
        height: of the images.
        width: of the images.
    """
    amounts = [operation.amount(magnitude, height, width) for operation in OPERATIONS]
    changes: list[Changes] = [[] for _ in keys]
    for step in range(num_operations):
        number = Number.RANDAUGMENT + 2 * step
        chosen, negative = draw(keys, number, len(OPERATIONS)).tolist(), draw(keys, number + 1, 2).tolist()
        for row, (index, minus) in enumerate(zip(chosen, negative, strict=True)):
            operation = OPERATIONS[index]
            changes[row].append((operation, -amounts[index] if operation.signed and minus else amounts[index]))
    return changes


def apply_changes(inputs: np.ndarray, changes: Sequence[Changes]) -> None:
    """Changes images in place.

    Args:
        inputs: uint8 (B, C, H, W) of 1 or 3 channels.
        changes: of each image.
    """
    from PIL import Image

    for row, todo in enumerate(changes):
        pixels = inputs[row]
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        for operation, amount in todo:
            image = operation.apply(image, amount)
        changed = np.asarray(image)
        pixels[...] = changed if len(pixels) == 1 else changed.transpose(2, 0, 1)
