# SPDX-License-Identifier: Apache-2.0
"""Chosen blocks of keys against a search by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, mask, select_blocks

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
