# SPDX-License-Identifier: Apache-2.0
"""Keep opaque kernels sharded: run them under `shard_map` over examples and heads.

The partitioner cannot look into a kernel; it would have to gather everything that goes in. Only
`attnjax.parallel` knows what the axes of a mesh are for; it says so in `MESH_AXES`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnjax.typing import Array

MESH_AXES: dict[str, tuple[str, ...]] = {"batch": (), "heads": ()}
"""Mesh axes over which examples and heads are sharded; told by `attnjax.parallel`."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a kernel's arrays lie on the ambient mesh.

    Attributes:
      batch, heads: mesh axes, in order.
      are_keys_shared: whether every device holds all key/value heads and picks the one it needs.
      free: all mesh axes that are not manual yet.
    """

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    are_keys_shared: bool
    free: frozenset[str]


def find(name: str, b: int, n: int, k: int) -> Placement | None:
    """Decide how to lay out b examples, n query heads and k key/value heads.

    Args:
      name: of the implementation, for refusals.
      b, n, k: sizes.

    Returns:
      The placement, or None when nothing is left to the partitioner: no mesh is set, or all its
      axes are manual or of size one. Sizes that a mesh axis does not divide stay whole.

    Raises:
      NotImplementedError: the mesh has an axis that neither carries examples nor heads, over which
        inputs may be sharded in a way that this cannot keep.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {axis for axis in mesh.axis_names if kinds[axis] != AxisType.Manual}
    large = {axis for axis in free if mesh.shape[axis] > 1}
    if not large:
        return None
    known = {axis for axes in MESH_AXES.values() for axis in axes}
    if unknown := sorted(large - known):
        raise NotImplementedError(
            f"{name}: mesh axis {unknown[0]!r} is none for examples {MESH_AXES['batch']} or heads "
            f"{MESH_AXES['heads']}: use parallel attention, or call this inside shard_map over it"
        )
    batch, heads = (
        tuple(axis for axis in MESH_AXES[role] if axis in large) for role in ("batch", "heads")
    )
    ways = lambda axes: math.prod(mesh.shape[axis] for axis in axes)
    if b % ways(batch):
        batch = ()
    are_keys_shared = k % ways(heads) != 0
    if are_keys_shared and (n % ways(heads) or (n // k) % (n // ways(heads))):
        heads, are_keys_shared = (), False
    return Placement(batch, heads, are_keys_shared, frozenset(free))


def apply(
    placement: Placement | None,
    function: Callable[..., Any],
    arrays: tuple[Array, Array, Array],
    others: Any,
    results: Any,
) -> Any:
    """Call `function(query, key, value, others)`, on each device with what it holds.

    Args:
      placement: from `find`.
      function: takes and returns arrays; differentiable.
      arrays: query `[b,t,n,h]`, key `[b,s,k,h]` and value `[b,s,k,hv]`.
      others: a tree of arrays; those of rank 3 and more have axes `[b|1, n|1, ...]`, the others
        are the same everywhere.
      results: a tree of specifications in "b", "n" and None, one tuple per result.

    Returns:
      What the function returns, whole.
    """
    if placement is None:
        return function(*arrays, others)
    axes = {"b": placement.batch or None, "n": placement.heads or None, None: None}
    query = P(axes["b"], None, axes["n"])
    key = P(axes["b"]) if placement.are_keys_shared else query

    def spec(array):
        if array.ndim < 3:
            return P()
        names = zip("bn", array.shape[:2], strict=True)
        return P(*(axes[name] if size > 1 else None for name, size in names))

    def local(query, key, value, others):
        if placement.are_keys_shared:
            # All query heads of a device share one key/value head.
            group = arrays[0].shape[2] // arrays[1].shape[2]
            head = lax.axis_index(placement.heads) * query.shape[2] // group
            key, value = (lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (key, value))
        return function(query, key, value, others)

    return jax.shard_map(
        local,
        in_specs=(query, key, key, jax.tree.map(spec, others)),
        out_specs=jax.tree.map(
            lambda names: P(*(axes[name] for name in names)),
            results,
            is_leaf=lambda x: isinstance(x, tuple),
        ),
        axis_names=set(placement.free),
        check_vma=False,
    )(*arrays, others)
