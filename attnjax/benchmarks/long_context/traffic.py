# SPDX-License-Identifier: Apache-2.0
"""Elements that a device sends in a context-parallel attention, by the paper's formulas.

hq, hkv heads of width d, t tokens on n devices; bytes are 2 each in bfloat16
ulysses     2 (hq + hkv) d t (n - 1) / n^2
ring        2 hkv d t (n - 1) / n          (all_gather alike)
usp         2 (hq + hkv) d t / n (u - 1) / u + 2 (hkv / u) d (t / r) (r - 1)      n = u r
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of one call.

    Attributes:
      heads: query heads.
      kv_heads: key/value heads.
      width: of a head.
      tokens: in all.
      devices: that share them.
    """

    heads: int
    kv_heads: int
    width: int
    tokens: int
    devices: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


def _all_to_all(p, split):
    """Queries, keys, values and outputs, of which a part stays."""
    return 2 * (p.heads + p.kv_heads) * p.width * p.tokens / p.devices * (split - 1) / split


def ulysses_forward(p: Problem) -> float:
    """All-to-all of query, key and value, and back for the output."""
    return _all_to_all(p, p.devices)


def ulysses_backward(p: Problem) -> float:
    """The same again, for gradients."""
    return _all_to_all(p, p.devices)


def ring_forward(p: Problem) -> float:
    """Keys and values travel n - 1 hops; an all-gather sends as much."""
    return 2 * p.kv_heads * p.width * p.tokens * (p.devices - 1) / p.devices


def ring_backward(p: Problem) -> float:
    """Keys and values again n - 1 hops, their gradients n: the last brings them home."""
    hop = 2 * p.kv_heads * p.width * p.tokens / p.devices
    return hop * (p.devices - 1) + hop * (p.devices if p.devices > 1 else 0)


def all_gather_backward(p: Problem) -> float:
    """Reduce-scatter of the gradients of keys and values."""
    return ring_forward(p)


def usp_forward(p: Problem, ulysses: int) -> float:
    """Ulysses over groups of `ulysses` devices, a ring over the groups; DoubleRing alike.

    Raises:
      ValueError: the groups do not divide the devices.
    """
    ring = _rings(p, ulysses)
    hops = 2 * (p.kv_heads / ulysses) * p.width * (p.tokens / ring) * (ring - 1)
    return _all_to_all(p, ulysses) + hops


def usp_backward(p: Problem, ulysses: int) -> float:
    """Both parts backward: all-to-alls again, and the ring with gradients."""
    ring = _rings(p, ulysses)
    hop = 2 * (p.kv_heads / ulysses) * p.width * (p.tokens / ring)
    return _all_to_all(p, ulysses) + hop * (ring - 1) + hop * (ring if ring > 1 else 0)


def fetched_forward(p: Problem, remote: int) -> float:
    """Keys and values of the remote tokens alone, as `balance.remote_tokens` counts them.

    Args:
      p: sizes.
      remote: tokens that a rank fetches.
    """
    return 2 * p.kv_heads * p.width * remote


def _rings(p, ulysses):
    if ulysses < 1 or p.devices % ulysses:
        raise ValueError(f"groups of {ulysses} do not divide {p.devices} devices")
    return p.devices // ulysses
