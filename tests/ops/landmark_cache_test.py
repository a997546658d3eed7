# SPDX-License-Identifier: Apache-2.0
"""Landmarks on a tape, positions of blocks, and the cache against attention to everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import landmark_attention
from attnjax.ops.grouped import ContextMiss
from attnjax.ops.landmark import miss_score
from attnjax.ops.landmark_cache import RETRIEVALS, BlockCache, HostBlocks, read_chunk
from attnjax.ops.landmark_tape import (
    cached_slots,
    chunk_start,
    insert,
    jump,
    normal_slots,
    retrieved_slots,
    strip,
    tape_length,
    token_slots,
)
from attnjax.ops.positions import rotate as rope

B, N, K, H, EVERY = 2, 4, 2, 8, 3
BLOCK = EVERY + 1
ATOL = 1e-5

rotate = functools.partial(rope, layout="interleaved")


def test_landmarks_go_behind_every_block_and_come_off_again():
    tokens = np.arange(1, 15).reshape(2, 7)
    tape = insert(tokens, 3, 0)
    assert tape.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7], [8, 9, 10, 0, 11, 12, 13, 0, 14]]
    np.testing.assert_array_equal(strip(tape, 3), tokens)
    np.testing.assert_array_equal(insert(jnp.asarray(tokens), 3, 0), tape)
    assert insert(tokens[:1, :2], 3, 0, phase=1).tolist() == [[1, 2, 0]]
    for phase in range(3):
        for count in (0, 1, 5, 9):
            part = np.arange(1, count + 1)[None]
            tape = insert(part, 3, 0, phase)
            assert tape.shape[1] == tape_length(count, 3, phase)
            np.testing.assert_array_equal(strip(tape, 3, phase), part)
            np.testing.assert_array_equal(normal_slots(tape.shape[1], 3, phase),
                                          token_slots(count, 3, phase))  # fmt: skip
    chunks, phase, parts = (2, 5, 1, 4), 0, []
    whole = np.arange(1, 13)[None]
    for start, count in zip(np.cumsum((0, *chunks)), chunks, strict=False):
        parts.append(insert(whole[:, start : start + count], 3, 0, phase))
        phase = (phase + count) % 3
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), insert(whole, 3, 0))
    with pytest.raises(ValueError, match="phase=3"):
        token_slots(2, 3, 3)


def test_stingy_positions_are_those_of_the_table():
    """l = 5 and k = 2: blocks of 6 slots; chunks of 10 tokens begin at 0, 12, 18, 18, ..."""
    assert [chunk_start(2 * chunk, 2, 6) for chunk in range(4)] == [0, 12, 18, 18]
    landmarks = {
        cached: (cached_slots(np.arange(cached)[::-1], cached, 2) * 6 + 5).tolist()
        for cached in range(7)
    }
    assert landmarks == {
        0: [], 1: [5], 2: [5, 11], 3: [5, 11, 17], 4: [5, 5, 11, 17], 5: [5, 5, 5, 11, 17],
        6: [5, 5, 5, 5, 11, 17],
    }  # fmt: skip
    chosen = lambda cached, *ages: retrieved_slots(np.array(ages), cached, 2).tolist()
    assert chosen(6, 5, 3) == [0, 1]  # both old: side by side from the first slot on
    assert chosen(6, 4, 0) == [0, 2]  # the latest stays at its place
    assert chosen(6, 1, 0) == [1, 2]
    assert chosen(2, 1, 0) == [0, 1]
    assert chosen(1, 0) == [0]
    assert chosen(3, 2, 1) == [0, 1]


def test_jumps_keep_blocks_together():
    positions = np.asarray(jump(jax.random.key(0), (2, 12), 3, most=5))
    assert (positions[0] != positions[1]).any() and (positions[:, :4] == np.arange(4)).all()
    steps = np.diff(positions)
    at_block = np.arange(1, 12) % 4 == 0
    assert (steps[:, ~at_block] == 1).all() and (steps[:, at_block] >= 2).all()
    assert steps.max() <= 6
    with pytest.raises(ValueError, match="most=0"):
        jump(jax.random.key(0), (1, 3), 3, most=0)


def arrays(length, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda heads: jnp.asarray(rng.standard_normal((B, length, heads, H)), jnp.float32)
    return make(N), make(K), make(K)


@functools.partial(jax.jit, static_argnames=("top_k", "retrieval", "miss_cutoff"))
def read(query, key, value, cache, top_k, retrieval="per_token_and_head", **miss):
    return read_chunk(
        query, key, value, cache, top_k=top_k, retrieval=retrieval, rotate=rotate, **miss
    )


def in_chunks(query, key, value, chunks, cache, **options):
    outs, at = [], 0
    for size in chunks:
        part = slice(at, at + size)
        out, cache, _ = read(query[:, part], key[:, part], value[:, part], cache, **options)
        outs.append(out)
        at += size
    return jnp.concatenate(outs, axis=1), cache


def everything(query, key, value):
    positions = jnp.arange(query.shape[1])
    return landmark_attention(rotate(query, positions), rotate(key, positions), value, block=BLOCK)


@pytest.mark.parametrize(
    ("retrieval", "chunks"),
    [
        (RETRIEVALS[0], (5, 7, 6, 2)),
        (RETRIEVALS[1], (8, 8, 4)),
        (RETRIEVALS[2], (8, 8, 4)),
        *(pytest.param(name, (5, 7, 6, 2), marks=pytest.mark.slow) for name in RETRIEVALS[1:]),
    ],
)
def test_with_enough_blocks_the_cache_is_attention_to_everything(retrieval, chunks):
    query, key, value = arrays(20)
    top_k, capacity = 7, 6
    cache = BlockCache.empty(B, capacity, BLOCK, K, H)
    out, cache = in_chunks(query, key, value, chunks, cache, top_k=top_k, retrieval=retrieval)
    np.testing.assert_allclose(out, everything(query, key, value), atol=ATOL)
    assert int(cache.count) == 5 and cache.phase == 0


def test_fewer_cached_blocks_than_k_are_all_retrieved():
    query, key, value = arrays(12)
    cache = BlockCache.empty(B, 8, BLOCK, K, H)
    out, _ = in_chunks(query, key, value, (4, 8), cache, top_k=6)
    np.testing.assert_allclose(out, everything(query, key, value), atol=ATOL)


def turn(x, position):
    """Interleaved rotary positions of one vector."""
    angle = position * 10_000.0 ** (-np.arange(0, H, 2) / H)
    first, second = x[0::2], x[1::2]
    turned = [first * np.cos(angle) - second * np.sin(angle),
              first * np.sin(angle) + second * np.cos(angle)]  # fmt: skip
    return np.stack(turned, axis=1).ravel()


def by_hand(query, key, value, cached, top_k, retrieval):
    """The last chunk's outputs in float64, one token and head at a time."""
    blocks = cached * BLOCK
    m = query.shape[1] - blocks
    start = min(cached, top_k + 1) * BLOCK
    key64, value64 = np.asarray(key, np.float64), np.asarray(value, np.float64)
    dot = lambda q, k, position: q @ turn(k, position) / H**0.5
    share = np.zeros((B, N, m, cached))
    queries = np.zeros((B, N, m, H))
    for b, n, i in np.ndindex(B, N, m):
        queries[b, n, i] = turn(np.asarray(query[b, blocks + i, n], np.float64), start + i)
        g = n // (N // K)
        scores = [
            dot(queries[b, n, i], key64[b, c * BLOCK + EVERY, g],
                int(cached_slots(np.array(cached - 1 - c), cached, top_k)) * BLOCK + EVERY)
            for c in range(cached)
        ]  # fmt: skip
        share[b, n, i] = np.exp(scores) / np.exp(scores).sum()
    if retrieval == "max_over_heads":
        share = np.broadcast_to(share.max(axis=1, keepdims=True), share.shape)
    if retrieval == "max_over_tokens":
        share = np.broadcast_to(share.max(axis=2, keepdims=True), share.shape)
    out = np.zeros((B, m, N, H))
    for b, n, i in np.ndindex(B, N, m):
        g, q = n // (N // K), queries[b, n, i]
        chosen = sorted(np.argsort(-share[b, n, i], kind="stable")[:top_k])
        slots = retrieved_slots(cached - 1 - np.array(chosen), cached, top_k)
        gates, values = [], []
        for block, slot in [*zip(chosen, slots, strict=True)]:
            places = range(block * BLOCK, block * BLOCK + EVERY)
            inner = np.exp([dot(q, key64[b, p, g], slot * BLOCK + p % BLOCK) for p in places])
            values.append(inner @ value64[b, list(places), g] / inner.sum())
            landmark = block * BLOCK + EVERY
            gates.append(dot(q, key64[b, landmark, g], slot * BLOCK + EVERY))
        for own in range(i // BLOCK + 1):
            places = range(own * BLOCK, min(own * BLOCK + EVERY, i + 1))
            scores = [dot(q, key64[b, blocks + p, g], start + p) for p in places]
            if own == i // BLOCK:
                gates += scores
                values += [value64[b, blocks + p, g] for p in places]
            else:
                inner = np.exp(scores)
                held = value64[b, [blocks + p for p in places], g]
                values.append(inner @ held / inner.sum())
                landmark = own * BLOCK + EVERY
                gates.append(dot(q, key64[b, blocks + landmark, g], start + landmark))
        weights = np.exp(gates)
        out[b, i, n] = weights @ np.array(values) / weights.sum()
    return out


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_retrieval_is_that_of_the_definition(retrieval):
    cached, top_k = 5, 2
    query, key, value = arrays(cached * BLOCK + 6, seed=3)
    cache = BlockCache.empty(B, cached, BLOCK, K, H)
    cache = cache.append(key[:, : cached * BLOCK], value[:, : cached * BLOCK])
    part = slice(cached * BLOCK, None)
    out, _, seen = read(query[:, part], key[:, part], value[:, part], cache, top_k, retrieval)
    expected = by_hand(query, key, value, cached, top_k, retrieval)
    np.testing.assert_allclose(out, expected, atol=ATOL)
    assert seen.blocks.shape[-1] == top_k and seen.miss_share is None
    assert (np.diff(seen.blocks, axis=-1) > 0).all() and seen.blocks.min() >= 0
    assert seen.blocks.max() < cached


def test_context_miss_token_switches_retrieval():
    """With enough blocks as on one tape; its share, and what a cutoff of it leaves."""
    cached, top_k = 3, 4
    query, key, value = arrays(cached * BLOCK + 6, seed=4)
    miss_key = 2 * arrays(1, seed=5)[1][:1]
    cache = BlockCache.empty(B, cached, BLOCK, K, H)
    cache = cache.append(key[:, : cached * BLOCK], value[:, : cached * BLOCK])
    part = slice(cached * BLOCK, None)
    chunk = (query[:, part], key[:, part], value[:, part])
    once = functools.partial(read, *chunk, cache, top_k, miss_key=miss_key)

    def tape(keys, first, controlled):
        positions = jnp.arange(keys.shape[1]) + first
        turned = rotate(query[:, part], positions[-6:])
        score = miss_score(turned, rotate(miss_key, jnp.full((1, 1), -1)))
        miss = ContextMiss(score, np.arange(keys.shape[1])[None] < controlled)
        values = value[:, -keys.shape[1] :]
        return landmark_attention(turned, rotate(keys, positions), values, block=BLOCK, miss=miss)

    out, _, seen = once()
    np.testing.assert_allclose(out, tape(key, 0, cached * BLOCK), atol=ATOL)
    share = np.asarray(seen.miss_share)
    assert share.shape == (B, N, 6) and share.min() > 0 and share.max() < 1
    dropped = [float((share < cutoff).mean()) for cutoff in (0.0, 0.2, 0.5, 1.0)]
    assert dropped == sorted(dropped) and dropped[0] == 0 < dropped[1] < dropped[2]
    assert dropped[-1] == 1
    local = tape(key[:, part], cached * BLOCK, 0)
    np.testing.assert_allclose(once(miss_cutoff=1.0)[0], local, atol=ATOL)
    half = once(miss_cutoff=0.5)[0]
    keeps = np.swapaxes(share >= 0.5, 1, 2)[..., None]
    np.testing.assert_allclose(half, np.where(keeps, out, local), atol=ATOL)
    host = HostBlocks(B, cached, BLOCK, K, H)
    first = slice(0, cached * BLOCK)
    host.read(query[:, first], key[:, first], value[:, first], top_k=0, rotate=rotate)
    result, there = host.read(*chunk, top_k=2, rotate=rotate, miss_key=miss_key, miss_cutoff=0.5)
    expected, _, here = read(
        *chunk, cache, 2, "max_over_tokens", miss_key=miss_key, miss_cutoff=0.5
    )
    np.testing.assert_allclose(result, expected, atol=ATOL)
    np.testing.assert_array_equal(there.blocks, here.blocks)


def test_what_is_pushed_out_does_not_matter_to_the_rest():
    query, key, value = arrays(40, seed=1)
    caches = []
    for start in (0, 16):
        cache = BlockCache.empty(B, 5, BLOCK, K, H)
        caches.append(cache.append(key[:, start:36], value[:, start:36]))
    part = slice(36, 40)
    outs = [read(query[:, part], key[:, part], value[:, part], c, 2)[0] for c in caches]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-6)
    ages, valid = caches[0].ages()
    assert sorted(ages.tolist()) == [0, 1, 2, 3, 4] and bool(valid.all())


