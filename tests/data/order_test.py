# SPDX-License-Identifier: Apache-2.0
"""The training sequence: permutations, repeats, shards."""

import numpy as np
import pytest

from attnjax.data import order
from attnjax.errors import RecipeError


def epoch(sequence, number):
    start = number * sequence.epoch_length
    return [sequence[start + i] for i in range(sequence.epoch_length)]


@pytest.mark.parametrize("size", [1, 2, 37, 1000])
def test_every_epoch_is_another_permutation(size):
    sequence = order.Order(size, seed=3)
    epochs = [epoch(sequence, e) for e in range(3)]
    for entries in epochs:
        assert sorted(entries) == list(range(size))
    if size > 2:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_only():
    a, b, c = (order.Order(500, seed) for seed in (7, 7, 8))
    assert epoch(a, 5) == epoch(b, 5) != epoch(c, 5)
    # An epoch of one seed must not be an epoch of the neighbouring seed.
    assert epoch(a, 1) != epoch(c, 0)


def test_negative_and_huge_seeds_work():
    assert sorted(epoch(order.Order(9, -1), 0)) == list(range(9))
    assert sorted(epoch(order.Order(9, 2**70), 0)) == list(range(9))


@pytest.mark.parametrize(("size", "kept"), [(1797, 1792), (256, 256), (300, 256), (100, 100)])
def test_repeated_augmentation_keeps_the_first_entries_of_a_repeated_permutation(size, kept):
    plain, repeated = order.Order(size, 0), order.Order(size, 0, repeats=3)
    assert repeated.epoch_length == kept
    for number in (0, 1):
        expected = np.repeat(epoch(plain, number), 3)[:kept]
        assert epoch(repeated, number) == expected.tolist()
    counts = np.bincount(epoch(repeated, 0), minlength=size)
    assert np.sum(counts == 3) == kept // 3
    assert np.sum(counts > 0) == -(-kept // 3)


def test_every_copy_has_its_own_randomness():
    sequence = order.Order(1000, 0, repeats=3)
    assert sequence[0] == sequence[1] == sequence[2]
    draws = [sequence.generator(position).random() for position in range(3)]
    assert len(set(draws)) == 3
    assert draws == [sequence.generator(position).random() for position in range(3)]


@pytest.mark.parametrize("batch", [1, 6, 8, 48, 96, 129])
def test_rows_are_a_permutation_of_the_batch(batch):
    assert sorted(order.global_rows(batch)) == list(range(batch))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_blocks_of_rows_are_strided_shards(count):
    rows = order.global_rows(48)
    blocks = np.split(rows, count)
    remainders = [set((block % count).tolist()) for block in blocks]
    assert all(len(r) == 1 for r in remainders)
    assert set.union(*remainders) == set(range(count))


def test_copies_of_an_example_go_to_different_processes():
    sequence = order.Order(1024, 0, repeats=2)
    blocks = np.split(order.global_rows(64), 2)
    seen = [{sequence[position] for position in block} for block in blocks]
    assert seen[0] == seen[1] and len(seen[0]) == 32


def test_an_empty_source_is_refused():
    with pytest.raises(RecipeError, match="0 examples"):
        order.Order(0, 0)
