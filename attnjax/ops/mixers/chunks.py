# SPDX-License-Identifier: Apache-2.0
"""Cutting sequences into chunks that see their predecessor."""

import jax.numpy as jnp

from attnjax.typing import Array


def split(x: Array, size: int) -> Array:
    """Cut `x [b,t,...]` into chunks `[b,c,size,...]`, the last one padded with zeros."""
    b, t = x.shape[:2]
    padded = jnp.pad(x, ((0, 0), (0, -t % size)) + ((0, 0),) * (x.ndim - 2))
    return padded.reshape(b, -1, size, *x.shape[2:])


def with_previous(parts: Array) -> Array:
    """Put its predecessor before each chunk of `[b,c,size,...]`, zeros before the first."""
    before = jnp.concatenate([jnp.zeros_like(parts[:, :1]), parts[:, :-1]], axis=1)
    return jnp.concatenate([before, parts], axis=2)


def fold(parts: Array) -> Array:
    """Make the chunks `[b,c,size,...]` examples of their own: `[b * c,size,...]`."""
    return parts.reshape(-1, *parts.shape[2:])


def join(parts: Array, b: int, t: int) -> Array:
    """Undo `split` and `fold`: `[b * c,size,...]` to `[b,t,...]`."""
    return parts.reshape(b, -1, *parts.shape[2:])[:, :t]
