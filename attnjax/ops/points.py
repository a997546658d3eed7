# SPDX-License-Identifier: Apache-2.0
"""Clouds of points: nearest neighbours, furthest points, distances between clouds.

Coordinates are `[b,n,3]`, any number of axes in fact, and unordered. No function holds all n x m
distances at once: they are made tile by tile, as differences, which lose no digits where points are
close to each other.
"""

import functools
import math

import jax
import jax.numpy as jnp

from attnjax.typing import Array


def gather(features: Array, indices: Array) -> Array:
    """Look up points of every cloud.

    Args:
      features: `[b,n,c]`.
      indices: int `[b,...]`, below n.

    Returns:
      `[b,...,c]`.
    """
    b, _, c = features.shape
    flat_bpc = jnp.take_along_axis(features, indices.reshape(b, -1, 1), axis=1)
    return flat_bpc.reshape(*indices.shape, c)


def furthest_point_sampling(points: Array, count: int) -> Array:
    """Choose points one by one, each the furthest from those chosen before; the first is point 0.

    The first k of them are what sampling k points would give, and sampling from the chosen points
    gives them again in the same order. Of equally distant points the first is chosen.

    Args:
      points: `[b,n,c]` floating.
      count: points to choose, at most n.

    Returns:
      int32 `[b,count]`, indices in the order of choice; no gradient flows through them.

    Raises:
      ValueError: the count is not from 1 to n.
    """
    _check_clouds(points=points)
    b, n, _ = points.shape
    if not 1 <= count <= n:
        raise ValueError(f"count={count}: must be from 1 to the number of points {n}")
    points = _exact(jax.lax.stop_gradient(points))

    def choose(state, _):
        distance_bn, last_b = state
        offset_bnc = points - gather(points, last_b[:, None])
        distance_bn = jnp.minimum(distance_bn, jnp.sum(jnp.square(offset_bnc), axis=-1))
        return (distance_bn, jnp.argmax(distance_bn, axis=1).astype(jnp.int32)), last_b

    start = (jnp.full((b, n), jnp.inf, points.dtype), jnp.zeros(b, jnp.int32))
    _, chosen_pb = jax.lax.scan(choose, start, length=count)
    return chosen_pb.T


def nearest_neighbours(query: Array, points: Array, count: int, *, block: int = 1024) -> Array:
    """Return the nearest points of every query, nearest first.

    Args:
      query: `[b,t,c]` floating.
      points: `[b,s,c]` floating.
      count: k, at most s.
      block: queries whose distances exist at the same time.

    Returns:
      int32 `[b,t,k]`; of equally distant points the first come first. No gradient flows through.

    Raises:
      ValueError: shapes do not fit, or the count is not from 1 to s.
    """
    _check_clouds(query=query, points=points)
    t, s = query.shape[1], points.shape[1]
    if not 1 <= count <= s:
        raise ValueError(f"count={count}: must be from 1 to the number of points {s}")
    query, points = (_exact(jax.lax.stop_gradient(x)) for x in (query, points))

    def best(query_bqc):
        return jax.lax.top_k(-_squared(query_bqc, points), count)[1].astype(jnp.int32)

    found_pbqk = jax.lax.map(best, _blocks(query, block, 0.0))
    return jnp.moveaxis(found_pbqk, 0, 1).reshape(query.shape[0], -1, count)[:, :t]


def nearest_point(query: Array, points: Array, *, block: int = 1024) -> tuple[Array, Array]:
    """Return the squared distance of every query to its nearest point, and which one it is.

    Gradients flow through the distance into the query and the point it is nearest to.

    Args:
      query: `[b,t,c]` floating.
      points: `[b,s,c]` floating.
      block: side of the tiles of distances that exist at the same time.

    Returns:
      Squared distances `[b,t]`, float32 (float64 for float64), and indices int32 `[b,t]`.

    Raises:
      ValueError: shapes do not fit, or the block is below 1.
    """
    _check_clouds(query=query, points=points)
    query, points = _exact(query), _exact(points)
    b, t, _ = query.shape
    # A point at infinity is nearest to nobody.
    tiles_pbsc = _blocks(jax.lax.stop_gradient(points), block, jnp.inf)
    width = tiles_pbsc.shape[2]

    def best(query_bqc):
        def compare(state, tile):
            distance_bq, index_bq = state
            points_bsc, start = tile
            squared_bqs = _squared(query_bqc, points_bsc)
            least_bq = jnp.min(squared_bqs, axis=-1)
            place_bq = start + jnp.argmin(squared_bqs, axis=-1).astype(jnp.int32)
            is_nearer = least_bq < distance_bq
            return (
                jnp.minimum(distance_bq, least_bq),
                jnp.where(is_nearer, place_bq, index_bq),
            ), ()

        shape = query_bqc.shape[:2]
        start = (jnp.full(shape, jnp.inf, query_bqc.dtype), jnp.zeros(shape, jnp.int32))
        starts = width * jnp.arange(len(tiles_pbsc), dtype=jnp.int32)
        return jax.lax.scan(compare, start, (tiles_pbsc, starts))[0][1]

    found_pbq = jax.lax.map(best, _blocks(jax.lax.stop_gradient(query), block, 0.0))
    index_bt = jnp.moveaxis(found_pbq, 0, 1).reshape(b, -1)[:, :t]
    return jnp.sum(jnp.square(query - gather(points, index_bt)), axis=-1), index_bt


def chamfer_distances(first: Array, second: Array, *, block: int = 1024) -> tuple[Array, Array]:
    """Return the squared distance of every point to the nearest one of the other cloud.

    Args:
      first: `[b,n,c]` floating.
      second: `[b,m,c]` floating.
      block: see `nearest_point`.

    Returns:
      `[b,n]` from the first to the second cloud, and `[b,m]` back; differentiable.
    """
    there, _ = nearest_point(first, second, block=block)
    back, _ = nearest_point(second, first, block=block)
    return there, back


def _exact(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _squared(query_btc, points_bsc):
    """Squared distances `[b,t,s]`, a coordinate at a time, so that no `[b,t,s,c]` need exist."""
    return functools.reduce(
        jnp.add,
        (
            jnp.square(query_btc[:, :, None, i] - points_bsc[:, None, :, i])
            for i in range(query_btc.shape[-1])
        ),
    )


def _blocks(x_btc, block, fill):
    """Cut points into equal parts of at most `block`: `[parts, b, size, c]`, the rest filled."""
    if block < 1:
        raise ValueError(f"block={block}: must be at least 1")
    b, t, c = x_btc.shape
    parts = math.ceil(t / block)
    size = math.ceil(t / parts)
    padding = ((0, 0), (0, parts * size - t), (0, 0))
    x_btc = jnp.pad(x_btc, padding, constant_values=fill)
    return jnp.moveaxis(x_btc.reshape(b, parts, size, c), 1, 0)


def _check_clouds(**clouds):
    for name, x in clouds.items():
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"{name} must be [b, points, c] without empty axes, got {x.shape}")
    shapes = {(x.shape[0], x.shape[2]) for x in clouds.values()}
    if len(shapes) > 1:
        listing = " and ".join(f"{name} {x.shape}" for name, x in clouds.items())
        raise ValueError(f"{listing} differ in batch or coordinates")
