# SPDX-License-Identifier: Apache-2.0
"""What each device holds stays there, however examples and heads are divided."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops.partition import MESH_AXES, over_batch_and_heads
from attnjax.parallel import make_mesh

AXES = {"query": "btnh", "key": "bskh", "out": "btnh", "shared": "bnh", "dkey": "bskh"}
T, S, H = 4, 6, 8


def kernel(inputs):
    """Mix queries with the keys of their head; like a kernel, any examples and heads will do."""
    query, key = inputs["query"], inputs["key"]
    group = query.shape[2] // key.shape[2]
    scores = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, group, axis=2))
    dkey = jnp.einsum("bnts,btnh->bsnh", scores, query)
    b, s, n, h = dkey.shape
    return {
        "out": query + scores.sum((3,)).swapaxes(1, 2)[..., None],
        "dkey": dkey.reshape(b, s, n // group, group, h).sum(3),
        "shared": query.sum((0, 1, 2))[None, None],
    }


@pytest.fixture(params=["as_divided", "by_name"])
def whole(request):
    """Both ways to divide a kernel."""
    mesh_axes = MESH_AXES if request.param == "by_name" else None
    return lambda query, key: over_batch_and_heads(
        kernel, {"query": query, "key": key}, AXES, mesh_axes=mesh_axes
    )


def draw(b, n, k):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((b, T, n, H), (b, S, k, H))
    ]


def compare(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, atol=1e-5 * largest, err_msg=name)


HEADS = {
    "equal": (8, 8, "model", set()),
    "grouped": (8, 4, "model", set()),
    # What is given whole is divided for free, but its gradient may have to be whole again.
    "grouped_keys_whole": (8, 4, None, {"all-gather"}),
    "fewer_keys_than_devices": (8, 2, None, set()),
    "one_key": (4, 1, None, set()),
}


@pytest.mark.parametrize("name", HEADS)
def test_what_is_divided_is_not_moved(name, whole):
    n, k, over_k, moves = HEADS[name]
    arrays = draw(4, n, k)
    mesh = make_mesh({"data": 2, "model": 4})
    with jax.set_mesh(mesh):
        inputs = [
            jax.device_put(array, NamedSharding(mesh, P("data", None, over)))
            for array, over in zip(arrays, ("model", over_k), strict=True)
        ]
        compiled = jax.jit(whole).lower(*inputs).compile()
        found = compiled(*inputs)
    text = compiled.as_text()
    assert {*re.findall(r" (all-gather|all-to-all|collective-permute)\(", text)} <= moves
    assert found["out"].sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), 4)
    compare(found, kernel(dict(zip(("query", "key"), arrays, strict=True))))


WHOLE = {
    "heads_that_the_axis_does_not_divide": (6, 6, "model"),
    "devices_that_would_need_two_keys": (12, 6, "model"),
    "queries_divided": (8, 8, "context"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_stay_divided_is_gathered(name, whole):
    """The heads come from one axis of channels, of which a device may hold parts of heads."""
    n, k, axis = WHOLE[name]
    query, key = draw(4, n, k)
    mesh = make_mesh({"data": 2, axis: 4})
    spec = P("data", "context") if axis == "context" else P("data", None, axis)

    def run(flat, key):
        return whole(flat.reshape(4, T, n, H), key)

    with jax.set_mesh(mesh):
        flat = jax.device_put(query.reshape(4, T, n * H), NamedSharding(mesh, spec))
        found = jax.jit(run)(flat, key)
    compare(found, kernel({"query": query, "key": key}))


def test_under_vmap_and_scan(whole):
    query, key = draw(4, 8, 4)
    stacked = jnp.stack([query, 2 * query])
    wanted = [kernel({"query": x, "key": key}) for x in stacked]
    mesh = make_mesh({"data": 2, "model": 4})
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.vmap(whole, (0, None)))(stacked, key)
        _, scanned = jax.jit(lambda x: jax.lax.scan(lambda _, y: (None, whole(y, key)), None, x))(
            stacked
        )
    for found in (mapped, scanned):
        compare(found, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


def test_inside_shard_map_it_is_applied_as_it_is(whole):
    query, key = draw(8, 4, 2)
    mesh = make_mesh({"data": 8})
    specs = {"out": P("data"), "dkey": P("data"), "shared": P("data")}
    found = jax.shard_map(whole, mesh=mesh, in_specs=P("data"), out_specs=specs)(query, key)
    wanted = kernel({"query": query, "key": key})
    wanted["shared"] = query.sum((1, 2))[:, None]
    compare(found, wanted)
