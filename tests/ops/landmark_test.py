# SPDX-License-Identifier: Apache-2.0
"""Landmark attention against its definition in three loops, dense and block by block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, landmark_attention, mask, normalizers
from attnjax.ops.grouped import ContextMiss

B, N, K, H, HV = 2, 4, 2, 5, 3
TOLERANCE = 1e-6
"""Of weights, which are at most 1."""
OUTPUT, GRADIENT = 1e-5, 1e-4
# Optimising these small programs takes longer than running them.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STEP = 1e-5
"""Of central differences in float64, whose error is its square."""


def arrays(t, s, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return make(B, t, N, H), make(B, s, K, H), make(B, s, K, HV)


def by_hand(query, key, is_landmark, visible, miss=None):
    """Weights `[b,n,t,s]` by the paper's definition, one number at a time.

    A context-miss token takes part in the query's own group; controlled landmarks form another.
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    t, s = query.shape[1], key.shape[1]
    weights = np.zeros((B, N, t, s))
    for b, n, row in np.ndindex(B, N, t):
        i = row + s - t
        landmarks = np.flatnonzero(is_landmark[b])
        closing = [next((p for p in landmarks if p >= j), s) for j in range(s)]
        score = [query[b, row, n] @ key[b, j, n // (N // K)] / np.sqrt(H) for j in range(s)]
        groups = {}
        for j in range(s):
            if j > i or not visible[b, n, row, j] or (is_landmark[b, j] and j == closing[i]):
                continue
            group = closing[i] if is_landmark[b, j] else closing[j]
            if miss is not None and is_landmark[b, j] and miss.controlled[b, j]:
                group = "controlled"
            groups.setdefault(group, []).append(j)
        share, missed = {}, 1.0
        if miss is not None:
            score.append(float(miss.score[b, n, row]))
            groups.setdefault(closing[i], []).append(s)
        for members in groups.values():
            top = max(score[j] for j in members)
            total = sum(np.exp(score[j] - top) for j in members)
            share |= {j: np.exp(score[j] - top) / total for j in members}
        if miss is not None:
            missed = share.pop(s)
            for j in groups.get("controlled", []):
                share[j] *= missed if missed >= miss.cutoff else 0
        for j, own in share.items():
            if not is_landmark[b, j]:
                gate = 1.0 if closing[j] == closing[i] else share.get(closing[j], 0.0)
                weights[b, n, row, j] = own * gate
    return weights


def regular(s, block):
    return np.broadcast_to(np.arange(s) % block == block - 1, (B, s))


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_definition(seed):
    """Landmarks anywhere, other ones in every example, an unfinished last block, padding."""
    rng = np.random.default_rng(seed)
    t, s = [(17, 17), (9, 17), (17, 17)][seed]
    is_landmark = rng.random((B, s)) < 0.25
    is_landmark[:, 0] = is_landmark[:, 5] = False
    visible = np.ones((B, N, t, s), bool)
    if seed == 2:
        visible &= np.arange(s) < np.array([17, 11])[:, None, None, None]
    query, key, value = arrays(t, s, seed)
    made = normalizers.Grouped(is_landmark if seed else jnp.asarray(is_landmark))
    result = compiled(
        lambda *arrays: attention(
            *arrays, mask=mask.causal() & mask.array(visible), normalizer=made,
            return_probabilities=True,
        )
    )(query, key, value)  # fmt: skip
    expected = by_hand(query, key, is_landmark, visible)
    np.testing.assert_allclose(result.probabilities, expected, atol=TOLERANCE)
    columns = np.broadcast_to(is_landmark[:, None, None], expected.shape)
    np.testing.assert_array_equal(result.probabilities[columns], 0)
    if seed < 2:
        sums = np.asarray(result.probabilities).sum(-1)
        # Consecutive landmarks leave blocks without normal keys, whose share is lost.
        np.testing.assert_allclose(sums, expected.sum(-1), atol=TOLERANCE)
    mixed = np.einsum("bnts,bsnh->btnh", expected, np.repeat(value, N // K, axis=2))
    np.testing.assert_allclose(result.out, mixed, atol=OUTPUT)


@pytest.mark.parametrize("seed", range(2))
def test_context_miss_token_decides_on_controlled_blocks(seed):
    """Dense with landmarks anywhere; dense, and block by block, with regular ones."""
    rng, t, s = np.random.default_rng(seed), (17, 9)[seed], 17
    query, key, value = arrays(t, s, seed)
    miss = ContextMiss(
        jnp.asarray(rng.standard_normal((B, N, t)), jnp.float32), rng.random((B, s)) < 0.5,
        cutoff=0.3 * seed,
    )  # fmt: skip
    everything = np.ones((B, N, t, s), bool)
    mix = lambda weights: np.einsum("bnts,bsnh->btnh", weights, np.repeat(value, N // K, axis=2))
    is_landmark = rng.random((B, s)) < 0.25
    is_landmark[:, 0] = False
    out = compiled(lambda *a: landmark_attention(*a, is_landmark=is_landmark, miss=miss))(
        query, key, value
    )
    expected = mix(by_hand(query, key, is_landmark, everything, miss))
    np.testing.assert_allclose(out, expected, atol=OUTPUT)
    expected = mix(by_hand(query, key, regular(s, 4), everything, miss))
    grads = []
    for form in both_forms(4, query, key, value, miss=miss):
        np.testing.assert_allclose(compiled(form)(query, key, value), expected, atol=OUTPUT)
        loss = lambda score, *a, form=form: jnp.sum(
            jnp.sin(form(*a, miss=dataclasses.replace(miss, score=score)))
        )
        grads.append(compiled(jax.grad(loss, (0, 1, 2, 3)))(miss.score, query, key, value))
    for dense, blocked in zip(*grads, strict=True):
        assert np.abs(dense).max() > 1e-3
        np.testing.assert_allclose(blocked, dense, atol=GRADIENT)


@pytest.mark.parametrize("block", [2, 5, 6])
def test_rows_sum_to_one(block):
    query, key, value = arrays(17, 17)
    made = normalizers.Grouped(regular(17, block))
    p = compiled(
        lambda *arrays: (
            attention(
                *arrays, mask=mask.causal(), normalizer=made, return_probabilities=True
            ).probabilities
        )
    )(query, key, value)
    np.testing.assert_allclose(p.sum(-1), 1, atol=TOLERANCE)


def both_forms(block, query, key, value, **options):
    s = key.shape[1]
    dense = lambda *a, **more: landmark_attention(
        *a, is_landmark=regular(s, block), **(options | more)
    )
    blocked = lambda *a, **more: landmark_attention(*a, block=block, **(options | more))
    return dense, blocked


@pytest.mark.parametrize(
    ("t", "s", "block", "options"),
    [
        (17, 17, 5, {}),
        (15, 15, 5, {"mask": mask.padding(jnp.array([15, 7])), "scale": 0.7, "softcap": 2.0}),
        (7, 17, 4, {}),
    ],
)
def test_blocks_equal_dense(t, s, block, options):
    inputs = arrays(t, s)
    dout = np.random.default_rng(1).standard_normal((B, t, N, HV)).astype(np.float32)

    def values(*inputs):
        pairs = [jax.vjp(form, *inputs) for form in both_forms(block, *inputs, **options)]
        return [(out, *pull(dout)) for out, pull in pairs]

    dense, blocked = compiled(values)(*inputs)
    np.testing.assert_allclose(blocked[0], dense[0], atol=OUTPUT)
    for ours, theirs in zip(blocked[1:], dense[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=GRADIENT)


@pytest.mark.parametrize("form", [0, 1], ids=["dense", "blocked"])
def test_gradients_equal_differences(form):
    """In float64, with a first block that is a landmark alone for its query."""
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, jnp.float64) for x in arrays(7, 7)]
        run = both_forms(3, *inputs)[form]
        rng = np.random.default_rng(2)
        dout = rng.standard_normal((B, 7, N, HV))
        both = compiled(jax.value_and_grad(lambda *a: (run(*a) * dout).sum(), (0, 1, 2)))
        loss = lambda *a: both(*a)[0]
        slopes = both(*inputs)[1]
        for i, slope in enumerate(slopes):
            along = rng.standard_normal(slope.shape)
            side = lambda sign: loss(
                *(x + sign * STEP * along if i == j else x for j, x in enumerate(inputs))
            )
            expected = (side(1) - side(-1)) / (2 * STEP)
            np.testing.assert_allclose(jnp.vdot(slope, along), expected, rtol=1e-7, atol=1e-7)


def test_large_scores_and_empty_rows():
    """Scores of +-10,000; a tape that starts with a landmark; a fully padded example."""
    query, key, value = arrays(9, 9)
    query, key = 1000 * jnp.sign(query), 10 * jnp.sign(key)
    is_landmark = np.zeros((1, 9), bool)
    is_landmark[0, [0, 1, 5]] = True
    padding = mask.padding(jnp.array([9, 0]))
    for options in (dict(is_landmark=is_landmark), dict(block=2)):

        @compiled
        def run(*inputs):
            attend = lambda *a: landmark_attention(*a, mask=padding, scale=1.0, **options)
            out, pull = jax.vjp(attend, *inputs)
            return out, pull(out)

        out, gradients = run(query, key, value)
        np.testing.assert_array_equal(out[1], 0)
        assert np.isfinite(out).all() and all(np.isfinite(x).all() for x in gradients)
    out = landmark_attention(query, key, value, is_landmark=is_landmark)
    np.testing.assert_array_equal(out[:, :2], 0)


def test_without_landmarks_it_is_causal_softmax():
    query, key, value = arrays(11, 13)
    causal = functools.partial(attention, mask=mask.causal(), implementation="reference")
    expected = compiled(causal)(query, key, value)
    unmarked = functools.partial(landmark_attention, is_landmark=np.zeros((1, 13), bool))
    none = compiled(unmarked)(query, key, value)
    np.testing.assert_array_equal(none, expected)
    blocked = compiled(functools.partial(landmark_attention, block=20))(query, key, value)
    np.testing.assert_allclose(blocked, expected, atol=TOLERANCE)


def test_group_dropout_drops_gates_alike_and_nothing_else():
    query, key, value = arrays(17, 17)
    options = dict(group_dropout_rate=0.4, group_dropout_key=jax.random.key(1))
    dense, blocked = both_forms(4, query, key, value, **options)
    np.testing.assert_allclose(
        compiled(dense)(query, key, value), compiled(blocked)(query, key, value), atol=OUTPUT
    )
    plain, dropped = (
        attention(
            query, key, value, mask=mask.causal(), return_probabilities=True,
            normalizer=normalizers.Grouped(regular(17, 4), *more),
        ).probabilities
        for more in ((), options.values())
    )  # fmt: skip
    block = np.arange(17) // 4
    own = np.broadcast_to(block[:, None] == block, plain.shape)
    np.testing.assert_array_equal(dropped[own], plain[own])
    by_block = lambda x: np.asarray(x)[..., :16].reshape(B, N, 17, 4, 4)
    ratio = by_block(dropped / np.where(plain > 0, plain, 1))
    whole = (by_block(plain)[..., 0] > 0) & ~by_block(own)[..., 0]
    for j in (1, 2):  # Normal keys of a block share its fate.
        np.testing.assert_allclose(ratio[..., j][whole], ratio[..., 0][whole], rtol=1e-5)
    kept = ratio[..., 0][whole] > 0
    np.testing.assert_allclose(ratio[..., 0][whole][kept], 1 / 0.6, rtol=1e-5)
    assert abs(kept.mean() - 0.6) < 5 * np.sqrt(0.24 / kept.size)


def test_low_precision():
    inputs = [x.astype(jnp.bfloat16) for x in arrays(17, 17)]
    dense, blocked = both_forms(5, *inputs)
    blocked = compiled(blocked)
    assert blocked(*inputs).dtype == jnp.bfloat16
    wide = dense(*(x.astype(jnp.float32) for x in inputs))
    for form in (dense, blocked):
        np.testing.assert_allclose(form(*inputs).astype(np.float32), wide, atol=2e-2)


def test_scores_of_one_block_at_a_time():
    """The blocked form and its gradients need less memory than one array of all scores."""
    s, block = 1024, 64

    def temporaries(**options):
        shapes = [jax.ShapeDtypeStruct((1, s, 2, 16), jnp.float32)] * 3
        loss = lambda *a: landmark_attention(*a, **options).sum()
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * s * s
    assert temporaries(block=block) < scores
    assert temporaries(is_landmark=regular(s, block)[:1]) > 3 * scores


def test_refusals():
    query, key, value = arrays(5, 5)
    for options, message in (
        ({}, "give either is_landmark or block"),
        ({"block": 2, "is_landmark": regular(5, 2)}, "give either is_landmark or block"),
        ({"block": 1}, "block=1: a landmark"),
        ({"block": 2, "group_dropout_rate": 0.5}, "needs a key"),
        ({"is_landmark": np.zeros((1, 4), bool)}, "does not fit 5 queries of 5 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            landmark_attention(query, key, value, **options)
    with pytest.raises(ValueError, match="do not fit"):
        landmark_attention(query, key[:, :4], value[:, :4], block=2)
