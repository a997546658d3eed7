# SPDX-License-Identifier: Apache-2.0
"""The mesh of distributed attention: any devices, four axes."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from attnjax.parallel.distributed.plan import DistributedPlan

EXAMPLES, HEADS, QUERIES, KEYS = "examples", "heads", "queries", "keys"
DISTRIBUTED_AXES = (EXAMPLES, HEADS, QUERIES, KEYS)
"""What each axis divides; neighbouring devices of the mesh differ in the last."""


def find_mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    """Return the mesh, or one of all devices, or the ambient one of devices that are not here.

    Raises:
      ValueError: it is no mesh, or this is inside a `shard_map`.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.manual_axes:
        raise ValueError(
            f"distributed attention inside a shard_map over {list(ambient.manual_axes)}: call it "
            "outside, it divides whole arrays itself"
        )
    if mesh is None:
        devices = np.array(jax.devices())
        kind = getattr(ambient.abstract_device, "device_kind", devices[0].device_kind)
        if ambient.empty or (ambient.size == devices.size and kind == devices[0].device_kind):
            return Mesh(devices, ("devices",), axis_types=(AxisType.Auto,))
        return ambient
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {mesh!r}")
    return mesh


def distributed_mesh(plan: DistributedPlan, mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """Arrange the devices of a mesh, in their order, with the axes `DISTRIBUTED_AXES`.

    Args:
      plan: checked, for as many devices.
      mesh: any mesh.
    """
    types = (AxisType.Auto,) * len(DISTRIBUTED_AXES)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(
            plan.shape, DISTRIBUTED_AXES, axis_types=types, abstract_device=mesh.abstract_device
        )
    return Mesh(mesh.devices.reshape(plan.shape), DISTRIBUTED_AXES, axis_types=types)
