# SPDX-License-Identifier: Apache-2.0
"""Relaxed mixers equal loops in float64, see no later token, and go on from their states."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention
from attnjax.ops import mask as masks
from attnjax.ops.cache import FullCache, append_and_attend
from attnjax.ops.relaxed import (
    MIXERS,
    CumulativeState,
    TaylorState,
    cumulative_map,
    cumulative_softmax,
    extend_cumulative,
    extend_taylor,
    fold_batch,
    shared_map_attention,
    taylor_attention,
    unfold_batch,
)
from attnjax.ops.relaxed_cost import cache_bytes, decode_flops, prefill_flops

EXACT = 1e-5  # float32 sums against float64, relative to the largest entry
SIZES = (1, 2, 33, 257)
FORMS = [("separate", "diagonal"), ("joint", "diagonal"), ("joint", "full"), ("separate", "full")]


def draw(t, b=2, n=2, k=2, h=4, shift=1.0):
    """Queries and keys that mostly agree, so that no denominator vanishes; any values."""
    rng = np.random.default_rng(t)
    shapes = ((b, t, n, h), (b, t, k, h), (b, t, k, h))
    query, key, value = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return query + shift, key + shift, value


def close(ours, expected, tolerance=EXACT):
    scale = max(1.0, np.abs(np.asarray(expected, np.float64)).max())
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), expected, rtol=0, atol=tolerance * scale
    )


def loop(query, key, value, weigh):
    """The average of values up to every token, `weigh` giving weights of all orders."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    b, t, n, h = query.shape
    out = np.zeros((b, t, n, value.shape[3]))
    for i in np.ndindex(b, n):
        head = i[1] // (n // key.shape[2])
        for place in range(t):
            k, v = key[i[0], : place + 1, head], value[i[0], : place + 1, head]
            out[i[0], place, i[1]] = sum(
                w @ v / w.sum() for w in weigh(query[i[0], : place + 1, i[1]], k, h)
            )
    return out


def cumulative_weights(query, key, h):
    logits = (query * key).sum(-1) / math.sqrt(h)
    return [np.exp(logits - logits.max())]


def taylor_weights(norm, second):
    def weigh(query, key, h):
        products = query[-1] * key / math.sqrt(h)
        first = products.sum(-1)
        square = (products**2).sum(-1) if second == "diagonal" else first**2
        orders = [np.ones(len(key)), first, square / 2]
        return orders if norm == "separate" else [sum(orders)]

    return weigh


OPS = {"cumulative": (cumulative_softmax, cumulative_weights)}
OPS |= {
    f"taylor-{norm}-{second}": (
        functools.partial(taylor_attention, norm=norm, second=second, chunk=32),
        taylor_weights(norm, second),
    )
    for norm, second in FORMS
}
COMPILED = {name: jax.jit(op) for name, (op, _) in OPS.items()}


