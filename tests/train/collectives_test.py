# SPDX-License-Identifier: Apache-2.0
"""The collectives of compiled programs whose traffic is known by construction."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.train import collectives

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(f, mesh, spec, shape):
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(f).lower(argument).compile().as_text()


def manual(body, mesh, in_spec, out_spec):
    return jax.shard_map(body, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)


def psum(x):
    return jax.lax.psum(x, "columns")


def gather(x):
    return jax.lax.all_gather(x, "columns", tiled=True)


def scatter(x):
    return jax.lax.psum_scatter(x, "columns", tiled=True)


def exchange(x):
    return jax.lax.all_to_all(x, "columns", 0, 1, tiled=True)


def rotate(x):
    return jax.lax.ppermute(x, "columns", [(i, (i + 1) % 4) for i in range(4)])


@pytest.mark.parametrize(
    ("body", "kind", "elements", "group"),
    [
        (psum, "all-reduce", 16 * 8, 4),
        (gather, "all-gather", 4 * 16 * 8, 4),
        (scatter, "reduce-scatter", 16 * 8, 4),
        (exchange, "all-to-all", 16 * 8, 4),
        (rotate, "collective-permute", 16 * 8, 2),
    ],
)
def test_kind_bytes_and_group_of_one_collective(mesh, body, kind, elements, group):
    f = manual(body, mesh, P("columns"), P("columns"))
    found = collectives.read(compiled_text(f, mesh, P("columns"), (64, 8)))
    assert [item.kind for item in found] == [kind]
    assert found[0].bytes == elements * FLOAT
    assert found[0].group == group
    assert found[0].executions == 1


def test_loops_multiply_executions(mesh):
    def body(x):
        step = lambda carry, _: (jax.lax.psum(jnp.sin(carry), "columns"), None)
        inner = lambda carry, _: (jax.lax.scan(step, carry, None, length=3)[0] * 2, None)
        return jax.lax.scan(inner, x, None, length=5)[0]

    f = manual(body, mesh, P("columns"), P("columns"))
    found = collectives.read(compiled_text(f, mesh, P("columns"), (64, 8)))
    assert sum(item.executions for item in found) == 15
    assert collectives.total(found)["all-reduce"]["bytes"] == 15 * 16 * 8 * FLOAT


def test_data_parallel_gradient_is_reduced_once(mesh):
    shape = (24, 40)

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)

    place = functools.partial(NamedSharding, mesh)
    w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(P()))
    x = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=place(P(("rows", "columns"))))
    text = jax.jit(gradient, out_shardings=place(P())).lower(w, x).compile().as_text()
    sums = collectives.total(collectives.read(text))
    assert sums == {"all-reduce": {"count": 1, "executions": 1, "bytes": 24 * 40 * FLOAT}}


def test_single_device_program_has_none():
    text = jax.jit(jnp.tanh).lower(jnp.ones((4, 4))).compile().as_text()
    assert collectives.total(collectives.read(text)) == {}


TPU_TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[1024,1024]) -> f32[256,1024] {
  %input = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[1024,1024]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %slice = f32[256,1024]{1,0:T(8,128)} dynamic-slice(%all-reduce.5, %i)
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %start = ((bf16[1,8]{1,0}), bf16[1,32]{1,0:T(8,128)(2,1)}) all-gather-start(%x), replica_groups=mesh['a'=4,'b'=4] {'b'}, dimensions={1}
  %done = bf16[1,32]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %scattered = f32[256,1024]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], f32[8,128]) tuple(%i, %z)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %w = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  ROOT %both = (f32[8,128], bf16[64]) all-reduce(%a, %b), replica_groups=[4,4]<=[16], to_apply=%sum
}
"""  # noqa: E501


def test_text_as_the_tpu_compiler_prints_it():
    found = {item.kind: item for item in collectives.read(TPU_TEXT)}
    assert found["all-gather"] == collectives.Collective("all-gather", 64, 4, 6)
    assert found["reduce-scatter"] == collectives.Collective("reduce-scatter", 2**22, 4, 6)
    assert found["all-reduce"] == collectives.Collective("all-reduce", 8 * 128 * 4 + 128, 4, 1)
