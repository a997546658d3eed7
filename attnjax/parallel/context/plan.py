# SPDX-License-Identifier: Apache-2.0
"""Which way to divide attention over the ranks of a mesh axis, and why.

| method | keys and values | layout | limits |
|---|---|---|---|
| ulysses | tokens exchanged for heads (DeepSpeed Ulysses, arXiv 2309.14509) | contiguous | heads |
| ring | blocks go round (Ring Attention, arXiv 2310.01889) | zig-zag | |
| all_gather | all to all | zig-zag | memory of all keys |
| usp | ulysses in groups, ring between them (USP, arXiv 2405.07719) | zig-zag | heads |
| double_ring | ulysses in groups, rings of rings (LoongTrain, arXiv 2406.18485) | zig-zag | heads |
| hybrid | short documents on few ranks (Megatron's hybrid parallelism) | packed | static mask |
| balanced | only what is needed, work by area (MagiAttention) | chunks | static mask |
"""

import dataclasses
import math

import numpy as np

from attnjax.ops.mask import Mask, Visibility
from attnjax.parallel.context import layout as layouts
from attnjax.parallel.context import transport as transports
from attnjax.parallel.context.layout import Layout
from attnjax.parallel.context.transport import Transport

METHODS = ("ulysses", "ring", "all_gather", "usp", "double_ring", "hybrid", "balanced", "auto")
"""Names that `method` may have."""

MOST_HEADS_WAYS = 8
"""Ranks that share their heads in `usp` and `double_ring` at most: those of one fast network."""

TOLERATED_IMBALANCE = 1.1
"""Most work of a rank over the mean from which `auto` prefers the balanced layout."""


@dataclasses.dataclass(frozen=True, eq=False)
class ContextPlan:
    """A way to divide attention.

    Attributes:
      method: one of `METHODS` but "auto".
      reason: why, in a sentence.
      layout: of queries, and of keys where there are as many.
      key_layout: of keys.
      heads_ways: neighbouring ranks that share their heads.
      transport: how keys and values travel.
      lengths: t and s.
    """

    method: str
    reason: str
    layout: Layout
    key_layout: Layout
    heads_ways: int
    transport: Transport
    lengths: tuple[int, int]


def plan_context(
    mask: Mask | Visibility | None,
    t: int,
    ranks: int,
    *,
    n: int,
    k: int | None = None,
    s: int | None = None,
    method: str = "auto",
    needs_whole_rows: bool = False,
    heads_ways: int | None = None,
    chunk: int | None = None,
    tokens_per_rank: int = 8192,
    stages: int = 2,
) -> ContextPlan:
    """Choose a method for a mask, a number of ranks and heads, and work out its layout.

    Args:
      mask: who may attend whom; None for everybody.
      t: queries.
      ranks: size of the mesh axis.
      n: query heads.
      k: key/value heads; n if None.
      s: keys; t if None.
      method: one of `METHODS`; "auto" chooses.
      needs_whole_rows: whether a rank must see all keys at once (normalizers without a
        log-sum-exp).
      heads_ways: ranks that share their heads in "usp" and "double_ring"; at most 8 if None.
      chunk: tokens of a chunk of "balanced"; chosen from t if None.
      tokens_per_rank: what "hybrid" gives one rank of a document.
      stages: of "balanced" and "hybrid", each on its way while the one before is worked on.

    Returns:
      The plan.

    Raises:
      ValueError: the method is unknown or cannot serve these sizes; the message says why and what
        can.
    """
    s, k = s or t, k or n
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose from {list(METHODS)}")
    visibility = Visibility() if mask is None else mask
    if isinstance(visibility, Mask):
        visibility = visibility.visibility(t, s)
    reason = "it was asked for"
    if method == "auto":
        method, reason = _choose(visibility, (t, s), ranks, n, k, needs_whole_rows)
    if needs_whole_rows and method not in ("ulysses", "all_gather"):
        raise ValueError(
            f"method {method!r} merges softmax by its log-sum-exp, which this normalizer has not; "
            "choose 'all_gather' or 'ulysses'"
        )
    if method in ("hybrid", "balanced"):
        if t != s:
            raise ValueError(f"method {method!r} needs as many queries as keys, not {t} and {s}")
        if not visibility.is_static:
            raise ValueError(
                f"method {method!r} needs a mask that is known while tracing; choose 'ring', 'usp' "
                "or 'ulysses' for ids or boundaries that are known at run time only"
            )
    if method == "balanced":
        chunk = chunk or choose_chunk(t, ranks)
        layout = layouts.balanced(visibility, t, ranks, chunk)
        transport = transports.selected(visibility, layout, stages=stages)
        return ContextPlan(method, reason, layout, layout, 1, transport, (t, s))
    if method == "hybrid":
        lengths = document_lengths(visibility, t)
        layout = layouts.hybrid(lengths, ranks, tokens=tokens_per_rank)
        transport = transports.selected(visibility, layout, stages=stages)
        return ContextPlan(method, reason, layout, layout, 1, transport, (t, s))
    ways = 1
    if method == "ulysses":
        ways = ranks
        if n % ranks:
            raise ValueError(
                f"method 'ulysses' shares {n} heads over {ranks} ranks, which do not divide them; "
                "choose 'usp', 'ring' or 'all_gather'"
            )
    elif method in ("usp", "double_ring"):
        ways = heads_ways or most_heads_ways(n, ranks)
        if ranks % ways or n % ways:
            raise ValueError(f"heads_ways={ways} must divide the {ranks} ranks and the {n} heads")
    around = ranks // ways
    make = layouts.contiguous if method == "ulysses" or t != s else layouts.zigzag
    layout = make(t, around, multiple=ways).split(ways)
    key_layout = layout if t == s else layouts.contiguous(s, around, multiple=ways).split(ways)
    if method == "all_gather":
        transport = transports.Gather()
    elif method == "double_ring":
        transport = transports.double_ring(around, windows_of(around), ways)
    else:
        transport = transports.ring(around, ways)
    return ContextPlan(method, reason, layout, key_layout, ways, transport, (t, s))


