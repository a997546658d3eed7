# SPDX-License-Identifier: Apache-2.0
"""Pairs of pictures for super-resolution: folders as SR3 lays them out, digits, photographs.

Every source is a sequence of dicts of uint8 arrays `[y, x, c]`: `high`, and `low`, its small
version enlarged to the same size. Pictures are made small and large again by Pillow's bicubic
filter, as the published code of SR3 does (arXiv 2104.07636). Nothing is downloaded.
"""

import os
import pathlib

import numpy as np
from PIL import Image

from attnjax.data.records import check_on_error
from attnjax.data.sources import Digits, check_split
from attnjax.errors import RecipeError

_LISTED = 5
"""Names of files shown in a message."""


class PictureFolders:
    """`hr_<large>`, `lr_<small>` and `sr_<small>_<large>` with PNG files of the same names.

    `sr` holds the pictures of `lr`, enlarged. Without `sr` they are enlarged here; without `lr`
    nothing is missing. SR3 trains on such folders of FFHQ and evaluates on those of CelebA-HQ.

    Args:
      root: folder that holds them, such as ffhq_16_128; `~` and environment variables are expanded.
      small: side of the small pictures.
      large: side of the large ones.
      limit: only so many, in the order of names; 0: all.
      on_error: "raise", or "skip" to replace pictures that cannot be read or have another size.

    Raises:
      RecipeError: a folder is missing or empty, or folders hold different names.
    """

    def __init__(
        self, root: str, small: int = 16, large: int = 128, limit: int = 0, on_error: str = "raise"
    ):
        self.on_error = check_on_error(on_error)
        if not 0 < small < large:
            raise RecipeError(f"source.small={small}, large={large}: must be positive and grow")
        if limit < 0:
            raise RecipeError(f"source.limit={limit}: must be at least 0")
        self._small, self._large = small, large
        base = pathlib.Path(os.path.expandvars(root)).expanduser()
        folders = {
            "hr": base / f"hr_{large}", "lr": base / f"lr_{small}",
            "sr": base / f"sr_{small}_{large}",
        }  # fmt: skip
        found = {kind: _names(folder) for kind, folder in folders.items() if folder.is_dir()}
        if "hr" not in found or not {"lr", "sr"} & set(found):
            raise RecipeError(
                f"source.root={root!r}: expected {folders['hr']} and {folders['sr']} (or "
                f"{folders['lr']}) with PNG files of the same names, {_present(base)}"
            )
        for kind, names in found.items():
            if not names:
                raise RecipeError(f"{folders[kind]}: no PNG file in it")
            for lacks, has in (("hr", kind), (kind, "hr")):
                missing = sorted(set(found[has]) - set(found[lacks]))
                if missing:
                    raise RecipeError(
                        f"{folders[lacks]} lacks {len(missing)} of the pictures in "
                        f"{folders[has]}: {', '.join(missing[:_LISTED])}"
                    )
        self._low = "sr" if "sr" in found else "lr"
        self._folders = folders
        self._files = found["hr"][: limit or None]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        low = self._read(self._low, index, self._small if self._low == "lr" else self._large)
        if self._low == "lr":
            low = resize(low, self._large)
        return {"low": low, "high": self._read("hr", index, self._large)}

    def _read(self, kind, index, side):
        path = self._folders[kind] / self._files[index]
        with Image.open(path) as image:
            if image.size != (side, side):
                raise ValueError(f"{path} is {image.width}x{image.height}, expected {side}x{side}")
            return np.asarray(image.convert("RGB"))

    def locate(self, index: int) -> str:
        """Return the path of a large picture."""
        return str(self._folders["hr"] / self._files[index])


class DigitPairs:
    """Handwritten digits, 4 x 4 to 8 x 8 in one channel, of scikit-learn.

    Args:
      split: "train" (1,437) or "test" (360).
      seed: decides the split.
    """

    def __init__(self, split: str = "train", seed: int = 0):
        self._digits = Digits(split, seed)

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return pair(self._digits[index]["image"], 4)


