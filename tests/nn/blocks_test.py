# SPDX-License-Identifier: Apache-2.0
"""The encoder block and its parts against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.blocks import EncoderBlock, Mlp, drop_path, gelu
from attnjax.nn.norm import LayerNorm

# One rounding of float32 at values near 3.
TOLERANCE = 1e-6


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected, atol=TOLERANCE)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(drop_path(jax.random.key(0), x, 0.25))
    kept = y[:, 0, 0] > 0
    np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-6)
    assert not y[~kept].any()
    # Five standard deviations of a mean of 4000 draws.
    assert abs(kept.mean() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_drop_path_is_a_function_of_the_key():
    x = jnp.ones((64, 2))
    first, again, other = (drop_path(jax.random.key(k), x, 0.5) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_layer_norm_by_hand():
    x = jnp.asarray([[1.0, 2.0, 3.0, 6.0]])
    module = LayerNorm(epsilon=0.5)
    params = {"params": {"scale": jnp.full(4, 2.0), "bias": jnp.full(4, -1.0)}}
    expected = np.asarray([-2, -1, 0, 3]) / math.sqrt(3.5 + 0.5) * 2 - 1
    np.testing.assert_allclose(module.apply(params, x)[0], expected, atol=TOLERANCE)


def test_layer_norm_statistics_survive_bfloat16():
    # In bfloat16 arithmetic the mean of 300 and 302 would already be off by a unit.
    x = jnp.asarray([[300.0, 302.0] * 64], jnp.bfloat16)
    params = {"params": {"scale": jnp.ones(128), "bias": jnp.zeros(128)}}
    y = LayerNorm(dtype="bfloat16").apply(params, x).astype(jnp.float32)
    np.testing.assert_allclose(np.abs(y), 1, atol=0.01)


def test_mlp_names_its_kernels_up_and_down():
    shapes = jax.eval_shape(Mlp(6).init, jax.random.key(0), jnp.zeros((1, 2, 4)))["params"]
    assert shapes["up"]["kernel"].shape == (4, 6) and shapes["down"]["kernel"].shape == (6, 4)


@pytest.mark.parametrize(("outer", "lost"), [(0.0, 0.0), (None, 0.5)])
def test_mlp_can_leave_the_dropout_of_its_output_to_the_branch(outer, lost):
    """With weights of 0 only the last bias is left, of which dropout inside says nothing."""
    mlp, x = Mlp(2, 0.5, output_dropout=outer), jnp.ones((1, 500, 4))
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params["params"]["down"]["bias"] += 1
    y = mlp.apply(params, x, train=True, rngs={"dropout": jax.random.key(1)})
    # Five standard deviations of a mean of 2000 draws.
    assert abs(float((y == 0).mean()) - lost) <= 5 * math.sqrt(lost * (1 - lost) / 2000)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_encoder_block_is_deterministic_in_evaluation(rate):
    block = EncoderBlock(2, 8, dropout=rate, drop_path=rate)
    x = jax.random.normal(jax.random.key(0), (8, 3, 4))
    params = block.init(jax.random.key(1), x)
    plain = block.apply(params, x)
    np.testing.assert_array_equal(plain, block.apply(params, x))
    trained = block.apply(params, x, True, rngs={"dropout": jax.random.key(2)})
    assert np.allclose(plain, trained, atol=TOLERANCE) == (rate == 0)
