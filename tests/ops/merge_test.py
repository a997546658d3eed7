# SPDX-License-Identifier: Apache-2.0
"""Partial attention merges into whole attention, with gradients, whatever the parts hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import EMPTY_LSE, attention, mask, merge_partials
from attnjax.ops.cases import Case

CASE = Case("case", s=13, hv=6)
TOLERANCE = 2e-6
"""Of float32 numbers of size one."""
GRADIENT = 1e-5
"""Of sums of some dozens of them."""


def split(parts, visible):
    """Attention over the keys of each part, merged."""

    def run(query, key, value):
        return merge_partials(
            [
                tuple(
                    getattr(
                        attention(
                            query, key, value, mask=visible & (parts == part), return_lse=True,
                            implementation="reference",
                        ),
                        name,
                    )
                    for name in ("out", "lse")
                )
                for part in range(4)
            ]
        )  # fmt: skip

    return run


@pytest.mark.parametrize("seed", range(3))
def test_random_splits(seed):
    """Each query has its own split; some parts and some rows are empty."""
    rng = np.random.default_rng(seed)
    arrays = CASE.arrays(seed)
    visible = rng.random((CASE.b, CASE.n, CASE.t, CASE.s)) < 0.8
    visible[0, 0, 0] = visible[1, 2, 3] = False
    parts = rng.integers(0, 4, (CASE.b, 1, CASE.t, CASE.s))
    parts[0, :, 1] = 2  # All in one part.
    parts[parts == seed] = 3  # One part is empty for everybody.
    whole = lambda *a: attention(*a, mask=visible, return_lse=True, implementation="reference")
    expected = jax.jit(whole)(*arrays)
    merged = split(parts, visible)
    out, lse = jax.jit(merged)(*arrays)
    np.testing.assert_allclose(out, expected.out, atol=TOLERANCE)
    np.testing.assert_allclose(lse, expected.lse, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(lse[~visible.any(-1)], np.float32(EMPTY_LSE))
    np.testing.assert_array_equal(np.swapaxes(out, 1, 2)[~visible.any(-1)], 0)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)

    def loss(run):
        def of(arrays):
            out, lse = run(*arrays)
            return (out * dout).sum() + (jnp.where(lse > -1e29, lse, 0) * dlse).sum()

        return jax.jit(jax.grad(of))(arrays)

    both = loss(merged), loss(lambda *a: (whole(*a).out, whole(*a).lse))
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=GRADIENT)


def test_nothing_leaks_out_of_an_empty_part():
    """Its output may be anything, NaN included, also for the gradients of the others."""
    rng = np.random.default_rng(0)
    out = jnp.asarray(rng.standard_normal((1, 2, 3, 4)), jnp.float32)
    lse = jnp.asarray(rng.standard_normal((1, 3, 2)), jnp.float32)
    for empty in (EMPTY_LSE, -jnp.inf):
        nothing = (jnp.full_like(out, jnp.nan), jnp.full_like(lse, empty))

        def total(out, lse):
            merged = merge_partials([nothing, (out, lse), nothing])
            return merged[0].sum() + merged[1].sum(), merged

        (_, merged), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(out, lse)
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
        np.testing.assert_allclose(gradients[0], 1)
        np.testing.assert_allclose(gradients[1], 1, rtol=1e-6)
        none = merge_partials([nothing, nothing])
        np.testing.assert_array_equal(none[0], 0)
        np.testing.assert_array_equal(none[1], np.float32(EMPTY_LSE))


def test_large_scores_and_low_precision():
    rng = np.random.default_rng(1)
    outs = [jnp.asarray(rng.standard_normal((1, 2, 3, 4)), jnp.bfloat16) for _ in range(2)]
    low, high = jnp.full((1, 3, 2), -1e4), jnp.full((1, 3, 2), 1e4)
    out, lse = merge_partials([(outs[0], low), (outs[1], high)])
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_array_equal(out, outs[1])
    np.testing.assert_array_equal(lse, high)
    out, lse = merge_partials([(outs[0], high), (outs[1], high)])
    np.testing.assert_allclose(out, (outs[0] + outs[1]) / 2, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(lse, 1e4 + np.log(2), rtol=1e-6)


def test_a_sink_is_counted_once():
    query, key, value = CASE.arrays()
    rng = np.random.default_rng(2)
    half = rng.random((1, 1, 1, CASE.s)) < 0.5
    get = lambda **o: attention(query, key, value, return_lse=True, **o)
    a, b = get(mask=half, normalizer="softmax_one"), get(mask=~half)
    out, _ = merge_partials([(a.out, a.lse), (b.out, b.lse)])
    whole = attention(query, key, value, normalizer="softmax_one", mask=mask.full())
    np.testing.assert_allclose(out, whole, atol=TOLERANCE)


def test_refusals():
    with pytest.raises(ValueError, match="at least one pair"):
        merge_partials([])
    out, lse = jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 3, 2))
    for pair in ((out, lse[..., :1]), (out[..., :2], lse)):
        with pytest.raises(ValueError, match="do not belong to"):
            merge_partials([(out, lse), pair])