def most_heads_ways(n: int, ranks: int) -> int:
    """Return how many neighbouring ranks share n heads: at most `MOST_HEADS_WAYS`."""
    return max(
        u for u in range(1, min(ranks, MOST_HEADS_WAYS) + 1) if ranks % u == 0 and n % u == 0
    )


def windows_of(ranks: int) -> int:
    """Return the windows of a double ring: the largest divisor of its ranks up to their root."""
    return max(w for w in range(1, math.isqrt(ranks) + 1) if ranks % w == 0)


def choose_chunk(t: int, ranks: int) -> int:
    """Return the chunk of the balanced layout: sixteen for each rank, of at least 128 tokens.

    Short sequences have smaller ones, so that every rank still gets two.
    """
    size = math.ceil(t / (16 * ranks))
    return max(1, min(max(128, size), math.ceil(t / (2 * ranks))))


def document_lengths(visibility: Visibility, t: int) -> list[int]:
    """Return the lengths of stretches that do not see each other.

    Args:
      visibility: static; where intervals do not say it all, the whole is one stretch.
      t: tokens.
    """
    if visibility.query_ids is not None or visibility.rest is not None:
        return [t]
    whole = visibility.with_intervals(t, t)
    lower, upper = whole.lower, whole.upper
    is_some = lower < upper
    own = np.arange(t)
    first = np.where(is_some, lower, own).min(axis=(0, 1, 2))
    last = np.where(is_some, upper - 1, own).max(axis=(0, 1, 2))
    # A cut before token x is a boundary if nothing on either side reaches across.
    first = np.minimum.accumulate(np.minimum(first, own)[::-1])[::-1]
    reached = np.maximum.accumulate(np.maximum(last, own))
    cuts = np.flatnonzero((reached[:-1] < own[1:]) & (first[1:] >= own[1:])) + 1
    return np.diff([0, *cuts, t]).tolist()


def _choose(visibility, lengths, ranks, n, k, needs_whole_rows):
    t, s = lengths
    if needs_whole_rows:
        if n % ranks == 0:
            return "ulysses", "the normalizer needs whole rows of scores and the ranks divide heads"
        return "all_gather", "the normalizer needs whole rows of scores"
    shares = n % ranks == 0 and k % ranks == 0
    if shares and n + k <= k * ranks:
        return "ulysses", (
            f"{ranks} ranks divide {n} and {k} heads: equal work under any mask, and {n + k} heads "
            f"of 1/{ranks} travel instead of {k} whole ones"
        )
    if t == s and visibility.is_static and not visibility.is_full:
        around = layouts.zigzag(t, ranks)
        work = around.areas(visibility)
        imbalance = work.max() / work.mean() if work.any() else 1.0
        chunk = choose_chunk(t, ranks)
        better = layouts.balanced(visibility, t, ranks, chunk).areas(visibility)
        if imbalance > TOLERATED_IMBALANCE and better.max() < work.max():
            return "balanced", (
                f"in zig-zag a rank has {imbalance:.2f} times the mean work, in chunks of {chunk} "
                f"{better.max() / better.mean():.2f} times"
            )
    ways = most_heads_ways(n, ranks)
    if ways > 1 and n + k < 2 * k * ways:
        return "usp", f"{ways} ranks share {n} heads, and {ranks // ways} such groups form a ring"
    return "ring", f"{ranks} ranks do not share {n} heads and {k} of keys well"
