# SPDX-License-Identifier: Apache-2.0
"""What models of speech share: convolutions that padding cannot enter, lengths, positions.

FastSpeech 2 (arXiv 2006.04558) and Transformer-TTS (arXiv 1809.08895) as fairseq builds them and
CAB (arXiv 2210.07661) trains them. There, padding enters a convolution at the end of an utterance;
here it is set to 0 before each. There, convolutions are followed by BatchNorm, whose running state
the trainer does not carry; here by GroupNorm (arXiv 1803.08494), over the places that exist.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.nn.initializers import fan_in_uniform
from attnjax.nn.norm import GroupNorm
from attnjax.ops.positions import sinusoids
from attnjax.typing import Array

GAINS = {"relu": 2.0, "tanh": 25 / 9, "linear": 1.0}
"""Activation -> variance of the weights of the convolution before it, relative to Glorot's."""

GROUPS = 32
"""Most groups of a norm; fewer where they would not divide the channels."""

PRENET = "prenet"
"""Name of the random stream of a decoder prenet's dropout, which also acts outside training."""

_FIRST_POSITION = 2


class Convolution(nn.Module):
    """Convolution over time that leaves the length as it is and sees no padding.

    Attributes:
      features: output channels.
      kernel: odd number of places that an output sees.
      activation: key of `GAINS`, for the initial weights only.
      dtype: compute dtype.
    """

    features: int
    kernel: int
    activation: str = "relu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> Array:
        """Map `x [b, t, c]` to `[b, t, features]`; `valid [b, t]` is False at padding."""
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        init = nn.initializers.variance_scaling(GAINS[self.activation], "fan_avg", "uniform")
        conv = nn.Conv(
            self.features, (self.kernel,), padding="SAME", dtype=self.dtype, kernel_init=init,
            bias_init=fan_in_uniform(self.kernel * x.shape[-1]), name="conv",
        )  # fmt: skip
        return conv(x)


class ConvolutionStack(nn.Module):
    """Convolutions, each with a norm, a nonlinearity and dropout.

    Attributes:
      features: output channels of every layer.
      kernel: places that an output sees.
      activation: "relu" or "tanh".
      is_last_linear: without a nonlinearity after the last layer.
      dropout: rate while training.
      dtype: compute dtype.
    """

    features: tuple[int, ...]
    kernel: int = 5
    activation: str = "relu"
    is_last_linear: bool = False
    dropout: float = 0.5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None, train: bool = False) -> Array:
        """Map `x [b, t, c]` to `[b, t, features[-1]]`; `valid [b, t]` is False at padding."""
        act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[self.activation]
        last = len(self.features) - 1
        for i, width in enumerate(self.features):
            conv = Convolution(width, self.kernel, self.activation, self.dtype, name=f"conv_{i}")
            norm = GroupNorm(math.gcd(GROUPS, width), dtype=self.dtype, name=f"norm_{i}")
            x = norm(conv(x, valid), valid)
            x = x if self.is_last_linear and i == last else act(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


class ScaledPositions(nn.Module):
    """x + alpha * sinusoids, with a learnt alpha; waves and first position are those of fairseq.

    Wavelengths grow from 2 pi to 20,000 pi, both of them included; positions count from 2.

    Attributes:
      dtype: compute dtype.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, start: Array | int = 0) -> Array:
        """Add positions to `x [b, t, d]`, whose first token is number `start`."""
        alpha = self.param("alpha", nn.initializers.ones, (), jnp.float32)
        waves = x.shape[2] // 2
        base = 10_000.0 ** (waves / max(1, waves - 1))
        positions = _FIRST_POSITION + start + jnp.arange(x.shape[1])
        table_td = sinusoids(positions, x.shape[2], base=base, layout="half")
        return (x + alpha * table_td).astype(self.dtype)


def dense(features: int, dtype: str, name: str, fan_in: int) -> Callable[[Array], Array]:
    """Return a linear map, initially uniform in +-1/sqrt(fan_in) as PyTorch's."""
    init = fan_in_uniform(fan_in)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


def regulate_lengths(x: Array, duration: Array, length: int) -> tuple[Array, Array]:
    """Repeat every token as often as its duration says (FastSpeech, arXiv 1905.09263, Eq. 1).

    Args:
      x: `[b, s, d]`.
      duration: int `[b, s]`, at least 0.
      length: t, places of the result; what does not fit is cut off.

    Returns:
      `[b, length, d]`, and int32 `[b]`, how many places are filled: at least one, with the last
      token, so that nothing divides by no frames. Beyond them the result is arbitrary, but finite.
    """
    ends_bs = jnp.cumsum(duration.astype(jnp.int32), axis=1)
    places = jnp.arange(length, dtype=jnp.int32)
    token_bt = jax.vmap(lambda ends: jnp.searchsorted(ends, places, side="right"))(ends_bs)
    token_bt = jnp.minimum(token_bt, x.shape[1] - 1)
    filled_b = jnp.clip(ends_bs[:, -1], 1, length)
    return jnp.take_along_axis(x, token_bt[..., None], axis=1), filled_b
