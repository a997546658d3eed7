# SPDX-License-Identifier: Apache-2.0
"""Properties of attention over drawn shapes, masks and groups of heads."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnjax.ops import EMPTY_LSE, attention
from attnjax.ops.cases import BIASES, MASKS, SQUARE, Case

TOLERANCE = 1e-5
"""Float32 sums of some dozens of numbers of size one."""


@st.composite
def cases(draw):
    """Few shapes, because every one is compiled anew."""
    mask = draw(st.sampled_from([None, *MASKS]))
    t, s = (7, 7) if mask in SQUARE else draw(st.sampled_from([(1, 7), (7, 7), (7, 3)]))
    n, k = draw(st.sampled_from([(6, 2), (6, 6), (6, 1)]))
    return Case(
        "drawn", t=t, s=s, n=n, k=k, mask=mask, bias=draw(st.sampled_from([None, *BIASES])),
        softcap=draw(st.sampled_from([None, 2.0])),
    )  # fmt: skip


def run(case, seed, arrays=None, implementation="reference", **more):
    arrays = case.arrays(seed) if arrays is None else arrays
    return attention(*arrays, **case.options(seed), implementation=implementation, **more)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 3))
def test_reference(case, seed):
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
    np.testing.assert_allclose(run(case, seed, changed), result.out, atol=TOLERANCE)
    _, pull = jax.vjp(lambda *a: run(case, seed, a), query, key, value)
    for gradient in pull(result.out)[1:]:
        np.testing.assert_array_equal(np.where(hidden, gradient, 0), 0)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 3))
def test_chunked_agrees(case, seed):
    theirs = run(case, seed, return_lse=True)
    ours = run(case, seed, return_lse=True, implementation="chunked")
    np.testing.assert_allclose(ours.out, theirs.out, atol=TOLERANCE)
    np.testing.assert_allclose(ours.lse, theirs.lse, atol=TOLERANCE, rtol=TOLERANCE)
