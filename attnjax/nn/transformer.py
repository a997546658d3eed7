# SPDX-License-Identifier: Apache-2.0
"""The transformer layer of encoders and decoders, before or after its norms, with any attention."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from attnjax.nn.blocks import Mlp
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import Attention
from attnjax.ops.efficient import PatternAttention, Stream
from attnjax.ops.mask import Mask
from attnjax.parallel.constrain import constrain
from attnjax.typing import Array


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if there is one, MLP, each with a residual and a norm.

    pre-norm:  x <- x + branch(norm(x));   post-norm:  x <- norm(x + branch(x))

    Attributes:
      num_heads: attention heads.
      hidden: hidden width of the MLP.
      self_attention: attends among the layer's tokens.
      cross_attention: attends to a context; None: there is none.
      pre_norm: where the norms are.
      activation: of the MLP, key of `nn.blocks.ACTIVATIONS`.
      dropout: rate on every branch while training.
      attention_dropout: rate on probabilities while training.
      mlp_dropout: rate after the MLP's nonlinearity while training.
      epsilon: of the norms.
      kernel_init: draws all matrices; None: as in the reference code of CAB.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    num_heads: int
    hidden: int
    self_attention: PatternAttention
    cross_attention: PatternAttention | None = None
    pre_norm: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    epsilon: float = 1e-5
    kernel_init: Callable[..., Array] | None = None
    dtype: str = "float32"
    implementation: str | None = None

    def setup(self):
        norm = lambda: LayerNorm(self.epsilon, self.dtype)
        attend = lambda attention: Attention(
            attention, self.num_heads, self.attention_dropout, self.kernel_init, self.dtype,
            self.implementation,
        )  # fmt: skip
        self.attention, self.attention_norm = attend(self.self_attention), norm()
        if self.cross_attention is not None:
            self.cross, self.cross_norm = attend(self.cross_attention), norm()
        init = self.kernel_init or nn.initializers.xavier_uniform()
        # The branch has a dropout of its own, which is not to act twice.
        self.mlp = Mlp(
            self.hidden, self.mlp_dropout, self.dtype, self.activation, init, output_dropout=0.0
        )
        self.mlp_norm = norm()
        self.drop = nn.Dropout(self.dropout)

    def _residual(self, x, norm, branch, train=False):
        add = lambda y: constrain(
            x + self.drop(branch(y), deterministic=not train), "batch", "sequence", None
        )
        return add(norm(x)) if self.pre_norm else norm(add(x))

    def __call__(
        self,
        x: Array,
        valid: Array | None = None,
        context: Array | None = None,
        context_valid: Array | None = None,
        mask: Mask | Array | None = None,
        train: bool = False,
    ) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`; all arguments are positional for `nn.remat`.

        Args:
          x: tokens.
          valid: bool `[b, t]`, False at padding.
          context: `[b, s, d']`, where there is cross-attention.
          context_valid: bool `[b, s]`, False at padding.
          mask: more to hide from self-attention, broadcastable to `[b, n, t, t]`; softmax only.
          train: with dropout.
        """
        attend = lambda y: self.attention(y, query_valid=valid, mask=mask, train=train)
        x = self._residual(x, self.attention_norm, attend, train)
        if self.cross_attention is not None:
            cross = lambda y: self.cross(
                y, context, query_valid=valid, key_valid=context_valid, train=train
            )
            x = self._residual(x, self.cross_norm, cross, train)
        return self._residual(x, self.mlp_norm, lambda y: self.mlp(y, train=train), train)

    def remember(self, context: Array, dim: int, context_valid: Array | None = None) -> Any:
        """Return what `step` needs of a context `[b, s, d']`; `dim` is the layer's width."""
        return self.cross.remember(context, dim, context_valid)

    def step(
        self, x: Array, stream: Stream, memory: Any = None, context_dim: int | None = None
    ) -> tuple[Array, Stream]:
        """Map the next token `[b, 1, d]` of a stream; equals a column of the call.

        Args:
          x: the token.
          stream: from `self_attention.empty_stream`, or from the step before.
          memory: from `remember`, where there is cross-attention.
          context_dim: width of the remembered context, if it differs.

        Returns:
          `[b, 1, d]` and the stream afterwards.
        """
        after = []

        def attend(y):
            out, new = self.attention.step(y, stream)
            after.append(new)
            return out

        x = self._residual(x, self.attention_norm, attend)
        if self.cross_attention is not None:
            recall = lambda y: self.cross.recall(y, memory, context_dim)
            x = self._residual(x, self.cross_norm, recall)
        return self._residual(x, self.mlp_norm, self.mlp), after[0]
