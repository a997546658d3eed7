# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-head gates against numbers by hand; attention of chosen queries against all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, mask
from attnjax.ops.head_routing import (
    attend_chosen,
    balance_loss,
    check_heads,
    choose_heads,
    head_capacity,
    mixture_gates,
    query_gates,
)

B, T = 2, 7
ATOL = 1e-5


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def soft(x):
    exponential = np.exp(np.asarray(x, np.float64))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def by_hand(routed, shared, types, top_k, num_shared):
    """Gates one token at a time, and the loss."""
    experts = 0 if routed is None else routed.shape[-1]
    gates = np.zeros((B, T, num_shared + experts))
    mean_p, mean_f = np.zeros(experts), np.zeros(experts)
    for b, t in np.ndindex(B, T):
        weights = np.ones(2) if types is None else 2 * soft(types[b, t])
        if num_shared:
            share = np.ones(1) if shared is None else soft(shared[b, t])
            gates[b, t, :num_shared] = weights[0] * num_shared * share
        if experts:
            p = soft(routed[b, t])
            best = sorted(range(experts), key=lambda e: (-p[e], e))[:top_k]
            for e in best:
                gates[b, t, num_shared + e] = weights[1] * top_k * p[e] / p[best].sum()
                mean_f[e] += 1 / (B * T)
            mean_p += p / (B * T)
    return gates, experts * (mean_p * mean_f).sum()


@pytest.mark.parametrize(
    ("num_shared", "experts", "top_k"), [(3, 5, 2), (1, 4, 3), (0, 6, 2), (4, 0, 0), (2, 4, 4)]
)
def test_gates_are_those_of_the_definition(num_shared, experts, top_k):
    routed = drawn(B, T, experts) if experts else None
    shared = drawn(B, T, num_shared, seed=1) if num_shared > 1 else None
    types = drawn(B, T, 2, seed=2) if num_shared and experts else None
    made = jax.jit(functools.partial(mixture_gates, top_k=top_k, num_shared=num_shared))(
        routed, shared, types
    )
    gates, loss = by_hand(routed, shared, types, top_k, num_shared)
    np.testing.assert_allclose(made.gates, gates, atol=ATOL)
    np.testing.assert_allclose(made.balance_loss, loss, rtol=1e-5)
    assert (made.chosen.sum(-1) == num_shared + top_k).all()
    np.testing.assert_array_equal(made.chosen, np.asarray(made.gates) > 0)
    # Mass: s + K, where both types count alike.
    share = np.ones((B, T, 2)) if types is None else 2 * soft(types)
    mass = share[..., 0] * num_shared + share[..., 1] * top_k
    np.testing.assert_allclose(made.gates.sum(-1), mass, rtol=1e-5)


def test_without_scores_all_gates_are_one():
    zeros = lambda size: jnp.zeros((B, T, size))
    made = mixture_gates(zeros(5), zeros(3), zeros(2), top_k=5, num_shared=3)
    np.testing.assert_allclose(made.gates, 1, atol=1e-6)


def test_balance():
    """K when all heads are chosen alike, e when one head gets everything."""
    even = jnp.full((1, 6, 6), 1 / 6)
    chosen = jnp.stack([jnp.roll(jnp.arange(6) < 2, i) for i in range(6)])[None]
    np.testing.assert_allclose(balance_loss(even, chosen), 2, rtol=1e-6)
    one = jnp.zeros((1, 6, 6)).at[..., 2].set(1)
    np.testing.assert_allclose(balance_loss(one, one > 0), 6, rtol=1e-6)
    # Padding does not count.
    padded = jnp.concatenate([even, one], axis=1), jnp.concatenate([chosen, one > 0], axis=1)
    valid = jnp.arange(12)[None] < 6
    np.testing.assert_allclose(balance_loss(*padded, valid), 2, rtol=1e-6)
    grad = jax.grad(lambda x: mixture_gates(x, None, None, top_k=2, num_shared=0).balance_loss)(
        drawn(B, T, 5)
    )
    assert np.abs(grad).max() > 1e-4


def test_equal_scores_choose_the_first_heads():
    assert choose_heads(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).tolist() == [False, True, True, False]
    assert choose_heads(jnp.array([2.0, 1.0, 2.0]), 1).tolist() == [True, False, False]


