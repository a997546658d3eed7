# SPDX-License-Identifier: Apache-2.0
"""Layers cut into equal groups over a mesh axis, with microbatches that follow one another.

Huang et al., "GPipe", arXiv 1811.06965. Rank p holds the p-th group of layers, a stage. In tick t
it works on microbatch t - p and hands the result to its neighbour, so that m microbatches leave the
last of P stages after m + P - 1 ticks:

    tick      0   1   2   3   4
    stage 0   0   1   2   .   .
    stage 1   .   0   1   2   .
    stage 2   .   .   0   1   2

The backward pass is the transposed loop: the same schedule, from the last stage to the first.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attnjax.typing import Array, Params


def bubble_fraction(stages: int, microbatches: int) -> float:
    """Return the part of the time that a rank waits: (stages - 1) / (microbatches + stages - 1).

    Args:
      stages: P.
      microbatches: m.

    Raises:
      ValueError: one of them is less than 1.
    """
    for name, value in (("stages", stages), ("microbatches", microbatches)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    return (stages - 1) / (microbatches + stages - 1)


def pipeline(
    layer: Callable[[Params, Array], Array],
    params: Params,
    microbatches: Array,
    *,
    axis_name: str,
    mesh: Mesh | None = None,
    remat: bool = False,
) -> Array:
    """Apply a stack of layers, its groups divided over a mesh axis, to every microbatch.

    Equals `layer(params[l - 1], ... layer(params[0], x))` for every microbatch x, and so do its
    gradients. Only the axis of the stages is manual: within a layer all other axes of the mesh stay
    automatic, so that batch and heads may be divided over them as usual.

    Any axis will do. On the mesh of `make_mesh`, "fsdp" is the natural one for a caller who does
    not divide parameters otherwise: batches then go over "data" alone. Where all four axes have
    their usual work, make a mesh with an axis more; names that `constrain` does not know are left
    alone by it.

    Every rank holds the microbatches and, for the backward pass, what its layers save of each; with
    `remat`, only the inputs of its stage: m + P - 1 of them.

    Args:
      layer: hashable pure function of one layer's parameters and `[b, ...]`, returning the same
        shape and dtype. `[b, ...]` may be a tree of arrays, all of which travel from stage to
        stage: return unchanged what only accompanies the rest, such as segments.
      params: tree of arrays with a leading axis of layers, which the stages divide; divided over
        the mesh axis `P(axis_name)`, or else they are moved there.
      microbatches: `[m, b, ...]`, or a tree of such arrays.
      axis_name: the axis of the stages.
      mesh: the mesh; the ambient one (`jax.set_mesh`) if None.
      remat: whether the backward pass computes again what happens within a stage.

    Returns:
      Like the microbatches, on every rank.

    Raises:
      ValueError: the mesh has no such axis, or it is already manual; there are no layers or no
        microbatches, or leaves disagree about their number; the stages do not divide the layers;
        or a layer changes shape or dtype.
    """
    around = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    stages = _stages(around, axis_name)
    layers = _leading(params, "params", "layers")
    _leading(microbatches, "microbatches", "microbatches")
    if layers % stages:
        raise ValueError(f"{layers} layers cannot be divided over {stages} stages of {axis_name!r}")
    _check_layer(layer, params, microbatches)
    return _run(layer, axis_name, stages, mesh, remat, params, microbatches)


# Compiled even when called outside of `jit`: only so may the other axes stay automatic.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(layer, axis_name, stages, mesh, remat, params, microbatches):
    def stage(params, x):
        return jax.lax.scan(lambda x, one: (layer(one, x), None), x, params)[0]

    if remat:
        stage = jax.checkpoint(stage, prevent_cse=False)
    neighbours = [(rank, rank + 1) for rank in range(stages - 1)]

    def rank_program(params, microbatches):
        microbatches = jax.tree.map(lambda x: x[0], microbatches)
        is_first = jax.lax.axis_index(axis_name) == 0

        def tick(received, fresh):
            x = jax.tree.map(lambda *of: jnp.where(is_first, *of), fresh, received)
            x = stage(params, x)
            return jax.tree.map(lambda a: jax.lax.ppermute(a, axis_name, neighbours), x), x

        # Ranks that would wait work on real data and drop it: zeros could have no derivative, and
        # not-a-number times a cotangent of zero would reach the parameters.
        filled = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], stages - 1, axis=0)]), microbatches
        )
        _, done = jax.lax.scan(tick, jax.tree.map(lambda x: x[0], microbatches), filled)
        return jax.tree.map(lambda x: x[None, stages - 1 :], done)

    # One copy for every rank. Were they whole on all ranks, `P()`, the backward pass would add up
    # their cotangents within `shard_map`, at which XLA's CPU compiler aborts in bfloat16.
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (stages, *x.shape)), microbatches)
    done = jax.shard_map(
        rank_program,
        mesh=mesh,
        in_specs=P(axis_name),
        out_specs=P(axis_name),
        axis_names={axis_name},
        check_vma=False,
    )(params, copies)
    return jax.tree.map(lambda x: x[-1], done)


def _stages(mesh, axis_name):
    if axis_name not in mesh.shape:
        known = ", ".join(mesh.shape) or "none: call jax.set_mesh, or pass mesh"
        raise ValueError(f"axis_name={axis_name!r}: the mesh has no such axis (known: {known})")
    if axis_name in getattr(mesh, "manual_axes", ()):
        raise ValueError(f"axis_name={axis_name!r}: the axis is manual here (inside shard_map)")
    return mesh.shape[axis_name]


def _leading(tree, name, what):
    """Return the size of the leading axis that all leaves share."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if sizes in (set(), {(0,)}):
        raise ValueError(f"{name}: there are no {what}")
    if len(sizes) > 1 or () in sizes:
        raise ValueError(f"{name} must have one leading axis of {what}, got {sorted(sizes)}")
    return sizes.pop()[0]


def _check_layer(layer, params, microbatches):
    one = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), tree
    )
    given = one(microbatches)
    found = jax.eval_shape(layer, one(params), given)
    kinds = lambda tree: jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)
    if kinds(found) != kinds(given):
        raise ValueError(f"a layer must return what it is given, {kinds(given)}: {kinds(found)}")
