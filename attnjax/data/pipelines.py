# SPDX-License-Identifier: Apache-2.0
"""What happens to one example between its source and the batch.

A pipeline is called with the example and a random generator; evaluation passes None. Its attribute
`random` says whether it ever draws from the generator. Image pipelines return `image` float32
`[size, size, 3]` and `label` int32 and drop every other field.
"""

import math

import numpy as np

from attnjax import registry
from attnjax.data import transforms
from attnjax.data.randaugment import Canvas, RandAugment
from attnjax.errors import RecipeError


class Arrays:
    """Pass arrays through in the types a model reads: float32, int32, bool, uint8.

    Fields that are no numbers (strings, encoded files) are dropped.
    """

    random = False

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        arrays = {}
        for name, value in example.items():
            value = np.asarray(value)
            if value.dtype.kind == "f":
                arrays[name] = value.astype(np.float32)
            elif value.dtype.kind in "iu" and value.dtype != np.uint8:
                arrays[name] = value.astype(np.int32)
            elif value.dtype.kind in "bu":
                arrays[name] = value
        if not arrays:
            raise RecipeError(f"data.pipeline: none of {sorted(example)} is a numeric array")
        return arrays


class ImageTrain:
    """Training augmentation of the DeiT and CrossViT recipes.

    Random resized crop, mirror, RandAugment (or colour jitter when it is off), normalisation,
    random erasing. Mixing of examples and label smoothing belong to the task.

    Args:
      size: side of the result in pixels.
      scale: range of the cropped area, relative to the image.
      ratio: range of the crop's aspect.
      interpolation: filter of the crop and of RandAugment's geometry.
      flip: probability of mirroring left and right.
      rand_augment: such as "rand-m9-mstd0.5-inc1"; "" switches it off.
      color_jitter: strength of the jitter that replaces RandAugment when that is off.
      erase: probability of random erasing.
      erase_mode: "pixel" (noise), "colour" (one colour) or "zero".
      mean: channel means on the scale 0..1.
      std: channel standard deviations on the scale 0..1.
    """

    random = True

    def __init__(
        self,
        size: int = 224,
        scale: tuple = (0.08, 1.0),
        ratio: tuple = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        flip: float = 0.5,
        rand_augment: str = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        erase: float = 0.25,
        erase_mode: str = "pixel",
        mean: tuple = transforms.IMAGENET_MEAN,
        std: tuple = transforms.IMAGENET_STD,
    ):
        self.size, self.mean, self.std = _check_size(size), mean, std
        self.scale, self.ratio = _check_range("scale", scale), _check_range("ratio", ratio)
        self.resample = transforms.interpolation(interpolation)
        self.flip, self.erase = _check_share("flip", flip), _check_share("erase", erase)
        self.color_jitter = color_jitter
        if erase_mode not in transforms.ERASE_MODES:
            known = registry.nearest(erase_mode, transforms.ERASE_MODES)
            raise RecipeError(f"pipeline.erase_mode={erase_mode!r}: {known}")
        self.erase_mode = erase_mode
        fill = tuple(min(255, round(255 * value)) for value in mean)
        canvas = Canvas(fill=fill, resample=self.resample)
        self.rand_augment = RandAugment.parse(rand_augment, canvas) if rand_augment else None

    def __call__(self, example: dict, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if rng is None:
            raise RecipeError(
                "data.pipeline: image_train needs randomness; evaluate with image_eval"
            )
        image = transforms.random_resized_crop(
            transforms.to_rgb(example["image"]),
            self.size,
            rng,
            scale=self.scale,
            ratio=self.ratio,
            resample=self.resample,
        )
        image = transforms.random_flip(image, self.flip, rng)
        if self.rand_augment is not None:
            image = self.rand_augment(image, rng)
        elif self.color_jitter:
            image = transforms.colour_jitter(image, self.color_jitter, rng)
        array = transforms.normalise(image, self.mean, self.std)
        array = transforms.random_erase(array, self.erase, rng, mode=self.erase_mode)
        return {"image": array, "label": np.int32(example["label"])}


class ImageEval:
    """Resize the shorter side to `size / crop_ratio`, take the middle, normalise.

    Args:
      size: side of the result in pixels.
      crop_ratio: side of the crop over the shorter side of the resized image.
      interpolation: filter of the resize.
      mean: channel means on the scale 0..1.
      std: channel standard deviations on the scale 0..1.
    """

    random = False

    def __init__(
        self,
        size: int = 224,
        crop_ratio: float = 0.875,
        interpolation: str = "bicubic",
        mean: tuple = transforms.IMAGENET_MEAN,
        std: tuple = transforms.IMAGENET_STD,
    ):
        self.size, self.mean, self.std = _check_size(size), mean, std
        if not 0 < crop_ratio <= 1:
            raise RecipeError(f"pipeline.crop_ratio={crop_ratio}: must be in (0, 1]")
        self.resized = math.floor(size / crop_ratio)
        self.resample = transforms.interpolation(interpolation)

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        image = transforms.to_rgb(example["image"])
        image = transforms.resize_shorter(image, self.resized, self.resample)
        image = transforms.centre_crop(image, self.size)
        array = transforms.normalise(image, self.mean, self.std)
        return {"image": array, "label": np.int32(example["label"])}


class SmallImages:
    """Enlarge small images, such as digits, to a model's input; optionally shift and rotate.

    Args:
      size: side of the result in pixels; images are stretched to it.
      shift: largest random shift, relative to the side; training only.
      rotation: largest random rotation in degrees; training only.
      interpolation: filter of the resize.
      mean: channel means on the scale 0..1.
      std: channel standard deviations on the scale 0..1.
    """

    def __init__(
        self,
        size: int = 48,
        shift: float = 0.0,
        rotation: float = 0.0,
        interpolation: str = "bicubic",
        mean: tuple = (0.5, 0.5, 0.5),
        std: tuple = (0.5, 0.5, 0.5),
    ):
        self.size, self.mean, self.std = _check_size(size), mean, std
        self.shift, self.rotation = shift, rotation
        self.random = bool(shift or rotation)
        self.resample = transforms.interpolation(interpolation)

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        image = transforms.to_rgb(example["image"]).resize((self.size,) * 2, self.resample)
        if self.random and rng is not None:
            image = transforms.random_affine(image, rng, shift=self.shift, rotation=self.rotation)
        array = transforms.normalise(image, self.mean, self.std)
        return {"image": array, "label": np.int32(example["label"])}


def _check_size(size):
    if size < 1:
        raise RecipeError(f"pipeline.size={size}: must be at least 1")
    return size


def _check_share(name, value):
    if not 0 <= value <= 1:
        raise RecipeError(f"pipeline.{name}={value}: must be in [0, 1]")
    return value


def _check_range(name, value):
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise RecipeError(f"pipeline.{name}={value!r}: must be two growing positive numbers")
    return tuple(value)
