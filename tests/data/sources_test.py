# SPDX-License-Identifier: Apache-2.0
"""Real data: digits, prepared TensorFlow Datasets, folders of images."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from attnjax.data import sources
from attnjax.data.iterator import eval_batches, train_iterator
from attnjax.errors import RecipeError
from attnjax.recipe import Data

JPEG_ERROR = 12
"""Largest mean difference that a quality-95 JPEG of a photo may have, in grey levels of 255."""


def test_digits_split_is_stratified_disjoint_and_fixed():
    train, test = sources.Digits("train"), sources.Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train.ids, *test.ids]) == list(range(1797))
    shares = [
        np.bincount([int(s[i]["label"]) for i in range(len(s))]) / len(s) for s in (train, test)
    ]
    np.testing.assert_allclose(*shares, atol=0.003)
    np.testing.assert_array_equal(test.ids, sources.Digits("test").ids)
    assert not np.array_equal(test.ids, sources.Digits("test", seed=1).ids)
    digits = datasets.load_digits()
    example = test[5]
    np.testing.assert_array_equal(
        np.rint(example["image"][..., 0] * (16 / 255)), digits.images[test.ids[5]]
    )
    assert example["label"] == digits.target[test.ids[5]]
    assert example["image"].dtype == np.uint8 and example["image"].shape == (8, 8, 1)


def test_digits_refuse_an_unknown_split():
    with pytest.raises(RecipeError, match="did you mean 'train'"):
        sources.Digits("trian")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder made of the two photos that scikit-learn ships."""
    root = tmp_path_factory.mktemp("photos")
    with warnings.catch_warnings():
        # Some scikit-learn releases leave the file of a bundled photo to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        pictures = {name: datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for split, count in (("train", 3), ("val", 1)):
        for name, picture in pictures.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                crop = Image.fromarray(picture[60 * number :, : 640 - 40 * number])
                crop.resize((160, 120)).save(folder / f"{number:03d}.JPEG", quality=95)
    (root / "train" / "china" / ".hidden.jpg").write_text("not an image")
    (root / "train" / "china" / "notes.txt").write_text("not an image")
    Image.fromarray(pictures["flower"]).convert("L").save(root / "train" / "flower" / "grey.png")
    return root, pictures


