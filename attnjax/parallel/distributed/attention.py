# SPDX-License-Identifier: Apache-2.0
"""Exact attention divided over devices by heads, by queries and by keys at once.

    heads     nothing is communicated
    queries   keys and values are gathered, or passed round a ring
    keys      out_i, lse_i of the keys of each device;  m = pmax lse_i,  w_i = exp(lse_i - m)
              out = psum(w_i out_i) / psum(w_i),        lse = m + log psum(w_i)

Every device runs the core on its part, which never holds the scores whole; gradients go back
through the same split (those of a ring keep the share of every step, as much as a gather). Queries
are cut into neighbouring parts, so a causal mask leaves the devices with different work.

    >>> import functools, jax, jax.numpy as jnp
    >>> from attnjax.ops import attention, mask
    >>> from attnjax.parallel import distributed_attention
    >>> random = lambda seed: jax.random.normal(jax.random.key(seed), (1, 64, 8, 8))
    >>> q, k, v = random(0), random(1), random(2)
    >>> run = lambda attend: jax.jit(functools.partial(attend, mask=mask.causal()))(q, k, v)
    >>> bool(jnp.allclose(run(distributed_attention), run(attention), atol=1e-5))
    True
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from attnjax.ops import attention
from attnjax.ops.attention import (
    IMPLEMENTATIONS,
    AttentionOutput,
    check_arrays,
    check_mask,
    check_normalizer,
    check_number,
    check_softcap,
)
from attnjax.ops.mask import Mask
from attnjax.ops.mask.algebra import Lowered
from attnjax.ops.merge import merge_partials, merge_shards
from attnjax.ops.normalizer import SoftmaxFamily
from attnjax.ops.partition import vary_alike
from attnjax.parallel.distributed.devices import (
    EXAMPLES,
    HEADS,
    KEYS,
    QUERIES,
    distributed_mesh,
    find_mesh,
)
from attnjax.parallel.distributed.mask import divide_visibility
from attnjax.parallel.distributed.plan import DistributedPlan, resolve_plan
from attnjax.typing import Array


def distributed_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    plan: DistributedPlan | str | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: str | SoftmaxFamily = "softmax",
    implementation: str | None = None,
    return_lse: bool = False,
    memory_limit: float | None = None,
) -> Array | AttentionOutput:
    """Attend as `ops.attention` does, on all devices of a mesh.

    Call it inside `jax.jit`. Queries and keys that the plan does not divide are padded with tokens
    that see and show nothing; examples and heads must divide. In low precision the outputs of parts
    are rounded before they are merged.

    Args:
      query: `[b,t,n,h]` floating, in the order of the sequence.
      key: `[b,s,k,h]`, dtype of the query; `k` divides `n`.
      value: `[b,s,k,hv]`, dtype of the query.
      mask: as in `attention`. One that differs between heads in other ways than by its arrays can
        only serve plans that leave heads whole.
      mesh: its devices are used in their order, whatever its axes are; an abstract one serves to
        lower ahead of time. None: all devices, or as many as an abstract ambient mesh describes.
      plan: a split, one of `PLANS`, or None for the planner's choice.
      scale, softcap: as in `attention`.
      normalizer: softmax or a relative of it; its extra term is added once, after merging.
      implementation: of the core, on every device.
      return_lse: also return the log-sum-exp.
      memory_limit: bytes per device that the planner may spend, forward.

    Returns:
      `out [b,t,n,hv]` in the dtype of the query, or an `AttentionOutput` with `lse [b,n,t]`.

    Raises:
      ValueError: an argument cannot mean anything, the plan does not fit, or the mask cannot be
        divided by it.
      NotImplementedError: the normalizer has no log-sum-exp.
    """
    query, key, value = check_arrays(query, key, value)
    b, t, n, h = query.shape
    s, k, hv = key.shape[1:3] + value.shape[3:]
    normalizer = check_normalizer(normalizer)
    if not isinstance(normalizer, SoftmaxFamily):
        raise NotImplementedError(
            f"distributed_attention: {type(normalizer).__name__} has no log-sum-exp to merge by"
        )
    normalizer.check(n, h, hv)
    mesh = find_mesh(mesh)
    split = Split.make(
        (b, n, k, t, s, h, hv), query.dtype.itemsize, mesh, plan, mask,
        scale=scale, softcap=softcap, implementation=implementation, memory_limit=memory_limit,
    )  # fmt: skip
    query_spec, key_spec = split.query_spec, split.key_spec
    program = split.shard_map(
        split.attend,
        (query_spec, key_spec, key_spec),
        (query_spec, P(EXAMPLES, HEADS, QUERIES)),
    )
    to_t, to_s = split.padded
    out, lse = program(pad_tokens(query, to_t), pad_tokens(key, to_s), pad_tokens(value, to_s))
    out, lse = out[:, :t], lse[..., :t]
    if type(normalizer) is not SoftmaxFamily:
        finished = normalizer.finish(query, lse, split.scale, split.softcap)
        out, lse = finished.output(out), finished.lse
    out = out.astype(query.dtype)
    return AttentionOutput(out=out, lse=lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class Split:
    """One call's division over devices: what the program of every device needs to know.

    Attributes:
      plan: checked.
      mesh: with the axes `DISTRIBUTED_AXES`.
      heads: query and key/value heads of all devices, `(n, k)`.
      padded: queries and keys of all devices, padded to equal parts.
      mask: arrays, their partition, and the function that makes a visibility of them; see
        `divide_visibility`. None: all keys are visible.
      scale, softcap, implementation: as in `attention`.
    """

    plan: DistributedPlan
    mesh: Any
    heads: tuple[int, int]
    padded: tuple[int, int]
    mask: tuple[Any, Any, Any] | None
    scale: float
    softcap: float | None
    implementation: str | None

    @classmethod
    def make(
        cls, sizes, itemsize, mesh, plan, mask, *, scale, softcap, implementation, memory_limit
    ) -> "Split":
        """Check the arguments of a call for sizes `(b, n, k, t, s, h, hv)`.

        Raises:
          ValueError: see `distributed_attention`.
        """
        b, n, k, t, s, h, _ = sizes
        if implementation is not None and implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation {implementation!r} is unknown; choose from {list(IMPLEMENTATIONS)}"
            )
        plan = resolve_plan(plan, sizes, mesh.size, itemsize, memory_limit)
        to_t, to_s = (
            math.ceil(size / ways) * ways
            for size, ways in ((t, plan.queries), (s, plan.queries * plan.keys))
        )
        visibility = check_mask(mask, b, n, t, s)
        divided = None
        if not visibility.is_full or (to_t, to_s) != (t, s):
            divided = divide_visibility(visibility.pad(t, s, to_t, to_s), plan.shape[:2])
        return cls(
            plan=plan,
            mesh=distributed_mesh(plan, mesh),
            heads=(n, k),
            padded=(to_t, to_s),
            mask=divided,
            scale=h**-0.5 if scale is None else check_number("scale", scale),
            softcap=check_softcap(softcap),
            implementation=implementation,
        )

    @property
    def shares_heads(self) -> bool:
        """Whether several devices use the same key/value head."""
        return self.heads[1] % self.plan.shape[1] > 0

    @property
    def query_spec(self) -> P:
        """Partition of `[b,t,n,h]`."""
        return P(EXAMPLES, QUERIES, HEADS)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the keys are divided; those of size one must not be named."""
        sizes = {KEYS: self.plan.keys, QUERIES: self.plan.queries}
        return tuple(name for name, size in sizes.items() if size > 1)

    @property
    def key_spec(self) -> P:
        """Partition of `[b,s,k,h]`."""
        return P(EXAMPLES, self.token_axes or None, None if self.shares_heads else HEADS)

    def shard_map(self, function, in_specs, out_specs):
        """Return `function(mask, *inputs)` as a function of the whole inputs on all devices."""
        arrays, specs = ((), ()) if self.mask is None else (self.mask[0], self.mask[1])
        abstract = self.mesh if isinstance(self.mesh, AbstractMesh) else self.mesh.abstract_mesh

        def program(*inputs):
            # The mesh of the caller has other axes.
            with jax.sharding.use_abstract_mesh(abstract):
                mapped = jax.shard_map(
                    function,
                    mesh=self.mesh,
                    in_specs=(tuple(specs), *in_specs),
                    out_specs=out_specs,
                )
                return mapped(tuple(arrays), *inputs)

        return program

    def attend(self, mask_arrays, query, key, value):
        """Run on one device: its queries, its share of keys and values.

        Args:
          mask_arrays: this device's part of the mask's arrays.
          query: `[b,t,n,h]`.
          key, value: `[b,s,k,h]`, `[b,s,k,hv]`.

        Returns:
          `out [b,t,n,hv]` and `lse [b,n,t]` over all keys, in float32 or wider.
        """
        plan = self.plan
        if self.shares_heads:
            key, value = (self._own_head(x, query.shape[2]) for x in (key, value))
        share = key.shape[1]
        first = jax.lax.axis_index(KEYS) * share * plan.queries if plan.keys > 1 else 0
        if plan.queries == 1:
            out, lse = self._attend_block(mask_arrays, query, key, value, first)
        elif plan.exchange == "gather":
            key, value = (jax.lax.all_gather(x, QUERIES, axis=1, tiled=True) for x in (key, value))
            out, lse = self._attend_block(mask_arrays, query, key, value, first)
        else:
            out, lse = self._attend_ring(mask_arrays, query, key, value, first)
        return merge_shards(out, lse, KEYS) if plan.keys > 1 else (out, lse)

    def _attend_ring(self, mask_arrays, query, key, value, first):
        """Pass the shares of keys and values round the devices that split the queries."""
        ways, share = self.plan.queries, key.shape[1]
        here = jax.lax.axis_index(QUERIES)
        neighbours = [(i, (i + 1) % ways) for i in range(ways)]

        def attend(pair, i):
            start = first + (here - i) % ways * share
            return self._attend_block(mask_arrays, query, *pair, start)

        def step(state, i):
            pair, merged = state
            pair = jax.lax.ppermute(pair, QUERIES, neighbours)
            return (pair, merge_partials([merged, attend(pair, i)])), None

        state = (key, value), attend((key, value), 0)
        _, state = vary_alike(state)
        (_, merged), _ = jax.lax.scan(step, state, jnp.arange(1, ways))
        return merged

    def _attend_block(self, mask_arrays, query, key, value, key_start):
        """Attend the queries of this device to some neighbouring keys."""
        mask, queries, keys = None, query.shape[1], key.shape[1]
        if self.mask is not None:
            start = jax.lax.axis_index(QUERIES) * queries if self.plan.queries > 1 else 0
            whole = self.mask[2](list(mask_arrays))
            mask = Lowered(whole.window(start, queries, key_start, keys, *self.padded))
        found = attention(
            query, key, value, mask=mask, scale=self.scale, softcap=self.softcap,
            implementation=self.implementation, return_lse=True,
        )  # fmt: skip
        return found.out.astype(found.lse.dtype), found.lse

    def _own_head(self, x, held):
        """Leave the one key/value head that the query heads of this device use."""
        n, k = self.heads
        head = jax.lax.axis_index(HEADS) * held // (n // k)
        return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)


def pad_tokens(x: Array, size: int) -> Array:
    """Extend axis 1 with zeros."""
    if x.shape[1] == size:
        return x
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
