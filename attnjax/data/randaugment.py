# SPDX-License-Identifier: Apache-2.0
"""RandAugment (arXiv 1909.13719) with the fifteen operations and scales of the DeiT recipe.

Strength runs from 0 to 10. In the increasing variant a stronger level always changes an image more:
posterise keeps fewer bits, solarise starts lower, enhancements move further from 1.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from attnjax.errors import RecipeError

MAX_LEVEL = 10.0

_SHEAR, _SHIFT, _DEGREES, _SOLARISE_ADD = 0.3, 0.45, 30.0, 110
_ENHANCE, _WEAKEST_ENHANCE = 0.9, 0.1
_HALF = 128


@dataclasses.dataclass(frozen=True)
class Canvas:
    """How geometric operations resample, and the colour they reveal at the borders."""

    fill: tuple[int, int, int] = (124, 116, 104)
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def affine(self, image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
        """Apply an output-to-input affine map to an image of unchanged size."""
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix,
            resample=self.resample,
            fillcolor=self.fill,
        )


def _auto_contrast(image, strength, sign, canvas):
    return ImageOps.autocontrast(image)


def _equalise(image, strength, sign, canvas):
    return ImageOps.equalize(image)


def _invert(image, strength, sign, canvas):
    return ImageOps.invert(image)


def _rotate(image, strength, sign, canvas):
    return image.rotate(sign * strength * _DEGREES, resample=canvas.resample, fillcolor=canvas.fill)


def _posterise(image, bits):
    mask = 256 - (1 << (8 - bits))  # no bits at all, the strongest level, leaves a black image
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


def _posterise_increasing(image, strength, sign, canvas):
    return _posterise(image, 4 - int(strength * 4))


def _posterise_decreasing(image, strength, sign, canvas):
    return _posterise(image, int(strength * 4))


def _solarise_increasing(image, strength, sign, canvas):
    return ImageOps.solarize(image, 256 - min(256, int(strength * 256)))


def _solarise_decreasing(image, strength, sign, canvas):
    return ImageOps.solarize(image, min(256, int(strength * 256)))


def _solarise_add(image, strength, sign, canvas):
    added = min(_HALF, int(strength * _SOLARISE_ADD))
    table = [min(255, value + added) if value < _HALF else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _shear_x(image, strength, sign, canvas):
    return canvas.affine(image, (1, sign * strength * _SHEAR, 0, 0, 1, 0))


def _shear_y(image, strength, sign, canvas):
    return canvas.affine(image, (1, 0, 0, sign * strength * _SHEAR, 1, 0))


def _shift_x(image, strength, sign, canvas):
    return canvas.affine(image, (1, 0, sign * strength * _SHIFT * image.width, 0, 1, 0))


def _shift_y(image, strength, sign, canvas):
    return canvas.affine(image, (1, 0, 0, 0, 1, sign * strength * _SHIFT * image.height))


def _enhance_increasing(enhancer):
    def apply(image, strength, sign, canvas):
        factor = max(_WEAKEST_ENHANCE, 1 + sign * strength * _ENHANCE)
        return enhancer(image).enhance(factor)

    return apply


def _enhance_plain(enhancer):
    def apply(image, strength, sign, canvas):
        return enhancer(image).enhance(_WEAKEST_ENHANCE + 2 * _ENHANCE * strength)

    return apply


def _operations(increasing) -> dict[str, Callable]:
    enhance = _enhance_increasing if increasing else _enhance_plain
    return {
        "auto_contrast": _auto_contrast,
        "equalise": _equalise,
        "invert": _invert,
        "rotate": _rotate,
        "posterise": _posterise_increasing if increasing else _posterise_decreasing,
        "solarise": _solarise_increasing if increasing else _solarise_decreasing,
        "solarise_add": _solarise_add,
        "colour": enhance(ImageEnhance.Color),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": _shear_x,
        "shear_y": _shear_y,
        "shift_x": _shift_x,
        "shift_y": _shift_y,
    }


class RandAugment:
    """Apply a few random operations at about one strength.

    Args:
      magnitude: mean level in [0, 10].
      operations: drawn per image, with replacement.
      probability: of applying each drawn operation.
      spread: standard deviation of the level, which is clipped to [0, 10].
      increasing: whether a higher level always means a stronger change.
      canvas: resampling and border colour of geometric operations.

    `operations` maps the names of the fifteen operations to functions of
    (image, strength in [0, 1], sign, canvas).
    """

    def __init__(
        self,
        magnitude: float = 9.0,
        *,
        operations: int = 2,
        probability: float = 0.5,
        spread: float = 0.0,
        increasing: bool = True,
        canvas: Canvas = Canvas(),
    ):
        self.magnitude, self.count, self.probability = magnitude, operations, probability
        self.spread, self.canvas = spread, canvas
        self.operations = _operations(increasing)

    @classmethod
    def parse(cls, spec: str, canvas: Canvas = Canvas()) -> "RandAugment":
        """Build from the customary notation, such as "rand-m9-mstd0.5-inc1".

        Parts are m (magnitude), n (operations per image), p (probability), mstd (spread) and inc
        (1: increasing variant); what is absent is m10, n2, p0.5, mstd0, inc0.

        Raises:
          RecipeError: the text is no such notation.
        """
        values = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
        head, *parts = spec.split("-")
        matches = [re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part) for part in parts]
        if head != "rand" or not all(m and m[1] in values for m in matches):
            raise RecipeError(
                f"pipeline.rand_augment={spec!r}: expected rand-m<level>[-n<count>][-p<chance>]"
                "[-mstd<spread>][-inc<0 or 1>]"
            )
        values |= {match[1]: float(match[2]) for match in matches}
        return cls(
            values["m"],
            operations=int(values["n"]),
            probability=values["p"],
            spread=values["mstd"],
            increasing=bool(values["inc"]),
            canvas=canvas,
        )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        names = list(self.operations)
        for which in rng.integers(len(names), size=self.count):
            if rng.random() < self.probability:
                image = self.apply(names[which], image, rng)
        return image

    def apply(self, name: str, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Apply one operation by name, at a level and sign drawn from `rng`."""
        level = self.magnitude
        if self.spread:
            level = rng.normal(level, self.spread)
        strength = min(max(level, 0.0), MAX_LEVEL) / MAX_LEVEL
        sign = math.copysign(1.0, rng.random() - 0.5)
        return self.operations[name](image, strength, sign, self.canvas)
