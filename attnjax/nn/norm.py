# SPDX-License-Identifier: Apache-2.0
"""Normalisation with statistics in float32 whatever the compute dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.typing import Array


class LayerNorm(nn.Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Attributes:
      epsilon: added to the variance.
      dtype: of the output.
      use_bias: shift.
      use_scale: scale.
    """

    epsilon: float = 1e-6
    dtype: str = "float32"
    use_bias: bool = True
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise `x [..., d]`; returns the same shape in `dtype`."""
        scale: Array | float = 1.0
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias: Array | float = 0.0
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, then scale.

    y = scale * cast(x / sqrt(mean(x^2) + epsilon)), with the cast to `dtype` as in LLaMA.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the output.
    """

    epsilon: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise `x [..., d]`; returns the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        normal = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return normal.astype(self.dtype) * scale.astype(self.dtype)


class GroupNorm(nn.Module):
    """Normalise groups of channels over all places, then scale and shift every channel.

    Wu and He, "Group Normalization", arXiv 1803.08494.

    Attributes:
      groups: how many there are; divides the channels.
      epsilon: added to the variance.
      dtype: of the output.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> Array:
        """Normalise `x [b, ..., c]`; returns the same shape in `dtype`.

        Args:
          x: numbers.
          valid: bool `[b, ...]`, which places the statistics are taken over; all if None.

        Raises:
          ValueError: the groups do not divide the channels.
        """
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {channels} channels")
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        counts = jnp.broadcast_to(True if valid is None else valid[..., None, None], grouped.shape)
        # At least 1, so that nothing is divided by 0 where all is padding.
        total = jnp.maximum(jnp.sum(counts, axis=axes, keepdims=True), 1)
        mean = lambda values: (
            jnp.sum(jnp.where(counts, values, 0), axis=axes, keepdims=True) / total
        )
        centred = grouped - mean(grouped)
        variance = mean(jnp.square(centred))
        normal = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (normal * scale + bias).astype(self.dtype)
