# SPDX-License-Identifier: Apache-2.0
"""Activation hints in logical names, so that models never mention mesh axes."""

import math

import jax
from jax.sharding import PartitionSpec as P

from attnjax.parallel.rules import LOGICAL_AXES
from attnjax.typing import Array


def constrain(x: Array, *names: str | None) -> Array:
    """Ask the compiler to keep an activation partitioned along logical axes.

    A no-op without an ambient mesh (`jax.set_mesh`). Axes that are manual (inside `shard_map`), of
    size one, or that do not divide the dimension are left to the compiler.

    Args:
      x: any array.
      names: one logical name of `LOGICAL_AXES`, or None, per dimension.

    Returns:
      The same values.

    Raises:
      ValueError: the number of names is not the rank of `x`.
    """
    if len(names) != x.ndim:
        raise ValueError(f"constrain got {len(names)} names for an array of shape {x.shape}")
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.empty:
        return x
    entries = []
    for name, size in zip(names, x.shape, strict=True):
        axes = tuple(
            axis
            for axis in LOGICAL_AXES.get(name or "", ())
            if axis in ambient.shape and axis not in ambient.manual_axes and ambient.shape[axis] > 1
        )
        divides = size % math.prod(ambient.shape[axis] for axis in axes) == 0
        entries.append(axes if axes and divides else None)
    if not any(entries):
        return x
    return jax.lax.with_sharding_constraint(x, P(*entries))
