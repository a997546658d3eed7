# SPDX-License-Identifier: Apache-2.0
"""Biases that are functions of position, against their definitions term by term."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, mask
from attnjax.ops.bias import (
    Alibi,
    RelativeBuckets,
    RelativePosition,
    alibi_slopes,
    bucket_of_distance,
)  # fmt: skip
from attnjax.ops.cases import Case

N = 4
CASE = Case("case")
TOLERANCE = 1e-5
"""Of sums of some dozens of float32 numbers of size one."""


def bucket(relative, buckets, longest, is_bidirectional):
    """The bucket of key - query, as the T5 paper's code counts."""
    result = 0
    if is_bidirectional:
        buckets //= 2
        result = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return result + distance
    # Products of whole numbers, so that no logarithm is rounded across a limit.
    step = max(
        i for i in range(buckets) if distance ** (buckets - exact) * exact**i
        >= longest**i * exact ** (buckets - exact)
    )  # fmt: skip
    return result + min(exact + step, buckets - 1)


def draw(name):
    rng = np.random.default_rng(3)
    table = lambda columns: jnp.asarray(rng.standard_normal((N, columns)), jnp.float32)
    if name == "alibi":
        slopes = table(1)[:, 0]
        return Alibi(slopes), lambda n, q, k: -slopes[n] * abs(q - k)
    if name == "relative":
        values = table(7)
        return RelativePosition(values), lambda n, q, k: values[n, min(max(k - q, -3), 3) + 3]
    both = name == "buckets"
    values = table(8)
    made = RelativeBuckets(values, max_distance=9, is_bidirectional=both)
    return made, lambda n, q, k: values[n, bucket(k - q, 8, 9, both)]


NAMES = ("alibi", "relative", "buckets", "buckets_causal")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("t", "s"), [(5, 17), (14, 14), (9, 4)])
def test_definition_and_tiles(name, t, s):
    made, function = draw(name)
    made.check(2, N, t, s)
    dense = np.asarray(made.dense(t, s))
    expected = [[[function(n, q + s - t, k) for k in range(s)] for q in range(t)] for n in range(N)]
    np.testing.assert_allclose(dense[0], np.asarray(expected), rtol=1e-6)
    tile = jax.jit(lambda q, k: made.tile(q, k, 3, 2, t, s))(jnp.int32(t - 3), jnp.int32(s - 2))
    np.testing.assert_array_equal(tile, dense[:, :, -3:, -2:])
    beyond = made.tile(t, s, 4, 4, t, s)
    assert beyond.shape == (1, N, 4, 4) and np.isfinite(beyond).all()


@pytest.mark.parametrize("name", NAMES)
def test_attention_with_it_equals_attention_with_its_array(name):
    """Output and gradients of the parameters, for every implementation that serves it."""
    made, _ = draw(name)
    arrays = CASE.arrays()

    def total(made, implementation, is_dense):
        bias = made.dense(CASE.t, CASE.s) if is_dense else made
        out = attention(*arrays, bias=bias, mask=mask.causal(), implementation=implementation)
        return (out**2).sum(), out

    run = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=(1, 2))
    (_, expected), slope = run(made, "reference", True)
    for implementation in ("reference", "chunked"):
        (_, out), found = run(made, implementation, False)
        np.testing.assert_allclose(out, expected, atol=TOLERANCE)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slope), strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE)
            assert np.abs(b).max() > 1e-3


def test_slopes_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:2], [2**-0.5, 0.5], rtol=1e-6)
    twelve = [2.0**-i for i in range(1, 9)] + [2.0**-i for i in (0.5, 1.5, 2.5, 3.5)]
    np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])
    for n in range(1, 40):
        assert alibi_slopes(n).shape == (n,) and (alibi_slopes(n) > 0).all()
    with pytest.raises(ValueError, match="n=0"):
        alibi_slopes(0)


@pytest.mark.parametrize(("buckets", "longest"), [(16, 128), (32, 128), (4, 7), (6, 100)])
def test_buckets_in_whole_numbers(buckets, longest):
    table = bucket_of_distance(buckets, longest)
    expected = [bucket(-x, buckets, longest, False) for x in range(longest + 1)]
    np.testing.assert_array_equal(table, expected)
    assert table[0] == 0 and table[-1] == buckets - 1 and (np.diff(table) >= 0).all()
    # Single precision, in which the published checkpoints were trained, says the same.
    exact = buckets // 2
    large = np.arange(exact, longest + 1, dtype=np.float32)
    step = np.log(large / np.float32(exact)) / np.float32(math.log(longest / exact))
    single = exact + (step * np.float32(buckets - exact)).astype(np.int32)
    np.testing.assert_array_equal(table[exact:], np.minimum(single, buckets - 1))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (Alibi(jnp.zeros(3)), r"slopes must be floating \[n\] with n = 4 or 1, got float32 \(3,\)"),
        (Alibi(jnp.zeros(4, jnp.int32)), "slopes must be floating"),
        (RelativePosition(jnp.zeros((4, 6))), r"2 r \+ 1 columns, got 6"),
        (RelativePosition(jnp.zeros(7)), r"table must be floating \[n, ...\]"),
        (RelativeBuckets(jnp.zeros((4, 6))), "6 buckets cannot be split"),
        (RelativeBuckets(jnp.zeros((4, 32)), max_distance=8), "max_distance=8 must exceed 8"),
    ],
)
def test_refusals(bias, message):
    with pytest.raises(ValueError, match=message):
        attention(*CASE.arrays(), bias=bias)
