# SPDX-License-Identifier: Apache-2.0
"""A layer of self-attention whose weights are divided by heads.

    q, k, v = x W_q, x W_k, x W_v     columns of W: the heads of this device
    y = psum_heads(out W_o) + b       rows of W_o: the same heads

Between the two, `distributed_attention` on what each device has. Activations are summed once.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from attnjax.ops.mask import Mask
from attnjax.parallel.distributed.attention import Split, pad_tokens
from attnjax.parallel.distributed.devices import EXAMPLES, HEADS, QUERIES, find_mesh
from attnjax.parallel.distributed.plan import DistributedPlan
from attnjax.typing import Array


def attention_layer(
    params: Mapping[str, Mapping[str, Array]],
    x: Array,
    plan: DistributedPlan | str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    mask: Mask | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    memory_limit: float | None = None,
) -> Array:
    """Apply self-attention with its four projections on all devices of a mesh.

    Softmax only. Parameters of examples split are copies, whose gradients are added.

    Args:
      params: "query", "key", "value" and "out", as `nn.MultiHeadAttention` has them: kernels
        `[d,n,h]`, `[d,k,h]`, `[d,k,hv]` and `[n,hv,d]`, each with an optional bias `[n,h]`,
        `[k,h]`, `[k,hv]` and `[d]`.
      x: `[b,t,d]` floating.
      plan, mesh, memory_limit: as in `distributed_attention`.
      mask, scale, softcap, implementation: as in `attention`.

    Returns:
      `[b,t,d]`.

    Raises:
      ValueError: shapes do not belong together; see also `distributed_attention`.
    """
    sizes = _check(params, x)
    t = x.shape[1]
    split = Split.make(
        sizes, x.dtype.itemsize, find_mesh(mesh), plan, mask,
        scale=scale, softcap=softcap, implementation=implementation, memory_limit=memory_limit,
    )  # fmt: skip
    key_heads = None if split.shares_heads else HEADS
    divided = {"query": HEADS, "key": key_heads, "value": key_heads}
    specs = {
        name: {"kernel": P(None, heads), "bias": P(heads)} for name, heads in divided.items()
    } | {"out": {"kernel": P(HEADS), "bias": P()}}
    specs = {name: {part: specs[name][part] for part in params[name]} for name in specs}

    def run(mask_arrays, params, x_queries, x_keys):
        query, key, value = (
            _project(params[name], tokens)
            for name, tokens in (("query", x_queries), ("key", x_keys), ("value", x_keys))
        )
        out, _ = split.attend(mask_arrays, query, key, value)
        out = jnp.einsum("btnh,nhd->btd", out.astype(x.dtype), params["out"]["kernel"])
        out = jax.lax.psum(out, HEADS)
        return out + params["out"]["bias"] if "bias" in params["out"] else out

    to_t, to_s = split.padded
    program = split.shard_map(
        run,
        (specs, P(EXAMPLES, QUERIES), P(EXAMPLES, split.token_axes or None)),
        P(EXAMPLES, QUERIES),
    )
    params = {name: dict(params[name]) for name in specs}
    return program(params, pad_tokens(x, to_t), pad_tokens(x, to_s))[:, :t]


def _project(params, x_btd):
    projected_btnh = jnp.einsum("btd,dnh->btnh", x_btd, params["kernel"])
    return projected_btnh + params["bias"] if "bias" in params else projected_btnh


def _check(params, x):
    """Return the sizes of the attention, `(b, n, k, t, s, h, hv)`."""
    names = ("query", "key", "value", "out")
    if missing := [name for name in names if "kernel" not in params.get(name, {})]:
        raise ValueError(f"params lack {missing[0]}/kernel; they need kernels of {list(names)}")
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating [b,t,d], got {x.dtype} {x.shape}")
    shapes = {name: params[name]["kernel"].shape for name in names}
    for name, shape in shapes.items():
        if len(shape) != 3:
            raise ValueError(f"{name}/kernel must have rank 3, got shape {shape}")
    (b, t, d), (_, n, h), (_, k, hv) = x.shape, shapes["query"], shapes["value"]
    expected = {"query": (d, n, h), "key": (d, k, h), "value": (d, k, hv), "out": (n, hv, d)}
    biases = {"query": (n, h), "key": (k, h), "value": (k, hv), "out": (d,)}
    for name in names:
        if shapes[name] != expected[name]:
            raise ValueError(f"{name}/kernel has shape {shapes[name]}, expected {expected[name]}")
        if "bias" in params[name] and params[name]["bias"].shape != biases[name]:
            raise ValueError(
                f"{name}/bias has shape {params[name]['bias'].shape}, expected {biases[name]}"
            )
    if n % k:
        raise ValueError(f"{n} query heads are not a multiple of {k} key/value heads")
    return b, n, k, t, t, h, hv
