# SPDX-License-Identifier: Apache-2.0
"""Clouds of points against float64 oracles: neighbours, furthest points, chamfer, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.losses.points import chamfer_l1, chamfer_l2
from attnjax.metrics.points import f_score
from attnjax.ops import points

CLOSE = 1e-6  # a few roundings of float32; distances are of size 1


def draw(b, n, seed=0, c=3):
    return np.random.default_rng(seed).standard_normal((b, n, c)).astype(np.float32)


def squared(first, second):
    offsets = first[:, :, None].astype(np.float64) - second[:, None].astype(np.float64)
    return np.sum(offsets**2, axis=-1)


def rigid(x, seed=5):
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
    return (x @ rotation + np.array([3, -1, 2])).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("count", "block"))
def neighbours(query, cloud, count, block=8):
    return points.nearest_neighbours(query, cloud, count, block=block)


chamfer = jax.jit(points.chamfer_distances, static_argnames="block")


def test_neighbours_equal_the_oracle():
    query, cloud = draw(2, 21), draw(2, 30, 1)
    found = neighbours(query, cloud, 5)
    expected = np.argsort(squared(query, cloud), axis=-1)[..., :5]
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    for block in (1, 7, 21, 1024):
        np.testing.assert_array_equal(neighbours(query, cloud, 5, block), expected)
    np.testing.assert_array_equal(neighbours(rigid(query), rigid(cloud), 5), expected)
    order = np.random.default_rng(2).permutation(30)
    np.testing.assert_array_equal(order[neighbours(query, cloud[:, order], 5)], expected)
    np.testing.assert_array_equal(
        points.gather(cloud, found), np.stack([cloud[i][expected[i]] for i in range(2)])
    )


def furthest(cloud, count):
    """The definition, point by point."""
    chosen = [0]
    for _ in range(count - 1):
        distance = squared(cloud[None], cloud[None, chosen])[0].min(axis=1)
        chosen.append(int(np.argmax(distance)))
    return chosen


def test_furthest_points_equal_the_oracle():
    cloud = draw(3, 40)
    sample = jax.jit(points.furthest_point_sampling, static_argnums=1)
    found = np.asarray(sample(cloud, 15))
    np.testing.assert_array_equal(found, [furthest(x, 15) for x in cloud])
    np.testing.assert_array_equal(sample(rigid(cloud), 15), found)
    # Beginnings are samples, and a sample of a sample is its beginning.
    np.testing.assert_array_equal(sample(cloud, 6), found[:, :6])
    chosen = np.asarray(points.gather(cloud, found))
    np.testing.assert_array_equal(sample(chosen, 6), np.arange(6)[None].repeat(3, axis=0))
    assert sorted(np.asarray(sample(cloud, 40))[0]) == list(range(40))


def test_furthest_points_cover_better_than_any_first_ones():
    cloud = draw(1, 200)
    found = points.furthest_point_sampling(cloud, 20)
    reach = lambda chosen: squared(cloud, cloud[:, np.asarray(chosen)]).min(axis=-1).max()
    assert reach(found[0]) < reach(np.arange(20)) / 2


def test_chamfer_equals_the_oracle():
    first, second = draw(2, 21), draw(2, 30, 1)
    expected = squared(first, second)
    for block in (1, 4, 7, 64):
        there, back = chamfer(first, second, block=block)
        assert there.dtype == back.dtype == jnp.float32
        np.testing.assert_allclose(there, expected.min(axis=2), rtol=CLOSE)
        np.testing.assert_allclose(back, expected.min(axis=1), rtol=CLOSE)
    for loss, values in ((chamfer_l1, np.sqrt(expected) / 2), (chamfer_l2, expected)):
        by_hand = values.min(axis=2).mean(axis=1) + values.min(axis=1).mean(axis=1)
        np.testing.assert_allclose(loss(there, back), by_hand, rtol=CLOSE)


def test_chamfer_knows_equal_clouds_and_no_order():
    cloud = draw(2, 21)
    order = np.random.default_rng(2).permutation(21)
    there, back = chamfer(cloud, cloud[:, order], block=8)
    assert not np.any(there) and not np.any(back)
    far = cloud + 1000  # distances of one part in a thousand are still told
    np.testing.assert_allclose(
        chamfer(far, far + np.float32(0.125), block=8)[0], 3 * 0.125**2, rtol=0.02
    )
    there, back = chamfer(cloud, draw(2, 30, 1), block=8)
    again, onto = chamfer(draw(2, 30, 1), cloud[:, order], block=8)
    np.testing.assert_array_equal(there[:, order], onto)
    np.testing.assert_array_equal(back, again)


def test_gradients_equal_those_of_all_pairs():
    first, second = draw(2, 9), draw(2, 13, 1)
    second[:, 0] = first[:, 0]  # a distance of zero

    def ours(first, second):
        return jnp.sum(chamfer_l1(*points.chamfer_distances(first, second, block=4)))

    def theirs(first, second):
        pairs = jnp.sum((first[:, :, None] - second[:, None]) ** 2, axis=-1)
        return jnp.sum(chamfer_l1(pairs.min(axis=2), pairs.min(axis=1)))

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(first, second) for f in (ours, theirs)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=CLOSE)
    for a, b in zip(found[1], expected[1], strict=True):
        assert np.isfinite(a).all() and np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, atol=CLOSE)


def test_no_table_of_all_pairs_exists():
    shapes = (jax.ShapeDtypeStruct((1, 16_384, 3), jnp.float32),) * 2
    loss = lambda a, b: jnp.sum(chamfer_l1(*points.chamfer_distances(a, b, block=512)))
    compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16_384**2 * 4 / 50


def test_clouds_map_and_half_precision():
    cloud = draw(4, 12)
    mapped = jax.vmap(lambda x: points.furthest_point_sampling(x, 5))(cloud.reshape(2, 2, 12, 3))
    np.testing.assert_array_equal(mapped.reshape(4, 5), points.furthest_point_sampling(cloud, 5))
    there, _ = points.chamfer_distances(cloud.astype(jnp.bfloat16), cloud.astype(jnp.bfloat16))
    assert there.dtype == jnp.float32 and not np.any(there)


def test_f_score_by_hand():
    there = np.array([[0.0, 0.5, 0.9, 1.1], [2, 2, 2, 2], [0, 0, 0, 0]], np.float32) ** 2
    back = np.array([[0.99, 1.01], [3, 3], [0, 0]], np.float32) ** 2
    expected = [2 * 0.75 * 0.5 / 1.25, 0, 1]
    np.testing.assert_allclose(f_score(there, back, 1.0), expected, rtol=CLOSE)


def test_wrong_shapes_are_refused():
    cloud = draw(2, 5)
    with pytest.raises(ValueError, match="count=6: must be from 1 to the number of points 5"):
        points.furthest_point_sampling(cloud, 6)
    with pytest.raises(ValueError, match="count=0"):
        points.nearest_neighbours(cloud, cloud, 0)
    with pytest.raises(ValueError, match=r"query \(2, 5, 3\) and points \(1, 5, 3\) differ"):
        points.nearest_point(cloud, cloud[:1])
    with pytest.raises(ValueError, match=r"points must be \[b, points, c\]"):
        points.furthest_point_sampling(cloud[0], 2)
    with pytest.raises(ValueError, match="block=0"):
        points.chamfer_distances(cloud, cloud, block=0)
