# SPDX-License-Identifier: Apache-2.0
"""How a cache holds its keys and values: as they are, or quantised with the first tokens spared.

Quantised numbers are `code * scale` with signed codes of 2, 4 or 8 bits. A scale belongs to one
head of one token and is computed as the token is written, or to one channel and is given once. The
first tokens of a stream, on which attention sinks, may be held in full beside their codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.typing import Array

CODES = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}
"""Bits -> dtype of codes. XLA packs the narrow ones on accelerators, not on CPU."""


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """What to ask for in place of a dtype.

    Attributes:
      bits: one of `CODES`.
      scale: `[k, h]` positive, one for each channel; None: one for each token and head, the
        largest magnitude over the largest code. Numbers beyond a given scale are clipped, and
        NaN does not survive it.
      spared: number of first tokens that are held in full as well and read from there.
      spared_dtype: their dtype.
    """

    bits: int = 8
    scale: Any = None
    spared: int = 0
    spared_dtype: Any = jnp.bfloat16

    def __post_init__(self):
        if self.bits not in CODES:
            raise ValueError(f"bits={self.bits}: choose from {list(CODES)}")
        if self.spared < 0:
            raise ValueError(f"spared={self.spared}: must be at least 0")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedArray:
    """Quantised keys or values.

    Attributes:
      codes: `[b,s,k,h]` signed integers.
      scale: float32, `[b,s,k,1]` per token or `[1,1,k,h]` per channel.
      spared: `[b,spared,k,h]` the first slots in full, or None.
      is_fixed: whether the scale was given.
    """

    codes: Array
    scale: Array
    spared: Array | None
    is_fixed: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`(b, s, k, h)`."""
        return self.codes.shape


def allocate(shape: tuple[int, int, int, int], dtype: Any) -> Array | QuantisedArray:
    """Return zeros.

    Args:
      shape: `(b, s, k, h)`.
      dtype: a floating dtype or a `Quantisation`.

    Raises:
      ValueError: the dtype is not floating, or a scale does not fit.
    """
    if not isinstance(dtype, Quantisation):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"a cache holds floating numbers or a Quantisation, not {dtype}")
        return jnp.zeros(shape, dtype)
    b, s, k, h = shape
    if dtype.spared > s:
        raise ValueError(f"spared={dtype.spared} tokens exceed the {s} slots")
    if dtype.scale is None:
        scale = jnp.zeros((b, s, k, 1), jnp.float32)
    else:
        scale = jnp.asarray(dtype.scale, jnp.float32)
        if scale.shape != (k, h):
            raise ValueError(f"scale must be [k,h] = ({k}, {h}), got {scale.shape}")
        scale = jnp.array(scale[None, None])
    spared = jnp.zeros((b, dtype.spared, k, h), dtype.spared_dtype) if dtype.spared else None
    codes = jnp.zeros(shape, CODES[dtype.bits])
    return QuantisedArray(codes, scale, spared, is_fixed=dtype.scale is not None)


def write(storage: Array | QuantisedArray, slots: Array, new: Array) -> Array | QuantisedArray:
    """Write tokens into slots.

    Args:
      storage: `[b,s,k,h]`.
      slots: int32 `[b,c]`, all different for one example; those at or above s are dropped.
      new: `[b,c,k,h]`.

    Returns:
      The storage with the tokens in place.
    """
    if not isinstance(storage, QuantisedArray):
        return _scatter(storage, slots, new)
    codes, scale = storage.codes, storage.scale
    most = int(jnp.iinfo(codes.dtype).max)
    wide = new.astype(jnp.float32)
    if storage.is_fixed:
        step = scale
    else:
        step = jnp.abs(wide).max(axis=-1, keepdims=True) / most
        scale = _scatter(scale, slots, step)
    fresh = jnp.round(wide / jnp.where(step == 0, 1, step)).clip(-most, most)
    spared = storage.spared
    if spared is not None:
        # What is beyond the spared slots is beyond all slots of this smaller array.
        spared = _scatter(spared, slots, new)
    codes = _scatter(codes, slots, fresh.astype(jnp.int8))
    return dataclasses.replace(storage, codes=codes, scale=scale, spared=spared)


def read(storage: Array | QuantisedArray, dtype: Any) -> Array:
    """Return everything, `[b,s,k,h]`, in a floating dtype."""
    if not isinstance(storage, QuantisedArray):
        return storage.astype(dtype)
    array = (storage.codes.astype(jnp.float32) * storage.scale).astype(dtype)
    if storage.spared is None:
        return array
    return array.at[:, : storage.spared.shape[1]].set(storage.spared.astype(dtype))


def clear(storage: Array | QuantisedArray, rows: Array) -> Array | QuantisedArray:
    """Return the storage with zeros for some examples (or pages), bool `[b]`."""
    gone = rows[:, None, None, None]
    wipe = lambda x: jnp.where(gone, jnp.zeros((), x.dtype), x)
    if not isinstance(storage, QuantisedArray):
        return wipe(storage)
    return dataclasses.replace(
        storage,
        codes=wipe(storage.codes),
        scale=storage.scale if storage.is_fixed else wipe(storage.scale),
        spared=None if storage.spared is None else wipe(storage.spared),
    )


def _scatter(old, slots, new):
    # Batched over examples, so that a sharded batch needs no communication.
    put = lambda o, i, x: o.at[i].set(x, mode="drop", unique_indices=True)
    return jax.vmap(put)(old, slots, new.astype(old.dtype))
