# SPDX-License-Identifier: Apache-2.0
"""Masks against their definitions, element by element, in every form they can take."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import mask
from attnjax.ops.mask import EMPTY, FULL, PARTIAL, schedule

DRAWS = 50


def random_lengths(rng, total, largest=40):
    lengths = []
    while sum(lengths) < total:
        lengths.append(int(min(rng.integers(1, largest), total - sum(lengths))))
    return lengths


def of(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


def brute(t, s, function):
    return np.array([[bool(function(q, k)) for k in range(s)] for q in range(t)])


def draw(name, rng):
    """Return a mask, its lengths t and s, and its definition of (query, key)."""
    t = int(rng.integers(1, 90))
    lengths = random_lengths(rng, t)
    document, start = of(lengths), np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    same = lambda q, k: document[q] == document[k]
    shift = int(rng.integers(-20, 20))
    s = max(1, t + shift)
    d = s - t
    w, g = int(rng.integers(0, 30)), int(rng.integers(0, 20))
    prefix, block = int(rng.integers(0, t + 5)), int(rng.integers(1, 12))
    square = (t, t)
    table = {
        "full": (mask.full(), (t, s), lambda q, k: True),
        "causal": (mask.causal(), (t, s), lambda q, k: k <= q + d),
        "full_document": (mask.documents(lengths, causal=False), square, same),
        "causal_document": (
            mask.documents(lengths, causal=True), square, lambda q, k: same(q, k) and k <= q,
        ),
        "sliding_window": (
            mask.sliding_window(w, g), (t, s), lambda q, k: -w <= k - (q + d) <= g,
        ),
        "sliding_window_causal": (
            mask.sliding_window(w, 0), (t, s), lambda q, k: 0 <= q + d - k <= w,
        ),
        "share_question": (
            mask.share_question(lengths), square,
            lambda q, k: (same(q, k) and k <= q) or (document[k] == 0 and document[q] != 0),
        ),
        "causal_blockwise": (
            mask.causal_blockwise(lengths), square,
            lambda q, k: k <= q and (same(q, k) or document[q] == document[-1]),
        ),
        "prefix_lm_causal": (
            mask.prefix_lm(prefix), (t, s), lambda q, k: k < prefix or k <= q + d,
        ),
        "prefix_lm_document": (
            mask.prefix_lm_documents(lengths, prefix), square,
            lambda q, k: same(q, k) and (k - start[k] < prefix or k <= q),
        ),
        "global_sliding_window": (
            mask.global_sliding_window(w, g), square,
            lambda q, k: abs(q - k) <= w or q < g or k < g,
        ),
        "block_causal_document": (
            mask.block_causal_document(lengths, block), square,
            lambda q, k: same(q, k) and (k - start[k]) // block <= (q - start[q]) // block,
        ),
    }  # fmt: skip
    return table[name]


STATIC = (
    "full", "causal", "full_document", "causal_document", "sliding_window",
    "sliding_window_causal", "share_question", "causal_blockwise", "prefix_lm_causal",
    "prefix_lm_document", "global_sliding_window", "block_causal_document",
)  # fmt: skip


def expand(kinds, dense, block_q, block_k):
    """Check each tile of a block map against the dense mask; return whether all were exact."""
    exact = True
    for (i, j), kind in np.ndenumerate(kinds):
        tile = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        true = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
        assert kind in (true, PARTIAL)
        exact &= bool(kind == true)
    return exact


@pytest.mark.parametrize("name", STATIC)
def test_every_form_agrees_with_the_definition(name):
    rng = np.random.default_rng(STATIC.index(name))
    for _ in range(DRAWS):
        made, (t, s), function = draw(name, rng)
        expected = brute(t, s, function)
        dense = made.dense(t, s)
        assert isinstance(dense, np.ndarray)
        np.testing.assert_array_equal(dense, expected)
        assert made.area(t, s) == expected.sum()
        parts = np.zeros((t, s), int)
        for part in made.slices(t, s):
            lower, upper = part.intervals()
            for row, (low, up) in enumerate(zip(lower, upper, strict=True), part.query_start):
                parts[row, low:up] += 1
        np.testing.assert_array_equal(parts, expected)  # Disjoint, too.
        np.testing.assert_array_equal(made.columns(t, s).dense(t), expected)
        again = mask.from_columns(made.columns(t, s))
        np.testing.assert_array_equal(again.dense(t, s), expected)
        block_q, block_k = rng.integers(1, 20, 2)
        for one in (made, again):
            assert expand(one.block_map(t, s, block_q, block_k), expected, block_q, block_k)
        visible = made.visibility(t, s)
        assert visible.rest is None and (visible.lower is None or visible.lower.shape[2] <= 2)
        np.testing.assert_array_equal(
            np.broadcast_to(visible.visible_keys(t, s)[0, 0], t), expected.sum(1)
        )


def test_counts_of_the_reference_generator():
    """Areas of the benchmark's own masks at 2,048 tokens."""
    assert mask.full().area(2048, 2048) == 4194304
    assert mask.causal().area(2048, 2048) == 2098176
    assert mask.sliding_window(256, 256).area(2048, 2048) == 984832
    assert mask.sliding_window(256, 0).area(2048, 2048) == 493440


