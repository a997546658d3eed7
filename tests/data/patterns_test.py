# SPDX-License-Identifier: Apache-2.0
"""Sequences for one pattern of attention have the answers, at the distances, that they say."""

import numpy as np
import pytest

from attnjax.data.patterns import (
    AssociativeRecall,
    CopyBack,
    Induction,
    PrefixCount,
    WindowPermutation,
)
from attnjax.errors import RecipeError


@pytest.mark.parametrize(
    "source", [WindowPermutation, AssociativeRecall, CopyBack, Induction, PrefixCount]
)
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


def test_copies_repeat_the_token_so_far_before():
    source = CopyBack(length=20, distance=6, symbols=5)
    tokens, scored = source[3].values()
    assert scored.tolist() == [place >= 6 for place in range(20)]
    np.testing.assert_array_equal(tokens[6:], tokens[:-6])
    assert tokens.min() >= 1 and tokens.max() < source.vocab_size and source.chance == 0.2


def test_pairs_are_told_before_they_are_completed_and_differ_between_examples():
    options = {"pairs": 4, "asks": 5, "firsts": 6, "seconds": 7}
    source, seen = Induction(**options), set()
    for index in range(100):
        tokens, scored = source[index].values()
        assert tokens.shape == scored.shape == (22,) and tokens.max() < source.vocab_size
        told = dict(zip(tokens[0:12:3].tolist(), tokens[1:12:3].tolist(), strict=True))
        assert len(told) == len(set(told.values())) == 4
        np.testing.assert_array_equal(tokens[0:12:3], tokens[2:12:3])
        for place in np.flatnonzero(scored):
            assert told[int(tokens[place - 1])] == tokens[place]
        assert np.flatnonzero(scored).tolist() == [13, 15, 17, 19, 21]
        assert max(told) <= 6 < min(told.values())
        seen |= set(told.items())
    assert len(seen) == 6 * 7 and source.chance == 0.25
    echoed = Induction(**options, echoes=True)[0]
    np.testing.assert_array_equal(echoed["tokens"], source[0]["tokens"])
    assert np.flatnonzero(echoed["scored"]).tolist() == [2, 5, 8, 11, 13, 15, 17, 19, 21]


def test_answers_say_whether_most_bits_so_far_were_ones():
    source = PrefixCount(blocks=3, bits=4)
    answers = []
    for index in range(40):
        tokens, scored = source[index].values()
        assert tokens.shape == (source.length,) and scored.sum() == 3
        for place in np.flatnonzero(scored):
            bits = tokens[:place][tokens[:place] <= 2] - 1
            assert tokens[place - 1] == 3
            assert tokens[place] == (5 if 2 * bits.sum() > len(bits) else 4)
            answers.append(int(tokens[place]))
    assert 0.25 < answers.count(5) / len(answers) < 0.6


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        (WindowPermutation, {"length": 20, "distance": 8}, "length=20"),
        (WindowPermutation, {"symbols": 1}, "symbols=1"),
        (AssociativeRecall, {"values": 1}, "values=1"),
        (AssociativeRecall, {"distance": -1}, "distance=-1"),
        (CopyBack, {"distance": 32}, "distance=32"),
        (CopyBack, {"symbols": 1}, "symbols=1"),
        (Induction, {"firsts": 3}, "firsts=3: must be at least 4"),
        (Induction, {"seconds": 3}, "seconds=3"),
        (PrefixCount, {"bits": 0}, "bits=0"),
    ],
)
def test_refusals(source, options, named):
    with pytest.raises(RecipeError, match=named):
        source(**options)
