# SPDX-License-Identifier: Apache-2.0
"""Chosen blocks of keys, and experts of tokens, against a search by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import assign_experts, attention, mask, select_blocks
from attnjax.ops.routing import expert_capacity

B, N, K, H = 2, 4, 2, 5


def arrays(t, s, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return make(B, t, N, H), make(B, s, K, H)


def by_hand(query, key, block_q, block_k, top_k, allowed, is_shared):
    """For every row of blocks: own blocks, then the best of the others that are allowed."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    t, s = query.shape[1], key.shape[1]
    if is_shared:
        query = np.repeat(query.reshape(B, t, K, N // K, H).mean(3), N // K, axis=2)
    kept = np.zeros((B, N, t, s), bool)
    for b, n, start in np.ndindex(B, N, -(-t // block_q)):
        rows = slice(start * block_q, min(t, (start + 1) * block_q))
        own = {(q + s - t) // block_k for q in range(rows.start, rows.stop)}
        scores = {}
        for j in range(-(-s // block_k)):
            columns = slice(j * block_k, min(s, (j + 1) * block_k))
            heads = range(n // (N // K) * (N // K), (n // (N // K) + 1) * (N // K))
            seen = [allowed[b, m, rows, columns].any() for m in (heads if is_shared else [n])]
            if j in own or any(seen):
                mean = key[b, columns, n // (N // K)].mean(0)
                scores[j] = query[b, rows, n].mean(0) @ mean
        others = sorted((j for j in scores if j not in own), key=lambda j: -scores[j])
        for j in [*own, *others[: max(0, top_k - len(own))]]:
            kept[b, n, rows, j * block_k : (j + 1) * block_k] = True
    return kept & allowed


MASKS = {
    "all": None,
    "causal": mask.causal(),
    "window": mask.sliding_window(20, 0),
    "heads": mask.per_head([mask.causal(), mask.sliding_window(6, 0)] * 2),
    "padding": mask.causal() & mask.padding(np.array([40, 17])),
}


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_choice(name, is_shared):
    for seed, (t, s, block_q, block_k, top_k) in enumerate(
        [(40, 40, 16, 6, 2), (23, 40, 7, 5, 4), (40, 40, 1, 8, 2)]
    ):
        query, key = arrays(t, s, seed)
        allowed = np.ones((B, N, t, s), bool)
        if MASKS[name] is not None:
            allowed &= MASKS[name].dense_bnts(t, s)
        dense = jax.jit(
            lambda query, key: select_blocks(
                query, key, block_q=block_q, block_k=block_k, top_k=top_k, mask=MASKS[name],
                is_shared=is_shared,
            ).dense_bnts(t, s)
        )(query, key)  # fmt: skip
        expected = by_hand(query, key, block_q, block_k, top_k, allowed, is_shared)
        dense = np.broadcast_to(dense, expected.shape)
        np.testing.assert_array_equal(dense, expected)


def test_every_query_sees_itself_and_never_its_future():
    query, key = arrays(40, 40)
    options = dict(block_q=8, block_k=8, top_k=1, mask=mask.causal())
    dense = np.asarray(select_blocks(query, key, **options).dense_bnts(40, 40))
    assert dense[..., np.arange(40), np.arange(40)].all()
    assert not np.triu(dense, 1).any()
    every = select_blocks(query, key, **options | {"top_k": 99}).dense_bnts(40, 40)
    np.testing.assert_array_equal(every, np.broadcast_to(np.tri(40, dtype=bool), dense.shape))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_attention_through_the_choice(implementation):
    query, key = arrays(40, 40)

    @jax.jit
    def run(query, key):
        made = select_blocks(query, key, block_q=8, block_k=8, top_k=2, mask=mask.causal())
        return attention(query, key, key, mask=made, implementation=implementation)

    made = select_blocks(query, key, block_q=8, block_k=8, top_k=2, mask=mask.causal())
    expected = attention(query, key, key, mask=made.dense_bnts(40, 40), implementation="reference")
    np.testing.assert_allclose(run(query, key), expected, atol=2e-6)


def test_refusals():
    query, key = arrays(40, 40)
    for options, message in (
        (dict(block_q=0), "block_q=0"),
        (dict(block_k=-1), "block_k=-1"),
        (dict(top_k=0), "top_k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            select_blocks(query, key, **{"block_q": 8, "block_k": 8, "top_k": 2, **options})
    for wrong in (key[..., :3], key[:, :20], jnp.concatenate([key, key[:, :, :1]], axis=2)):
        with pytest.raises(ValueError, match="do not fit"):
            select_blocks(query, wrong, block_q=8, block_k=8, top_k=2)


def experts_by_hand(logits, top_k, capacity, valid):
    """Token after token, choice after choice, in numpy."""
    g, t, e = logits.shape
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    combine = np.zeros((g, t, e, capacity))
    chosen = np.zeros(e)
    for group in range(g):
        used = [0] * e
        for token in np.flatnonzero(valid[group]):
            p = probabilities[group, token]
            best = np.argsort(-p, kind="stable")[:top_k]
            weights = p[best] / (p[best].sum() if top_k > 1 else 1)
            for expert, weight in zip(best, weights, strict=True):
                chosen[expert] += 1
                if used[expert] < capacity:
                    combine[group, token, expert, used[expert]] = weight
                used[expert] += 1
    count = valid.sum()
    load = e * (chosen / (top_k * count)) @ probabilities[valid].mean(axis=0)
    z = np.mean(np.log(np.exp(logits[valid]).sum(-1)) ** 2)
    return combine, load, z, 1 - (combine > 0).sum() / (top_k * count)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity", [1, 3, 20])
def test_assignment_equals_a_loop_over_tokens(top_k, capacity):
    rng = np.random.default_rng(top_k)
    logits = rng.standard_normal((3, 10, 4)).astype(np.float32)
    valid = rng.random((3, 10)) < 0.8
    found = assign_experts(logits, top_k=top_k, capacity=capacity, valid=valid)
    combine, load, z, dropped = experts_by_hand(logits, top_k, capacity, valid)
    np.testing.assert_allclose(found.combine, combine, atol=1e-6)
    np.testing.assert_array_equal(found.dispatch, combine > 0)
    np.testing.assert_allclose([found.load_loss, found.z_loss, found.dropped], [load, z, dropped],
                               atol=1e-5)  # fmt: skip
    # Nobody has two tokens in one place.
    assert found.dispatch.sum(axis=1).max() <= 1
    assert found.dispatch.any(axis=(1, 3)).shape == (3, 4)


def test_equal_load_costs_one_and_a_collapse_costs_all():
    """Every expert chosen alike, with flat probabilities: 1. One expert for all, surely: e."""
    even = 1e-4 * jnp.eye(4)[jnp.arange(16) % 4][None]
    np.testing.assert_allclose(assign_experts(even, top_k=1, capacity=4).load_loss, 1, atol=1e-3)
    one = 50.0 * jnp.eye(4)[jnp.zeros(16, jnp.int32)][None]
    collapsed = assign_experts(one, top_k=1, capacity=4)
    np.testing.assert_allclose(collapsed.load_loss, 4, rtol=1e-5)
    np.testing.assert_allclose(collapsed.dropped, 0.75, rtol=1e-6)


def test_later_tokens_take_no_place_from_earlier_ones():
    logits = np.random.default_rng(0).standard_normal((1, 12, 3)).astype(np.float32)
    assign = jax.jit(lambda x: assign_experts(x, top_k=2, capacity=4))
    whole, start = assign(logits), assign(logits[:, :7])
    np.testing.assert_array_equal(whole.combine[:, :7], start.combine)


def test_losses_pull_experts_together():
    """A step against the gradient of the load loss lowers it."""
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((2, 32, 4)) + np.arange(4))
    loss = jax.jit(lambda x: assign_experts(x, top_k=1, capacity=8).load_loss)
    gradient = jax.grad(loss)(logits.astype(jnp.float32))
    assert float(loss(logits - 30 * gradient)) < float(loss(logits))


def test_capacity_is_the_even_share_times_a_factor():
    assert expert_capacity(1024, 64, 2, 1.25) == 40
    assert expert_capacity(10, 4, 1, 1.0) == 3
    assert expert_capacity(1, 64, 1, 1.25) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((2, 3))}, r"must be \[g,t,e\]"),
        ({"top_k": 5}, "top_k=5"),
        ({"top_k": 0}, "top_k=0"),
        ({"capacity": 0}, "capacity=0"),
        ({"valid": np.ones((2, 4), bool)}, r"valid must be bool \[g,t\]"),
        ({"valid": np.ones((2, 3), np.int32)}, "int32"),
    ],
)
def test_impossible_assignments_are_refused(changes, message):
    arguments = {"logits": np.zeros((2, 3, 4)), "top_k": 1, "capacity": 2, **changes}
    with pytest.raises(ValueError, match=message):
        assign_experts(arguments.pop("logits"), **arguments)
