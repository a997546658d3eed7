# SPDX-License-Identifier: Apache-2.0
"""Pre-norm transformer encoder block and its parts."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.nn.attention import MultiHeadAttention
from attnjax.nn.initializers import LINEAR
from attnjax.nn.norm import LayerNorm
from attnjax.parallel.constrain import constrain
from attnjax.typing import Array, PRNGKey


def gelu(x: Array) -> Array:
    """Return the exact GELU, x Phi(x), of `x` of any shape."""
    # jax.nn.gelu goes through erfc, which costs twice as much on CPU.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""Nonlinearities of channel stages by name: exact GELU, its tanh approximation (GPT-2), ReLU."""


def drop_path(key: PRNGKey, x: Array, rate: float) -> Array:
    """Zero whole examples of a residual branch and rescale the others (stochastic depth).

    Args:
      key: typed random key.
      x: `[b, ...]`.
      rate: probability of dropping an example, below 1.

    Returns:
      `x * keep / (1 - rate)` with one Bernoulli draw per example.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def drop_branch(module: nn.Module, branch: Array, rate: float, train: bool) -> Array:
    """Return a module's residual branch `[b, ...]`, of which training drops whole examples.

    See `drop_path`, with the module's "dropout" key.
    """
    if not (train and rate):
        return branch
    return drop_path(module.make_rng("dropout"), branch, rate)


class Mlp(nn.Module):
    """Linear, nonlinearity, linear, back to the input's width.

    Attributes:
      hidden: width f in the middle.
      dropout: rate after each linear map while training.
      dtype: compute dtype.
      activation: key of `ACTIVATIONS`.
      kernel_init: draws both matrices.
      output_dropout: rate after the second linear map; None: as after the first.
      use_bias: biases of both linear maps.
      output_init: draws the second matrix; None: as the first.
    """

    hidden: int
    dropout: float = 0.0
    dtype: str = "float32"
    activation: str = "gelu"
    kernel_init: Callable[..., Array] = LINEAR
    output_dropout: float | None = None
    use_bias: bool = True
    output_init: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`."""
        outer = self.dropout if self.output_dropout is None else self.output_dropout
        drop = lambda rate: nn.Dropout(rate, deterministic=not train)
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=self.use_bias)
        up = dense(self.hidden, kernel_init=self.kernel_init, name="up")
        last_init = self.output_init or self.kernel_init
        down = dense(x.shape[-1], kernel_init=last_init, name="down")
        hidden_btf = constrain(up(x), "batch", "sequence", "mlp")
        hidden_btf = drop(self.dropout)(ACTIVATIONS[self.activation](hidden_btf))
        return drop(outer)(down(hidden_btf))


class EncoderBlock(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x)).

    Attributes:
      num_heads: attention heads.
      hidden: hidden width of the MLP.
      dropout: rate on probabilities and after linear maps while training.
      drop_path: rate of dropping each residual branch per example while training.
      epsilon: of the norms.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    num_heads: int
    hidden: int
    dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-6
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`; `train` is positional for `nn.remat`."""
        attend = MultiHeadAttention(
            self.num_heads,
            dropout=self.dropout,
            dtype=self.dtype,
            implementation=self.implementation,
            name="attention",
        )
        mlp = Mlp(self.hidden, self.dropout, self.dtype, name="mlp")
        normal_btd = LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        branch_btd = attend(normal_btd, train=train)
        branch_btd = nn.Dropout(self.dropout, deterministic=not train)(branch_btd)
        drop = lambda branch_btd: drop_branch(self, branch_btd, self.drop_path, train)
        x = constrain(x + drop(branch_btd), "batch", "sequence", None)
        normal_btd = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        branch_btd = mlp(normal_btd, train=train)
        return constrain(x + drop(branch_btd), "batch", "sequence", None)