def test_run_time_masks_equal_their_static_twins():
    rng = np.random.default_rng(0)
    lengths = random_lengths(rng, 64)
    made = mask.documents(lengths, causal=True)
    ids = np.tile(of(lengths), (2, 1))

    @jax.jit
    def traced(ids):
        both = mask.causal() & mask.segments(ids, ids)
        visible = both.visibility(64, 64)
        return both.dense(64, 64), visible.block_map(64, 64, 16, 8), both.area(64, 64)

    dense, kinds, area = traced(ids)
    for example in range(2):
        np.testing.assert_array_equal(dense[example, 0], made.dense(64, 64))
        expand(np.asarray(kinds)[example, 0], np.asarray(dense)[example, 0], 16, 8)
    np.testing.assert_array_equal(area[:, 0], made.area(64, 64))
    lower, upper = (x[None] for x in made.visibility(64, 64).lower[0]), None
    del lower, upper


def test_run_time_intervals_are_made_disjoint():
    rng = np.random.default_rng(1)
    lower = rng.integers(-5, 50, (2, 3, 4, 40))
    upper = lower + rng.integers(-3, 20, lower.shape)
    static = mask.ranges(lower, upper)
    dynamic = jax.jit(lambda a, b: mask.ranges(a, b).dense(40, 48))(lower, upper)
    expected = np.zeros((2, 3, 40, 48), bool)
    for b, n, r, t in np.ndindex(*lower.shape):
        expected[b, n, t, max(0, lower[b, n, r, t]) : max(0, upper[b, n, r, t])] = True
    np.testing.assert_array_equal(static.dense(40, 48), expected)
    np.testing.assert_array_equal(dynamic, expected)
    kinds = static.block_map(40, 48, 7, 9)
    traced = jax.jit(lambda a, b: mask.ranges(a, b).block_map(40, 48, 7, 9))(lower, upper)
    np.testing.assert_array_equal(traced, kinds)
    for b, n in np.ndindex(2, 3):
        assert expand(kinds[b, n], expected[b, n], 7, 9)


MASKS = {
    "band": lambda rng: mask.sliding_window(9, 4),
    "documents": lambda rng: mask.documents(random_lengths(rng, 48), causal=False),
    "global": lambda rng: mask.global_sliding_window(5, 3),
    "segments": lambda rng: mask.segments(rng.integers(0, 4, (2, 48)), rng.integers(0, 4, (2, 48))),
    "array": lambda rng: mask.array(rng.random((2, 3, 48, 48)) < 0.5),
    "row": lambda rng: mask.array(rng.random((2, 1, 1, 48)) < 0.5),
    "predicate": lambda rng: mask.predicate(lambda q, k: (q + k) % 3 == 0),
    "blocks": lambda rng: mask.blocks(rng.random((3, 6, 4)) < 0.5, 8, 12),
    "uneven": lambda rng: mask.blocks(
        rng.random((1, 3, 4, 3)) < 0.5, [5, 20, 3, 20], [17, 17, 14]
    ),
    "heads": lambda rng: mask.per_head(
        [mask.causal(), mask.global_sliding_window(4, 2), mask.full()]
    ),
    "mixed_heads": lambda rng: mask.per_head(
        [mask.causal(), mask.predicate(lambda q, k: q != k), mask.array(rng.random((48, 48)) < 0.5)]
    ),
    "ragged": lambda rng: mask.padding(np.array([48, 7]), np.array([40, 48])),
    "columns": lambda rng: mask.from_columns(mask.global_sliding_window(5, 3).columns(48, 48)),
}  # fmt: skip


