# SPDX-License-Identifier: Apache-2.0
"""Synthetic sequences have the answers, and need the context, that they say."""

import numpy as np
import pytest

from attnjax.data import sequences
from attnjax.data.sequences import ListOps, MovingAverage, Needle, Pathfinder
from attnjax.errors import RecipeError

SMALL = {
    Needle: {"length": 32},
    MovingAverage: {"length": 24, "span": 5},
    ListOps: {"length": 60, "shortest": 20},
    Pathfinder: {},
}


@pytest.mark.parametrize("source", SMALL, ids=lambda s: s.__name__)
def test_examples_are_pure_functions_of_seed_split_and_index(source):
    make = lambda **change: source(**SMALL[source], **change)
    first, again = make()[7], make()[7]
    others = [make(seed=1)[7], make(split="test")[7], make()[8]]
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        assert value.dtype in (np.int32, np.float32, bool)
    name = "tokens" if "tokens" in first else "values"
    assert all((first[name] != other[name]).any() for other in others)


def test_needle_lies_where_it_says():
    source = Needle(length=64, classes=4)
    seen = set()
    for index in range(200):
        example = source[index]
        tokens, distance = example["tokens"], int(example["distance"])
        seen.add(distance)
        assert tokens[-1] == 9 and tokens[63 - distance] == 5 + example["label"]
        assert (tokens > 4).sum() == 2 and tokens.min() >= 1 and tokens.max() < source.vocab
    assert seen == {1, 2, 4, 8, 16, 32}


def test_needle_out_of_context_cannot_be_known():
    source = Needle(length=64, context=8)
    # Distances 1, 2 and 4 of six are within 8 tokens; the others leave a guess among four.
    assert source.ceiling == pytest.approx(3 / 6 + 3 / 6 / 4)
    for index in range(50):
        example = source[index]
        assert example["tokens"].shape == (8,)
        assert (example["tokens"] > 4).sum() == 1 + (example["distance"] < 8)
    assert Needle(length=64, distance=16)[3]["distance"] == 16
    assert Needle(length=64).ceiling == 1


@pytest.mark.parametrize("distribution", sequences.DISTRIBUTIONS)
def test_moving_average_and_its_floor(distribution):
    span = 8
    source = MovingAverage(length=200, span=span, distribution=distribution)
    errors = {reach: [] for reach in (1, 4, 8)}
    for index in range(100):
        example = source[index]
        values, target = example["values"][:, 0], example["target"][:, 0]
        assert list(np.flatnonzero(~example["scored"])) == list(range(span - 1))
        for t in (span - 1, 50, 199):
            assert target[t] == pytest.approx(values[t - span + 1 : t + 1].mean(), abs=1e-5)
        for reach, found in errors.items():
            sums = np.convolve(values, np.ones(reach))[: len(values)]
            found.append(np.square(sums / span - target)[example["scored"]].mean())
    for reach, found in errors.items():
        floor = sequences.moving_average_floor(span, reach)
        assert floor == pytest.approx((span - reach) / span**2)
        assert np.mean(found) == pytest.approx(floor, rel=0.05, abs=1e-9)


def test_listops_evaluates_by_hand():
    assert sequences.evaluate(["[MAX", "2", "9", "[MIN", "4", "7", "]", "0", "]"]) == 9
    assert sequences.evaluate(["[SM", "5", "6", "[MED", "1", "4", "8", "9", "]", "]"]) == 7
    assert sequences.evaluate(["3"]) == 3
    for wrong in ("[MAX 2", "] 2", "[MAX ]", "2 3", "[SUM 1 ]", "12"):
        with pytest.raises(ValueError, match=r"complete|bracket|digit"):
            sequences.evaluate(wrong.split())


def test_listops_has_the_lengths_and_classes_it_should():
    source = ListOps(size=200, length=80, shortest=30, depth=5)
    words = {number: word for word, number in sequences.LISTOPS_TOKENS.items()}
    labels = set()
    for index in range(200):
        tokens = source[index]["tokens"]
        used = tokens[tokens > 0]
        assert (tokens[: len(used)] > 0).all() and tokens.max() < source.vocab
        assert len(used) <= 80
        expression = [words[token] for token in used]
        assert sequences.evaluate(expression) == source[index]["label"]
        depth = np.cumsum([(w[0] == "[") - (w == "]") for w in expression])
        assert depth.max() <= 6
        labels.add(int(source[index]["label"]))
    assert labels == set(range(10))


@pytest.mark.parametrize("side", [32, 48])
def test_pathfinder_truth_can_be_read_off_the_picture(side):
    """Curves lie four pixels apart and gaps are one wide: growing by one joins what belongs."""
    from scipy import ndimage

    source = Pathfinder(side=side)
    square, labels = np.ones((3, 3)), []
    for index in range(60):
        example = source[index]
        image = example["values"].reshape(side, side)
        assert set(np.unique(image)) == {0.0, 0.5, 1.0}
        dots = ndimage.binary_erosion(image == 1, square)
        assert dots.sum() == 2
        joined, _ = ndimage.label(ndimage.binary_dilation((image == 0.5) | dots, square))
        first, second = joined[dots]
        assert (first == second) == example["label"], index
        labels.append(int(example["label"]))
    assert 0.25 < np.mean(labels) < 0.75


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (Needle, {"length": 8, "distance": 8}, "source.distance=8"),
        (Needle, {"length": 8, "context": 9}, "source.context=9"),
        (MovingAverage, {"length": 8, "span": 9}, "source.span=9"),
        (MovingAverage, {"distribution": "norml"}, "did you mean 'normal'"),
        (ListOps, {"arguments": 1}, "arguments=1"),
        (Pathfinder, {"side": 8}, "source.side=8"),
        (Needle, {"split": "tset"}, "did you mean 'test'"),
    ],
)
def test_wrong_arguments_are_refused(source, arguments, message):
    with pytest.raises(RecipeError, match=message):
        source(**arguments)
