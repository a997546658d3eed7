# SPDX-License-Identifier: Apache-2.0
"""The decoder compiled for a TPU by libtpu: where the backward pass finds the layers' inputs."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.models.load import abstract_params, build

pytestmark = pytest.mark.slow

DEPTH, B, T, D = 16, 2, 512, 256


def test_offloaded_inputs_are_in_the_memory_of_the_host_alone():
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(chips[:1]), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    model = build(
        "decoder", width=D, depth=DEPTH, heads=(2, 2), hidden=192, length=T, dtype="bfloat16",
        remat="offload",
    )  # fmt: skip
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    params = jax.tree.map(place, abstract_params(model))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=whole)

    def loss(params, tokens):
        return jnp.sum(model.apply({"params": params}, tokens, method="encode")[0], dtype="float32")

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(jax.grad(loss)).trace(params, tokens)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    assert program.memory_analysis().host_temp_size_in_bytes == DEPTH * B * T * D * 2
    stacks = re.findall(rf"\w+\[{DEPTH},{B},{T},{D}\]\{{([^}}]*)\}}", program.as_text())
    assert stacks
    # Memory space 5 is the host's.
    assert all(layout.endswith("S(5)") for layout in stacks)
