# SPDX-License-Identifier: Apache-2.0
"""Properties of attention over drawn shapes, masks and groups of heads."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnjax.ops import EMPTY_LSE, attention
from attnjax.ops.cases import BIASES, MASKS, SQUARE, Case

TOLERANCE = 1e-5
"""Float32 sums of some dozens of numbers of size one."""


@st.composite
def cases(draw, lengths, heads):
    mask = draw(st.sampled_from([None, *MASKS]))
    t, s = draw(lengths)
    n, k = draw(heads)
    return Case(
        "drawn", t=s if mask in SQUARE else t, s=s, n=n, k=k, mask=mask,
        bias=draw(st.sampled_from([None, *BIASES])), softcap=draw(st.sampled_from([None, 2.0])),
    )  # fmt: skip


# Few, because every shape is compiled anew.
NARROW = cases(st.sampled_from([(1, 7), (7, 7), (7, 3)]), st.sampled_from([(6, 2), (6, 6), (6, 1)]))
WIDE = cases(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda x: (x[0] * x[1], x[1])),
)


def run(case, seed, arrays=None, implementation="reference", **more):
    arrays = case.arrays(seed) if arrays is None else arrays
    options = case.options(seed) | more
    attend = lambda *a: attention(*a, **options, implementation=implementation)
    return jax.jit(attend)(*arrays)


def check_reference(case, seed):
    """Weights are a distribution over what is visible; what is hidden does not matter."""
    query, key, value = case.arrays(seed)
    result = run(case, seed, return_lse=True, return_probabilities=True, return_scores=True)
    p, scores = np.asarray(result.probabilities), np.asarray(result.scores)
    seen, mask = np.isfinite(scores), case.options(seed).get("mask")
    if mask is not None and case.bias != "blocked":
        visible = np.broadcast_to(mask.dense_bnts(case.t, case.s), seen.shape)
        np.testing.assert_array_equal(seen, visible)
    assert (p[~seen] == 0).all() and (p >= 0).all()
    np.testing.assert_allclose(p.sum(-1), seen.any(-1), atol=TOLERANCE)
    np.testing.assert_array_equal(result.lse[~seen.any(-1)], np.float32(EMPTY_LSE))
    expected = np.exp(np.where(seen, scores - np.asarray(result.lse)[..., None], -np.inf))
    np.testing.assert_allclose(p, expected, atol=TOLERANCE)

    # Grouped heads are repeated heads.
    repeat = lambda x: np.repeat(np.asarray(x), case.n // case.k, axis=2)
    mixed = np.einsum("bnts,bsnh->btnh", p, repeat(value))
    np.testing.assert_allclose(result.out, mixed, atol=TOLERANCE)
    raw = np.einsum("btnh,bsnh->bnts", query, repeat(key)) * case.h**-0.5
    if case.softcap is None and case.bias is None:
        np.testing.assert_allclose(scores[seen], raw[seen], atol=TOLERANCE)

    hidden = ~seen.reshape(case.b, case.k, -1, case.t, case.s).any((2, 3)).swapaxes(1, 2)[..., None]
    noise = np.random.default_rng(seed).standard_normal(key.shape).astype(np.float32)
    changed = (query, np.where(hidden, noise, key), np.where(hidden, noise, value))
    out, pull = jax.vjp(lambda *a: run(case, seed, a), *changed)
    np.testing.assert_allclose(out, result.out, atol=TOLERANCE)
    for gradient in pull(result.out)[1:]:
        np.testing.assert_array_equal(np.where(hidden, gradient, 0), 0)


def check_chunked(case, seed):
    theirs = run(case, seed, return_lse=True)
    ours = run(case, seed, return_lse=True, implementation="chunked")
    np.testing.assert_allclose(ours.out, theirs.out, atol=TOLERANCE)
    np.testing.assert_allclose(ours.lse, theirs.lse, atol=TOLERANCE, rtol=TOLERANCE)


examples = functools.partial(settings, deadline=None, derandomize=True)
seeds = st.integers(0, 3)


@examples(max_examples=14)
@given(NARROW, seeds)
def test_reference(case, seed):
    check_reference(case, seed)


@examples(max_examples=10)
@given(NARROW, seeds)
def test_chunked_agrees(case, seed):
    check_chunked(case, seed)


@pytest.mark.slow
@examples(max_examples=100)
@given(WIDE, seeds)
def test_reference_of_any_shape(case, seed):
    check_reference(case, seed)


@pytest.mark.slow
@examples(max_examples=100)
@given(WIDE, seeds)
def test_chunked_agrees_in_any_shape(case, seed):
    check_chunked(case, seed)