@pytest.mark.parametrize("t", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_it_equals_a_loop_in_float64(name, t):
    query, key, value = draw(t)
    close(COMPILED[name](query, key, value), loop(query, key, value, OPS[name][1]))


@pytest.mark.parametrize("name", ["cumulative", "taylor-joint-diagonal"])
def test_grouped_heads_share_keys_and_values(name):
    query, key, value = draw(7, n=4, k=2)
    close(COMPILED[name](query, key, value), loop(query, key, value, OPS[name][1]))


@pytest.mark.parametrize("name", OPS)
def test_no_output_knows_of_later_tokens(name):
    query, key, value = draw(33)
    out = COMPILED[name](query, key, value)
    changed = [x.copy() for x in (query, key, value)]
    for x in changed:
        x[:, 20:] += 1
    other = COMPILED[name](*changed)
    np.testing.assert_array_equal(out[:, :20], other[:, :20])
    assert np.abs(out[:, 20:] - other[:, 20:]).min(axis=(0, 2, 3)).max() > 0


@pytest.mark.parametrize("name", OPS)
def test_segments_equal_separate_texts(name):
    op, (query, key, value) = COMPILED[name], draw(41)
    sizes = (3, 1, 37)  # The last begins inside of a chunk of 32 and ends in the next.
    segments = np.repeat([1, 2, 3], sizes)[None].repeat(2, axis=0)
    packed = op(query, key, value, segments=segments)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        expected = loop(query[:, part], key[:, part], value[:, part], OPS[name][1])
        close(packed[:, part], expected)
        start += size


STEPS = {"cumulative": jax.jit(extend_cumulative)}
STEPS |= {
    f"taylor-{norm}-{second}": jax.jit(functools.partial(extend_taylor, norm=norm, second=second))
    for norm, second in FORMS
}


@pytest.mark.parametrize("t", SIZES)
@pytest.mark.parametrize("name", ["cumulative", "taylor-separate-diagonal", "taylor-joint-full"])
def test_steps_equal_the_whole(name, t):
    query, key, value = draw(t)
    whole = COMPILED[name](query, key, value)
    is_taylor = name.startswith("taylor")
    make = TaylorState.empty if is_taylor else CumulativeState.empty
    state = make(2, 2, 4, *(name.split("-")[2:]))
    outs, first = [], t // 2  # A prompt, then token by token.
    for start, stop in [(0, first)] * (first > 0) + [(i, i + 1) for i in range(first, t)]:
        part = [x[:, start:stop] for x in (query, key, value)]
        out, state = STEPS[name](*part, state, *((start,) if is_taylor else ()))
        outs.append(out)
    close(np.concatenate(outs, axis=1), whole)


def test_shared_map_is_ordinary_attention_with_queries_and_keys_repeated():
    query, key, value = draw(33, b=3, n=4)
    query, key = query[:1], key[:1]
    repeated = [np.repeat(x, 3, axis=0) for x in (query, key)]
    expected = attention(*repeated, value, mask=masks.causal())
    close(shared_map_attention(query, key, value, mask=masks.causal()), expected)
    np.testing.assert_array_equal(unfold_batch(fold_batch(value), 3), value)
    result = shared_map_attention(query, key, value, mask=masks.causal(), return_probabilities=True)
    assert result.probabilities.shape == (1, 4, 33, 33)
    close(result.out, expected)
    with pytest.raises(ValueError, match="of one sequence"):
        shared_map_attention(repeated[0], key, value)


def test_shared_map_exists_once():
    """Temporaries of 16 examples: one map instead of sixteen."""
    shapes = [jax.ShapeDtypeStruct((b, 128, 2, 4), jnp.float32) for b in (1, 16, 16)]

    def temporaries(op, query, key, value):
        run = jax.jit(lambda *x: op(*x, mask=masks.causal()))
        return run.lower(query, key, value).compile().memory_analysis().temp_size_in_bytes

    one, many, value = shapes
    shared = temporaries(shared_map_attention, one, one, value)
    assert shared < temporaries(attention, many, many, value) / 4


def test_cumulative_map_is_the_map():
    query, key, value = draw(9)
    map_of = jax.jit(cumulative_map)
    weights = map_of(query, key)
    close(np.einsum("bnts,bsnh->btnh", weights, value), COMPILED["cumulative"](query, key, value))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    segments = np.repeat([[1, 2]], [4, 5], axis=1).repeat(2, axis=0)
    close(
        np.einsum("bnts,bsnh->btnh", map_of(query, key, segments=segments), value),
        COMPILED["cumulative"](query, key, value, segments=segments),
    )


def test_logits_of_ten_thousand_are_harmless():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in draw(64, shift=0.0))
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True) * 200

    def loss(query, key, value):
        return jnp.sum(cumulative_softmax(query, key * 100, value).astype(jnp.float32) ** 2)

    logits = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32), -1) * 100 / 2
    assert jnp.abs(logits).max() > 1e4
    out = COMPILED["cumulative"](query, key * 100, value)
    assert out.dtype == jnp.bfloat16 and jnp.isfinite(out.astype(jnp.float32)).all()
    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value):
        assert jnp.isfinite(gradient.astype(jnp.float32)).all()


def test_gradient_of_the_cumulative_softmax():
    """Against the dense map, whose gradient is automatic."""
    query, key, value = draw(12)

    def dense(query, key, value):
        return jnp.einsum("bnts,bsnh->btnh", cumulative_map(query, key), value)

    weights = np.random.default_rng(1).standard_normal(value.shape).astype(np.float32)
    gradient = lambda op: jax.jit(jax.grad(lambda *x: jnp.sum(op(*x) * weights), argnums=(0, 1, 2)))
    for ours, expected in zip(
        gradient(cumulative_softmax)(query, key, value), gradient(dense)(query, key, value),
        strict=True,
    ):  # fmt: skip
        close(ours, expected)


