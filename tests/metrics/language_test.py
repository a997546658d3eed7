# SPDX-License-Identifier: Apache-2.0
"""Perplexity and bits per byte by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.metrics import BitsPerByte, Metric, Perplexity

NLL = jnp.asarray([[1.0, 2.0, jnp.nan], [3.0, 100.0, 0.5]])
VALID = jnp.asarray([[True, True, False], [True, False, True]])


def test_by_hand_and_merged():
    for whole, parts, expected in (
        (
            Perplexity.of(NLL, valid=VALID),
            [Perplexity.of(NLL[i], valid=VALID[i]) for i in (0, 1)],
            math.exp(6.5 / 4),
        ),
        (
            BitsPerByte.from_losses(NLL, VALID, 2.0),
            [BitsPerByte.from_losses(NLL[i], VALID[i], 2.0) for i in (0, 1)],
            6.5 / math.log(2) / 8,
        ),
    ):
        assert isinstance(whole, Metric)
        assert whole.compute() == pytest.approx(expected, rel=1e-6)
        assert parts[0].merge(parts[1]).compute() == pytest.approx(expected, rel=1e-6)


def test_extremes():
    assert Perplexity.of(jnp.asarray([800.0])).compute() == math.inf
    assert math.isnan(Perplexity.of(NLL, valid=jnp.zeros_like(VALID)).compute())
    with pytest.raises(ValueError, match="bytes_per_token=0"):
        BitsPerByte.from_losses(NLL, VALID, 0)
    assert np.isclose(
        BitsPerByte.from_losses(jnp.full(3, math.log(256)), jnp.ones(3, bool), 1.0).compute(), 8
    )