PAIRS = [
    pytest.param(first, second, marks=() if i <= j else pytest.mark.slow)
    for i, first in enumerate(MASKS)
    for j, second in enumerate(MASKS)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_algebra(first, second):
    rng = np.random.default_rng(2)
    one, two = MASKS[first](rng), MASKS[second](rng)
    a, b = one.dense_bnts(48, 48), two.dense_bnts(48, 48)
    for made, expected in ((one & two, a & b), (one | two, a | b)):
        np.testing.assert_array_equal(made.dense_bnts(48, 48), expected)
        check_tiles(made, np.asarray(expected))


def check_tiles(made, expected):
    """Padded tiles, windows and block maps say what the dense mask says."""
    visible = made.visibility(48, 48)
    padded = visible.pad(48, 48, 50, 60)
    tile = padded.tile(jnp.int32(20), jnp.int32(40), 30, 20)
    if tile is not None:
        tile = np.broadcast_to(tile, (*expected.shape[:2], 30, 20))
        np.testing.assert_array_equal(tile[:, :, :28, :8], expected[:, :, 20:, 40:])
        assert not tile[:, :, 28:].any() and not tile[:, :, :, 8:].any()
    part = made.window(jnp.int32(7), 30, jnp.int32(11), 16, 48, 48)
    dense = np.broadcast_to(part.dense_bnts(30, 16), (*expected.shape[:2], 30, 16))
    np.testing.assert_array_equal(dense, expected[:, :, 7:37, 11:27])
    kinds = np.broadcast_to(visible.block_map(48, 48, 10, 7), (*expected.shape[:2], 5, 7))
    for b, n in np.ndindex(*expected.shape[:2]):
        expand(kinds[b, n], expected[b, n], 10, 7)


def test_masks_pass_through_jit_as_arguments():
    made = mask.causal() & mask.segments(np.zeros(8, int), np.arange(8) % 2)
    dense = jax.jit(lambda m: m.dense(8, 8))(made)
    np.testing.assert_array_equal(dense, made.dense(8, 8))
    assert hash(mask.documents([3, 5], causal=True)) == hash(mask.documents([3, 5], causal=True))


def test_schedule_lists_full_tiles_before_partial_ones():
    kinds = mask.sliding_window(20, 0).block_map(64, 64, 8, 8)
    plan = schedule(kinds[None, None])
    for i in range(8):
        full = plan.full[0, 0, i, : plan.full_count[0, 0, i]]
        partial = plan.partial[0, 0, i, : plan.partial_count[0, 0, i]]
        np.testing.assert_array_equal(full, np.flatnonzero(kinds[i] == FULL))
        np.testing.assert_array_equal(partial, np.flatnonzero(kinds[i] == PARTIAL))


@pytest.mark.parametrize("r", [1, 2, 3])
def test_block_maps_of_intervals_are_exact(r):
    """Also of intervals that touch, are empty or come in any order, and of smaller last tiles."""
    rng = np.random.default_rng(r)
    for _ in range(DRAWS):
        t, s = rng.integers(1, 40, 2)
        block_q, block_k = rng.integers(1, 14, 2)
        cuts = np.sort(rng.integers(0, s + 1, (2, 3, r + 1, t), np.int32), axis=2)
        lower, upper = cuts[:, :, :-1], cuts[:, :, 1:]
        upper = np.where(rng.random(upper.shape) < 0.2, lower - 1, upper)
        order = rng.permutation(r)
        visible = mask.Visibility(lower[:, :, order], upper[:, :, order])
        dense, kinds = visible.dense(t, s), visible.block_map(t, s, block_q, block_k)
        lists = schedule(kinds)
        for b, n in np.ndindex(2, 3):
            assert expand(kinds[b, n], dense[b, n], block_q, block_k)
            for i, row in enumerate(kinds[b, n]):
                full = lists.full[b, n, i, : lists.full_count[b, n, i]]
                np.testing.assert_array_equal(full, np.flatnonzero(row == FULL))


def test_host_work_at_131072_tokens_is_quick():
    """Not a timing of speed but of the kind of algorithm: a dense mask would take a minute."""
    t = 131_072
    rng = np.random.default_rng(0)
    made = (mask.causal(), mask.documents(random_lengths(rng, t, 4_000), causal=True))
    for one in made:
        start = time.perf_counter()
        schedule(one.visibility(t, t).block_map(t, t, 64, 64))
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mask.sliding_window(-1, 0), "left=-1"),
        (lambda: mask.documents([], causal=True), "must be positive"),
        (lambda: mask.documents([5], causal=True).dense(4, 4), "do not fit 4 queries"),
        (lambda: mask.documents([4], causal=True).dense(4, 5), "do not fit 4 queries and 5 keys"),
        (lambda: mask.segments(np.zeros(3), np.zeros(3, int)), "query_ids must be integers"),
        (lambda: mask.segments(np.zeros(3, int), np.zeros(3, int)).dense(3, 4), "key_ids cover 3"),
        (lambda: mask.array(np.zeros((2, 2))), "mask must be bool"),
        (lambda: mask.blocks(np.ones((2, 2), bool), [3, 3, 3], 4), "query_sizes"),
        (lambda: mask.blocks(np.ones((2, 2), bool), 3, 4).dense(6, 9), "key positions, not 9"),
        (lambda: mask.slices([(0, 2, 0, 2, "diagonal")]), "kind 'diagonal'"),
        (lambda: mask.slices([(0, 9, 0, 2, "full")]).dense(4, 4), "exceeds 4 queries"),
        (lambda: mask.global_sliding_window(3).dense(4, 5), "as many queries as keys"),
        (lambda: mask.prefix_lm(-1), "prefix=-1"),
        (
            lambda: mask.from_columns(mask.causal().columns(4, 4)).dense(4, 5),
            "columns are given for 4 keys, not for 5",
        ),
        (lambda: mask.ranges(np.zeros((3, 4)), np.zeros((3, 4))), r"\[b,n,r,t\]"),
    ],
)  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["blocks", "uneven", "mixed_heads", "predicate", "columns"])
def test_keys_that_queries_see_are_counted(name):
    made = MASKS[name](np.random.default_rng(3))
    seen = made.visibility(48, 48).visible_keys(48, 48)
    assert isinstance(seen, np.ndarray)
    np.testing.assert_array_equal(seen, made.dense_bnts(48, 48).sum(axis=-1))


def test_columns_may_be_known_at_run_time_only():
    columns = mask.share_question([5, 20, 7, 16]).columns(48, 48)

    def kinds(columns):
        made = mask.from_columns(columns)
        return made.dense(48, 48), made.block_map(48, 48, 10, 7)

    traced = jax.jit(lambda *arrays: kinds(mask.Columns(*arrays)))
    arrays = [getattr(columns, field.name) for field in dataclasses.fields(columns)]
    for ours, expected in zip(traced(*arrays), kinds(columns), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_padded_blocks_of_a_traced_map():
    kept = np.random.default_rng(0).random((2, 3, 4)) < 0.5

    def kinds(kept):
        seen = mask.blocks(kept, 5, 6).visibility(15, 24)
        return seen.pad(15, 24, 16, 32).block_map(16, 32, 8, 8)

    np.testing.assert_array_equal(jax.jit(kinds)(kept), kinds(kept))
