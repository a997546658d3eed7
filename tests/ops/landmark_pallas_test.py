# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of landmark attention, emulated on CPU, against all weights in one matrix."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnjax.ops import landmark_attention, mask
from attnjax.ops.pallas_tpu_tile import interpreted

OUTPUT, GRADIENT = 1e-5, 1e-4


def arrays(t, s, n=4, k=2, h=8, hv=6, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return make(2, t, n, h), make(2, s, k, h), make(2, s, k, hv)


def kernels(*inputs, **options):
    with interpreted():
        return landmark_attention(*inputs, implementation="pallas_tpu", **options)


def with_gradients(form, inputs):
    out, pull = jax.vjp(lambda *a: form(*a).astype(jnp.float32), *inputs)
    dout = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    return out, *pull(jnp.asarray(dout))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("t", "s", "block", "n", "k"),
    [
        pytest.param(17, 17, 5, 4, 2, id="uneven"),
        pytest.param(140, 160, 20, 2, 1, id="keys_longer"),
        pytest.param(8, 20, 4, 2, 2, id="few_queries", marks=SLOW),
        pytest.param(5, 5, 2, 2, 2, id="smallest", marks=SLOW),
    ],
)
def test_equals_dense(t, s, block, n, k):
    inputs = arrays(t, s, n, k)
    is_landmark = (np.arange(s) % block == block - 1)[None]
    expected = with_gradients(lambda *a: landmark_attention(*a, is_landmark=is_landmark), inputs)
    found = with_gradients(lambda *a: kernels(*a, block=block), inputs)
    np.testing.assert_allclose(found[0], expected[0], atol=OUTPUT)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=GRADIENT)


def test_lse_and_its_gradient():
    inputs = arrays(17, 17)
    for_lse = lambda form: lambda *a: form(*a, block=5, return_lse=True)[1]
    expected = with_gradients(for_lse(landmark_attention), inputs)
    found = with_gradients(for_lse(kernels), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=GRADIENT)


def test_bfloat16():
    inputs = arrays(17, 17, dtype=jnp.bfloat16)
    found = with_gradients(lambda *a: kernels(*a, block=5), inputs)
    blocked = lambda *a: landmark_attention(*a, block=5, implementation="blocked")
    expected = with_gradients(blocked, [x.astype(jnp.float32) for x in inputs])
    assert kernels(*inputs, block=5).dtype == jnp.bfloat16
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.1)


@pytest.mark.parametrize(
    ("t", "options", "message"),
    [
        (16, {}, "no multiple of block=5"),
        (17, {"mask": mask.padding(jnp.array([17, 9]))}, "mask is not served"),
        (17, {"softcap": 2.0}, "softcap is not served"),
        (17, {"group_dropout_rate": 0.5, "group_dropout_key": jax.random.key(0)}, "group_dropout"),
    ],
)
def test_refuses_or_falls_back(t, options, message):
    inputs = arrays(t, 17)
    with pytest.raises(ValueError, match=message):
        kernels(*inputs, block=5, **options)
    with interpreted():
        found = landmark_attention(*inputs, block=5, **options)
    expected = landmark_attention(*inputs, block=5, implementation="blocked", **options)
    np.testing.assert_array_equal(found, expected)


def test_names_what_does_not_fit():
    inputs = arrays(17, 17)
    with pytest.raises(ValueError, match="choose from"):
        landmark_attention(*inputs, block=5, implementation="fast")
    with pytest.raises(ValueError, match="needs block"):
        landmark_attention(*inputs, is_landmark=np.zeros((1, 17), bool), implementation="blocked")
    with pytest.raises(ValueError, match="not a TPU"):
        landmark_attention(*inputs, block=5, implementation="pallas_tpu")
    with interpreted():
        run = jax.jit(lambda scale: landmark_attention(*inputs, block=5, scale=scale))
        assert np.isfinite(run(0.5)).all(), "a traced scale is for the blocked form"


def tpu_mesh(chips):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    return Mesh(np.array(devices[:chips]), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("t", "s", "k", "h", "dtype", "chips"),
    [
        (512, 512, 8, 128, jnp.bfloat16, 1),
        (300, 504, 4, 64, jnp.bfloat16, 1),
        (512, 512, 8, 128, jnp.float32, 1),
        (512, 512, 8, 128, jnp.bfloat16, 4),
    ],
    ids=["plain", "shared_keys", "float32", "inside_shard_map"],
)
def test_compiles_for_tpu(t, s, k, h, dtype, chips):
    """To machine code by libtpu: one kernel forward, two backward, and the automatic choice."""
    mesh = tpu_mesh(chips)
    spec = PartitionSpec("data") if chips > 1 else PartitionSpec()
    inputs = [
        jax.ShapeDtypeStruct((4, length, heads, h), dtype, sharding=NamedSharding(mesh, spec))
        for length, heads in ((t, 8), (s, k), (s, k))
    ]
    attend = lambda *a: landmark_attention(*a, block=51)
    if chips > 1:
        attend = jax.shard_map(attend, mesh=mesh.abstract_mesh, in_specs=spec, out_specs=spec)
    loss = lambda *a: attend(*a).astype(jnp.float32).sum()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*inputs)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
