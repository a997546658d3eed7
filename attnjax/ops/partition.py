# SPDX-License-Identifier: Apache-2.0
"""Keep kernels sharded over examples and heads.

The partitioner cannot look into a kernel and would gather everything that goes in. But examples and
heads are independent of one another: under an ambient mesh every device runs the kernel on the
examples and heads that it holds already, and nothing is moved.

There are two ways to tell the partitioner. It can ask back for every kernel, and is given what the
arrays' own shardings suggest, whatever the mesh axes are called. The compiler for TPUs never asks
back (github.com/jax-ml/jax/issues/38196); there it must be known before, from the names of axes.
"""

import itertools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.typing import Array

MESH_AXES = types.MappingProxyType({"batch": ("data", "fsdp"), "heads": ("model",)})
"""Names of the mesh axes over which examples and heads are divided."""


def over_batch_and_heads(
    function: Callable,
    inputs: Mapping[str, Array],
    axes: Mapping[str, str],
    *,
    mesh_axes: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Array]:
    """Apply a function of dicts of arrays to the part of them that each device holds.

    Without a mesh and inside `shard_map` over all of it, the function is applied as it is.

    Args:
      function: maps a dict of arrays to a dict of arrays, for any number of examples and heads; it
        is called with the shapes of one device.
      inputs: its argument. "query" must be among them; query heads share key/value heads in groups
        of equal size, neighbours together.
      axes: one letter per axis of every input and result: b, n (query heads) and k (key/value
        heads) may be divided. An axis b or n of size 1 serves all examples or heads; in a result it
        is a sum over them, and sums over devices are added.
      mesh_axes: like `MESH_AXES`, to divide examples and heads by the names of mesh axes where
        their sizes allow; None to leave them as they are divided.

    Returns:
      The results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axes is not None:
        return _divide_by_name(function, inputs, axes, mesh, mesh_axes)
    return _leave_divided(function, inputs, axes, mesh)


def vary_alike(tree: Any) -> tuple[tuple[str, ...], Any]:
    """Let all arrays vary over the axes of an enclosing `shard_map` over which any of them does.

    Loops need that of what they carry, and kernels of all that they read.

    Args:
      tree: arrays.

    Returns:
      These axes, none without a `shard_map`, and the arrays.
    """
    axes = lambda x: jax.typeof(x).manual_axis_type.varying
    union = frozenset().union(*(axes(x) for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(sorted(union - axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(sorted(union)), jax.tree.map(vary, tree)


def large_axes(mesh: jax.sharding.AbstractMesh) -> list[str]:
    """Return the names of the axes over which the partitioner could divide something."""
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return [name for name, size, kind in kinds if size > 1 and kind != AxisType.Manual]


def _divide_by_name(function, inputs, axes, mesh, mesh_axes):
    free = {name for name in mesh.axis_names if name not in mesh.manual_axes}
    if not free or mesh.size == 1:
        return function(dict(inputs))
    large = large_axes(mesh)
    sizes = _sizes({name: np.shape(array) for name, array in inputs.items()}, axes)
    batch, heads = (
        tuple(name for name in mesh_axes[role] if name in large) for role in ("batch", "heads")
    )
    ways = lambda names: math.prod(mesh.shape[name] for name in names)
    if sizes["b"] % ways(batch):
        batch = ()
    if not _can_divide_queries(ways(heads), sizes):
        heads = ()
    divided = {"b": batch, "n": heads, "k": () if sizes["k"] % ways(heads) else heads}
    results = jax.eval_shape(function, dict(inputs))
    spec = lambda name, array: _spec(axes[name], np.shape(array), divided, sizes)

    def local(inputs):
        return _local(function, inputs, axes, results, mesh, divided, sizes)

    return jax.shard_map(
        local,
        in_specs=({name: spec(name, array) for name, array in inputs.items()},),
        out_specs={name: spec(name, array) for name, array in results.items()},
        # All that are left, even those of size one, or the compiler takes the kernel for divided.
        axis_names=free,
        check_vma=False,
    )(dict(inputs))


def _local(function, inputs, axes, results, mesh, divided, sizes):
    """Apply the function to what a device holds."""
    held = {name: _pick(array, axes[name], mesh, divided, sizes) for name, array in inputs.items()}
    return {
        name: _add(array, axes[name], results[name].shape, mesh, divided, sizes)
        for name, array in function(held).items()
    }


def _leave_divided(function, inputs, axes, mesh):
    if not _is_divided(mesh):
        return function(dict(inputs))
    names = tuple(sorted(inputs))
    arrays = [inputs[name] for name in names]
    shapes = {name: np.shape(array) for name, array in zip(names, arrays, strict=True)}
    results = jax.eval_shape(function, dict(inputs))
    sizes = _sizes(shapes, axes)

    @custom_partitioning
    def whole(*arrays):
        return function(dict(zip(names, arrays, strict=True)))

    def partition(mesh, arguments, wanted):
        given = dict(zip(names, arguments, strict=True))
        divided = _divided(given, axes, mesh, sizes)

        def sharding(name, shape):
            return NamedSharding(mesh, _spec(axes[name], shape, divided, sizes))

        def local(*arrays):
            held = dict(zip(names, arrays, strict=True))
            return _local(function, held, axes, wanted, mesh, divided, sizes)

        return (
            mesh,
            local,
            {name: sharding(name, result.shape) for name, result in wanted.items()},
            tuple(sharding(name, given[name].shape) for name in names),
        )

    rule, whole_axes = _rule(
        [(axes[name], shapes[name]) for name in names],
        [(axes[name], results[name].shape) for name in sorted(results)],
        sizes,
    )
    whole.def_partition(
        partition=partition,
        # Propagation may divide by a part of a mesh axis, which JAX cannot decode.
        decode_shardings=False,
        sharding_rule=rule,
        need_replication_factors=whole_axes,
    )
    # Its batching is not defined.
    return jax.custom_batching.sequential_vmap(lambda *arrays: whole(*arrays))(*arrays)


def _is_divided(mesh) -> bool:
    """Whether the partitioner has something to divide."""
    if mesh.empty or mesh.manual_axes:
        return False
    return any(
        kind == AxisType.Auto and size > 1
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )


def _sizes(shapes, axes):
    """Return the numbers of examples, query heads and key/value heads."""
    sizes = {"b": 1, "n": 1, "k": 1}
    for name, shape in shapes.items():
        for axis, size in zip(axes[name], shape, strict=True):
            if axis in sizes:
                sizes[axis] = max(sizes[axis], size)
    return sizes


def _divided(given, axes, mesh, sizes):
    """Return the mesh axes over which b, n and k are divided already, as far as that can stay.

    Where query heads are divided further than there are key/value heads, n has axes and k none.
    """
    found = {"b": (), "h": ()}
    order = sorted(given, key=lambda name: -math.prod(given[name].shape))
    for name in order:
        for at, (axis, size) in enumerate(zip(axes[name], given[name].shape, strict=True)):
            group = {"b": "b", "n": "h", "k": "h"}.get(axis)
            if group is None or found[group] or size < sizes[axis]:
                continue
            over = _mesh_axes(given[name].sharding, given[name].shape, at, mesh)
            ways = math.prod(mesh.shape[name] for name in over)
            can_stay = _can_divide_queries(ways, sizes) if axis == "n" else size % ways == 0
            others = found["h" if group == "b" else "b"]
            if can_stay and not set(over) & set(others):
                found[group] = over
    ways = math.prod(mesh.shape[name] for name in found["h"])
    are_keys_whole = sizes["k"] % ways > 0
    return {"b": found["b"], "n": found["h"], "k": () if are_keys_whole else found["h"]}


def _can_divide_queries(ways, sizes):
    """Whether each device has the same key/value heads to itself, or needs the same single one."""
    if sizes["k"] % ways == 0:
        return True
    group = sizes["n"] // sizes["k"]
    return sizes["n"] % ways == 0 and group % (sizes["n"] // ways) == 0


def _mesh_axes(sharding, shape, at, mesh):
    """Return the mesh axes over which an axis of an array is divided, () if that has no name."""
    if sharding is None or sharding.is_fully_replicated:
        return ()
    starts = lambda indices, at: {
        device: index[at].indices(shape_at)[0] for device, index in indices.items()
    }
    shape_at = shape[at]
    wanted = starts(sharding.devices_indices_map(tuple(shape)), at)
    ways = len(set(wanted.values()))
    large = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(1, len(large) + 1):
        for names in itertools.permutations(large, count):
            if math.prod(mesh.shape[name] for name in names) != ways or shape_at % ways:
                continue
            named = NamedSharding(mesh, P(names)).devices_indices_map((shape_at,))
            if starts(named, 0) == wanted:
                return names
    return ()


def _spec(letters, shape, divided, sizes):
    entries = [
        divided[axis] or None if axis in divided and size == sizes[axis] else None
        for axis, size in zip(letters, shape, strict=True)
    ]
    return P(*entries)


def _head(mesh, divided, sizes):
    """Return the key/value head that all query heads of this device use."""
    ways = math.prod(mesh.shape[name] for name in divided["n"])
    first = jax.lax.axis_index(divided["n"]) * (sizes["n"] // ways)
    return first // (sizes["n"] // sizes["k"])


def _pick(array, letters, mesh, divided, sizes):
    """Leave of undivided key/value heads the one that is used here."""
    if "k" not in letters or divided["k"] == divided["n"]:
        return array
    head = _head(mesh, divided, sizes)
    return jax.lax.dynamic_slice_in_dim(array, head, 1, letters.index("k"))


def _add(array, letters, shape, mesh, divided, sizes):
    """Add what the devices have of a sum over examples or heads."""
    over = []
    if "k" in letters and divided["k"] != divided["n"]:
        # Devices that share a key/value head each have a part of its gradient.
        at = letters.index("k")
        whole = jnp.zeros((*array.shape[:at], sizes["k"], *array.shape[at + 1 :]), array.dtype)
        head = _head(mesh, divided, sizes)
        array = jax.lax.dynamic_update_slice_in_dim(whole, array, head, at)
        over += divided["n"]
    for axis, size in zip(letters, shape, strict=True):
        if axis in divided and size == 1 < sizes[axis]:
            over += divided[axis]
    return jax.lax.psum(array, tuple(over)) if over else array


def _rule(operands, results, sizes):
    """Say in the partitioner's notation which axes belong together."""
    counter = iter(range(1_000_000))
    whole = []
    is_grouped = sizes["n"] > sizes["k"]

    def term(letters, shape):
        words = []
        for axis, size in zip(letters, shape, strict=True):
            if axis in sizes and size == sizes[axis] > 1:
                words.append("k" if axis == "n" and not is_grouped else axis)
            else:
                whole.append(f"w{next(counter)}")
                words.append(whole[-1])
        return " ".join(words)

    terms = [", ".join(term(*item) for item in items) for items in (operands, results)]
    return " -> ".join(terms), tuple(whole)