def test_vanishing_denominators_keep_their_sign():
    zero = np.zeros((1, 3, 1, 4), np.float32)
    value = np.ones((1, 3, 1, 4), np.float32)
    out, (_, first, second) = taylor_attention(zero, zero, value, return_denominators=True)
    close(out, np.ones((1, 3, 1, 4)))  # The mean of values; nothing of the other orders.
    assert not first.any() and not second.any()
    query, key = zero.copy(), zero.copy()
    query[..., 0], key[..., 0] = 0.1, -0.1
    out = taylor_attention(query, key, value, epsilon=1.0)
    assert np.all(out > 1)  # A small negative sum over a negative denominator.


def test_caches_have_the_bytes_of_the_table():
    b, t, d, n = 3, 40, 24, 4
    h, half = d // n, jnp.bfloat16
    size = lambda *arrays: sum(x.nbytes for x in arrays)
    full = FullCache.empty(batch=b, heads=n, width=h, capacity=t, dtype=half)
    shared = FullCache.empty(batch=1, heads=n, width=h, value_width=b * h, capacity=t, dtype=half)
    stored = {
        "standard": size(full.key, full.value),
        "static_embedding": size(full.key, full.value),
        "mlp": 0,
        "approximate": size(*jax.tree.leaves(TaylorState.empty(b, n, h, dtype=half))),
        "non_approximate": size(*jax.tree.leaves(CumulativeState.empty(b, n, h, half))),
        "random_embedding": size(shared.key, shared.value),
        "fixed_sequence": size(shared.key, shared.value),
    }
    assert set(stored) == set(MIXERS)
    assert stored == {mixer: cache_bytes(mixer, b, t, d, n) for mixer in MIXERS}
    assert cache_bytes("approximate", b, t, d, n) == 6 * b * d + 4 * b * d * d // n
    assert cache_bytes("non_approximate", b, t, d, n) == 2 * b * d + 4 * b * n
    assert cache_bytes("random_embedding", b, t, d, n) == 2 * (b + 1) * t * d


def test_half_precision_states_are_updated_in_float32():
    query, key, value = (x[:, :1] for x in draw(5))
    state = CumulativeState.empty(2, 2, 4, jnp.bfloat16)
    out, state = extend_cumulative(query, key, value, state)
    close(out, value)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("t", [1, 2, 33])
def test_shared_map_is_decoded_from_one_copy_of_the_keys(t):
    query, key, value = draw(t, b=3)
    query, key = query[:1], key[:1]
    cache = FullCache.empty(batch=1, heads=2, width=4, value_width=12, capacity=t)
    step = jax.jit(append_and_attend)
    outs = []
    for i in range(t):
        at = slice(i, i + 1)
        out, cache = step(query[:, at], key[:, at], fold_batch(value[:, at]), cache)
        outs.append(unfold_batch(out, 3))
    whole = shared_map_attention(query, key, value, mask=masks.causal())
    close(np.concatenate(outs, axis=1), whole)


def test_operations_are_those_of_the_table():
    b, t, d = 2, 16, 8
    assert prefill_flops("standard", b, t, d) == 4 * b * t * t * d + 6 * b * t * d * d
    assert prefill_flops("approximate", b, t, d) == 14 * b * t * d * d
    assert decode_flops("random_embedding", b, t, d) == 2 * t * d + 2 * b * t * d + 6 * b * d * d
    assert decode_flops("standard", b, t, d) == 4 * b * t * d + 6 * b * d * d
    assert decode_flops("mlp", b, t, d) == 6 * b * d * d


def test_refusals():
    query, key, value = draw(4)
    with pytest.raises(ValueError, match="norm='sum': choose from separate, joint"):
        taylor_attention(query, key, value, norm="sum")
    with pytest.raises(ValueError, match="second='third'"):
        TaylorState.empty(1, 1, 4, "third")
    with pytest.raises(ValueError, match="dividing the 2 heads"):
        cumulative_softmax(query, key[:, :3], value)
    with pytest.raises(ValueError, match="choose from standard, mlp"):
        cache_bytes("rnn", 1, 1, 4, 2)
    with pytest.raises(ValueError, match="heads=3"):
        cache_bytes("mlp", 1, 1, 4, 3)
