# SPDX-License-Identifier: Apache-2.0
"""Balance of placements against dense counting and numbers worked out by hand."""

import time

import numpy as np
import pytest

from attnjax.benchmarks.long_context.balance import (
    CostModel,
    balance,
    rank_areas,
    remote_tokens,
    spread,
)
from attnjax.benchmarks.long_context.patterns import PATTERNS, Setting, draw
from attnjax.ops import mask


def contiguous(t, n):
    return np.arange(t).reshape(n, -1)


def zigzag(t, n):
    chunks = np.arange(t).reshape(2 * n, -1)
    return np.concatenate([chunks[:n], chunks[::-1][:n]], axis=1)


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_causal_masks_by_hand(n):
    t = 128 * n
    even = balance(mask.causal(), t, zigzag(t, n))
    assert even.area.max_over_mean == 1.0
    assert even.area.entropy == pytest.approx(1) and even.area.gini == pytest.approx(1 - 1 / n)
    # Rank n - 1 holds the last t / n rows: (t / n) (t - t / 2n) of t^2 / 2, up to the diagonal.
    c = t // n
    exact = c * (t - c) + c * (c + 1) / 2
    uneven = balance(mask.causal(), t, contiguous(t, n))
    assert uneven.area.max_over_mean == pytest.approx(exact * n / (t * (t + 1) / 2))
    assert uneven.area.max_over_mean == pytest.approx(2 - 1 / n, abs=1 / t)
    assert uneven.remote_fraction == pytest.approx(1)
    np.testing.assert_array_equal(
        remote_tokens(mask.causal(), t, contiguous(t, n)), c * np.arange(n)
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_equal_those_of_the_dense_mask(pattern):
    rng = np.random.default_rng(0)
    setting = Setting(window=9, piece=8, heads=4, kv_heads=2, block=12, ratio=0.3)
    t, n = 230, 4
    drawn = draw(pattern, t, setting, rng)
    dense = np.asarray(drawn.mask.dense_bnts(t, t))[0]
    # Any placement will do: shuffled pieces of ten, ten positions of padding.
    pieces = rng.permutation(np.append(np.arange(t), np.arange(10) + t + 5).reshape(-1, 10))
    positions = np.sort(pieces.reshape(n, -1), axis=1)
    areas, remote = [], []
    for held in positions:
        held = held[held < t]
        rows = dense[:, held]
        areas.append(rows.sum() / dense.shape[0])
        needed = rows.any(axis=(0, 1))
        needed[held] = False
        remote.append(needed.sum())
    np.testing.assert_allclose(rank_areas(drawn.mask, t, positions), areas)
    np.testing.assert_array_equal(remote_tokens(drawn.mask, t, positions), remote)


def test_segments_and_predicates_are_counted_too():
    ids = np.random.default_rng(0).integers(0, 3, 64)
    for made in (mask.segments(ids, ids) & mask.causal(), mask.predicate(lambda q, k: q % 3 == k)):
        dense, positions = np.asarray(made.dense_bnts(64, 64))[0, 0], zigzag(64, 4)
        np.testing.assert_array_equal(
            rank_areas(made, 64, positions), [dense[p].sum() for p in positions]
        )
        needed = np.stack([dense[p].any(axis=0) for p in positions])
        needed[np.arange(4)[:, None], positions] = False
        np.testing.assert_array_equal(remote_tokens(made, 64, positions), needed.sum(axis=1))


def test_spread_by_hand():
    found = spread(np.array([4, 2, 1, 1]))
    assert found.max_over_mean == 2 and found.max_over_total == 0.5
    assert found.entropy == pytest.approx(1.75 / 2)
    assert found.gini == pytest.approx(1 - (16 + 4 + 1 + 1) / 64)
    one = spread(np.array([0, 5]))
    assert (one.max_over_mean, one.entropy, one.gini) == (2, 0, 0)
    assert spread(np.zeros(3)).max_over_mean == pytest.approx(1)
    assert spread(np.array([7.0])).entropy == 1


def test_cost_model_by_hand():
    areas, remote = np.array([1e9, 2e9]), np.array([4_000_000, 0])
    compute = 4 * areas * 48 * 128 / 989e12
    traffic = 4 * remote * 8 * 128 / (50 * 2**30 * 0.55)
    forward = max(compute[0] / 0.68, traffic[0], compute[1] / 0.68)
    backward = max(2.5 * compute[0] / 0.45, 2 * traffic[0], 2.5 * compute[1] / 0.45)
    assert CostModel().seconds(areas, remote) == pytest.approx((forward, backward))
    assert forward == traffic[0]
    assert CostModel().seconds(areas, 0 * remote)[0] == pytest.approx(4 * 2e9 * 6144 / 6.7252e14)


def test_a_million_tokens_on_64_ranks():
    """Not a timing of speed but of the kind of algorithm: a dense mask has 10^12 elements."""
    t, n = 2**20, 64
    drawn = draw("causal_document", t, Setting(), np.random.default_rng(0))
    begun = time.perf_counter()
    found = balance(drawn.mask, t, zigzag(t, n))
    assert time.perf_counter() - begun < 20
    areas = rank_areas(drawn.mask, t, zigzag(t, n))
    assert areas.sum() == drawn.mask.area(t, t)
    assert found.area.max_over_mean == areas.max() / areas.mean() > 1
    assert 0 < found.remote_fraction < 2 * max(drawn.lengths) / t


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.arange(8).reshape(2, 4) + 1, "exactly once"),
        (np.zeros((2, 4), int), "exactly once"),
        (np.arange(8).reshape(2, 4) - 1, "exactly once"),
        (np.arange(8.0).reshape(2, 4), "must be integers"),
        (np.arange(8), "must be integers"),
    ],
)
def test_placements_are_checked(positions, message):
    with pytest.raises(ValueError, match=message):
        balance(mask.causal(), 8, positions)


def test_amounts_are_checked():
    with pytest.raises(ValueError, match="must not be negative"):
        spread(np.array([1, -1]))
