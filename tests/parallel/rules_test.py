# SPDX-License-Identifier: Apache-2.0
"""Path rules: alignment to the last axes, fall-back to replicated, shares of a process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnjax.parallel import constrain, gather, make_mesh, process_shard, tree_shardings
from attnjax.parallel.rules import leaf_spec


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("block_0/attention/query/kernel", (8, 4, 2), P("fsdp", "model", None)),
        ("blocks/attention/query/kernel", (3, 8, 4, 2), P(None, "fsdp", "model", None)),
        ("0/mu/block_0/attention/out/kernel", (4, 2, 8), P("model", None, "fsdp")),
        ("mlp/up/kernel", (8, 16), P("fsdp", "model")),
        ("mlp/up/bias", (16,), P("model")),
        ("mlp/down/kernel", (16, 8), P("model", "fsdp")),
        ("stem/projection/kernel", (12, 12, 3, 8), P(None, None, None, "fsdp")),
        ("norm/scale", (8,), P()),
        ("step", (), P()),
    ],
)
def test_default_rules(mesh, path, shape, spec):
    assert leaf_spec(path, shape, mesh) == (spec, [])


def test_indivisible_dimension_stays_whole_and_is_reported(mesh):
    spec, notes = leaf_spec("attention/query/kernel", (8, 3, 2), mesh)
    assert spec == P("fsdp", None, None)
    assert notes == ["attention/query/kernel (8, 3, 2): heads=3 not divisible by 2"]


def test_model_rules_come_first(mesh):
    spec, _ = leaf_spec("mlp/up/kernel", (8, 16), mesh, axes=((r"up/kernel$", (None, None)),))
    assert spec == P(None, None)


def test_tree_is_placed(mesh):
    tree = {"mlp": {"up": {"kernel": jnp.ones((8, 16))}}, "odd": {"kernel": jnp.ones((3, 5))}}
    shardings, notes = tree_shardings(tree, mesh)
    placed = jax.device_put(tree, shardings)
    assert placed["mlp"]["up"]["kernel"].sharding.shard_shape((8, 16)) == (4, 8)
    assert notes == ["odd/kernel (3, 5): embed=5 not divisible by 2"]


def test_one_process_supplies_everything(mesh):
    assert process_shard(mesh) == (0, 1)


class _Fake:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"data": 8}, (0, 2)), ({"model": 8}, (0, 1)), ({"data": 4, "model": 2}, (0, 2))],
)
def test_shares_of_two_processes(monkeypatch, sizes, expected):
    """Processes that differ along `model` only must supply the same rows."""
    mesh = make_mesh(sizes)
    owner = {device: i // 4 for i, device in enumerate(jax.devices())}

    class Sharding:
        def devices_indices_map(self, shape):
            real = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
            return {_Fake(owner[d]): i for d, i in real.devices_indices_map(shape).items()}

    monkeypatch.setattr("attnjax.parallel.rules.batch_sharding", lambda mesh: Sharding())
    assert process_shard(mesh) == expected


def test_constrain_is_a_no_op_without_mesh():
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", None) is x
    with pytest.raises(ValueError, match="1 names"):
        constrain(x, "batch")


def test_constrain_partitions_what_divides(mesh):
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(x * 2, "batch", "heads", "mlp"))(jnp.ones((4, 3, 6)))
    assert out.sharding.shard_shape(out.shape) == (1, 3, 3)
    np.testing.assert_array_equal(out, 2 * np.ones((4, 3, 6)))


def test_constrain_inside_shard_map(mesh):
    def body(x):
        return constrain(x + 1, "batch", "mlp")

    with jax.set_mesh(mesh):
        program = jax.shard_map(
            body, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")),
            axis_names={"data", "fsdp"},
        )  # fmt: skip
        np.testing.assert_array_equal(jax.jit(program)(jnp.ones((4, 2))), 2 * np.ones((4, 2)))


@pytest.fixture(scope="module")
def context_mesh():
    return make_mesh({"fsdp": 2, "model": 2, "context": 2})


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("query/kernel", (8, 4, 2), P(("fsdp", "context"), "model", None)),
        # A dimension that not all axes divide is divided by the first ones.
        ("query/kernel", (6, 4, 2), P("fsdp", "model", None)),
        ("experts/up/kernel", (4, 8, 6), P(("fsdp", "context"), None, "model")),
        ("layers/experts/down/kernel", (3, 2, 6, 8), P(None, "fsdp", "model", "context")),
        ("experts/router/kernel", (8, 4), P(("fsdp", "context"), None)),
    ],
)
def test_context_divides_parameters(context_mesh, path, shape, spec):
    assert leaf_spec(path, shape, context_mesh)[0] == spec


def test_no_mesh_axis_divides_two_dimensions(context_mesh):
    with jax.set_mesh(context_mesh):
        run = jax.jit(lambda x: constrain(x * 2, "expert", "batch", "sequence"))
        out, half = run(jnp.ones((4, 4, 4))), run(jnp.ones((2, 4, 4)))
    assert out.sharding.shard_shape(out.shape) == (1, 4, 4)
    assert half.sharding.shard_shape(half.shape) == (1, 4, 2)


def test_gather_leaves_nothing_else_divided(mesh, context_mesh):
    x = jnp.arange(32.0).reshape(8, 4)
    assert gather(x, None, "mlp") is x
    for ambient, names, local in (
        (mesh, (None, "mlp"), (8, 2)),
        (context_mesh, (None, None), (8, 4)),
    ):
        with jax.set_mesh(ambient):
            placed = jax.device_put(x, jax.NamedSharding(ambient, P("fsdp")))
            out = jax.jit(lambda x, names=names: gather(x, *names))(placed)
        assert out.sharding.shard_shape(out.shape) == local
        np.testing.assert_array_equal(out, x)
    with jax.set_mesh(mesh):
        inside = jax.shard_map(lambda x: gather(x, None, "mlp"), in_specs=P(), out_specs=P())
        np.testing.assert_array_equal(jax.jit(inside)(x), x)
