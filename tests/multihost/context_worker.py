# SPDX-License-Identifier: Apache-2.0
"""One of two processes that attend together: python context_worker.py ADDRESS INDEX."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnjax.ops import attention, mask
from attnjax.parallel import context_attention

T, N, K, H = 72, 8, 2, 8


def main(address: str, index: str) -> None:
    """Compare every process's own shards with attention on one device."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    whole = [rng.standard_normal((2, T, heads, H)).astype(np.float32) for heads in (N, K, K)]
    visible = mask.documents((30, 5, 37), causal=True)
    place = NamedSharding(mesh, PartitionSpec(None, "context"))
    divided = [jax.make_array_from_callback(x.shape, place, lambda at, x=x: x[at]) for x in whole]

    def run(attend, arrays):
        def loss(arrays):
            out = attend(*arrays)
            return (out * jnp.cos(out)).sum(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    (_, out), gradients = run(lambda *a: attention(*a, mask=visible), whole)
    for method in ("ring", "ulysses"):
        attend = lambda *a, method=method: context_attention(
            *a, mask=visible, method=method, mesh=mesh
        )
        (_, shared), found = run(attend, divided)
        for got, want in zip((shared, *found), (out, *gradients), strict=True):
            for shard in got.addressable_shards:
                np.testing.assert_allclose(shard.data, np.asarray(want)[shard.index], atol=1e-4)
        print(f"{method}: equal", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
