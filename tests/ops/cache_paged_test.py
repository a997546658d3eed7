# SPDX-License-Identifier: Apache-2.0
"""Pages against slots: taken, given back, shared between examples and missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnjax.ops import attention, mask
from attnjax.ops.cache import FullCache, PagedCache, append_and_attend

B, N, K, H, HV = 3, 4, 2, 8, 6
F32 = 2e-5  # Contract of the core for float32.
SIZES = dict(batch=B, heads=K, width=H, value_width=HV)


def tokens(length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, HV)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def paged(pages, page_size, most):
    return PagedCache.empty(
        **SIZES, pages=pages, page_size=page_size, max_pages_per_sequence=most
    )  # fmt: skip


@jax.jit
def parallel(query, key, value):
    return attention(query, key, value, mask=mask.causal())


share = jax.jit(lambda state, *rest: state.share(*rest))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.booleans()), max_size=14))
def test_pages_equal_slots_whatever_is_taken_and_given_back(events):
    pages, size, most = 9, 3, 4
    page = paged(pages, size, most)
    full = FullCache.empty(**SIZES, capacity=size * most)
    lengths = np.zeros(B, int)
    query, key, value = tokens(6, seed=len(events))
    for example, count, ends in events:
        if ends:
            gone = np.arange(B) == example
            page, full = _free(page, gone), _free(full, gone)
            lengths[example] = 0
            continue
        wanted = np.where(np.arange(B) == example, count, 1)
        grown = lengths + wanted
        needed = -(-grown // size)
        if grown.max() > size * most or needed.sum() > pages:
            with pytest.raises(ValueError, match=r"pages are needed|has room for 12"):
                page.append(key, value, wanted)
            continue
        step = _paged_steps
        one, page = step(page, query, key, value, wanted.astype(np.int32))
        two, full = step(full, query, key, value, wanted.astype(np.int32))
        np.testing.assert_allclose(one, two, atol=1e-6)
        lengths = grown
        assert int(page.is_free().sum()) == pages - needed.sum()
        held = np.asarray(page.table)
        assert len({*held[held >= 0]}) == needed.sum()
        assert not page.overflowed().any()


_free = jax.jit(lambda state, examples: state.free(examples))


@jax.jit
def _paged_steps(state, query, key, value, lengths):
    return append_and_attend(query, key, value, state, lengths=lengths)


def test_pages_of_others_are_out_of_sight():
    state = paged(2, 4, 2)
    query, key, value = tokens(3)
    step = _paged_steps
    # The lowest page is the first example's and holds NaN.
    state = state.append(key * jnp.nan, value * jnp.nan, jnp.array([3, 0, 0]))
    out, state = step(state, query, key, value, np.array([0, 0, 3]))
    expected = parallel(query, key, value)
    np.testing.assert_allclose(out[2], expected[2], atol=F32, rtol=F32)
    state = state.free(jnp.array([True, False, False]))
    out, _ = step(state, query, key, value, np.array([0, 3, 0]))
    np.testing.assert_allclose(out[1], expected[1], atol=F32, rtol=F32)


@pytest.mark.parametrize("prefix", [pytest.param(1, marks=pytest.mark.slow), 8, 10])
def test_examples_share_the_pages_of_a_prefix(prefix):
    size = 4
    streams = [np.array(x) for x in tokens(18)]
    # All three streams begin with the first tokens of the second.
    for x in streams:
        x[:, :prefix] = x[1, :prefix]
    query, key, value = streams
    expected = np.asarray(parallel(*streams))
    state = paged(pages=12, page_size=size, most=4)
    _, state = _paged_steps(state, query[:, :11], key[:, :11], value[:, :11], np.array([7, 11, 0]))
    used = B * 4 - int(state.is_free().sum())
    state = share(state, 1, np.array([True, True, True]), prefix)
    table = np.asarray(state.table)
    full = prefix // size
    np.testing.assert_array_equal(table[:, :full], np.broadcast_to(table[1, :full], (B, full)))
    np.testing.assert_array_equal(state.length, [prefix, 11, prefix])
    # Two pages were the first example's; each of the sharing ones has a copy of what is not full.
    assert B * 4 - int(state.is_free().sum()) == used - 2 + 2 * bool(prefix % size)
    # Each goes on with tokens of its own, at places of its own, and leaves the others alone.
    done = np.array([prefix, 11, prefix])
    for count in (3, 2):
        take = lambda x: np.stack([x[i, done[i] : done[i] + count] for i in range(B)])
        out, state = _paged_steps(
            state, take(query), take(key), take(value), np.full(B, count, np.int32)
        )
        np.testing.assert_allclose(out, take(expected), atol=F32, rtol=F32)
        done += count
    # The source may end first: what others hold stays.
    state = _free(state, np.array([False, True, False]))
    out, state = _paged_steps(state, take(query), take(key), take(value), np.array([1, 0, 1]))
    np.testing.assert_allclose(out[0, 0], expected[0, done[0]], atol=F32, rtol=F32)
    np.testing.assert_allclose(out[2, 0], expected[2, done[2]], atol=F32, rtol=F32)
    state = _free(state, np.array([True, False, True]))
    assert state.is_free().all()
    assert not state.key.any() and not state.value.any()


def test_sharing_without_a_page_for_the_copy():
    _, key, value = tokens(6)
    state = paged(pages=3, page_size=4, most=2).append(key, value, jnp.array([6, 0, 0]))
    others = np.array([False, True, True])
    with pytest.raises(ValueError, match="2 more pages are needed, but 1 of 3 are free"):
        state.share(0, others)
    np.testing.assert_array_equal(share(state, 0, others).overflowed(), [False, False, True])
    # Whole pages need none.
    assert not state.share(0, others, 4).overflowed().any()
    # Who has lost tokens passes on the loss.
    lost = share(state, 0, others)
    np.testing.assert_array_equal(share(lost, 2, np.array([1, 0, 0], bool)).overflowed(), [1, 0, 1])


def test_a_page_that_comes_too_late_does_not_hide_what_was_lost():
    query, key, value = tokens(4)
    state = paged(pages=2, page_size=2, most=4)
    for lengths in ([0, 2, 0], [4, 0, 0]):
        _, state = _paged_steps(state, query, key, value, np.array(lengths, np.int32))
    np.testing.assert_array_equal(state.overflowed(), [True, False, False])
    state = _free(state, np.array([False, True, False]))
    for lengths in ([0, 0, 0], [1, 0, 0]):
        out, state = _paged_steps(state, query, key, value, np.array(lengths, np.int32))
        np.testing.assert_array_equal(state.overflowed(), [True, False, False])
        assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()
    state = _free(state, np.array([True, False, False]))
    out, state = _paged_steps(state, query, key, value, np.array([3, 0, 0], np.int32))
    assert not state.overflowed().any()
    expected = parallel(query, key, value)
    np.testing.assert_allclose(out[0, :3], expected[0, :3], atol=F32, rtol=F32)


def test_refusals_of_sharing_name_what_is_wrong():
    _, key, value = tokens(3)
    state = paged(pages=3, page_size=2, most=2).append(key, value, jnp.array([3, 1, 0]))
    others = np.array([False, False, True])
    for message, arguments in {
        r"source=3: choose from 0 to 2": (3, others),
        r"source=-1": (-1, others),
        r"source must be an integer, got 0.5": (0.5, others),
        r"tokens must be an integer": (0, others, np.array([1, 2])),
        r"tokens=4: choose from 0 to 3, what example 0 has": (0, others, 4),
        r"tokens=-1": (1, others, -1),
        r"examples must be bool": (0, np.array([0, 0, 1])),
    }.items():
        with pytest.raises(ValueError, match=message):
            state.share(*arguments)
