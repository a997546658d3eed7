# SPDX-License-Identifier: Apache-2.0
"""Context parallelism compiled for TPUs by libtpu: kernels inside, collectives beside them."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import mask
from attnjax.parallel import context_attention, plan_context
from attnjax.parallel.context import METHODS

pytestmark = pytest.mark.slow

T, N, K, H, RANKS = 4096, 8, 4, 128, 4


def compiled(method, visible, *, backward=False):
    """Compile the forward pass, or both, for four chips that share a sequence."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = Mesh(
        np.array(chips).reshape(1, RANKS), ("data", "context"), axis_types=(AxisType.Auto,) * 2
    )
    place = NamedSharding(mesh, P("data", "context"))
    plan = plan_context(visible, T, RANKS, n=N, k=K, method=method)
    total = RANKS * plan.layout.size
    shape = lambda heads: jax.ShapeDtypeStruct((1, total, heads, H), jnp.bfloat16, sharding=place)

    def attend(query, key, value):
        return context_attention(
            query, key, value, mask=visible, plan=plan, dispatched=True,
            implementation="pallas_tpu",
        )  # fmt: skip

    def both(*arrays):
        out, pull = jax.vjp(attend, *arrays)
        return pull(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both if backward else attend).trace(shape(N), shape(K), shape(K))
        lowered = traced.lower(lowering_platforms=("tpu",))
        return lowered.as_text(), lowered.compile()


def test_keys_travel_while_something_is_computed():
    text = compiled("ring", mask.causal())[1].as_text()
    assert "is_scheduled=true" in text
    lines = text[text.index("ENTRY ") :].splitlines()
    find = lambda what: [i for i, line in enumerate(lines) if re.search(rf" {what}\(", line)]
    starts, ends = find("collective-permute-start"), find("collective-permute-done")
    works = sorted(find("fusion") + find("custom-call"))
    assert len(starts) == len(ends) == RANKS - 1
    for start, end in zip(starts, ends, strict=True):
        assert any(start < work < end for work in works)
    # Which work is the compiler's choice: at least once a kernel.
    kernels = [i for i, line in enumerate(lines) if re.match(r"\s+%attention_forward", line)]
    assert len(kernels) == RANKS
    assert any(a < i < z for i in kernels for a, z in zip(starts, ends, strict=True))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "auto"])
@pytest.mark.parametrize("name", ["causal", "documents"])
def test_compiles_with_gradients(method, name):
    visible = mask.causal() if name == "causal" else mask.documents((1000, 96, 3000), causal=True)
    text, program = compiled(method, visible, backward=True)
    assert text.count("tpu_custom_call") >= 2
    # Not by the text of the program, which this compiler cannot print where it moves gathers aside.
    assert program.memory_analysis().temp_size_in_bytes > 0
