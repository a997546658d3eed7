# SPDX-License-Identifier: Apache-2.0
"""Chunked cross entropy against the dense form, and that logits never exist at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.losses import token_losses

# Float32 sums in another order; values of size 5.
TOLERANCE = 1e-5


def draw(b=2, t=13, d=8, v=11):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((b, t, d)).astype(np.float32)
    kernel = rng.standard_normal((d, v)).astype(np.float32)
    return hidden, kernel, rng.integers(v, size=(b, t)).astype(np.int32)


def dense(hidden, kernel, labels):
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    own = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return lse - own, lse, logits.argmax(-1)


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 13, 100])
def test_equals_the_dense_form(chunk):
    """For chunks that divide the length and that do not."""
    arguments = draw()
    losses = jax.jit(functools.partial(token_losses, chunk=chunk))(*arguments)
    nll, lse, best = dense(*arguments)
    np.testing.assert_allclose(losses.nll, nll, atol=TOLERANCE)
    np.testing.assert_allclose(losses.lse, lse, atol=TOLERANCE)
    np.testing.assert_array_equal(losses.best, best)


def test_gradients_equal_those_of_the_dense_form():
    hidden, kernel, labels = draw()

    def plain(hidden, kernel):
        logits = jax.nn.log_softmax(hidden @ kernel)
        own = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        lse = jax.nn.logsumexp(hidden @ kernel, axis=-1)
        return -jnp.mean(own) + 0.1 * jnp.mean(lse**2)

    def chunked(hidden, kernel):
        losses = token_losses(hidden, kernel, labels, chunk=4)
        return jnp.mean(losses.nll) + 0.1 * jnp.mean(losses.lse**2)

    expected = jax.jit(jax.grad(plain, argnums=(0, 1)))(hidden, kernel)
    found = jax.jit(jax.grad(chunked, argnums=(0, 1)))(hidden, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_logits_of_all_tokens_never_exist():
    b, t, d, v = 1, 4096, 16, 2048
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, t, d), (d, v))]
    shapes.append(jax.ShapeDtypeStruct((b, t), jnp.int32))
    sizes = {}
    for chunk in (0, 256):
        loss = lambda h, k, y, chunk=chunk: token_losses(h, k, y, chunk=chunk).nll.sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        sizes[chunk] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[0] > 4 * b * t * v
    assert sizes[256] < 4 * b * t * v / 4


def test_label_outside_the_vocabulary_is_nan():
    hidden, kernel, labels = draw()
    labels[0, 3], labels[1, 2] = -1, 11
    nll = token_losses(hidden, kernel, labels, chunk=4).nll
    assert np.argwhere(np.isnan(nll)).tolist() == [[0, 3], [1, 2]]


def test_low_precision_is_accumulated_in_float32():
    hidden, kernel, labels = draw(d=256)
    half = jnp.asarray(hidden, jnp.bfloat16)
    losses = token_losses(half, kernel, labels)
    rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16).astype(jnp.float32))
    nll, _, _ = dense(np.asarray(half.astype(jnp.float32)), rounded, labels)
    assert losses.nll.dtype == jnp.float32
    np.testing.assert_allclose(losses.nll, nll, atol=1e-4)


def test_shapes_that_do_not_fit_are_refused():
    hidden, kernel, labels = draw()
    with pytest.raises(ValueError, match=r"not \[b,t,d\], \[d,v\] and \[b,t\]"):
        token_losses(hidden, kernel, labels[:, 1:])
    with pytest.raises(ValueError, match="chunk=-1"):
        token_losses(hidden, kernel, labels, chunk=-1)


@pytest.mark.parametrize("chunk", [0, 5])
def test_bias_and_smoothing(chunk):
    """(1 - a) nll + a (mean over the vocabulary of -log p), with a bias of the logits."""
    hidden, kernel, labels = draw()
    bias = np.linspace(-2, 2, kernel.shape[1]).astype(np.float32)
    run = jax.jit(functools.partial(token_losses, chunk=chunk, uniform=True))
    losses = run(hidden, kernel, labels, bias=bias)
    logits = hidden.astype(np.float64) @ kernel + bias
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses.nll, nll, atol=TOLERANCE)
    expected = 0.9 * nll - 0.1 * log_p.mean(-1)
    np.testing.assert_allclose(losses.smoothed(0.1), expected, atol=TOLERANCE)
    np.testing.assert_array_equal(losses.smoothed(0.0), losses.nll)
    with pytest.raises(ValueError, match="uniform=True"):
        token_losses(hidden, kernel, labels).smoothed(0.1)
