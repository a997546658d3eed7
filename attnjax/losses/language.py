# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a vocabulary whose logits never exist all at once."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """What the logits of every token say about its label.

    Attributes:
      nll: float32 `[b,t]`, negative log-likelihood; NaN where the label is outside the vocabulary.
      lse: float32 `[b,t]`, log-sum-exp of the logits.
      best: int32 `[b,t]`, the token with the highest logit, the first of equals.
      uniform: float32 `[b,t]`, cross entropy of the uniform distribution: what label smoothing
        adds; None unless asked for.
    """

    nll: Array
    lse: Array
    best: Array
    uniform: Array | None = None

    def smoothed(self, smoothing: float) -> Array:
        """Return `(1 - a) nll + a uniform` `[b,t]`: targets are mixed with the uniform ones."""
        if not smoothing:
            return self.nll
        if self.uniform is None:
            raise ValueError(f"smoothing={smoothing}: ask token_losses for uniform=True")
        return (1 - smoothing) * self.nll + smoothing * self.uniform


def token_losses(
    hidden: Array,
    kernel: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    chunk: int = 0,
    uniform: bool = False,
    place: Callable[..., Array] = lambda x, *names: x,
) -> TokenLosses:
    """Compare `hidden . kernel` with labels, a part of every sequence at a time.

    nll = logsumexp_v(logits) - logits[label],   uniform = logsumexp_v(logits) - mean_v(logits)

    Logits are float32 products of numbers in the dtype of hidden. The backward pass computes them
    again, part by part. Every part takes its tokens from the whole length, so that tokens that are
    divided over devices stay where they are.

    Args:
      hidden: `[b,t,d]` floating.
      kernel: `[d,v]` float32.
      labels: int `[b,t]`.
      bias: `[v]`, added to the logits.
      chunk: tokens of a sequence whose logits exist at the same time; 0: all.
      uniform: also return the cross entropy of the uniform distribution.
      place: called as `place(x, *logical_names)` to keep arrays partitioned, such as
        `parallel.constrain`.

    Returns:
      Losses of every token.

    Raises:
      ValueError: shapes do not fit, or the chunk is negative.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or kernel.shape[0] != hidden.shape[2]:
        raise ValueError(
            f"hidden {hidden.shape}, kernel {kernel.shape} and labels {labels.shape} are not "
            "[b,t,d], [d,v] and [b,t]"
        )
    if chunk < 0:
        raise ValueError(f"chunk={chunk}: must be at least 0")
    b, t, _ = hidden.shape
    count = -(-t // chunk) if chunk else 1
    length = -(-t // count)

    def cut(x, *names):
        x = jnp.pad(x, ((0, 0), (0, length * count - t), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(b, length, count, *x.shape[2:])
        return place(jnp.moveaxis(x, 2, 0), None, "batch", "sequence", *names)

    @jax.checkpoint
    def compare(hidden_bcd, labels_bc):
        logits_bcv = jnp.einsum(
            "bcd,dv->bcv", hidden_bcd, kernel.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if bias is not None:
            logits_bcv = logits_bcv + bias
        logits_bcv = place(logits_bcv, "batch", "sequence", "vocab")
        lse_bc = jax.nn.logsumexp(logits_bcv, axis=-1)
        # A sum instead of a look-up: the vocabulary may be divided over devices.
        is_label = jnp.arange(kernel.shape[1]) == labels_bc[..., None]
        own_bc = jnp.sum(jnp.where(is_label, logits_bcv, 0), axis=-1)
        known = (labels_bc >= 0) & (labels_bc < kernel.shape[1])
        best_bc = jnp.argmax(logits_bcv, axis=-1).astype(jnp.int32)
        nll_bc = jnp.where(known, lse_bc - own_bc, jnp.nan)
        uniform_bc = lse_bc - jnp.mean(logits_bcv, axis=-1) if uniform else None
        return TokenLosses(nll_bc, lse_bc, best_bc, uniform_bc)

    if count == 1:
        return compare(hidden, labels)
    pieces = (cut(hidden, None), cut(labels))
    _, losses = jax.lax.scan(lambda carry, piece: (carry, compare(*piece)), None, pieces)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(b, -1)[:, :t], losses)
