# SPDX-License-Identifier: Apache-2.0
"""Image transforms on PIL images and arrays; all randomness comes from the generator passed in."""

import math

import numpy as np
from PIL import Image, ImageEnhance

from attnjax import registry
from attnjax.errors import RecipeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""All but nearest widen their kernel when they shrink an image (antialiasing)."""

ERASE_MODES = ("pixel", "colour", "zero")

_ATTEMPTS = 10


def interpolation(name: str) -> Image.Resampling:
    """Return PIL's filter of a name in `INTERPOLATIONS`, or raise RecipeError."""
    if name not in INTERPOLATIONS:
        raise RecipeError(f"pipeline.interpolation: {registry.nearest(name, INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


def to_rgb(array: np.ndarray) -> Image.Image:
    """Return an RGB image of a uint8 array `[y, x]` or `[y, x, c]` with c in 1, 3, 4."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(f"image is {array.dtype} {array.shape}, expected uint8 [y, x, c]")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(array).convert("RGB")


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Crop a random box of relative area `scale` and aspect `ratio`, resize to `[size, size]`.

    The aspect is uniform in its logarithm. When ten boxes do not fit, the largest central box with
    an allowed aspect is taken.
    """
    box = _random_box(image.width, image.height, rng, scale, ratio)
    return image.crop(box).resize((size, size), resample)


def _random_box(width, height, rng, scale, ratio):
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize_shorter(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize so that the shorter side is `size`, the longer one rounded down."""
    width, height = image.size
    if width <= height:
        target = size, max(1, size * height // width)
    else:
        target = max(1, size * width // height), size
    return image if target == image.size else image.resize(target, resample)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut `[size, size]` out of the middle; smaller images get black borders."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    """Mirror left and right with a probability."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def colour_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Scale brightness, contrast and saturation in random order, each by 1 +- `strength`."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in rng.permutation(len(enhancers)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = enhancers[which](image).enhance(factor)
    return image


def random_affine(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    shift: float = 0.0,
    rotation: float = 0.0,
) -> Image.Image:
    """Rotate by up to `rotation` degrees and shift by up to `shift` of each side; fill with black.

    Args:
      image: the image.
      rng: source of the angle and the two shifts.
      shift: largest shift as a fraction of width and height.
      rotation: largest angle in degrees.

    Returns:
      An image of the same size.
    """
    angle = math.radians(rng.uniform(-rotation, rotation))
    dx = rng.uniform(-shift, shift) * image.width
    dy = rng.uniform(-shift, shift) * image.height
    cos, sin = math.cos(angle), math.sin(angle)
    cx, cy = image.width / 2, image.height / 2
    # PIL wants, for each output pixel, where it comes from.
    matrix = (
        cos,
        sin,
        cx - cos * (cx + dx) - sin * (cy + dy),
        -sin,
        cos,
        cy + sin * (cx + dx) - cos * (cy + dy),
    )
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


def normalise(
    image: Image.Image,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> np.ndarray:
    """Return `(image / 255 - mean) / std`, float32 `[y, x, 3]`."""
    array = np.asarray(image)
    rows, columns, channels = array.shape
    std64 = np.asarray(std, np.float64)
    # Whole rows at a time: broadcasting over the three channels alone is eight times slower.
    scale = np.tile((1 / (255 * std64)).astype(np.float32), columns)
    offset = np.tile((-np.asarray(mean, np.float64) / std64).astype(np.float32), columns)
    result = np.multiply(array.reshape(rows, columns * channels), scale, dtype=np.float32)
    result += offset
    return result.reshape(rows, columns, channels)


def random_erase(
    array: np.ndarray,
    probability: float,
    rng: np.random.Generator,
    *,
    mode: str = "pixel",
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Overwrite one random rectangle of a normalised image, in place.

    Args:
      array: float32 `[y, x, c]`, already normalised.
      probability: how often anything happens.
      rng: source of randomness.
      mode: "pixel" writes standard normal noise, "colour" one such value per channel, "zero" zeros.
      area: range of the relative area.
      aspect: range of height over width, uniform in its logarithm.

    Returns:
      `array`.
    """
    if rng.random() >= probability:
        return array
    rows, columns, channels = array.shape
    for _ in range(_ATTEMPTS):
        target = rows * columns * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < rows and w < columns:
            top, left = int(rng.integers(rows - h + 1)), int(rng.integers(columns - w + 1))
            if mode == "pixel":
                fill = rng.standard_normal((h, w, channels), np.float32)
            elif mode == "colour":
                fill = rng.standard_normal((1, 1, channels), np.float32)
            else:
                fill = np.float32(0)
            array[top : top + h, left : left + w] = fill
            return array
    return array
