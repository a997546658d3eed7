# SPDX-License-Identifier: Apache-2.0
"""Pairs of sequences: known answers, files of texts, prepared Multi-News."""

import json
import warnings

import numpy as np
import pytest

from attnjax import data, recipe
from attnjax.data import BadRecord
from attnjax.data.pairs import CopySort, MultiNews, TextPairs
from attnjax.data.tokenizers import make_tokenizer
from attnjax.errors import RecipeError


@pytest.mark.parametrize("order", ["copy", "reverse", "sort"])
def test_answers_follow_from_sources(order):
    source = CopySort(order=order, length=9, symbols=5)
    assert source.vocab_size == 8
    for index in range(20):
        example = source[index]
        read, answer = example["source"].tolist(), example["target"].tolist()
        assert answer == {"copy": read, "reverse": read[::-1], "sort": sorted(read)}[order] + [2]
        assert min(read) >= 3 and max(read) < 8
    np.testing.assert_array_equal(source[3]["source"], CopySort(length=9, symbols=5)[3]["source"])
    for other in (CopySort("test", length=9, symbols=5), CopySort(length=9, symbols=5, seed=1)):
        assert (other[3]["source"] != source[3]["source"]).any()


@pytest.mark.parametrize(
    "options", [{"split": "dev"}, {"size": 0}, {"length": 0}, {"order": "shuffle"}], ids=str
)
def test_impossible_sources_are_refused(options):
    with pytest.raises(RecipeError, match=f"source.{next(iter(options))}"):
        CopySort(**options)


def test_files_of_pairs(tmp_path):
    """Lines of JSON or two columns; texts are cut, targets end, batches are padded."""
    lines = [{"document": "abcdefgh", "summary": "ab"}, {"document": "x", "summary": "longer"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "test.tsv").write_text("naïve\tn\n")
    section = recipe.Data(
        source={"name": "text_pairs", "root": str(tmp_path), "split": "train", "lengths": (6, 4)}
    )
    batch = next(data.eval_batches(section, batch=2))
    text = make_tokenizer("bytes")
    assert [text.decode(row) for row in batch["source"]] == ["abcdef", "x"]
    assert batch["source"][1].tolist() == [4 + ord("x"), 0, 0, 0, 0, 0]
    assert batch["target"][0].tolist() == [4 + ord("a"), 4 + ord("b"), 2, 0]
    assert text.decode(batch["target"][1]) == "long"
    example = TextPairs(str(tmp_path), "test")[0]
    assert example["source"].shape == (4096,) and text.decode(example["source"]) == "naïve"


def test_what_is_wrong_with_files_of_pairs_is_said(tmp_path):
    with pytest.raises(RecipeError, match=r"no file .*train\.jsonl or .*train\.tsv"):
        TextPairs(str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"document": "a", "target": "b"}\n')
    (tmp_path / "test.tsv").write_text("one column\n")
    with pytest.raises(RecipeError, match="lengths="):
        TextPairs(str(tmp_path), lengths=(4,))
    for split, message in (("train", "no field summary"), ("test", "1 columns")):
        section = recipe.Data(source={"name": "text_pairs", "root": str(tmp_path), "split": split})
        with pytest.raises(BadRecord, match=message):
            next(data.eval_batches(section, batch=1))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set with the fields of Multi-News, prepared as array_record files."""
    import tensorflow_datasets as tfds

    class AttnjaxNews(tfds.core.GeneratorBasedBuilder):
        __module__ = "__main__"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            fields = {"document": tfds.features.Text(), "summary": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"document": f"article {i}", "summary": f"{i}"}

    folder = tmp_path_factory.mktemp("tfds")
    builder = AttnjaxNews(data_dir=str(folder), file_format="array_record")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return folder


def test_prepared_news(prepared):
    source = MultiNews(data_dir=str(prepared), dataset="attnjax_news", lengths=(16, 4))
    text = make_tokenizer("bytes")
    pairs = {text.decode(source[i]["source"]): text.decode(source[i]["target"]) for i in range(3)}
    assert pairs == {f"article {i}": f"{i}" for i in range(3)} and len(source) == 3
    assert "attnjax_news" in source.locate(0)
    with pytest.raises(RecipeError, match=r"multi_news.*download_and_prepare"):
        MultiNews(data_dir=str(prepared))
