# SPDX-License-Identifier: Apache-2.0
"""The one place that knows the context-parallel attentions: methods, placements and meshes.

Methods refuse what they cannot do with ValueError; here that becomes NotImplementedError, the
benchmark's word for a cell that is reported and not run. A method that is added to
`attnjax.parallel.context` takes part at once.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.ops.mask import Mask
from attnjax.parallel import context_attention, dispatch, make_mesh
from attnjax.parallel.context import ContextPlan, layout, plan

AXIS = "context"
"""Mesh axis over which tokens are split."""

METHODS = tuple(name for name in plan.METHODS if name != "auto")
"""Context-parallel attentions."""


def degrees(method: str, devices: int, heads: int) -> tuple[int, int]:
    """Return over how many devices heads are exchanged, and over how many keys travel.

    Args:
      method: one of `METHODS`.
      devices: in all; the product of both.
      heads: query heads.
    """
    if method == "ulysses":
        return devices, 1
    if method in ("usp", "double_ring"):
        inner = plan.most_heads_ways(heads, devices)
        return inner, devices // inner
    return 1, devices


def context_mesh(devices: int) -> jax.sharding.Mesh:
    """Return a mesh of the first devices, all along the context axis.

    Raises:
      NotImplementedError: there are fewer.
    """
    found = jax.devices()
    if devices > len(found):
        raise NotImplementedError(f"{devices} devices are needed, and {len(found)} are there")
    return make_mesh({AXIS: devices}, found[:devices])


def token_sharding(devices: int) -> NamedSharding:
    """Return how arrays `[b, t, n, h]` lie: tokens in order, split over the context axis."""
    return NamedSharding(context_mesh(devices), PartitionSpec(None, AXIS))


@dataclasses.dataclass(frozen=True)
class Attend:
    """A method on arrays that lie as its plan has them, as they do between layers of a model.

    Attributes:
      plan: how attention is divided.
      mask: for the sequence in global order.
      mesh: of the devices.
    """

    plan: ContextPlan
    mask: Mask
    mesh: jax.sharding.Mesh

    def place(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Bring arrays `[b, t, n, h]` from global order to where the plan has them."""
        move = jax.jit(lambda x: dispatch(x, self.plan.layout, mesh=self.mesh, axis_name=AXIS))
        return tuple(move(x) for x in arrays)

    def __call__(self, query, key, value, **options):
        """Attend; arrays and results in the plan's order, fillers included."""
        return context_attention(
            query, key, value, mask=self.mask, plan=self.plan, mesh=self.mesh, axis=AXIS,
            dispatched=True, **options,
        )  # fmt: skip


def attend(method: str, mask: Mask, t: int, heads: tuple[int, int], devices: int) -> Attend:
    """Plan a method.

    Args:
      method: one of `METHODS`.
      mask: for t queries and as many keys.
      t: tokens.
      heads: query heads and key/value heads.
      devices: that share the tokens.

    Raises:
      NotImplementedError: there are too few devices, or the method refuses.
    """
    mesh = context_mesh(devices)
    try:
        made = plan.plan_context(mask, t, devices, n=heads[0], k=heads[1], method=method)
    except ValueError as error:
        raise NotImplementedError(f"{method}: {error}") from error
    return Attend(made, mask, mesh)


PLACEMENTS: dict[str, Callable] = {
    "contiguous": lambda layout, drawn, ranks, chunk: layout.contiguous(drawn.total, ranks),
    "zigzag": lambda layout, drawn, ranks, chunk: layout.zigzag(drawn.total, ranks),
    "document_zigzag": lambda layout, drawn, ranks, chunk: layout.document_zigzag(
        drawn.lengths, ranks
    ),
    "hybrid": lambda layout, drawn, ranks, chunk: layout.hybrid(drawn.lengths, ranks),
    "balanced": lambda layout, drawn, ranks, chunk: layout.balanced(
        drawn.mask, drawn.total, ranks, chunk
    ),
}
"""Name -> how a layout for a drawn mask is made by the module of layouts."""


def place(name: str, drawn, ranks: int, chunk: int = 0) -> np.ndarray:
    """Return the positions that ranks hold.

    Args:
      name: key of `PLACEMENTS`.
      drawn: a `patterns.Drawn`.
      ranks: number of ranks.
      chunk: tokens that "balanced" moves together; 0 for what its plans choose.

    Returns:
      int32 `[ranks, tokens of a rank]`; entries of `drawn.total` or more are padding.

    Raises:
      ValueError: the name is unknown or the layout refuses.
    """
    if name not in PLACEMENTS:
        raise ValueError(f"placement {name!r} is unknown; choose from {list(PLACEMENTS)}")
    chunk = chunk or plan.choose_chunk(drawn.total, ranks)
    return np.asarray(PLACEMENTS[name](layout, drawn, ranks, chunk).positions)
