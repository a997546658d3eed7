# SPDX-License-Identifier: Apache-2.0
"""Any attention of `ops.efficient` as a module, chosen by name: how models switch attention."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from attnjax.errors import RecipeError
from attnjax.nn.attend import attend
from attnjax.nn.attention import CAPTURE
from attnjax.ops import efficient
from attnjax.ops.efficient import PatternAttention
from attnjax.ops.mask import Mask
from attnjax.typing import Array

RANDOM = "attention"
"""Name of the random stream of attentions that draw; without it they always draw the same."""


def choose_attention(
    choice: str | Mapping[str, Any] | None, *, field: str, causal: bool = False, cross: bool = False
) -> PatternAttention:
    """Return the attention that a recipe names.

    Args:
      choice: None for softmax; a name in `ops.efficient.ATTENTIONS`; or a mapping with `name` and
        options, such as `{"name": "abc", "landmarks": 16}`.
      field: name of the model's field, for messages.
      causal, cross: the pattern in which the model attends there.

    Raises:
      RecipeError: the name or an option is unknown, or the attention has no form for the pattern.
    """
    options = {"name": choice or "softmax"} if not isinstance(choice, Mapping) else dict(choice)
    name = options.pop("name", None)
    try:
        if name is None:
            raise ValueError(f"a mapping needs a 'name', got {dict(options)}")
        return efficient.make(name, causal=causal, cross=cross, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.{field}={choice!r}: {error}") from error


class Attention(nn.Module):
    """Multi-head attention by a `PatternAttention`; its parameters are this module's own.

    Softmax attention runs context-parallel where the ambient mesh divides tokens. When the
    collection "attention" is mutable, the probabilities `[b,n,t,s]` (float32) of exact attention
    are sown there.

    Attributes:
      attention: what attends.
      num_heads: n; divides the model width.
      dropout: rate on the probabilities of softmax and local attention while training.
      kernel_init: draws matrices of the projections; None: as in the reference code of CAB.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    attention: PatternAttention
    num_heads: int
    dropout: float = 0.0
    kernel_init: Callable[..., Array] | None = None
    dtype: str = "float32"
    implementation: str | None = None

    def _params(self, dim, context_dim):
        make = lambda key: self.attention.init(
            key, dim, self.num_heads, context_dim=context_dim, kernel_init=self.kernel_init
        )
        names = jax.eval_shape(make, jax.random.key(0))
        return {name: self.param(name, lambda key, name=name: make(key)[name]) for name in names}

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        *,
        query_valid: Array | None = None,
        key_valid: Array | None = None,
        mask: Mask | Array | None = None,
        bias: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Attend from `x` to itself or to a context.

        Args:
          x: `[b, t, d]`.
          context: `[b, s, d']` if the attention is cross.
          query_valid: bool `[b, t]`, False at padding.
          key_valid: bool `[b, s]`, likewise; without a context by default `query_valid`.
          mask: more to hide, broadcastable to `[b, n, t, s]`; softmax only.
          bias: added to the scaled scores, likewise; softmax only.
          train: with dropout (stream "dropout") and what the attention does in training only.

        Returns:
          `[b, t, d]`.

        Raises:
          NotImplementedError: a mask or a bias for an attention without a map of scores.
        """
        if not self.attention.is_exact and (mask is not None or bias is not None):
            raise NotImplementedError(
                f"{type(self.attention).__name__} has no map of scores that a mask or bias could "
                "change; choose softmax"
            )
        x = x.astype(self.dtype)
        context = None if context is None else context.astype(self.dtype)
        params = self._params(x.shape[-1], None if context is None else context.shape[-1])
        options: dict[str, Any] = {} if bias is None else {"bias": bias}
        if train and self.dropout:
            options |= dict(dropout_rate=self.dropout, dropout_key=self.make_rng("dropout"))
        is_shown = self.is_mutable_collection(CAPTURE) and not self.is_initializing()
        if is_shown:
            options["return_probabilities"] = True

        def core(query, key, value, mask):
            result = attend(
                query, key, value, mask=mask if extra is None else mask & extra,
                implementation=self.implementation, **options,
            )  # fmt: skip
            if is_shown:
                self.sow(CAPTURE, "probabilities", result.probabilities)
            return result.out if is_shown else result

        extra = mask
        rng = None
        if self.attention.is_random and self.has_rng(RANDOM):
            rng = self.make_rng(RANDOM)
        return self.attention.apply(
            params, x, context, query_valid=query_valid, key_valid=key_valid, rng=rng, train=train,
            core=core,
        )  # fmt: skip

    @nn.compact
    def step(self, x: Array, stream: efficient.Stream) -> tuple[Array, efficient.Stream]:
        """Attend from the next token `[b, 1, d]` of a stream; see `PatternAttention.step`."""
        return self.attention.step(self._params(x.shape[-1], None), x.astype(self.dtype), stream)

    @nn.compact
    def extend(self, x: Array, stream: efficient.Stream) -> tuple[Array, efficient.Stream]:
        """Attend from the next tokens `[b, c, d]` of a stream, one after another."""
        params = self._params(x.shape[-1], None)

        def step(stream, x_bd):
            out_b1d, stream = self.attention.step(params, x_bd[:, None], stream)
            return stream, out_b1d[:, 0]

        stream, out_cbd = jax.lax.scan(step, stream, x.astype(self.dtype).swapaxes(0, 1))
        return out_cbd.swapaxes(0, 1), stream

    @nn.compact
    def remember(self, context: Array, dim: int, key_valid: Array | None = None) -> Any:
        """Return what `recall` needs of `context [b, s, d']`; `dim` is the width of the queries."""
        params = self._params(dim, context.shape[-1])
        return self.attention.remember(params, context.astype(self.dtype), key_valid)

    @nn.compact
    def recall(self, x: Array, memory: Any, context_dim: int | None = None) -> Array:
        """Attend from `x [b, t, d]` to a remembered context, of width `context_dim` if not d."""
        params = self._params(x.shape[-1], context_dim)
        return self.attention.recall(params, x.astype(self.dtype), memory)
