# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention against a loop over heads in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.attention import MultiHeadAttention

# Float32 sums in another order.
TOLERANCE = 2e-6


def make(x, *args, seed=0, **fields):
    module = MultiHeadAttention(**fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, *args)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32)
    return module, jax.tree.map(draw, shapes)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def by_hand(params, x, context):
    """Loop over heads, in numpy."""
    p = jax.tree.map(np.asarray, params["params"])
    out = np.asarray(p["out"]["bias"])
    for i in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            np.asarray(y) @ p[name]["kernel"][:, i] + p[name]["bias"][i]
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        scores = np.einsum("bth,bsh->bts", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = out + weights @ v @ p["out"]["kernel"][i]
    return out


def test_self_attention_equals_a_loop_over_heads():
    x = normal(0, 2, 5, 12)
    module, params = make(x, num_heads=3)
    np.testing.assert_allclose(module.apply(params, x), by_hand(params, x, x), atol=TOLERANCE)


@pytest.mark.parametrize("queries", [1, 4])
def test_cross_attention_equals_a_loop_over_heads(queries):
    x, context = normal(0, 2, queries, 12), normal(1, 2, 7, 12)
    module, params = make(x, context, num_heads=3)
    np.testing.assert_allclose(
        module.apply(params, x, context), by_hand(params, x, context), atol=TOLERANCE
    )


def test_one_query_has_the_gradients_of_many():
    x, context = normal(0, 2, 2, 12), normal(1, 2, 7, 12)
    module, params = make(x, context, num_heads=3)

    def one(params, context):
        return jnp.sum(module.apply(params, x[:, :1], context) ** 2)

    def two(params, context):
        return jnp.sum(module.apply(params, x, context)[:, :1] ** 2)

    ours = jax.jit(jax.grad(one, argnums=(0, 1)))(params, context)
    theirs = jax.jit(jax.grad(two, argnums=(0, 1)))(params, context)
    # The gradient of the key bias is zero in exact arithmetic, and exactly zero for one query.
    assert not ours[0]["params"]["key"]["bias"].any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_one_query_takes_bias_and_mask():
    x, context = normal(0, 2, 3, 12), normal(1, 2, 7, 12)
    module, params = make(x, context, num_heads=3)
    for option in ({"bias": normal(2, 2, 3, 1, 7)}, {"mask": jnp.arange(7)[None] < 4}):
        one = module.apply(params, x[:, :1], context, **option)
        many = module.apply(params, x, context, **option)[:, :1]
        np.testing.assert_allclose(one, many, atol=TOLERANCE)


def test_capture_needs_a_mutable_collection():
    x = normal(0, 2, 5, 12)
    module, params = make(x, num_heads=3)
    assert set(module.init(jax.random.key(0), x)) == {"params"}
    out, captured = module.apply(params, x, mutable=["attention"])
    (probabilities,) = captured["attention"]["probabilities"]
    assert probabilities.shape == (2, 3, 5, 5) and probabilities.dtype == jnp.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=TOLERANCE)
    np.testing.assert_array_equal(out, module.apply(params, x))


def test_capture_of_one_query():
    x, context = normal(0, 2, 1, 12), normal(1, 2, 7, 12)
    module, params = make(x, context, num_heads=3)
    _, captured = module.apply(params, x, context, mutable=["attention"])
    (probabilities,) = captured["attention"]["probabilities"]
    assert probabilities.shape == (2, 3, 1, 7)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=TOLERANCE)


def test_dropout_acts_in_training_only():
    x = normal(0, 2, 5, 12)
    module, params = make(x, num_heads=3, dropout=0.5)
    rngs = {"dropout": jax.random.key(5)}
    assert not np.allclose(module.apply(params, x, train=True, rngs=rngs), module.apply(params, x))
    np.testing.assert_array_equal(module.apply(params, x), module.apply(params, x, rngs=rngs))


def test_attend_replaces_the_core():
    def mean(query, key, value):
        return jnp.broadcast_to(value.mean(axis=1, keepdims=True), query.shape)

    x = normal(0, 2, 5, 12)
    module, params = make(x, num_heads=3, attend=mean)
    out = module.apply(params, x)
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1], out.shape), atol=TOLERANCE)


def test_value_skip_adds_the_values():
    x = normal(0, 2, 5, 12)
    fields = dict(num_heads=1, head_dim=8, use_bias=False)
    module, params = make(x, value_skip=True, **fields)
    assert params["params"]["out"]["kernel"].shape == (1, 8, 8)
    values = jnp.einsum("btd,dnh->btnh", x, params["params"]["value"]["kernel"])[:, :, 0]
    plain = jax.tree.map(lambda leaf: leaf, params)
    plain["params"]["out"] = jax.tree.map(jnp.zeros_like, plain["params"]["out"])
    np.testing.assert_allclose(module.apply(plain, x), values, atol=TOLERANCE)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=5 does not divide the width 12"):
        MultiHeadAttention(num_heads=5).init(jax.random.key(0), jnp.zeros((1, 2, 12)))


def test_half_precision_keeps_parameters_in_full():
    x = normal(0, 2, 5, 12)
    module, params = make(x, num_heads=3, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert module.apply(params, x).dtype == jnp.bfloat16
