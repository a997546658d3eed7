# SPDX-License-Identifier: Apache-2.0
"""The one place that knows the context-parallel attentions: methods, placements and meshes.

Methods refuse what they cannot do with ValueError; here that becomes NotImplementedError, the
benchmark's word for a cell that is reported and not run.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attnjax.ops.mask import Mask
from attnjax.parallel import make_mesh

AXIS = "context"
"""Mesh axis over which tokens are split."""

METHODS = ("ulysses", "ring", "all_gather", "usp", "double_ring", "hybrid", "balanced")
"""Context-parallel attentions; the names `context_attention` knows, without "auto"."""

MOST_ULYSSES = 8
"""Devices of the inner axis of the two-dimensional methods: as many as one machine has."""


def degrees(method: str, devices: int) -> tuple[int, int]:
    """Return over how many devices heads are exchanged, and over how many keys travel.

    Args:
      method: one of `METHODS`.
      devices: in all; their product.
    """
    if method == "ulysses":
        return devices, 1
    if method in ("usp", "double_ring"):
        inner = max(u for u in range(1, min(devices, MOST_ULYSSES) + 1) if devices % u == 0)
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


def attend(method: str, mask: Mask, devices: int) -> Callable[..., jax.Array]:
    """Return a function of query, key and value in global order, which gives the output in it.

    Bringing tokens to their ranks and back is part of it.

    Raises:
      NotImplementedError: there are too few devices; from the function, when the method refuses.
    """
    from attnjax.parallel import context_attention

    mesh = context_mesh(devices)

    def function(query, key, value):
        try:
            return context_attention(
                query, key, value, mask=mask, method=method, mesh=mesh, axis=AXIS
            )
        except ValueError as error:
            raise NotImplementedError(f"{method}: {error}") from error

    return function


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
      chunk: tokens that "balanced" moves together; 0 for a sixteenth of a rank's share.

    Returns:
      int32 `[ranks, tokens of a rank]`; entries of `drawn.total` or more are padding.

    Raises:
      ValueError: the name is unknown or the layout refuses.
    """
    from attnjax.parallel.context import layout

    if name not in PLACEMENTS:
        raise ValueError(f"placement {name!r} is unknown; choose from {list(PLACEMENTS)}")
    chunk = chunk or max(1, drawn.total // (16 * ranks))
    return np.asarray(PLACEMENTS[name](layout, drawn, ranks, chunk).positions)