class PhotoPairs:
    """Crops of the two photographs of scikit-learn (a temple and a flower), such as 16 to 64.

    The left of the photographs is for training, in overlapping crops; the right for testing, in
    crops that do not overlap.

    Args:
      split: "train" or "test".
      small: side of the small crops.
      large: side of the large ones.
      stride: pixels between crops for training.

    Raises:
      RecipeError: a size is out of range.
    """

    def __init__(self, split: str = "train", small: int = 16, large: int = 64, stride: int = 16):
        from sklearn import datasets

        check_split(split, ("train", "test"))
        photos = datasets.load_sample_images().images
        rows, columns = photos[0].shape[:2]
        border = columns * 7 // 10
        if not 0 < small < large or large > columns - border or stride < 1:
            raise RecipeError(
                f"source.small={small}, large={large}, stride={stride}: must be positive, small "
                f"below large, large at most {columns - border}"
            )
        left, right = (0, border) if split == "train" else (border, columns)
        step = stride if split == "train" else large
        self._photos, self._small, self._large = photos, small, large
        self._places = [
            (photo, row, column)
            for photo in range(len(photos))
            for row in range(0, rows - large + 1, step)
            for column in range(left, right - large + 1, step)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        photo, row, column = self._places[index]
        crop = self._photos[photo][row : row + self._large, column : column + self._large]
        return pair(crop, self._small)


class PicturePairs:
    """The pipeline of pairs: mirror both left and right, map pixels to [-1, 1].

    Args:
      flip: probability of mirroring; training only.

    Raises:
      RecipeError: it is no probability.
    """

    def __init__(self, flip: float = 0.0):
        if not 0 <= flip <= 1:
            raise RecipeError(f"pipeline.flip={flip}: must be in [0, 1]")
        self.flip = flip
        self.random = flip > 0

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        pictures = {name: example[name] for name in ("low", "high")}
        if rng is not None and self.random and rng.random() < self.flip:
            pictures = {name: array[:, ::-1] for name, array in pictures.items()}
        scale = lambda x: np.ascontiguousarray(x, np.float32) * np.float32(2 / 255) - 1
        return {name: scale(array) for name, array in pictures.items()}


class Pictures:
    """The pipeline of labelled pictures as they are: enlarge, mirror, map pixels to [-1, 1].

    Latents, floating numbers of any range, are mirrored only.

    Args:
      size: side that pictures of pixels get, by Pillow's bicubic filter; 0: the one they have.
      flip: probability of mirroring; training only.

    Raises:
      RecipeError: a value is out of range.
    """

    def __init__(self, size: int = 0, flip: float = 0.0):
        if not 0 <= flip <= 1:
            raise RecipeError(f"pipeline.flip={flip}: must be in [0, 1]")
        if size < 0:
            raise RecipeError(f"pipeline.size={size}: must be at least 0")
        self.size, self.flip = size, flip
        self.random = flip > 0

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        image = np.asarray(example["image"])
        if rng is not None and self.random and rng.random() < self.flip:
            image = image[:, ::-1]
        if image.dtype == np.uint8:
            image = resize(np.ascontiguousarray(image), self.size) if self.size else image
            image = image.astype(np.float32) * np.float32(2 / 255) - 1
        return {
            "image": np.ascontiguousarray(image, np.float32), "label": np.int32(example["label"]),
        }  # fmt: skip


def resize(array: np.ndarray, side: int) -> np.ndarray:
    """Return uint8 `[side, side, c]` of uint8 `[y, x, c]`, by Pillow's bicubic filter."""
    channels = array.shape[2]
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return resized.reshape(side, side, channels)


def pair(high: np.ndarray, small: int) -> dict[str, np.ndarray]:
    """Return `high`, uint8 `[y, y, c]`, and `low`, the same through `small` x `small` pixels."""
    high = np.ascontiguousarray(high)
    return {"low": resize(resize(high, small), len(high)), "high": high}


def _names(folder):
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(".png") and not entry.name.startswith(".")
    )


def _present(base):
    if not base.is_dir():
        return f"but there is no folder {base}"
    names = sorted(entry.name for entry in os.scandir(base))
    return f"found {', '.join(names[:_LISTED]) or 'nothing'} in {base}"
