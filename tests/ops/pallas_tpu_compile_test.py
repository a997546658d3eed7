# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels, compiled to machine code by libtpu; no TPU is needed."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import TokenMass, attention, mask
from attnjax.ops.cases import MASKS, Case

pytestmark = pytest.mark.slow

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
B, T, N = 2, 1100, 4
LENGTHS = (300, 500, 300)


@functools.cache
def devices(chip):
    pytest.importorskip("libtpu")
    # libtpu looks for a TPU machine around it unless it is told about one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def compiled(
    chip, *, k=2, h=128, hv=None, dtype="bfloat16", t=T, s=None, bias=None, inputs=(), mesh=(1, 1),
    **options,
):  # fmt: skip
    """Compile output, lse and gradients; `options` may be functions of further inputs."""
    mesh = Mesh(
        np.array(devices(chip)[: mesh[0] * mesh[1]]).reshape(mesh),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
    )
    s, hv = s or t, hv or h
    heads = "model" if k % mesh.shape["model"] == 0 else None
    shapes = [((B, t, N, h), "model"), ((B, s, k, h), heads), ((B, s, k, hv), heads)]
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data", None, over)))
        for shape, over in shapes
    ]
    whole = NamedSharding(mesh, P())
    if bias is not None:
        arrays.append(jax.ShapeDtypeStruct(bias, jnp.float32, sharding=whole))
    inputs = [jax.ShapeDtypeStruct(*of, sharding=whole) for of in inputs]

    def loss(arrays, inputs):
        named = {
            name: option(*inputs) if callable(option) else option
            for name, option in options.items()
        }
        named |= dict(zip(("bias",), arrays[3:], strict=False))
        found = attention(*arrays[:3], implementation="pallas_tpu", return_lse=True, **named)
        return found.out.astype(jnp.float32).sum() + found.lse.sum(), (found.out, found.statistics)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(loss, has_aux=True)).trace(arrays, inputs)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def kernels(program):
    """Number of kernels of our own."""
    return program.as_text().count('custom_call_target="tpu_custom_call"')


CASES = {
    "full": dict(t=1024),
    "full_padded": {},
    "causal": dict(mask=mask.causal()),
    "causal_f32": dict(mask=mask.causal(), dtype="float32"),
    "causal_64": dict(mask=mask.causal(), h=64),
    "causal_80": dict(mask=mask.causal(), h=80),
    "causal_256": dict(mask=mask.causal(), h=256),
    "causal_256_f32": dict(mask=mask.causal(), h=256, dtype="float32"),
    "narrow_values": dict(mask=mask.causal(), h=192, hv=128),
    "documents": dict(mask=mask.documents(LENGTHS, causal=True)),
    "segments": dict(
        mask=lambda ids: mask.segments(ids, ids) & mask.causal(), inputs=[((B, T), jnp.int32)]
    ),
    "window": dict(mask=mask.sliding_window(200, 0)),
    "prefix": dict(mask=mask.prefix_lm(150)),
    "share_question": dict(mask=mask.share_question(LENGTHS)),
    "blocks": dict(mask=lambda kept: mask.blocks(kept, 100, 100), inputs=[((N, 11, 11), bool)]),
    "dense": dict(mask=lambda kept: mask.array(kept), inputs=[((B, N, T, T), bool)]),
    "dense_f32": dict(
        mask=lambda kept: mask.array(kept), inputs=[((1, 1, T, T), bool)], dtype="float32"
    ),
    "multi_query": dict(mask=mask.causal(), k=1),
    "softcap": dict(mask=mask.causal(), softcap=30.0),
    "softmax_one": dict(mask=mask.causal(), normalizer="softmax_one"),
    "dropout": dict(
        mask=mask.causal(), dropout_rate=0.1,
        dropout_key=lambda data: jax.random.wrap_key_data(data), inputs=[((2,), jnp.uint32)],
    ),
    "bias": dict(bias=(1, N, T, T), mask=mask.causal()),
    "bias_keys": dict(bias=(B, 1, 1, T)),
    "bias_queries": dict(bias=(1, N, T, 1)),
    "few_queries": dict(t=8, s=T),
    "long": dict(mask=mask.causal(), t=2**15, k=1),
    "statistics": dict(
        mask=mask.causal(),
        statistics=(
            "entropy", "key_mass", "max_probability", "first_token_mass",
            TokenMass(np.arange(T)[None] % 3 == 0, "thirds"),
        ),
    ),
}  # fmt: skip
EXTRA = {"bias": 1, "bias_keys": 1, "bias_queries": 1, "statistics": 1}
"""Kernels besides forward and backward."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip, name):
    assert kernels(compiled(chip, **CASES[name])) == 2 + EXTRA.get(name, 0)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_every_mask(chip, name):
    """Arrays that are known at run time only are arguments of the program."""
    made = MASKS[name](Case(name, b=B, t=T, s=T, n=N), np.random.default_rng(0))
    leaves, tree = jax.tree.flatten(made)
    is_traced = [isinstance(leaf, jax.Array) for leaf in leaves]
    shapes = [(x.shape, x.dtype) for x, traced in zip(leaves, is_traced, strict=True) if traced]

    def rebuild(*inputs):
        given = iter(inputs)
        return tree.unflatten(
            next(given) if traced else leaf for leaf, traced in zip(leaves, is_traced, strict=True)
        )

    assert kernels(compiled(chip, mask=rebuild, inputs=shapes)) == 2


@pytest.mark.parametrize("k", [4, 1])
def test_stays_sharded_over_chips(k):
    program = compiled("v5e", mask=mask.causal(), k=k, mesh=(1, 4))
    text = program.as_text()
    assert kernels(program) == 2
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    assert ("all-reduce" in text) == (k == 1)


def test_inside_shard_map_over_some_axes():
    """Axes that are left to the partitioner matter even if they are of size one."""
    mesh = Mesh(
        np.array(devices("v5e")[:4]).reshape(1, 4),
        ("data", "context"),
        axis_types=(AxisType.Auto,) * 2,
    )
    specs = P(None, "context")
    run = jax.shard_map(
        functools.partial(attention, mask=mask.causal(), implementation="pallas_tpu"),
        mesh=mesh.abstract_mesh,
        in_specs=specs,
        out_specs=specs,
        axis_names={"context"},
        check_vma=False,
    )
    sharding = NamedSharding(mesh, specs)
    arrays = [jax.ShapeDtypeStruct((1, 4 * T, 2, 64), jnp.bfloat16, sharding=sharding)] * 3
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(run).trace(*arrays)
        assert kernels(traced.lower(lowering_platforms=("tpu",)).compile()) == 1


def test_is_the_automatic_choice():
    """Also ahead of time, where the default backend is another."""
    device = devices("v5e")[:1]
    mesh = Mesh(np.array(device), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P())
    arrays = [jax.ShapeDtypeStruct((1, T, 2, 64), jnp.bfloat16, sharding=sharding)] * 3
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(functools.partial(attention, mask=mask.causal())).trace(*arrays)
        assert kernels(traced.lower(lowering_platforms=("tpu",)).compile()) == 1
