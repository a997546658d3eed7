# SPDX-License-Identifier: Apache-2.0
"""Masks whose examples and heads are divided over devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from attnjax.ops.mask import Mask, Visibility
from attnjax.ops.mask.algebra import Either, Lowered, Meet
from attnjax.ops.mask.arrays import Blocks, Dense, PerHead
from attnjax.parallel.distributed.devices import EXAMPLES, HEADS


def divide_visibility(
    visibility: Visibility, ways: tuple[int, int]
) -> tuple[list[Any], list[P], Callable[[Any], Visibility]]:
    """Say which axes of a mask's arrays are divided with examples and heads.

    Queries and keys stay whole: `Visibility.window` restricts to those of a device.

    Args:
      visibility: of `check_mask`, for all examples and heads.
      ways: ways over examples and over heads.

    Returns:
      The arrays, the partition of each, and a function that makes a visibility of the arrays of one
      device. There are no arrays when all of them are known and whole.

    Raises:
      ValueError: the mask has a program of its own for each example or head.
    """
    visibility = _prepare(visibility)
    specs, whole = jax.tree.flatten(_specs(visibility, ways), is_leaf=lambda x: isinstance(x, P))
    arrays, structure = jax.tree.flatten(visibility)
    if whole.num_leaves != structure.num_leaves:
        raise AssertionError(f"{whole} is not {structure}")
    if visibility.is_static and all(spec == P() for spec in specs):
        return [], [], lambda held: visibility
    arrays = [np.int32(x) if isinstance(x, int) else x for x in arrays]
    return arrays, specs, lambda held: jax.tree.unflatten(structure, held)


def _prepare(node):
    """Let one map of blocks for all heads serve any number of heads."""
    if isinstance(node, Blocks) and node.kept.shape[1] == 1:
        return dataclasses.replace(node, heads_per_map=1)
    if isinstance(node, Lowered):
        return Lowered(_prepare(node.value))
    if isinstance(node, (Meet, Either)):
        return type(node)(_prepare(node.first), _prepare(node.second))
    if isinstance(node, PerHead):
        return PerHead(tuple(_prepare(mask) for mask in node.masks))
    if isinstance(node, Visibility):
        return dataclasses.replace(node, rest=_prepare(node.rest))
    return node


def _specs(node, ways):
    """Return the same tree with a partition for every array."""
    divided = lambda x: _spec(np.shape(x), ways)
    if node is None:
        return None
    if isinstance(node, Visibility):
        # Ids have no axis of heads.
        ids = lambda x: None if x is None else _spec(np.shape(x)[:1], ways)
        bounds = lambda x: None if x is None else divided(x)
        return Visibility(
            bounds(node.lower), bounds(node.upper), ids(node.query_ids), ids(node.key_ids),
            _specs(node.rest, ways),
        )  # fmt: skip
    if isinstance(node, Lowered):
        return Lowered(_specs(node.value, ways))
    if isinstance(node, (Meet, Either)):
        return type(node)(_specs(node.first, ways), _specs(node.second, ways))
    if isinstance(node, Dense):
        return Dense(divided(node.values))
    if isinstance(node, Blocks):
        if (maps := node.kept.shape[1]) > 1 and maps % ways[1]:
            raise ValueError(
                f"mask Blocks has {maps} maps for the heads, which {ways[1]} ways do not divide"
            )
        return dataclasses.replace(node, kept=divided(node.kept), query_blocks=P(), key_blocks=P())
    if isinstance(node, PerHead) and ways[1] == 1:
        return PerHead(tuple(_specs(mask, ways) for mask in node.masks))
    return _whole(node, ways)


def _whole(node: Mask, ways):
    """Leave a mask whole, if it is the same for all examples and heads."""
    shape = jax.eval_shape(lambda: node.tile(0, 0, 1, 1)).shape
    for axis, name in enumerate((EXAMPLES, HEADS)):
        if shape[axis] > 1 and ways[axis] > 1:
            raise ValueError(
                f"mask {type(node).__name__} differs between {name} and cannot be divided "
                f"{ways[axis]} ways over them: choose a plan that leaves {name} whole, or pass "
                "mask.dense(t, s)"
            )
    return jax.tree.map(lambda _: P(), node)


def _spec(shape, ways):
    names = [
        name if size > 1 and parts > 1 else None
        for name, size, parts in zip((EXAMPLES, HEADS), shape, ways, strict=False)
    ]
    while names and names[-1] is None:
        names.pop()
    return P(*names)