def test_image_folder(photos):
    root, pictures = photos
    train, val = sources.ImageFolder(str(root)), sources.ImageFolder(str(root), "val")
    assert (len(train), len(val)) == (7, 2)
    assert train.classes == ["china", "flower"] and train.num_classes == 2
    assert [int(train[i]["label"]) for i in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert train.locate(0).endswith("train/china/000.JPEG")
    example = train[0]
    assert example["image"].shape == (120, 160, 3) and example["image"].dtype == np.uint8
    whole = np.asarray(Image.fromarray(pictures["china"]).resize((160, 120)))
    assert np.mean(np.abs(example["image"].astype(int) - whole)) < JPEG_ERROR
    assert train[6]["image"].shape == (427, 640, 3)  # grey images get three channels


def test_image_folder_through_training_and_evaluation(photos):
    root, _ = photos
    source = {"name": "image_folder", "root": str(root)}
    it = train_iterator(Data(source, {"name": "image_train", "size": 32}), 0, 4)
    batch = next(it)
    it.close()
    assert batch["image"].shape == (4, 32, 32, 3) and np.isfinite(batch["image"]).all()
    rows = list(
        eval_batches(Data(source | {"split": "val"}, {"name": "image_eval", "size": 32}), 4)
    )
    assert rows[0]["label"][rows[0]["valid"]].tolist() == [0, 1]


def test_classes_of_a_smaller_split_keep_their_numbers(photos, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "val" / "c").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "c" / "x.png")
    assert sources.ImageFolder(str(tmp_path), "val")[0]["label"] == 2
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(RecipeError, match="class 'd' is not in"):
        sources.ImageFolder(str(tmp_path), "val")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ((), r"no folder .*train, expected .*<class>/<image>"),
        (("val/a",), r"no folder .*train, .* holds val"),
        (("train",), "no class folder in"),
        (("train/a",), r"train/a: no image in it"),
    ],
)
def test_missing_images_are_one_clear_line(tmp_path, folders, message):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(RecipeError, match=message) as caught:
        sources.ImageFolder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_environment_variables_in_paths(photos, monkeypatch):
    monkeypatch.setenv("PHOTOS", str(photos[0]))
    assert len(sources.ImageFolder("$PHOTOS")) == 7


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set that TensorFlow Datasets prepares as array_record, without TensorFlow."""
    import tensorflow_datasets as tfds

    class AttnjaxStripes(tfds.core.GeneratorBasedBuilder):
        # As in a loose script: for a class in a package tfds 4.9.10 imports importlib_resources,
        # which it does not require on recent Pythons.
        __module__ = "stripes"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=4),
                    "note": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(6)}

        def _generate_examples(self, count):
            for i in range(count):
                file = io.BytesIO()  # encoded, as real data arrive; arrays would need TensorFlow
                Image.new("RGB", (8, 8), (10 * i,) * 3).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 4, "note": f"number {i}"}

    folder = tmp_path_factory.mktemp("tfds")
    builder = AttnjaxStripes(data_dir=str(folder), file_format="array_record")
    with warnings.catch_warnings():
        # Preparation is the user's own step; what tfds warns about in it is not ours.
        warnings.simplefilter("ignore")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return folder


def test_prepared_tfds(prepared):
    source = sources.TensorFlowDatasets("attnjax_stripes", "train", str(prepared))
    assert len(source) == 20 and source.num_classes == 4
    values = sorted(
        (int(e["image"][0, 0, 0]), int(e["label"])) for e in map(source.__getitem__, range(20))
    )
    assert values == [(10 * i, i % 4) for i in range(20)]
    assert len(sources.TensorFlowDatasets("attnjax_stripes", "train[:25%]", str(prepared))) == 5


def test_prepared_tfds_in_batches_with_and_without_workers(prepared):
    source = {"name": "tfds", "dataset": "attnjax_stripes", "data_dir": str(prepared)}
    batches = []
    for workers in (0, 1):
        it = train_iterator(Data(source, {"name": "arrays"}, workers=workers), 0, 10)
        batches.append([next(it) for _ in range(2)])
        it.close()
    for left, right in zip(*batches, strict=True):
        assert left.keys() == {"image", "label", "index"} and left["image"].dtype == np.uint8
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    assert sorted(np.concatenate([b["index"] for b in batches[0]])) == list(range(20))


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("mnist", "train", r"no array_record files of it in .*file_format='array_record'\).downl"),
        ("attnjax_stripes", "validation", r"has no such split; \(known: test, train\)"),
        ("attnjax_strips", "train", "knows no such data set"),
    ],
)
def test_what_is_not_prepared_is_one_clear_line(prepared, dataset, split, message):
    with pytest.raises(RecipeError, match=message) as caught:
        sources.TensorFlowDatasets(dataset, split, str(prepared))
    assert "\n" not in str(caught.value) and str(prepared) in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sources.ImageFolder("nowhere", on_error="ignore"),
        lambda: sources.TensorFlowDatasets("mnist", on_error="skipp"),
    ],
)
def test_on_error_takes_two_values(make):
    with pytest.raises(RecipeError, match="raise, skip"):
        make()


def test_data_imports_neither_tensorflow_nor_torch():
    code = (
        "import sys, attnjax.data, attnjax.data.sources, attnjax.data.synthetic;"
        "light = not {'grain', 'jax', 'tensorflow_datasets', 'sklearn'} & set(sys.modules);"
        "import attnjax.data.iterator, attnjax.data.pipelines, tensorflow_datasets;"
        "assert light and not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
