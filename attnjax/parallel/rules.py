# SPDX-License-Identifier: Apache-2.0
"""From parameter paths to shardings: path -> logical axes -> mesh axes.

The first pattern found in a path decides; its names are aligned to the last dimensions, so that
leading axes added by stacking stay whole. Optimiser moments and averages carry the parameter's path
as a suffix and are sharded alike.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.errors import RecipeError
from attnjax.ops.partition import MESH_AXES
from attnjax.typing import Params

LOGICAL_AXES = {
    "batch": MESH_AXES["batch"],
    "sequence": ("context",),
    "embed": ("fsdp", "context"),
    "expert": ("fsdp", "context"),
    "heads": MESH_AXES["heads"],
    "mlp": ("model",),
    "vocab": ("model",),
}
"""Logical axis -> mesh axes; a name that is not listed stays whole on every device.

Devices along `context` hold other tokens of the same examples, as those along `fsdp` hold other
examples: both can divide the parameters that all tokens share.
"""

DEFAULT_AXES = (
    (r"\bexperts/(up|gate)/kernel$", ("expert", "embed", "mlp")),
    (r"\bexperts/down/kernel$", ("expert", "mlp", "embed")),
    (r"\brouter/kernel$", ("embed", None)),
    (r"\b(query|key|value)/kernel$", ("embed", "heads", "head_dim")),
    (r"\b(query|key|value)/bias$", ("heads", "head_dim")),
    (r"\bout/kernel$", ("heads", "head_dim", "embed")),
    (r"\b(up|gate)/kernel$", ("embed", "mlp")),
    (r"\b(up|gate)/bias$", ("mlp",)),
    (r"\bdown/kernel$", ("mlp", "embed")),
    (r"\bhead\w*/kernel$", ("embed", "vocab")),
    (r"\bhead\w*/bias$", ("vocab",)),
    (r"\bembedding$", ("vocab", "embed")),
    (r"\bkernel$", ("embed",)),
)
"""Rules for the names that the shared blocks use; a model's PARAM_AXES come before them."""


def mesh_axes(
    name: str | None, size: int, shape: Mapping[str, int], taken: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose the mesh axes that divide one dimension.

    Args:
      name: logical name of the dimension, or None.
      size: its size.
      shape: size per usable mesh axis; others, and those of size one, divide nothing.
      taken: mesh axes that divide another dimension of the same array already.

    Returns:
      The axes that divide it, and those that would if the size were a multiple of all of them.
      Where it is not, the last ones are left out.
    """
    wanted = tuple(
        axis
        for axis in LOGICAL_AXES.get(name or "", ())
        if shape.get(axis, 1) > 1 and axis not in taken
    )
    target = wanted
    while size % math.prod(shape[axis] for axis in target):
        target = target[:-1]
    return target, wanted


def leaf_path(key_path) -> str:
    """Return a tree path as "block_0/query/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaf_spec(path: str, shape: Sequence[int], mesh: Mesh, axes=()) -> tuple[P, list[str]]:
    """Choose the partition of one array.

    Args:
      path: slash-separated path of the leaf.
      shape: its shape.
      mesh: the device mesh.
      axes: rules (pattern, logical names) tried before `DEFAULT_AXES`.

    Returns:
      The partition spec, and one line per dimension that had to stay whole because the mesh axis
      does not divide it.
    """
    for pattern, names in (*axes, *DEFAULT_AXES):
        if not re.search(pattern, path) or len(names) > len(shape):
            continue
        entries, notes, taken = [None] * (len(shape) - len(names)), [], []
        for name, size in zip(names, shape[len(shape) - len(names) :], strict=True):
            target, wanted = mesh_axes(name, size, mesh.shape, taken)
            if target != wanted:
                ways = math.prod(mesh.shape[axis] for axis in wanted)
                notes.append(f"{path} {tuple(shape)}: {name}={size} not divisible by {ways}")
            taken += target
            entries.append(target[0] if len(target) == 1 else target or None)
        return P(*entries), notes
    return P(), []


def tree_shardings(tree: Params, mesh: Mesh, axes=()) -> tuple[Params, list[str]]:
    """Choose the sharding of every leaf of a tree of parameters or optimiser state.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      mesh: the device mesh.
      axes: rules tried before `DEFAULT_AXES`.

    Returns:
      A tree of `NamedSharding`s, and notes about dimensions that fell back to replicated.
    """
    notes: list[str] = []

    def choose(key_path, leaf):
        spec, found = leaf_spec(leaf_path(key_path), leaf.shape, mesh, axes)
        notes.extend(found)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(choose, tree), notes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: first axis over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, P(LOGICAL_AXES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """Tell which share of every batch this process must supply.

    Processes whose devices hold the same rows (they differ along `model` or `context` only) supply
    the same share.

    Args:
      mesh: the device mesh, over all processes.

    Returns:
      (index, count): this process supplies the contiguous rows of block `index` out of `count`.

    Raises:
      RecipeError: the rows of a process are no contiguous block.
    """
    ways = math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])
    rows: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index[0].indices(ways)))
    mine = rows[jax.process_index()]
    count = ways // len(mine)
    first = min(mine)
    aligned = first % len(mine) == 0 and max(mine) - first + 1 == len(mine)
    if ways % len(mine) or not aligned or any(len(r) != len(mine) for r in rows.values()):
        raise RecipeError(
            f"mesh={dict(mesh.shape)}: process {jax.process_index()} would hold batch rows "
            f"{sorted(mine)} of {ways}, which are no equal contiguous block; order the axes so "
            "that data and fsdp vary slowest over processes"
        )
    return first // len(mine), count
