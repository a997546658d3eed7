# SPDX-License-Identifier: Apache-2.0
"""Keep kernels sharded over examples and heads.

The partitioner cannot look into a kernel and would gather everything that goes in. Here it is told
that examples and heads are independent of one another: under an ambient mesh every device runs the
kernel on the examples and heads that it holds already, and nothing is moved.
"""

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.typing import Array


def over_batch_and_heads(
    function: Callable, inputs: Mapping[str, Array], axes: Mapping[str, str]
) -> dict[str, Array]:
    """Apply a function of dicts of arrays to the part of them that each device holds.

    Without a mesh, inside `shard_map` over all of it, and under `vmap`, the function is applied
    as it is.

    Args:
      function: maps a dict of arrays to a dict of arrays, for any number of examples and heads; it
        is called with the shapes of one device.
      inputs: its argument. "query" must be among them; query heads share key/value heads in groups
        of equal size, neighbours together.
      axes: one letter per axis of every input and result: b, n (query heads) and k (key/value
        heads) may be divided. An axis b or n of size 1 serves all examples or heads; in a result it
        is a sum over them, and sums over devices are added.

    Returns:
      The results.
    """
    if not _is_divided(jax.sharding.get_abstract_mesh()):
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
            found = function(dict(zip(names, arrays, strict=True)))
            return {
                name: _add(array, axes[name], wanted[name].shape, divided, sizes)
                for name, array in found.items()
            }

        return (
            mesh,
            local,
            {name: sharding(name, result.shape) for name, result in wanted.items()},
            tuple(sharding(name, given[name].shape) for name in names),
        )

    rule, factors = _rule(
        [(axes[name], shapes[name]) for name in names],
        [(axes[name], results[name].shape) for name in sorted(results)],
        sizes,
    )
    whole.def_partition(
        partition=partition,
        sharding_rule=rule,
        **factors,
    )

    # Its batching is not defined: under vmap the function is left to the partitioner.
    batched = jax.custom_batching.custom_vmap(lambda *arrays: whole(*arrays))

    @batched.def_vmap
    def _(size, is_batched, *arrays):
        del size
        in_axes = [0 if is_one else None for is_one in is_batched]
        apply = lambda *arrays: function(dict(zip(names, arrays, strict=True)))
        found = jax.vmap(apply, in_axes)(*arrays)
        return found, jax.tree.map(lambda _: True, found)

    return batched(*arrays)


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
    """Return the mesh axes over which examples and heads are divided already."""
    found = {"b": (), "h": ()}
    order = sorted(given, key=lambda name: -math.prod(given[name].shape))
    for name in order:
        spec = tuple(given[name].sharding.spec)
        for axis, entry, size in zip(axes[name], spec, given[name].shape, strict=False):
            group = {"b": "b", "n": "h", "k": "h"}.get(axis)
            if group is None or not entry or found[group] or size == 1:
                continue
            entry = entry if isinstance(entry, tuple) else (entry,)
            ways = math.prod(mesh.shape[name] for name in entry)
            least = sizes["b"] if group == "b" else sizes["k"]
            others = found["h" if group == "b" else "b"]
            if least % ways == 0 and not set(entry) & set(others):
                found[group] = entry
    return {"b": found["b"], "n": found["h"], "k": found["h"]}


def _spec(letters, shape, divided, sizes):
    entries = [
        divided[axis] or None if axis in divided and size == sizes[axis] else None
        for axis, size in zip(letters, shape, strict=True)
    ]
    return P(*entries)


def _add(array, letters, shape, divided, sizes):
    """Add what the devices have of a sum over examples or heads."""
    over = [
        divided[axis]
        for axis, size in zip(letters, shape, strict=True)
        if axis in divided and size == 1 < sizes[axis]
    ]
    over = tuple(name for names in over for name in names)
    return jax.lax.psum(array, over) if over else array


def _rule(operands, results, sizes):
    """Say in the partitioner's notation which axes belong together."""
    counter = iter(range(1_000_000))
    whole = []
    group = sizes["n"] // sizes["k"]

    def term(letters, shape):
        words = []
        for axis, size in zip(letters, shape, strict=True):
            if axis in sizes and size == sizes[axis] > 1:
                words.append("(k g)" if axis == "n" and group > 1 else {"n": "k"}.get(axis, axis))
            else:
                whole.append(f"w{next(counter)}")
                words.append(whole[-1])
        return " ".join(words)

    terms = [", ".join(term(*item) for item in items) for items in (operands, results)]
    rule = " -> ".join(terms)
    factors = {"g": group} if "(k g)" in rule else {}
    return rule, factors | {"need_replication_factors": tuple(whole)}
