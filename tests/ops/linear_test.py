# SPDX-License-Identifier: Apache-2.0
"""Random features: what they estimate, and that linear attention is the attention they define."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops.linear import (
    cosine_weighted,
    feature_attention,
    gaussian_projection,
    linear_attention,
    orthogonal_projection,
    positive_features,
)

TOLERANCE = 2e-5  # float32, relative to the largest entry
SIGMAS = 5.0  # a mean of independent draws is this many standard errors off once in 1.7 million


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def estimates(query, key, projection):
    """One kernel estimate per query-key pair: phi(q) . phi(k)."""

    def phi(x):
        return np.asarray(positive_features(jnp.asarray(x)[None, :, None], projection))[0, :, 0]

    return phi(query).astype(np.float64) @ phi(key).astype(np.float64).T


def test_features_are_the_formula_and_positive():
    x, projection = normal(0, 2, 3, 4, 8), normal(1, 5, 8)
    features = positive_features(jnp.asarray(x), jnp.asarray(projection))
    wide = x.astype(np.float64)
    exponent = wide @ projection.T.astype(np.float64) - (wide**2).sum(-1, keepdims=True) / 2
    expected = np.exp(exponent) / math.sqrt(5)
    np.testing.assert_allclose(features, expected, rtol=TOLERANCE)
    assert features.dtype == jnp.float32 and (features > 0).all()
    half = positive_features(jnp.asarray(x, jnp.bfloat16), jnp.asarray(projection))
    assert half.dtype == jnp.float32


def test_gaussian_directions_estimate_the_softmax_kernel_without_bias():
    """E[phi(q) . phi(k)] = exp(q . k), with the variance of the closed form.

    One direction gives exp(w.z - (|q|^2 + |k|^2) / 2) with z = q + k, whose second moment is
    exp(2 |z|^2 - |q|^2 - |k|^2).
    """
    m, h = 200_000, 6
    query, key = 0.3 * normal(2, 3, h), 0.3 * normal(3, 4, h)
    found = estimates(query, key, jnp.asarray(normal(4, m, h)))
    exact = np.exp(query @ key.T)
    squares = (query**2).sum(-1)[:, None] + (key**2).sum(-1)
    sums = ((query[:, None] + key) ** 2).sum(-1)
    variance = np.exp(2 * sums - squares) - exact**2
    assert (np.abs(found - exact) < SIGMAS * np.sqrt(variance / m)).all()
    # The bound says something: it is at most a few percent of the kernel.
    assert (SIGMAS * np.sqrt(variance / m) < 0.05 * exact).all()


def test_directions_are_orthogonal_and_of_equal_length():
    w = np.asarray(orthogonal_projection(jax.random.key(0), 8, 16))
    np.testing.assert_allclose(w @ w.T, 8 * np.eye(8), atol=TOLERANCE * 8)
    assert w.dtype == np.float32
    other = orthogonal_projection(jax.random.key(1), 8, 16)
    assert np.abs(w - other).max() > 0.1
    with pytest.raises(ValueError, match="features=17: at most head_dim=16"):
        orthogonal_projection(jax.random.key(0), 17, 16)


def sphere_mean(radius, length, h):
    """E[exp(w . z)] over w uniform on a sphere: the series of Gamma(h/2) I_{h/2-1}(r|z|) ...."""
    x = (radius * length) ** 2 / 4
    return sum(x**i / math.factorial(i) / math.prod(h / 2 + j for j in range(i)) for i in range(60))


@pytest.mark.parametrize(("m", "h"), [(4, 8), (8, 8)])
def test_orthogonal_directions_estimate_the_mean_over_a_sphere(m, h):
    """What the reference's scaling by sqrt(m) estimates, over many draws of the projection.

    Near the origin that is exp(q . k (m / h) - (1 - m / h)(|q|^2 + |k|^2) / 2): the softmax kernel
    only where m equals h, and there to second order.
    """
    query, key = 0.25 * normal(5, 1, h), 0.25 * normal(6, 1, h)
    draws = jax.vmap(lambda k: orthogonal_projection(k, m, h))(
        jax.random.split(jax.random.key(7), 4000)
    )
    phi = lambda x: jax.vmap(lambda w: positive_features(jnp.asarray(x)[None, :, None], w))(draws)
    values = np.asarray((phi(query) * phi(key)).sum(-1), np.float64).ravel()
    squares = float((query**2).sum() + (key**2).sum())
    length = float(np.linalg.norm(query + key))
    exact = sphere_mean(math.sqrt(m), length, h) * math.exp(-squares / 2)
    error = values.std() / math.sqrt(values.size)
    assert abs(values.mean() - exact) < SIGMAS * error
    kernel = math.exp(float(query[0] @ key[0]))
    assert (abs(values.mean() / kernel - 1) < 0.05) == (m == h)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_attention_equals_its_explicit_weights(dtype):
    query, key, value = (jnp.asarray(0.5 * normal(i, 2, n, 3, 8), dtype) for i, n in
                         ((0, 5), (1, 7), (2, 7)))  # fmt: skip
    projection = orthogonal_projection(jax.random.key(0), 4, 8)
    phi = lambda x: np.asarray(positive_features(x, projection), np.float64)
    scores = np.einsum("btnm,bsnm->bnts", phi(query), phi(key))
    for epsilon in (1e-8, 0.5):
        weights = scores / (scores.sum(axis=-1, keepdims=True) + epsilon)
        expected = np.einsum("bnts,bsnh->btnh", weights, np.asarray(value, np.float64))
        out = linear_attention(query, key, value, projection, epsilon=epsilon)
        assert out.dtype == query.dtype
        tolerance = TOLERANCE if dtype == "float32" else 2**-8
        np.testing.assert_allclose(
            np.asarray(out, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max()
        )


def test_gradients_equal_those_of_the_explicit_weights():
    arrays = tuple(jnp.asarray(0.5 * normal(i, 2, n, 3, 8)) for i, n in ((0, 5), (1, 7), (2, 7)))
    projection = orthogonal_projection(jax.random.key(0), 4, 8)

    def explicit(query, key, value):
        scores = jnp.einsum(
            "btnm,bsnm->bnts", positive_features(query, projection),
            positive_features(key, projection),
        )  # fmt: skip
        weights = scores / (scores.sum(axis=-1, keepdims=True) + 1e-8)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    linear = lambda *a: linear_attention(*a, projection)
    grads = [
        jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(*a)))))(arrays) for f in (linear, explicit)
    ]
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
        assert np.abs(theirs).max() > 0


def test_many_gaussian_directions_approach_softmax_attention():
    query, key = (jnp.asarray(0.5 * normal(i, 1, n, 1, 6)) for i, n in ((0, 5), (1, 7)))
    value = jnp.asarray(normal(2, 1, 7, 1, 6))
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key), axis=-1)
    exact = jnp.einsum("bnts,bsnh->btnh", weights, value)
    errors = []
    for m in (100, 10_000):
        out = linear_attention(query, key, value, jnp.asarray(normal(9, m, 6)))
        errors.append(float(jnp.sqrt(jnp.mean((out - exact) ** 2))))
    # A hundred times the directions: a tenth of the error, give or take the luck of the draw.
    assert 4 < errors[0] / errors[1] < 25
    assert errors[1] < 0.05


def test_no_array_has_both_lengths():
    t, s = 512, 384
    query, key = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (t, s))
    projection = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    program = jax.jit(linear_attention).lower(query, key, key, projection).compile()
    assert f"{t},{s}" not in program.as_text() and f"{s},{t}" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 4 * t * s


@pytest.mark.parametrize(
    ("shapes", "where"),
    [
        (((1, 5, 2, 8), (1, 7, 1, 8), (1, 7, 1, 8)), "heads"),
        (((1, 5, 2, 8), (1, 7, 2, 4), (1, 7, 2, 8)), "head_dim"),
        (((1, 5, 2, 8), (1, 7, 2, 8), (1, 6, 2, 8)), "length"),
        (((2, 5, 2, 8), (1, 7, 2, 8), (1, 7, 2, 8)), "batch"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, where):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    projection = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    with pytest.raises(ValueError, match=where):
        jax.eval_shape(linear_attention, *arrays, projection)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("epsilon", "floor"), [(1e-8, 0.0), (0.0, 6.0)])
def test_feature_attention_equals_its_explicit_weights(is_causal, epsilon, floor):
    b, t, n, m, h = 2, 13, 3, 5, 4
    keys = jax.random.split(jax.random.key(0), 3)
    query, key = (jax.random.uniform(k, (b, t, n, m)) for k in keys[:2])
    value = jax.random.normal(keys[2], (b, t, n, h))
    options = {"is_causal": is_causal, "epsilon": epsilon, "floor": floor}
    out = jax.jit(lambda *x: feature_attention(*x, **options, chunk=4))(query, key, value)
    weights = np.einsum("btnm,bsnm->bnts", query, key)
    weights = np.tril(weights) if is_causal else weights
    total = np.maximum(weights.sum(axis=-1, keepdims=True), floor) + epsilon
    np.testing.assert_allclose(out, np.einsum("bnts,bsnh->btnh", weights / total, value), atol=1e-5)


def test_feature_attention_refuses_what_does_not_fit():
    x = jnp.zeros((1, 4, 2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        feature_attention(x, x[..., :2], x)
    with pytest.raises(ValueError, match="causal: True"):
        feature_attention(x[:, :3], x, x, is_causal=True)


def test_cosine_weighted_features_weigh_by_distance():
    t, span = 6, 8
    query, key = jax.random.uniform(jax.random.key(0), (2, 1, t, 1, 3))
    weights = np.einsum("btnm,bsnm->ts", cosine_weighted(query, span), cosine_weighted(key, span))
    distance = np.arange(t)[:, None] - np.arange(t)[None, :]
    plain = np.einsum("btnm,bsnm->ts", query, key)
    np.testing.assert_allclose(weights, plain * np.cos(np.pi * distance / (2 * span)), atol=1e-6)
    with pytest.raises(ValueError, match="span=5 is shorter than the 6 positions"):
        cosine_weighted(query, 5)


def test_gaussian_directions_are_orthogonal_in_blocks_with_the_lengths_of_normal_vectors():
    h, m = 16, 40
    rows = np.asarray(gaussian_projection(jax.random.key(0), m, h))
    assert rows.shape == (m, h)
    for start in range(0, m, h):
        part = rows[start : start + h]
        products = part @ part.T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-4)
    # The mean of |w|^2 is h, with a deviation of sqrt(2 h / rows).
    assert np.square(rows).sum(axis=-1).mean() == pytest.approx(h, abs=SIGMAS * (2 * h / m) ** 0.5)


def test_shift_of_positive_features_cancels():
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 2, 4))
    projection = gaussian_projection(jax.random.key(1), 6, 4)
    plain = positive_features(x, projection)
    for axes in ((3,), (1, 3)):
        factor = positive_features(x, projection, shift_axes=axes) / plain
        constant = np.broadcast_to(factor.max(axis=axes, keepdims=True), factor.shape)
        np.testing.assert_allclose(factor, constant, rtol=1e-4)
