# SPDX-License-Identifier: Apache-2.0
"""Indicators of causal attention maps, one number per layer.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602: entropy, concentration,
diversity of heads, sink and local focus, averaged over the texts (and heads, where these are not
compared). `indicators` gives all of them.

    >>> import jax.numpy as jnp
    >>> first = jnp.zeros((1, 1, 2, 4, 4)).at[..., 0].set(1.0)
    >>> for name, values in indicators(first, distances=1).items():
    ...     print(name, round(float(values[0]), 3))
    entropy 0.0
    concentration 2.0
    head_diversity 0.0
    sink 1.0
    local_focus_0 0.25
"""

import jax.numpy as jnp

from attnjax.typing import Array

DISTANCES = 4
"""The paper's distances of local focus: 0 to 3."""


def entropy(maps: Array, lengths: Array | None = None) -> Array:
    """Return -mean_i sum_j a_ij log a_ij in nats.

    Args:
      maps: `[l,b,n,t,s]`, t = s; rows sum to one.
      lengths: int `[b]`, tokens of each text, the first ones; all if None.

    Returns:
      `[l]` float32.

    Raises:
      ValueError: maps have another shape.
    """
    maps, valid_bt = _prepare(maps, lengths)
    logs = jnp.log(jnp.where(maps > 0, maps, 1.0))
    rows_lbnt = -jnp.sum(maps * logs, axis=-1)
    return jnp.mean(_row_mean(rows_lbnt, valid_bt), axis=(1, 2))


def concentration(maps: Array, lengths: Array | None = None) -> Array:
    """Return the Frobenius norm ||A||_F; arguments and result as in `entropy`."""
    maps, valid_bt = _prepare(maps, lengths)
    squares_lbnt = jnp.sum(jnp.square(maps), axis=-1) * valid_bt[:, None]
    return jnp.mean(jnp.sqrt(jnp.sum(squares_lbnt, axis=-1)), axis=(1, 2))


def head_diversity(maps: Array, lengths: Array | None = None) -> Array:
    """Return 2 / (t (t + 1)) sum_{j <= i} std_heads(a_ij); arguments and result as in `entropy`."""
    maps, valid_bt = _prepare(maps, lengths)
    deviation_lbts = jnp.std(maps, axis=2) * valid_bt[..., None]
    past_ts = jnp.tril(jnp.ones(maps.shape[-2:]))
    counts_b = valid_bt.sum(axis=1)
    sums_lb = jnp.sum(deviation_lbts * past_ts, axis=(2, 3))
    return jnp.mean(2 * sums_lb / (counts_b * (counts_b + 1)), axis=1)


def sink(maps: Array, lengths: Array | None = None) -> Array:
    """Return (1 / t) sum_i a_i1, what the first token receives; as in `entropy`."""
    maps, valid_bt = _prepare(maps, lengths)
    return jnp.mean(_row_mean(maps[..., 0], valid_bt), axis=(1, 2))


def local_focus(maps: Array, distance: int, lengths: Array | None = None) -> Array:
    """Return 1 / (t - N) sum_i a_{i,i-N}, what the token N places before receives.

    Args:
      maps, lengths: as in `entropy`.
      distance: N, from 0 to t - 1.

    Returns:
      `[l]` float32; texts of at most N tokens count as 0.

    Raises:
      ValueError: maps have another shape, or the distance is out of range.
    """
    maps, valid_bt = _prepare(maps, lengths)
    t = maps.shape[-1]
    if not 0 <= distance < t:
        raise ValueError(f"distance={distance}: must be from 0 to {t - 1}")
    diagonal_lbnt = jnp.diagonal(maps, -distance, axis1=-2, axis2=-1)
    return jnp.mean(_row_mean(diagonal_lbnt, valid_bt[:, distance:]), axis=(1, 2))


def indicators(
    maps: Array, lengths: Array | None = None, distances: int = DISTANCES
) -> dict[str, Array]:
    """Return all indicators by name, each `[l]` float32.

    Args:
      maps, lengths: as in `entropy`.
      distances: how many of the local focus, from 0 on.
    """
    values = {
        "entropy": entropy(maps, lengths),
        "concentration": concentration(maps, lengths),
        "head_diversity": head_diversity(maps, lengths),
        "sink": sink(maps, lengths),
    }
    return values | {f"local_focus_{n}": local_focus(maps, n, lengths) for n in range(distances)}


def min_max(values: Array) -> Array:
    """Scale values `[l]` to [0, 1], as in the paper's figures; equal ones become 0."""
    low, high = jnp.min(values), jnp.max(values)
    return (values - low) / jnp.where(high > low, high - low, 1.0)


def _prepare(maps, lengths):
    """Return float32 maps, and which rows count, float32 `[b,t]`."""
    if maps.ndim != 5 or maps.shape[3] != maps.shape[4]:
        raise ValueError(f"maps must be [l,b,n,t,s] with t = s, got shape {maps.shape}")
    b, t = maps.shape[1], maps.shape[3]
    lengths = jnp.full((b,), t) if lengths is None else jnp.asarray(lengths)
    return maps.astype(jnp.float32), (jnp.arange(t) < lengths[:, None]).astype(jnp.float32)


def _row_mean(rows_lbnt, valid_bt):
    total_b1 = jnp.maximum(valid_bt.sum(axis=1), 1)[:, None]
    return jnp.sum(rows_lbnt * valid_bt[:, None], axis=-1) / total_b1
