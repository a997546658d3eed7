# SPDX-License-Identifier: Apache-2.0
"""Nystromformer and LARA: formulas in float64, limits, segments of valid tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, efficient

B, T, N, H, M = 2, 13, 2, 4, 3
SAME = 1e-5


def draw(t=T):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (B, t, N, H)) for k in keys]


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def segments(x_th, m):
    return np.stack([part.mean(axis=0) for part in uneven(x_th, m)])


def uneven(x_th, m):
    """As even as can be, the shorter ones first."""
    short = len(x_th) // m
    sizes = [short] * (m - len(x_th) % m) + [short + 1] * (len(x_th) % m)
    return np.split(x_th, np.cumsum(sizes)[:-1])


def each_head(function, *heads):
    """Apply a function of `[t,h]` matrices in float64 to every example and head."""
    out = np.zeros(heads[0].shape)
    for b, n in np.ndindex(B, N):
        out[b, :, n] = function(*(np.asarray(x[b, :, n], np.float64) for x in heads))
    return out


def test_nystrom_is_its_formula_with_an_exact_inverse():
    def by_hand(q, k, v):
        few_q, few_k = segments(q, M), segments(k, M)
        first, inner, last = (softmax(a @ b.T / np.sqrt(H)) for a, b in
                              ((q, few_k), (few_q, few_k), (few_q, k)))  # fmt: skip
        return first @ np.linalg.inv(inner) @ (last @ v)

    # Landmarks of random tokens are nearly alike; these differ.
    query, key, value = draw()
    apart = 3 * jnp.eye(M, H)[np.arange(T) * M // T][:, None]
    query, key = query + apart, key + apart
    made = efficient.make("nystrom", landmarks=M, iterations=20)
    found = jax.jit(made.attend)({}, query, key, value)
    np.testing.assert_allclose(found, each_head(by_hand, query, key, value), atol=1e-3)


@pytest.mark.parametrize("landmarks", [T, T + 5])
def test_as_many_landmarks_as_tokens_are_softmax_attention(landmarks):
    heads = draw()
    found = efficient.make("nystrom", landmarks=landmarks).attend({}, *heads)
    np.testing.assert_allclose(found, attention(*heads), atol=SAME)


def test_few_valid_tokens_are_softmax_attention_among_them():
    heads = draw()
    valid = np.arange(T) < np.array([[2], [M]])
    found = jax.jit(efficient.make("nystrom", landmarks=M).attend)(
        {}, *heads, query_valid=valid, key_valid=valid
    )
    for b, count in enumerate((2, M)):
        few = [x[b : b + 1, :count] for x in heads]
        np.testing.assert_allclose(found[b : b + 1, :count], attention(*few), atol=SAME)


def test_convolution_reaches_both_ways_and_adds():
    heads = draw()
    params = {"filter": jnp.array([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])}
    plain, passed = (
        efficient.make("nystrom", landmarks=M, kernel=kernel).attend(params, *heads)
        for kernel in (0, 3)
    )
    value = np.pad(heads[2], ((0, 0), (1, 1), (0, 0), (0, 0)))
    # The first entry weighs the token after.
    expected = value[:, 2:, 0] + 2 * value[:, 1:-1, 0] + 4 * value[:, :-2, 0]
    np.testing.assert_allclose(passed[:, :, 0] - plain[:, :, 0], expected, atol=SAME)
    np.testing.assert_array_equal(passed[:, :, 1], plain[:, :, 1])


def lara_by_hand(noise=0.0):
    """The equations of the release's paper, with lp(x, w) written out."""
    root = H**-0.5
    project = lambda x, w: root * x @ w.T - root * (x**2).sum(axis=-1)[:, None] / 2

    def by_hand(q, k, v):
        mean = segments(q, M) + segments(k, M)
        sample = mean + noise
        keys = project(k, sample)  # [j,c]
        few = softmax(keys.T) @ v
        total = np.log(np.exp(keys).sum(axis=0))
        own = np.diag(project(mean, sample))
        logits = root * q @ mean.T + project(q, sample) + total - own
        return softmax(logits) @ few

    return by_hand


def test_lara_is_its_formula():
    heads = draw()
    made = efficient.make("lara", landmarks=M)
    expected = each_head(lara_by_hand(), *heads)
    for rng, train in ((None, True), (jax.random.key(1), False), (None, False)):
        found = jax.jit(made.attend, static_argnames="train")({}, *heads, rng=rng, train=train)
        np.testing.assert_allclose(found, expected, atol=SAME)


def test_lara_draws_while_training():
    heads, key = draw(), jax.random.key(3)
    run = lambda **options: efficient.make("lara", landmarks=M, **options).attend(
        {}, *heads, rng=key, train=True
    )
    still = efficient.make("lara", landmarks=M).attend({}, *heads)
    noisy, twice = run(), run(is_antithetic=True)
    assert abs(noisy - still).max() > 0.01 and abs(twice - noisy).max() > 0.01
    np.testing.assert_array_equal(noisy, run())
    noise = np.asarray(jax.random.normal(key, (B, M, N, H)))
    expected = np.zeros(heads[0].shape)
    for b, n in np.ndindex(B, N):
        arrays = (np.asarray(x[b, :, n], np.float64) for x in heads)
        expected[b, :, n] = lara_by_hand(noise[b, :, n])(*arrays)
    np.testing.assert_allclose(noisy, expected, atol=SAME)


def test_adaptive_means_are_mapped():
    made = efficient.make("lara", landmarks=M, is_adaptive=True)
    params = made.init(jax.random.key(0), N * H, N)
    identity = {"kernel": jnp.eye(H), "bias": jnp.zeros(H)}
    same = made.attend({"query_mean": identity, "key_mean": identity}, *draw())
    np.testing.assert_allclose(same, each_head(lara_by_hand(), *draw()), atol=SAME)
    assert abs(made.attend(params, *draw()) - same).max() > 0.01


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="kernel=4: must be odd, or 0"):
        efficient.make("nystrom", kernel=4)
    with pytest.raises(ValueError, match="landmarks=0: must be at least 1"):
        efficient.make("lara", landmarks=0)
