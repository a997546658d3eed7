# SPDX-License-Identifier: Apache-2.0
"""Initial values that follow the papers' reference code."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnjax.typing import Array, PRNGKey

# The references truncate at the absolute values -2 and 2, a hundred deviations away: no truncation.
LINEAR = jax.nn.initializers.normal(0.02)
TABLE = jax.nn.initializers.normal(0.02)


def residual(depth: int):
    """Return an initialiser of the last map of a residual branch: N(0, 0.02 / sqrt(2 depth)).

    The sum of all branches then has the same size at any depth (GPT-2, Section 2.3).

    Args:
      depth: layers, each of two branches.

    Returns:
      An initialiser `(key, shape, dtype) -> Array`.
    """
    return jax.nn.initializers.normal(0.02 / math.sqrt(2 * depth))


def fan_out_normal(fan_out: int):
    """Return an initialiser normal with variance 2 / fan_out (He et al., arXiv 1502.01852, Eq. 14).

    Args:
      fan_out: outputs that one input of a convolution reaches: taps times channels of its group.

    Returns:
      An initialiser `(key, shape, dtype) -> Array`.
    """
    return jax.nn.initializers.normal(math.sqrt(2 / fan_out))


def xavier_uniform(fan_in: int, fan_out: int):
    """Return an initialiser uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010).

    Args:
      fan_in: inputs that one output sums over.
      fan_out: outputs of the whole map, which may be fused of several kernels.

    Returns:
      An initialiser `(key, shape, dtype) -> Array`.
    """
    return _uniform(math.sqrt(6 / (fan_in + fan_out)))


def fan_in_uniform(fan_in: int):
    """Return an initialiser uniform in +-1/sqrt(fan_in), the convolution default of PyTorch.

    Args:
      fan_in: inputs that one output sums over.

    Returns:
      An initialiser `(key, shape, dtype) -> Array`.
    """
    return _uniform(1 / math.sqrt(fan_in))


def _uniform(bound):
    def init(key: PRNGKey, shape: Sequence[int], dtype=jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
