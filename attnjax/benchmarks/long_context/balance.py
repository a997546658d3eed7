# SPDX-License-Identifier: Apache-2.0
"""How evenly a placement of tokens spreads the work, counted without running or densifying.

A placement is a table of positions `[ranks, tokens of a rank]`: the global positions that each rank
holds, as queries and as keys; entries of t or more are padding. The work of a rank is the visible
elements of its queries (area), its traffic the keys that they see and that other ranks hold.
"""

import dataclasses

import numpy as np

from attnjax.ops.mask import Mask
from attnjax.parallel.context import layout


@dataclasses.dataclass(frozen=True)
class Spread:
    """How evenly amounts are spread over ranks.

    Attributes:
      max_over_mean: largest over mean; 1 is even, the number of ranks all on one.
      max_over_total: largest over the sum.
      entropy: -sum p log2 p / log2 ranks of the shares p; 1 is even.
      gini: impurity 1 - sum p^2; 1 - 1 / ranks is even.
    """

    max_over_mean: float
    max_over_total: float
    entropy: float
    gini: float


def spread(amounts: np.ndarray) -> Spread:
    """Describe amounts `[ranks]`, not negative; nothing at all counts as even.

    Raises:
      ValueError: amounts are negative or of another rank.
    """
    amounts = np.asarray(amounts, np.float64)
    if amounts.ndim != 1 or not len(amounts) or (amounts < 0).any():
        raise ValueError(f"amounts [ranks] must not be negative, got {amounts}")
    total, ranks = amounts.sum(), len(amounts)
    shares = amounts / total if total else np.full(ranks, 1 / ranks)
    positive = shares[shares > 0]
    entropy = -(positive * np.log2(positive)).sum() / np.log2(ranks) if ranks > 1 else 1.0
    return Spread(
        max_over_mean=float(shares.max() * ranks),
        max_over_total=float(shares.max()),
        entropy=float(entropy),
        gini=float(1 - (shares**2).sum()),
    )


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Seconds of a pass from areas and remote keys; defaults are the paper's for one H100.

    Attributes:
      heads: query heads.
      kv_heads: key/value heads.
      width: of a head.
      peak: operations per second of a device.
      forward_use, backward_use: fraction of the peak that kernels reach.
      bandwidth: bytes per second between devices.
      bandwidth_use: fraction of it that is reached.
      backward_flops: operations of the backward pass as a multiple of the forward pass's.
      backward_traffic: its bytes, likewise.
      itemsize: bytes of one number of keys and values.
    """

    heads: int = 48
    kv_heads: int = 8
    width: int = 128
    peak: float = 989e12
    forward_use: float = 0.68
    backward_use: float = 0.45
    bandwidth: float = 50 * 2.0**30
    bandwidth_use: float = 0.55
    backward_flops: float = 2.5
    backward_traffic: float = 2.0
    itemsize: int = 2

    def seconds(self, areas: np.ndarray, remote: np.ndarray) -> tuple[float, float]:
        """Return forward and backward seconds: of the slowest rank, what takes longer of both.

        Args:
          areas: visible elements `[ranks]`.
          remote: keys fetched `[ranks]`; a key comes with its value.
        """
        compute = 4.0 * np.asarray(areas, np.float64) * self.heads * self.width / self.peak
        bytes_moved = 2.0 * self.itemsize * np.asarray(remote, np.float64)
        traffic = bytes_moved * self.kv_heads * self.width / (self.bandwidth * self.bandwidth_use)
        forward = np.maximum(compute / self.forward_use, traffic).max()
        backward = np.maximum(
            self.backward_flops * compute / self.backward_use, self.backward_traffic * traffic
        ).max()
        return float(forward), float(backward)


@dataclasses.dataclass(frozen=True)
class Balance:
    """How a placement serves a mask.

    Attributes:
      area: spread of the areas.
      remote: spread of the remote keys.
      remote_fraction: most remote keys of a rank over (N - 1) / N t, all there are.
      forward_seconds, backward_seconds: by a `CostModel`.
    """

    area: Spread
    remote: Spread
    remote_fraction: float
    forward_seconds: float
    backward_seconds: float


def balance(mask: Mask, t: int, positions: np.ndarray, cost: CostModel | None = None) -> Balance:
    """Measure a placement.

    Args:
      mask: known while tracing; t queries and as many keys.
      t: tokens.
      positions: integers `[ranks, tokens of a rank]`, every position below t exactly once.
      cost: defaults to `CostModel()`.

    Returns:
      Its balance; areas are means over heads where heads differ, and a key is fetched when any
      head needs it.

    Raises:
      ValueError: positions do not hold every token exactly once, or the mask is traced.
    """
    areas, remote = rank_areas(mask, t, positions), remote_tokens(mask, t, positions)
    forward, backward = (cost or CostModel()).seconds(areas, remote)
    ranks = len(positions)
    return Balance(
        area=spread(areas),
        remote=spread(remote),
        remote_fraction=float(remote.max() / (t * (ranks - 1) / ranks)) if ranks > 1 else 0.0,
        forward_seconds=forward,
        backward_seconds=backward,
    )


def rank_areas(mask: Mask, t: int, positions: np.ndarray) -> np.ndarray:
    """Return the visible elements of each rank's queries, float64 `[ranks]`, see `balance`."""
    return layout.rank_areas(_static(mask, t), t, _checked(positions, t))


def remote_tokens(mask: Mask, t: int, positions: np.ndarray) -> np.ndarray:
    """Return how many keys of other ranks each rank's queries see, int64 `[ranks]`."""
    visibility = _static(mask, t)
    found = []
    for held in _checked(positions, t):
        held = held[held < t]
        needed = layout.seen_keys(visibility, t, held)
        needed[held] = False
        found.append(int(needed.sum()))
    return np.array(found)


def _static(mask, t):
    visibility = mask.visibility(t, t)
    if not visibility.is_static:
        raise ValueError("balance needs a mask that is known while tracing")
    return visibility


def _checked(positions, t):
    positions = np.asarray(positions)
    if positions.ndim != 2 or not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(
            f"positions must be integers [ranks, tokens], got {positions.dtype} {positions.shape}"
        )
    inside = positions[(positions >= 0) & (positions < t)]
    held = np.bincount(inside, minlength=t)
    if positions.min() < 0 or (held != 1).any():
        raise ValueError(f"positions must hold each of the {t} tokens exactly once")
    return np.minimum(positions, t)


__all__ = [
    "Balance",
    "CostModel",
    "Spread",
    "balance",
    "rank_areas",
    "remote_tokens",
    "spread",
]
