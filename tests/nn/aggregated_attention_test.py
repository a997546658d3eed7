# SPDX-License-Identifier: Apache-2.0
"""TransNeXt's attention against one place at a time in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.aggregated_attention import (
    AggregatedAttention,
    ConvolutionalGlu,
    log_offsets,
    pooled_axis,
)
from attnjax.nn.head_mixture import HeadMixture
from attnjax.ops.neighbourhood import neighbourhood_attention, neighbours
from attnjax.weights import flatten, unflatten

GRID, N, H = (4, 6), 2, 4
D, T = N * H, 24
ATOL = 2e-5


def drawn(module, x, scale=0.3):
    """Parameters of sizes that matter."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    return unflatten(
        {
            k: scale * rng.standard_normal(v.shape).astype(np.float32)
            for k, v in flatten(shapes).items()
        }
    )


def gelu(x):
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(params, x, pool, epsilon=1e-5):
    """Without a mixture, one place and head at a time."""
    p = {k: np.asarray(v, np.float64) for k, v in flatten(params).items()}
    x = np.asarray(x, np.float64)
    project = lambda name, z: np.einsum("btd,dnh->btnh", z, p[f"{name}/kernel"]) + p[f"{name}/bias"]
    is_full, (height, width) = pool == GRID, GRID
    if is_full:
        coarse = x
    else:
        mixed = gelu(x @ p["reduce/kernel"] + p["reduce/bias"]).reshape(-1, height, width, D)
        ys, xs = height // pool[0], width // pool[1]
        coarse = mixed.reshape(-1, pool[0], ys, pool[1], xs, D).mean(axis=(2, 4))
        coarse = coarse.reshape(-1, pool[0] * pool[1], D)
        centred = coarse - coarse.mean(-1, keepdims=True)
        coarse = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        coarse = coarse * p["reduce_norm/scale"] + p["reduce_norm/bias"]
    query, out = unit(project("query", x)), np.zeros((len(x), T, N, H))
    key, value = unit(project("key", coarse)), project("value", coarse)
    near_key, near_value = unit(project("key", x)), project("value", x)
    centre = lambda size, parts: (np.arange(parts) + 0.5) * (size // parts) - 0.5
    for b, t, n in np.ndindex(len(x), T, N):
        y, z = divmod(t, width)
        around = [(y + i, z + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        valid = [w for w, (i, j) in enumerate(around) if 0 <= i < height and 0 <= j < width]
        seen = key.shape[1] + (0 if is_full else len(valid))
        sharp = query[b, t, n] + p["query_embedding"][n]
        sharp = sharp * np.log1p(np.exp(p["temperature"][n, 0])) * np.log(seen)
        scores = []
        for s in range(key.shape[1]):
            i, j = divmod(s, pool[1])
            offset = np.array([y - centre(height, pool[0])[i], z - centre(width, pool[1])[j]])
            offset = offset / (np.array(GRID) - 1) * 8
            offset = np.sign(offset) * np.log2(np.abs(offset) + 1) / 3
            hidden = offset @ p["position_bias/up/kernel"] + p["position_bias/up/bias"]
            bias = np.maximum(hidden, 0) @ p["position_bias/down/kernel"][:, n]
            scores.append(sharp @ key[b, s, n] + bias + p["position_bias/down/bias"][n])
        values = [value[b, s, n] for s in range(key.shape[1])]
        if not is_full:
            for w in valid:
                place = around[w][0] * width + around[w][1]
                scores.append(sharp @ near_key[b, place, n] + p["near_bias"][n, w])
                values.append(near_value[b, place, n])
        weights = np.exp(np.array(scores) - max(scores))
        out[b, t, n] = (weights / weights.sum()) @ np.array(values)
        if not is_full:
            for w in valid:
                place = around[w][0] * width + around[w][1]
                more = query[b, t, n] @ p["near_tokens"][n, :, w] + p["near_offset"][n, w]
                out[b, t, n] += more * near_value[b, place, n]
    return np.einsum("btnh,nhd->btd", out, p["out/kernel"]) + p["out/bias"]


@pytest.mark.parametrize("pool", [(2, 3), GRID], ids=["aggregated", "full"])
def test_one_place_at_a_time(pool):
    module = AggregatedAttention(N, GRID, pool)
    x = np.random.default_rng(1).standard_normal((2, T, D)).astype(np.float32)
    params = drawn(module, x)
    out, measures = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(out, by_hand(params, x, pool), atol=ATOL)
    assert measures == {}


def test_mixture_of_heads():
    """With gates of one it changes nothing; sixteen-bit numbers are near."""
    x = np.random.default_rng(1).standard_normal((2, T, D)).astype(np.float32)
    plain = AggregatedAttention(N, GRID, (2, 3))
    params = drawn(plain, x)
    mixed = AggregatedAttention(N, GRID, (2, 3), HeadMixture(shared=1, top_k=1), depth=2)
    zeros = {
        "routed": {"kernel": np.zeros((D, 1), np.float32)},
        "types": {"kernel": np.zeros((D, 2), np.float32)},
    }
    out, measures = jax.jit(mixed.apply)({"params": {**params, "router": zeros}}, x)
    expected, _ = jax.jit(plain.apply)({"params": params}, x)
    np.testing.assert_allclose(out, expected, atol=ATOL)
    np.testing.assert_allclose(measures["balance_loss"], 1, rtol=1e-6)
    np.testing.assert_allclose(measures["penalty"], 0.005, rtol=1e-6)
    half, _ = plain.clone(dtype="bfloat16").apply({"params": params}, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=0.1)


def test_gradients_are_finite_where_nothing_is():
    module = AggregatedAttention(N, GRID, (2, 3))
    x = jnp.zeros((1, T, D))
    params = jax.tree.map(jnp.zeros_like, drawn(module, x))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x)[0])))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_gated_convolution():
    module = ConvolutionalGlu(5, GRID)
    x = np.random.default_rng(1).standard_normal((2, T, D)).astype(np.float32)
    params = drawn(module, x)
    p = {k: np.asarray(v, np.float64) for k, v in flatten(params).items()}
    dense = lambda name, z: z @ p[f"{name}/kernel"] + p[f"{name}/bias"]
    gate = np.pad(dense("gate", x).reshape(2, *GRID, 5), ((0, 0), (1, 1), (1, 1), (0, 0)))
    mixed = sum(
        gate[:, i : i + 4, j : j + 6] * p["depthwise/kernel"][i, j, 0]
        for i in range(3)
        for j in range(3)
    )
    mixed = gelu(mixed + p["depthwise/bias"]).reshape(2, T, 5)
    expected = dense("down", mixed * dense("value", x))
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), expected, atol=ATOL)


def test_pools_and_offsets():
    np.testing.assert_allclose(pooled_axis(5, 2), [[1 / 3] * 3 + [0, 0], [0, 0] + [1 / 3] * 3])
    offsets, index = log_offsets((1, 3), (1, 3))
    assert index.shape == (3, 3) and len(offsets) == 5
    np.testing.assert_allclose(offsets[index[2, 0]], [0, np.log2(9) / 3], rtol=1e-6)
    np.testing.assert_allclose(offsets[index[0, 1]], [0, -np.log2(5) / 3], rtol=1e-6)


def test_refusals():
    x = jnp.zeros((1, 2, 2, 1, 3))
    with pytest.raises(ValueError, match="window=2"):
        neighbours(x, 2)
    with pytest.raises(ValueError, match="bias"):
        neighbourhood_attention(x, x, x, window=3, bias=jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        neighbourhood_attention(x, x[:, :1], x, window=3)
