# SPDX-License-Identifier: Apache-2.0
"""Sequences for one pattern of attention have the answers, at the distances, that they say."""

import numpy as np
import pytest

from attnjax.data.patterns import AssociativeRecall, WindowPermutation
from attnjax.errors import RecipeError


@pytest.mark.parametrize("source", [WindowPermutation, AssociativeRecall])
def test_examples_are_pure_functions_of_seed_split_and_index(source):
    first, again = source()[7], source()[7]
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        assert value.dtype in (np.int32, bool)
    for other in (source(seed=1)[7], source(split="test")[7], source()[8]):
        assert (first["tokens"] != other["tokens"]).any()


def test_every_answer_of_the_permutation_is_exactly_so_far_away():
    source = WindowPermutation(length=32, distance=4, symbols=5)
    places = source.permutation
    assert sorted(places) == list(range(32))
    assert set(np.abs(places - np.arange(32))) == {4}
    example = source[3]
    np.testing.assert_array_equal(example["target"], example["tokens"][places])
    assert example["scored"].all() and source.chance == 0.2
    assert example["tokens"].min() >= 1 and example["tokens"].max() < source.vocab_size


@pytest.mark.parametrize("distance", [0, 5, 40])
def test_recalled_values_are_those_of_the_pairs_and_no_nearer_than_the_distance(distance):
    keys, values = 3, 4
    source = AssociativeRecall(keys=keys, values=values, distance=distance)
    for index in range(20):
        tokens, scored = source[index].values()
        assert tokens.shape == scored.shape == (source.length,)
        assert tokens.max() < source.vocab_size and scored.sum() == keys
        pairs = tokens[:keys] - (2 + keys + values)
        held = {int(pair) // values: int(pair) % values for pair in pairs}
        assert sorted(held) == list(range(keys))
        (filler,) = set(tokens[keys : keys + distance]) or {1}
        assert filler == 1
        asked = []
        for place in np.flatnonzero(scored):
            key, value = tokens[place - 1] - 2, tokens[place] - (2 + keys)
            assert held[int(key)] == value
            assert place - 1 - keys >= distance
            asked.append(int(key))
        assert sorted(asked) == list(range(keys))


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        (WindowPermutation, {"length": 20, "distance": 8}, "length=20"),
        (WindowPermutation, {"symbols": 1}, "symbols=1"),
        (AssociativeRecall, {"values": 1}, "values=1"),
        (AssociativeRecall, {"distance": -1}, "distance=-1"),
    ],
)
def test_refusals(source, options, named):
    with pytest.raises(RecipeError, match=named):
        source(**options)
