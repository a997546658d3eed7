# SPDX-License-Identifier: Apache-2.0
"""Performer and cosFormer: formulas in float64, limits, what is drawn when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, efficient

B, T, S, N, H = 2, 11, 7, 2, 16
SAME = 1e-5


def draw(t=T, s=T, unit=False):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = [jax.random.normal(k, (B, n, N, H)) for k, n in zip(keys, (t, s, s), strict=True)]
    if unit:
        heads[:2] = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in heads[:2]]
    return heads


@pytest.mark.parametrize("cross", [False, True])
def test_many_features_approach_softmax_attention(cross):
    heads = draw(s=S if cross else T, unit=True)
    exact = attention(*heads)
    errors = []
    for features in (64, 4096):
        made = efficient.make("performer", features=features, cross=cross)
        found = jax.jit(made.attend)({}, *heads)
        errors.append(float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)))
    assert errors[1] < 0.05 and errors[1] < errors[0]


def test_performer_is_its_formula():
    heads = draw(s=S)
    made = efficient.make("performer", features=9, cross=True)
    found = made.attend({}, *heads)
    directions = np.asarray(made.projection(N, H), np.float64)
    query, key, value = (np.asarray(x, np.float64) for x in heads)
    phi = lambda x: np.exp(
        np.einsum("btnh,nmh->btnm", x * H**-0.25, directions)
        - (x**2).sum(axis=-1, keepdims=True) / 2 / H**0.5
    )
    weights = np.einsum("btnm,bsnm->bnts", phi(query), phi(key))
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bnts,bsnh->btnh", weights, value), atol=SAME)


def test_performer_draws_while_training():
    heads, made = draw(), efficient.make("performer", features=9)
    run = lambda seed, train: made.attend({}, *heads, rng=jax.random.key(seed), train=train)
    fixed = made.attend({}, *heads)
    np.testing.assert_array_equal(run(1, False), fixed)
    np.testing.assert_array_equal(run(1, True), run(1, True))
    assert abs(run(1, True) - run(2, True)).max() > 0.01
    directions = made.projection(N, H)
    assert directions.shape == (N, 9, H) and abs(directions[0] - directions[1]).max() > 0.1
    products = directions[0] @ directions[0].T
    np.testing.assert_allclose(products - jnp.diag(jnp.diag(products)), 0, atol=1e-4)


def test_large_queries_and_keys_stay_finite():
    query, key, value = draw()
    made = efficient.make("performer")
    loss = lambda *heads: made.attend({}, *heads).sum()
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(30 * query, 30 * key, value)
    assert all(jnp.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("cross", [False, True])
def test_cosformer_is_its_formula(cross):
    s = S if cross else T
    heads = draw(s=s)
    found = efficient.make("cosformer", cross=cross).attend({}, *heads)
    query, key, value = (np.asarray(x, np.float64) for x in heads)
    distance = np.arange(T)[:, None] - np.arange(s)[None]
    scores = np.einsum("btnh,bsnh->bnts", query.clip(0), key.clip(0))
    weights = scores * np.cos(np.pi / 2 * distance / T)
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bnts,bsnh->btnh", weights, value), atol=SAME)


def test_cosformer_counts_valid_tokens_only():
    """Padding in front moves nothing either."""
    heads = draw()
    made = efficient.make("cosformer")
    grown = [jnp.pad(x, ((0, 0), (3, 2), (0, 0), (0, 0)), constant_values=7.0) for x in heads]
    valid = jnp.pad(jnp.ones((B, T), bool), ((0, 0), (3, 2)))
    found = made.attend({}, *grown, query_valid=valid, key_valid=valid)
    np.testing.assert_allclose(found[:, 3:-2], made.attend({}, *heads), atol=SAME)


def test_queries_without_a_positive_entry_attend_to_nothing():
    query, key, value = draw()
    out = efficient.make("cosformer").attend({}, -abs(query), key, value)
    np.testing.assert_array_equal(out, jnp.zeros_like(out))
