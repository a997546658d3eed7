# SPDX-License-Identifier: Apache-2.0
"""Data made on the fly with a known answer: every example is a pure function of (seed, index)."""

import numpy as np

from attnjax.data.sources import check_split
from attnjax.errors import RecipeError

_STREAMS = {"train": 0, "test": 1}  # splits draw from unrelated random streams
_NOISE = 0.5


class InformationExchange:
    """Two token sets that each carry one bit; the label is their exclusive or.

    fine[i]   ~ N(0, 0.5^2), plus (2a - 1) sin(9t), t = linspace(-1, 1, 48), on one of 16 patches
    coarse[j] ~ N(0, 0.5^2), plus (2b - 1) sin(7t), t = linspace(1, -1, 192), on one of 4 patches
    label = a xor b

    Branches that are only averaged are additive in a and b and stay at or below 75 % accuracy;
    branches that exchange information can be right every time.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
    """

    num_classes = 2

    def __init__(self, split: str = "train", seed: int = 0, size: int = 131_072):
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._fine = np.sin(9 * np.linspace(-1, 1, 48)).astype(np.float32)
        self._coarse = np.sin(7 * np.linspace(1, -1, 192)).astype(np.float32)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        a, b = rng.integers(2, size=2)
        noise = _NOISE * rng.standard_normal(16 * 48 + 4 * 192, np.float32)
        fine, coarse = noise[: 16 * 48].reshape(16, 48), noise[16 * 48 :].reshape(4, 192)
        fine[rng.integers(16)] += (2 * a - 1) * self._fine
        coarse[rng.integers(4)] += (2 * b - 1) * self._coarse
        return {"fine": fine, "coarse": coarse, "label": np.int32(a ^ b)}


class InformationExchangeImages:
    """The image form: one bit in the finest texture, one in the coarsest shade, label = a xor b.

    The fine bit is the phase of a checkerboard with cells of 2 pixels inside one patch of 12 x 12
    (zero mean, so a low-pass filter removes it); the coarse bit is the sign of one wide Gaussian
    blob (which a high-pass filter removes).

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      pixels: side of the image, a multiple of 12.
      noise: standard deviation of the pixel noise.
    """

    num_classes = 2

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        pixels: int = 48,
        noise: float = 0.25,
    ):
        if pixels < 12 or pixels % 12:
            raise RecipeError(f"source.pixels={pixels}: must be a positive multiple of 12")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._pixels, self._noise = pixels, noise
        cell = np.arange(12) // 2
        self._checker = 1.0 - 2.0 * ((cell[:, None] + cell[None, :]) % 2)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        a, b = rng.integers(2, size=2)
        n = self._pixels
        image = rng.normal(0, self._noise, (n, n))
        y, x = 12 * rng.integers(n // 12, size=2)
        image[y : y + 12, x : x + 12] += (2 * a - 1) * self._checker
        grid, width = np.arange(n), n / 6
        row, column = rng.uniform(n / 4, 3 * n / 4, size=2)
        blob = np.exp(-(((grid - row) / width) ** 2) / 2)[:, None]
        image += (2 * b - 1) * blob * np.exp(-(((grid - column) / width) ** 2) / 2)[None, :]
        image = np.repeat(image[..., None], 3, axis=-1).astype(np.float32)
        return {"image": image, "label": np.int32(a ^ b)}


class SyntheticImages:
    """Noisy colour patterns, one per class: full-size recipes without data, and benchmarks.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      pixels: side of the image.
      classes: number of classes.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 4096,
        pixels: int = 256,
        classes: int = 1000,
    ):
        if pixels < 1 or classes < 1:
            raise RecipeError("source.pixels and source.classes must be at least 1")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._pixels, self.num_classes = pixels, classes

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        label = int(rng.integers(self.num_classes))
        pattern = np.random.default_rng((self._seed, label)).integers(0, 192, (4, 4, 3), np.uint8)
        cell = np.arange(self._pixels) * 4 // self._pixels
        image = pattern[:, cell][cell]
        image += np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape) & 63
        return {"image": image, "label": np.int32(label)}


def stream(split: str, seed: int, size: int) -> tuple[int, int, int]:
    """Return the random stream of a split, the seed as numpy takes it, and the size.

    Raises:
      RecipeError: the split is unknown or the size below 1.
    """
    check_split(split, tuple(_STREAMS))
    if size < 1:
        raise RecipeError(f"source.size={size}: must be at least 1")
    return _STREAMS[split], seed % 2**64, size