def test_routing_by_queries():
    """Gates 1 or 0 by the sizes of queries; the gradient of scores; with all chosen exactly 1."""
    query = drawn(B, T, 8, 4)
    made = query_gates(query, top_k=2, num_shared=4)
    sizes = np.linalg.norm(np.asarray(query, np.float64)[:, :, 4:], axis=-1)
    best = np.argsort(-sizes, axis=-1)[..., :2]
    expected = np.zeros((B, T, 4))
    np.put_along_axis(expected, best, 1, axis=-1)
    np.testing.assert_array_equal(made.gates[..., 4:], expected)
    np.testing.assert_array_equal(made.gates[..., :4], 1)
    np.testing.assert_array_equal(query_gates(query, top_k=4, num_shared=4).gates, 1)
    weights = drawn(B, T, 8, seed=3)
    through = lambda q: jnp.sum(weights * query_gates(q, top_k=2, num_shared=4).gates)
    score = lambda q: jax.nn.softmax(
        (size := jnp.linalg.norm(q[:, :, 4:], axis=-1)) / jnp.std(size, -1, ddof=1, keepdims=True)
    )
    expected = jax.grad(lambda q: jnp.sum(weights[..., 4:] * score(q)))(query)
    np.testing.assert_allclose(jax.grad(through)(query), expected, atol=ATOL)
    assert np.isfinite(jax.grad(through)(jnp.zeros_like(query))).all()


@pytest.mark.parametrize("form", ["full", "causal", "lengths", "window", "bias", "grouped"])
def test_chosen_queries_attend_as_all_do(form):
    n, k, t = 4, 2 if form == "grouped" else 4, 9
    query, key, value = drawn(B, t, n, 4), drawn(B, t, k, 4, seed=1), drawn(B, t, k, 3, seed=2)
    chosen = jnp.asarray(np.random.default_rng(3).random((B, t, n)) < 0.5)
    sparse, dense = {}, {}
    if form in ("causal", "grouped"):
        sparse["last"], dense["mask"] = jnp.arange(1, t + 1)[None], mask.causal()
    if form == "lengths":
        lengths = jnp.array([9, 6])
        sparse["last"] = jnp.broadcast_to(lengths[:, None], (B, t))
        dense["mask"] = mask.padding(lengths)
    if form == "window":
        places = jnp.arange(t)[None]
        sparse |= {"first": places - 2, "last": places + 1}
        dense["mask"] = mask.sliding_window(2, 0)
    if form == "bias":
        sparse["bias"] = dense["bias"] = drawn(n, t, t, seed=4)

    def loss(attend, *arrays):
        out = attend(*arrays)
        return jnp.sum(jnp.sin(out)), out

    whole = lambda *a: jnp.where(chosen[..., None], attention(*a, **dense), 0)
    part = lambda *a: attend_chosen(*a, chosen, capacity=t, **sparse)[0]
    grads, outs = [], []
    for form in (whole, part):
        run = jax.jit(jax.grad(functools.partial(loss, form), (0, 1, 2), has_aux=True))
        grad, out = run(query, key, value)
        grads.append(grad)
        outs.append(out)
    np.testing.assert_allclose(outs[1], outs[0], atol=ATOL)
    for one, other in zip(*grads, strict=True):
        np.testing.assert_allclose(other, one, atol=ATOL)


def test_queries_without_a_place_give_zero():
    query, chosen = drawn(1, 6, 2, 4), jnp.ones((1, 6, 2), bool).at[0, 1, 0].set(False)
    out, dropped = attend_chosen(query, query, query, chosen, capacity=3)
    whole = attention(query, query, query)
    kept = np.zeros((1, 6, 2, 1), bool)
    kept[0, [0, 2, 3], 0] = kept[0, :3, 1] = True
    np.testing.assert_allclose(out, np.where(kept, whole, 0), atol=ATOL)
    np.testing.assert_allclose(dropped, 5 / 11, rtol=1e-6)


def test_half_of_the_heads_take_fewer_operations():
    t, n = 256, 8

    def flops(capacity):
        shape = jax.ShapeDtypeStruct((1, t, n, 32), jnp.float32)
        chosen = jax.ShapeDtypeStruct((1, t, n), jnp.bool_)
        attend = lambda q, c: attend_chosen(q, q, q, c, capacity=capacity)[0]
        return jax.jit(attend).lower(shape, chosen).compile().cost_analysis()["flops"]

    assert flops(t // 2) < 0.6 * flops(t)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_heads(8, 6, 3), "of 8 heads at most 8 are shared, and at most the other 2"),
        (lambda: check_heads(8, 8, 1), "the other 0 chosen"),
        (lambda: check_heads(8, 4, 0), "the others never work"),
        (lambda: mixture_gates(None, None, None, top_k=0, num_shared=1), "no gates"),
        (
            lambda: mixture_gates(drawn(B, T, 4), None, None, top_k=2, num_shared=2),
            "shared must be",
        ),
        (lambda: query_gates(drawn(B, T, 4, 2), top_k=1, num_shared=3), "at least two"),
        (lambda: attend_chosen(*[drawn(1, 3, 2, 4)] * 3, drawn(1, 3, 2) > 0, capacity=4), "=4"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_capacity():
    assert head_capacity(100, 8, 4) == 50
    assert head_capacity(100, 6, 4, 1.25) == 84
    assert head_capacity(10, 4, 4, 2.0) == 10
