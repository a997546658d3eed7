# SPDX-License-Identifier: Apache-2.0
"""Soft targets and cross entropy against hand-worked numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.losses import cross_entropy, soft_targets

FLOAT32_ROUNDING = 1e-6
"""A few float32 operations on values of order one."""


def test_smoothed_targets_match_the_formula():
    targets = soft_targets(jnp.array([2, 0]), 4, label_smoothing=0.1)
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    np.testing.assert_allclose(targets, expected, atol=FLOAT32_ROUNDING)
    assert targets.dtype == jnp.float32


def test_no_smoothing_is_one_hot():
    np.testing.assert_array_equal(soft_targets(jnp.array([1]), 3), [[0, 1, 0]])


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_out_of_range_gives_a_nan_loss_instead_of_zero(label):
    targets = soft_targets(jnp.array([label, 1]), 3, label_smoothing=0.1)
    losses = cross_entropy(jnp.zeros((2, 3)), targets)
    assert np.isnan(losses[0]) and np.isfinite(losses[1])


def test_cross_entropy_of_uniform_logits_is_log_of_classes():
    targets = soft_targets(jnp.array([0, 3]), 4, label_smoothing=0.3)
    losses = cross_entropy(jnp.full((2, 4), 7.0), targets)
    np.testing.assert_allclose(losses, [math.log(4)] * 2, atol=FLOAT32_ROUNDING)


def test_smoothing_equals_weighted_sum_of_two_losses():
    """(1 - a) * negative log-likelihood + a * mean of all negative log-probabilities."""
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    labels = jnp.array([0, 6, 3, 3, 1])
    log_probabilities = jax.nn.log_softmax(logits)
    likelihood = -log_probabilities[jnp.arange(5), labels]
    expected = 0.9 * likelihood - 0.1 * log_probabilities.mean(-1)
    losses = cross_entropy(logits, soft_targets(labels, 7, label_smoothing=0.1))
    np.testing.assert_allclose(losses, expected, atol=FLOAT32_ROUNDING)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = jax.random.normal(jax.random.key(0), (4, 1000)).astype(jnp.bfloat16)
    targets = soft_targets(jnp.arange(4), 1000)
    losses = cross_entropy(logits, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, cross_entropy(logits.astype(jnp.float32), targets))


def test_gradient_is_probabilities_minus_targets():
    logits = jax.random.normal(jax.random.key(1), (3, 5))
    targets = soft_targets(jnp.array([4, 0, 2]), 5, label_smoothing=0.2)
    gradient = jax.grad(lambda x: cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - targets, atol=FLOAT32_ROUNDING)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
