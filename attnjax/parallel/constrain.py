# SPDX-License-Identifier: Apache-2.0
"""Activation hints in logical names, so that models never mention mesh axes."""

import jax
from jax.sharding import PartitionSpec as P

from attnjax.parallel.rules import mesh_axes
from attnjax.typing import Array


def constrain(x: Array, *names: str | None) -> Array:
    """Ask the compiler to keep an activation partitioned along logical axes.

    A no-op without an ambient mesh (`jax.set_mesh`). Axes that are manual (inside `shard_map`), of
    size one, taken by an earlier dimension, or that do not divide the dimension are left to the
    compiler.

    Args:
      x: any array.
      names: one logical name of `LOGICAL_AXES`, or None, per dimension.

    Returns:
      The same values.

    Raises:
      ValueError: the number of names is not the rank of `x`.
    """
    _, entries = _entries(x, names)
    return jax.lax.with_sharding_constraint(x, P(*entries)) if any(entries) else x


def gather(x: Array, *names: str | None) -> Array:
    """Ask the compiler for an array that is divided along logical axes and nothing else.

    For parameters before they meet activations that are divided over the same mesh axes: it is the
    parameters that should be moved. Otherwise as `constrain`.
    """
    ambient, entries = _entries(x, names)
    is_alone = set(ambient.shape) <= set(ambient.manual_axes)
    return x if is_alone else jax.lax.with_sharding_constraint(x, P(*entries))


def _entries(x, names):
    if len(names) != x.ndim:
        raise ValueError(f"constrain got {len(names)} names for an array of shape {x.shape}")
    ambient = jax.sharding.get_abstract_mesh()
    free = {a: size for a, size in ambient.shape.items() if a not in ambient.manual_axes}
    entries, taken = [], []
    for name, size in zip(names, x.shape, strict=True):
        axes, _ = mesh_axes(name, size, free, taken)
        taken += axes
        entries.append(axes or None)
    return ambient, entries