@pytest.mark.slow
def test_blocks_on_the_host_give_the_same():
    query, key, value = arrays(25, seed=2)
    chunks = (7, 9, 9)
    host, outs, at = HostBlocks(B, 6, BLOCK, K, H), [], 0
    for size in chunks:
        part = slice(at, at + size)
        chunk = (query[:, part], key[:, part], value[:, part])
        outs.append(host.read(*chunk, top_k=2, rotate=rotate)[0])
        at += size
    cache = BlockCache.empty(B, 6, BLOCK, K, H)
    expected, _ = in_chunks(query, key, value, chunks, cache, top_k=2, retrieval="max_over_tokens")
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=ATOL)
    # Landmarks of 6 blocks and a tail below one block, whatever was read.
    assert host.device_bytes() <= 4 * B * K * H * (6 + 2 * EVERY)


def test_bfloat16_is_near_and_gradients_are_finite():
    query, key, value = arrays(20)
    cache = BlockCache.empty(B, 3, BLOCK, K, H).append(key[:, :12], value[:, :12])
    part = slice(12, 20)
    once = lambda q, k, v: read(q, k, v, cache, 2)[0]
    full = once(query[:, part], key[:, part], value[:, part])
    short = [x[:, part].astype(jnp.bfloat16) for x in (query, key, value)]
    assert once(*short).dtype == jnp.bfloat16
    np.testing.assert_allclose(once(*short).astype(jnp.float32), full, atol=0.1)
    grads = jax.grad(lambda q, k, v: jnp.sum(once(q, k, v) ** 2), argnums=(0, 1, 2))(
        query[:, part], key[:, part], value[:, part]
    )
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)


def test_wrong_arguments_are_refused():
    query, key, value = arrays(4)
    cache = BlockCache.empty(B, 3, BLOCK, K, H)
    with pytest.raises(ValueError, match="retrieval='best'"):
        read_chunk(query, key, value, cache, top_k=1, retrieval="best", rotate=rotate)
    with pytest.raises(ValueError, match="top_k=-1"):
        read_chunk(query, key, value, cache, top_k=-1, rotate=rotate)
    with pytest.raises(ValueError, match="block - 1=0"):
        BlockCache.empty(B, 3, 1, K, H)
    with pytest.raises(ValueError, match="capacity=0"):
        BlockCache.empty(B, 0, BLOCK, K, H)
    with pytest.raises(ValueError, match="return_lse"):
        landmark_attention(query, key, value, is_landmark=np.zeros((B, 4), bool), return_lse=True)
