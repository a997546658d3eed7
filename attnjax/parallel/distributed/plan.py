# SPDX-License-Identifier: Apache-2.0
"""How attention is divided over P devices: heads, then queries, then keys.

    P = heads * queries * keys      heads = ways over examples * ways over heads

Heads (of all examples) are independent: their split moves nothing. A split of the queries brings
keys and values together; a split of the keys merges partial outputs. The planner takes the split
with the least max(compute, communication) that fits the memory, and says why.

The form of the planner and its costs are those of an outline ("A Unified View of Long-Sequence
Models", arXiv 2302.06218, whose abstract alone is known here), not of published code.
"""

import dataclasses
import math

from attnjax.ops.attention import check_number

PLANS = ("auto", "heads", "queries", "keys")
"""Plans by name: the planner's choice, or all devices for one kind of split."""

EXCHANGES = ("gather", "ring")
"""How devices that split the queries see all keys: at once, or one share after another."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device is worth; orders of magnitude are enough to choose a split.

    Attributes:
      flops: operations per second in attention (a multiply-add is two).
      bytes_per_second: what one device receives from the others.
    """

    flops: float = 1e14
    bytes_per_second: float = 1e11


@dataclasses.dataclass(frozen=True)
class DistributedPlan:
    """A split of attention over `heads * queries * keys` devices.

    Attributes:
      heads: ways in which the b * n heads of all examples are split (a).
      queries: ways in which the queries are split (b).
      keys: ways in which the keys are split (c).
      examples: the part of `heads` that splits examples; None: as many as divide.
      exchange: "gather" or "ring", see `EXCHANGES`; only matters when queries are split.
      compute_seconds, communication_seconds: the planner's estimate for one device, forward.
      memory_bytes: the planner's estimate of what one device holds, forward.
      reason: why the planner chose it.
    """

    heads: int = 1
    queries: int = 1
    keys: int = 1
    examples: int | None = None
    exchange: str = "gather"
    compute_seconds: float = dataclasses.field(default=math.nan, compare=False)
    communication_seconds: float = dataclasses.field(default=math.nan, compare=False)
    memory_bytes: int = dataclasses.field(default=0, compare=False)
    reason: str = dataclasses.field(default="", compare=False)

    @property
    def devices(self) -> int:
        """Devices that the plan needs."""
        return self.heads * self.queries * self.keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Ways over examples, heads, queries and keys; `examples` must be known."""
        assert self.examples is not None
        return self.examples, self.heads // self.examples, self.queries, self.keys

    def check(self, b: int, n: int, k: int, t: int, s: int, devices: int) -> "DistributedPlan":
        """Return the plan with `examples` filled in.

        Args:
          b, n, k, t, s: sizes of the attention, see `attnjax.typing`.
          devices: devices there are.

        Raises:
          ValueError: the plan does not use all devices, or something does not divide.
        """
        for name in ("heads", "queries", "keys"):
            if not isinstance(ways := getattr(self, name), int) or ways < 1:
                raise ValueError(f"plan.{name}={ways!r}: must be a whole number of at least 1")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"plan.exchange={self.exchange!r}: choose from {list(EXCHANGES)}")
        if self.devices != devices:
            raise ValueError(
                f"plan heads={self.heads} x queries={self.queries} x keys={self.keys} is for "
                f"{self.devices} devices, but there are {devices}: the product must be {devices}"
            )
        if self.queries > t:
            raise ValueError(f"plan.queries={self.queries}: choose from 1 to the {t} queries")
        if self.queries * self.keys > s:
            raise ValueError(
                f"plan.queries={self.queries} x plan.keys={self.keys} shares of {s} keys: "
                f"choose a product of at most {s}"
            )
        splits = head_splits(self.heads, b, n, k)
        if self.examples is not None:
            splits = [split for split in splits if split[0] == self.examples]
        if not splits:
            valid = [ways for ways in range(1, b * n + 1) if head_splits(ways, b, n, k)]
            asked = "" if self.examples is None else f" with plan.examples={self.examples}"
            raise ValueError(
                f"plan.heads={self.heads}{asked} does not divide {b} examples, {n} query heads and "
                f"{k} key/value heads; heads that can be split in are {valid}"
            )
        return dataclasses.replace(self, examples=splits[0][0])


def head_splits(ways: int, b: int, n: int, k: int) -> list[tuple[int, int]]:
    """List the ways over examples and over heads whose product is given, most examples first.

    Every device has the same number of query heads, and either all key/value heads of these to
    itself or a single one that it shares.
    """
    found = []
    for examples in range(min(ways, b), 0, -1):
        heads = ways // examples
        if ways % examples or b % examples or n % heads:
            continue
        if k % heads == 0 or heads % k == 0:
            found.append((examples, heads))
    return found


def plan_distributed(
    b: int,
    n: int,
    k: int,
    t: int,
    s: int,
    h: int,
    devices: int,
    itemsize: int = 4,
    *,
    hv: int | None = None,
    machine: Machine | None = None,
    memory_limit: float | None = None,
) -> DistributedPlan:
    """Choose a split: least max(compute, communication); then most heads, then most queries.

    Args:
      b, n, k, t, s, h: sizes of the attention, see `attnjax.typing`.
      devices: P.
      itemsize: bytes of a number in query, key and value.
      hv: width of a value; h by default.
      machine: what a device is worth.
      memory_limit: bytes that a device may hold, forward; None: any.

    Returns:
      A checked plan with its estimates and the reason.

    Raises:
      ValueError: a size is no positive number, nothing divides, or nothing fits the memory.
    """
    sizes = {"b": b, "n": n, "k": k, "t": t, "s": s, "h": h, "devices": devices}
    for name, size in {**sizes, "itemsize": itemsize}.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r}: must be a whole number of at least 1")
    if n % k:
        raise ValueError(f"n={n} query heads are not a multiple of k={k} key/value heads")
    if memory_limit is not None and check_number("memory_limit", memory_limit) <= 0:
        raise ValueError(f"memory_limit={memory_limit}: must be positive")
    machine = Machine() if machine is None else machine
    plans = []
    for heads, queries, keys in factorisations(devices):
        for examples, _ in head_splits(heads, b, n, k):
            if queries > t or queries * keys > s:
                continue
            for exchange in EXCHANGES[: 2 if queries > 1 else 1]:
                plan = DistributedPlan(heads, queries, keys, examples, exchange)
                plans.append(_estimate(plan, (b, n, k, t, s, h, hv or h), itemsize, machine))
    if not plans:
        raise ValueError(
            f"{devices} devices do not divide {b} examples, {n} query heads ({k} key/value heads), "
            f"{t} queries and {s} keys: use fewer devices"
        )
    fitting = [p for p in plans if memory_limit is None or p.memory_bytes <= memory_limit]
    if not fitting:
        least = min(plan.memory_bytes for plan in plans)
        raise ValueError(
            f"memory_limit={memory_limit:.4g} bytes: the smallest of {len(plans)} plans for "
            f"{devices} devices holds {least:.4g} on each; use more devices, or "
            "streamed_attention, which leaves keys and values in host memory"
        )
    best = min(fitting, key=_rank)
    was_better = min(plans, key=_rank)
    return dataclasses.replace(best, reason=_reason(best, was_better, b * n, t))


def factorisations(devices: int) -> list[tuple[int, int, int]]:
    """List all (heads, queries, keys) whose product is the number of devices."""
    divisors = [x for x in range(1, devices + 1) if devices % x == 0]
    return [
        (heads, queries, devices // heads // queries)
        for heads in divisors
        for queries in divisors
        if devices // heads % queries == 0
    ]


def resolve_plan(
    plan: DistributedPlan | str | None,
    sizes: tuple[int, int, int, int, int, int, int],
    devices: int,
    itemsize: int,
    memory_limit: float | None = None,
) -> DistributedPlan:
    """Return a checked plan of a plan, a name of `PLANS`, or None for the planner's choice.

    Args:
      plan: what the caller asked for.
      sizes: `(b, n, k, t, s, h, hv)`.
      devices, itemsize, memory_limit: as in `plan_distributed`.

    Raises:
      ValueError: it is unknown or does not fit.
    """
    b, n, k, t, s, h, hv = sizes
    if plan is None or plan == "auto":
        return plan_distributed(
            b, n, k, t, s, h, devices, itemsize, hv=hv, memory_limit=memory_limit
        )
    if isinstance(plan, str) and plan in PLANS:
        plan = DistributedPlan(**{plan: devices})
    if not isinstance(plan, DistributedPlan):
        raise ValueError(f"plan {plan!r} is unknown; choose from {list(PLANS)} or a plan")
    return plan.check(b, n, k, t, s, devices)


def _rank(plan):
    longest = max(plan.compute_seconds, plan.communication_seconds)
    prefers_ring = plan.exchange == "ring"
    return longest, -plan.heads, -plan.queries, plan.communication_seconds, prefers_ring


def _estimate(plan, sizes, itemsize, machine):
    """Fill in what a plan costs one device in the forward pass, with all keys visible."""
    b, n, k, t, s, h, hv = sizes
    examples, heads, queries, keys = plan.shape
    b, n, t = b // examples, n // heads, math.ceil(t / queries)
    share = math.ceil(s / (queries * keys))
    held_heads = k // heads if k % heads == 0 else k
    used_heads = max(1, k // heads)
    flops = 2 * b * n * t * share * queries * (h + hv)
    # Keys and values of other devices, and what an all-reduce of the partial sums receives.
    pair = b * share * (h + hv) * itemsize
    received = (queries - 1) * pair * used_heads
    received += 2 * (keys - 1) / keys * b * n * t * (hv + 1) * 4
    # The arrays themselves, and copies: all keys of a gather, two shares of a ring, partial sums.
    memory = b * t * n * (h + hv) * itemsize + pair * held_heads
    if queries > 1:
        memory += pair * used_heads * (queries if plan.exchange == "gather" else 2)
    if keys > 1 or plan.exchange == "ring":
        memory += 2 * b * t * n * (hv + 1) * 4
    return dataclasses.replace(
        plan,
        compute_seconds=flops / machine.flops,
        communication_seconds=received / machine.bytes_per_second,
        memory_bytes=memory,
    )


def _reason(plan, was_better, total_heads, t):
    examples, heads, queries, keys = plan.shape
    parts = []
    if plan.heads > 1:
        parts.append(f"{examples} x {heads} ways over examples x heads ({total_heads} in all)")
    if queries > 1:
        how = "gathered" if plan.exchange == "gather" else "passed round a ring"
        parts.append(f"{queries} ways over {t} queries, keys and values {how}")
    if keys > 1:
        parts.append(f"{keys} ways over keys, partial outputs merged")
    seconds = f"compute {plan.compute_seconds:.3g} s"
    if plan.communication_seconds:
        seconds += f", communication {plan.communication_seconds:.3g} s"
    else:
        seconds += ", nothing is communicated"
    text = ("; ".join(parts) or "one device") + f": {seconds}, {plan.memory_bytes:.3g} bytes each"
    if plan != was_better:
        text += f" (faster but over the memory limit: {was_better.shape} {was_better.exchange})"
    return text
