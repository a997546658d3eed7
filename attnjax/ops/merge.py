# SPDX-License-Identifier: Apache-2.0
"""Exact merge of attention over disjoint sets of keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.typing import Array


def merge_partials(partials: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge softmax attention over disjoint sets of keys into attention over their union.

    lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i, in float32 or wider.

    Args:
      partials: pairs of `out [b,t,n,hv]` and `lse [b,n,t]`, as from `attention(return_lse=True)`;
        add an extra term of the softmax to one of them only. Where a part has nothing to attend its
        lse is `EMPTY_LSE` (or -inf) and its output does not matter.

    Returns:
      `out [b,t,n,hv]` in the dtype of the first part, and `lse [b,n,t]`.

    Raises:
      ValueError: there is nothing to merge, or shapes differ.
    """
    if not partials:
        raise ValueError("merge_partials needs at least one pair of out and lse")
    first = partials[0][0]
    for out, lse in partials:
        b, t, n, _ = out.shape
        if out.shape != first.shape or lse.shape != (b, n, t):
            raise ValueError(f"out {out.shape} and lse {lse.shape} do not belong to {first.shape}")
    wide = jnp.promote_types(first.dtype, jnp.float32)
    lses = jnp.stack([jnp.maximum(lse.astype(wide), EMPTY_LSE) for _, lse in partials])
    top = jax.lax.stop_gradient(lses.max(axis=0))  # It cancels.
    weights = _weigh(lses, top)
    total, lse = _add_up(weights.sum(axis=0), top)
    shares = (weights / total).swapaxes(2, 3)[..., None]
    outs = [
        _product(share, out.astype(wide)) for share, (out, _) in zip(shares, partials, strict=True)
    ]
    return sum(outs).astype(first.dtype), lse


def merge_shards(out: Array, lse: Array, axis_name: str) -> tuple[Array, Array]:
    """Merge softmax attention over the keys of each device of a mesh axis; see `merge_partials`.

    Args:
      out: `[b,t,n,hv]` float32 or wider, of this device's keys.
      lse: `[b,n,t]` of the same dtype.
      axis_name: name of the axis in the surrounding `jax.shard_map`.

    Returns:
      `out` and `lse` for the keys of all devices, the same on each.
    """
    lse = jnp.maximum(lse, EMPTY_LSE)
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)
    weight = _weigh(lse, top)
    # Divided afterwards, so that outputs and weights travel together.
    parts = (_product(weight.swapaxes(1, 2)[..., None], out), weight)
    out, weight = jax.lax.psum(parts, axis_name)
    total, lse = _add_up(weight, top)
    return out / total.swapaxes(1, 2)[..., None], lse


def _weigh(lse, top):
    """Return how much a part counts, relative to the largest log-sum-exp."""
    return jnp.where(lse > EMPTY_LSE, jnp.exp(lse - top), 0)


def _add_up(total, top):
    """Return the sum of all weights, 1 where there are none, and the log-sum-exp."""
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    return total, jnp.where(is_empty, EMPTY_LSE, top + jnp.log(total))


def _product(share, out):
    # An output that does not matter may even be NaN: it must not meet a product, not even its
    # derivative.
    return share * jnp.where(share > 0, out, 0)
