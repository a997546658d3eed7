# SPDX-License-Identifier: Apache-2.0
"""The control without attention returns zeros in every pattern and counts as no attention."""

import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import efficient


def test_controls_are_no_attentions():
    assert not set(efficient.CONTROLS) & set(efficient.ATTENTIONS)
    with pytest.raises(ValueError, match="none"):
        efficient.make("non")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_nothing_is_attended_to(causal, cross):
    attention = efficient.make("none", causal=causal, cross=cross)
    params = attention.init(jax.random.key(0), 8, 2)
    x = jnp.ones((2, 5, 8), jnp.bfloat16)
    out = attention.apply(params, x, x if cross else None)
    assert out.dtype == x.dtype and out.shape == x.shape and not out.any()
    assert params == {} and attention.flops(5, 5, 8, 2) == 0
    if causal and not cross:
        step, stream = attention.step(params, x[:, :1], attention.empty_stream(2, 8, 2, 5))
        assert not step.any() and stream.position == 1
    if causal and cross:
        assert not attention.recall(params, x[:, :1], attention.remember(params, x)).any()


def test_the_width_is_divided_all_the_same():
    with pytest.raises(ValueError, match="heads=3"):
        efficient.make("none").init(jax.random.key(0), 8, 3)
