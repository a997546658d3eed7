# SPDX-License-Identifier: Apache-2.0
"""The device mesh: four named axes, sized by a recipe."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from attnjax.errors import RecipeError

AXES = ("data", "fsdp", "model", "context")
"""Batch replicas; batch replicas that also split parameters; heads and hidden units; sequence."""


def resolve_sizes(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Fill in the axis of size -1 and check that the axes use every device.

    Args:
      sizes: size per axis of `AXES`; missing axes are 1; at most one is -1.
      device_count: devices to arrange.

    Returns:
      The four sizes, in the order of `AXES`.

    Raises:
      RecipeError: an axis is unknown or the product is not `device_count`.
    """
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise RecipeError(f"mesh: unknown axis {sorted(unknown)[0]!r} (known: {', '.join(AXES)})")
    resolved = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    fixed = math.prod(size for size in resolved.values() if size != -1)
    free = [axis for axis, size in resolved.items() if size == -1]
    if len(free) > 1:
        raise RecipeError(f"mesh={resolved}: at most one axis may be -1")
    if free and device_count % fixed == 0:
        resolved[free[0]] = device_count // fixed
    if math.prod(resolved.values()) != device_count:
        raise RecipeError(
            f"mesh={dict(sizes)} does not divide the {device_count} devices: the product of its "
            f"axes must be {device_count} (use -1 for one axis to take what is left)"
        )
    return resolved


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None):
    """Arrange devices as a mesh with the axes `data`, `fsdp`, `model` and `context`.

    Devices that belong to several TPU slices are laid out so that only `data` crosses slices, the
    one axis whose traffic tolerates the slower network.

    Args:
      sizes: size per axis, see `resolve_sizes`.
      devices: devices to use; all of `jax.devices()` by default.

    Returns:
      A `jax.sharding.Mesh` with automatic axes.

    Raises:
      RecipeError: the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_sizes(sizes, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape["data"] % slices:
            raise RecipeError(f"mesh.data={shape['data']} is no multiple of the {slices} slices")
        inner = {**shape, "data": shape["data"] // slices}
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(inner.values()), (slices, 1, 1, 1), devices=devices
        )
        return jax.sharding.Mesh(grid, AXES, axis_types=types)
    if len(devices) == 1:
        return jax.sharding.Mesh(np.array(devices).reshape(1, 1, 1, 1), AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(shape.values()), AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # Axes that are no products of the torus's own (2 of 8x8x8) share one of them.
        grid = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices, allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(grid, AXES, axis_types=types)
