# SPDX-License-Identifier: Apache-2.0
"""Real data sets by random access: scikit-learn digits, TensorFlow Datasets, folders of images.

Every source is a sequence of dicts of numpy arrays with `image` uint8 `[y, x, c]` and `label`,
where y and x may differ between examples. Nothing is downloaded; TensorFlow is never imported.
"""

import os
import pathlib

import numpy as np
from PIL import Image

from attnjax import registry
from attnjax.data.records import check_on_error
from attnjax.errors import RecipeError

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Digits:
    """Handwritten digits that ship with scikit-learn: 1,797 images of 8 x 8, ten classes.

    Args:
      split: "train" or "test"; classes keep their proportions in both.
      seed: decides the split, not the order.
      test_fraction: share of the test split.
    """

    num_classes = 10

    def __init__(self, split: str = "train", seed: int = 0, test_fraction: float = 0.2):
        from sklearn import datasets, model_selection

        check_split(split, ("train", "test"))
        if not 0 < test_fraction < 1:
            raise RecipeError(f"source.test_fraction={test_fraction}: must be between 0 and 1")
        digits = datasets.load_digits()
        train, test = model_selection.train_test_split(
            np.arange(len(digits.target)),
            test_size=test_fraction,
            random_state=seed,
            stratify=digits.target,
        )
        chosen = np.sort(train if split == "train" else test)
        self.ids = chosen
        # Pixels are counts 0..16.
        self._images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
        self._labels = digits.target[chosen].astype(np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self._images[index], "label": self._labels[index]}


class TensorFlowDatasets:
    """A data set that TensorFlow Datasets has prepared as array_record files.

    Args:
      dataset: such as "imagenet2012" or "cifar10/3.0.2".
      split: such as "train", "validation" or "train[:90%]".
      data_dir: folder of prepared data sets; "" takes $TFDS_DATA_DIR or ~/tensorflow_datasets.
      on_error: "raise", or "skip" to replace records that cannot be decoded.

    Raises:
      RecipeError: it is not prepared there; the message says how to do it.
    """

    def __init__(
        self, dataset: str, split: str = "train", data_dir: str = "", on_error: str = "raise"
    ):
        import tensorflow_datasets as tfds

        self.on_error = check_on_error(on_error)
        folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        folder = os.path.expanduser(os.path.expandvars(folder))
        try:
            builder = tfds.builder(dataset, data_dir=folder)
        except Exception as error:
            raise RecipeError(
                f"source.dataset={dataset!r}: TensorFlow Datasets knows no such data set "
                f"({type(error).__name__}), and none of that name is prepared in {folder}"
            ) from error
        present = list(builder.info.splits)
        try:
            self._records = builder.as_data_source(split=split)
        except Exception as error:
            if present and split.partition("[")[0] not in present:
                raise RecipeError(
                    f"source.split={split!r}: {dataset} in {folder} has no such split; "
                    f"{registry.nearest(split, present)}"
                ) from error
            raise RecipeError(
                f"source.dataset={dataset!r}: no array_record files of it in {folder} "
                f"({type(error).__name__}); prepare it once with tfds.builder({dataset!r}, "
                f"data_dir={folder!r}, file_format='array_record').download_and_prepare()"
            ) from error
        label = dict(builder.info.features.items()).get("label")
        self.num_classes = getattr(label, "num_classes", None)
        self._where = f"{builder.info.full_name} {split} in {folder}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._records[index]

    def locate(self, index: int) -> str:
        """Return the data set, split and folder a record comes from."""
        return self._where


class ImageFolder:
    """Images in `root/split/<class>/`, such as ImageNet as it is usually unpacked.

    Files and classes are sorted by name. Class ids count the class folders of `root/train` when it
    exists, else those of the split itself, so that all splits agree.

    Args:
      root: folder that holds the splits; `~` and environment variables are expanded.
      split: such as "train" or "val".
      on_error: "raise", or "skip" to replace files that cannot be decoded.

    Raises:
      RecipeError: a folder is missing or holds no image; the message says what was expected.
    """

    def __init__(self, root: str, split: str = "train", on_error: str = "raise"):
        self.on_error = check_on_error(on_error)
        base = pathlib.Path(os.path.expandvars(root)).expanduser()
        folder = base / split
        expected = f"expected {base}/{split}/<class>/<image>.jpeg (or png, ...)"
        if not folder.is_dir():
            present = _folders(base) if base.is_dir() else []
            hint = f"; {base} holds {', '.join(present)}" if present else ""
            raise RecipeError(f"source.root={root!r}: no folder {folder}, {expected}{hint}")
        names = _folders(folder)
        if not names:
            raise RecipeError(f"source.root={root!r}: no class folder in {folder}, {expected}")
        self.classes = _folders(base / "train") if (base / "train").is_dir() else names
        ids = {name: number for number, name in enumerate(self.classes)}
        self.num_classes = len(self.classes)
        self._folder = str(folder)
        self._files: list[str] = []
        labels = []
        for name in names:
            if name not in ids:
                raise RecipeError(
                    f"{folder / name}: class {name!r} is not in {base / 'train'} "
                    f"{registry.nearest(name, self.classes[:20])}"
                )
            files = sorted(
                entry.name
                for entry in os.scandir(folder / name)
                if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(".")
            )
            if not files:
                raise RecipeError(f"{folder / name}: no image in it, {expected}")
            self._files += [f"{name}/{file}" for file in files]
            labels += [ids[name]] * len(files)
        self._labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        with Image.open(self.locate(index)) as image:
            return {"image": np.asarray(image.convert("RGB")), "label": self._labels[index]}

    def locate(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self._folder, self._files[index])


def check_split(split: str, choices: tuple[str, ...]) -> str:
    """Return `split` when it is one of the choices, else raise RecipeError."""
    if split not in choices:
        raise RecipeError(f"source.split={split!r}: {registry.nearest(split, choices)}")
    return split


def _folders(path):
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
