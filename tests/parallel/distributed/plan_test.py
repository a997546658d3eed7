# SPDX-License-Identifier: Apache-2.0
"""The planner: heads first, then queries; keys for a single query; costs by hand."""

import pytest

from attnjax.parallel import DistributedPlan, Machine, plan_distributed
from attnjax.parallel.distributed.plan import factorisations, head_splits

LONG = 2**16
"""Tokens whose attention takes longer than the exchange of keys."""


def ways(plan):
    return plan.heads, plan.queries, plan.keys


@pytest.mark.parametrize(
    ("b", "n", "devices", "split"),
    [(1, 8, 8, (1, 8)), (8, 1, 8, (8, 1)), (2, 4, 8, (2, 4)), (4, 16, 32, (4, 8)),
     (64, 8, 8, (8, 1))],
)  # fmt: skip
def test_heads_when_there_are_enough(b, n, devices, split):
    plan = plan_distributed(b, n, n, LONG, LONG, 64, devices, 2)
    assert ways(plan) == (devices, 1, 1) and plan.shape[:2] == split
    assert plan.communication_seconds == 0 and "nothing is communicated" in plan.reason


@pytest.mark.parametrize(
    ("b", "n", "k", "expected"),
    [(1, 1, 1, (1, 8, 1)), (1, 2, 2, (2, 4, 1)), (2, 2, 1, (4, 2, 1)), (1, 12, 12, (4, 2, 1)),
     (1, 12, 3, (1, 8, 1)), (3, 1, 1, (1, 8, 1))],
)  # fmt: skip
def test_queries_are_added_otherwise(b, n, k, expected):
    """Also where heads do not divide; two or four ways cannot share three key/value heads."""
    plan = plan_distributed(b, n, k, LONG, LONG, 64, 8, 2)
    assert ways(plan) == expected
    assert f"{plan.queries} ways over {LONG} queries" in plan.reason


@pytest.mark.parametrize(
    ("b", "n", "expected"), [(1, 1, (1, 1, 8)), (1, 2, (2, 1, 4)), (1, 8, (8, 1, 1))]
)
def test_keys_for_one_query(b, n, expected):
    plan = plan_distributed(b, n, n, 1, LONG, 64, 8, 2)
    assert ways(plan) == expected
    assert ("partial outputs merged" in plan.reason) == (plan.keys > 1)


def test_costs_by_hand():
    machine = Machine(flops=1e9, bytes_per_second=1e9)
    plan = plan_distributed(1, 2, 1, 100, 200, 8, 4, 2, hv=4, machine=machine)
    # Two heads that share a key/value head, two ways over queries: 50 x 200 scores each.
    assert plan.shape == (1, 2, 2, 1) and plan.exchange == "gather"
    assert plan.compute_seconds == pytest.approx(2 * 50 * 200 * (8 + 4) / 1e9)
    assert plan.communication_seconds == pytest.approx(100 * (8 + 4) * 2 / 1e9)
    # Query and output, a share of keys and values, all of them gathered.
    assert plan.memory_bytes == (50 + 100 + 200) * (8 + 4) * 2
    plan = plan_distributed(1, 1, 1, 1, 200, 8, 4, 2, hv=4, machine=machine)
    assert ways(plan) == (1, 1, 4)
    # Output and normaliser, reduced over a ring of four.
    assert plan.communication_seconds == pytest.approx(2 * 3 / 4 * (4 + 1) * 4 / 1e9)


def test_least_time_wins():
    """A slow network prefers the split that moves least, a fast one the simplest."""
    slow = Machine(flops=1e15, bytes_per_second=1e6)
    arguments = (1, 1, 1, 4096, 4096, 64, 16, 4)
    plan = plan_distributed(*arguments, machine=slow)
    assert plan.queries > 1 and plan.keys > 1
    assert ways(plan_distributed(*arguments, machine=Machine(1e9, 1e12))) == (1, 16, 1)
    fewer = plan_distributed(1, 1, 1, 64, 10**6, 64, 8, 4, machine=slow)  # Many keys per query.
    assert ways(fewer) == (1, 1, 8)


def test_memory_limit():
    arguments = (1, 1, 1, LONG, LONG, 64, 8, 2)
    free = plan_distributed(*arguments)
    assert free.exchange == "gather"
    tight = plan_distributed(*arguments, memory_limit=0.9 * free.memory_bytes)
    assert tight.memory_bytes <= 0.9 * free.memory_bytes
    assert "over the memory limit: (1, 1, 8, 1) gather" in tight.reason
    assert ways(tight) == (1, 8, 1) and "ring" in tight.reason
    with pytest.raises(ValueError, match="use more devices, or streamed_attention"):
        plan_distributed(*arguments, memory_limit=1000)


def test_what_divides():
    assert factorisations(4) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    assert head_splits(8, 2, 8, 2) == [(2, 4), (1, 8)]
    assert head_splits(4, 1, 12, 3) == [] and head_splits(6, 1, 12, 3) == [(1, 6)]
    assert DistributedPlan(4).check(2, 6, 6, 9, 9, 4).examples == 2
    assert DistributedPlan(6).check(2, 6, 6, 9, 9, 6).shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 0}, "devices=0: must be a whole number"),
        ({"t": 2.5}, "t=2.5"),
        ({"n": 3, "k": 2}, "n=3 query heads are not a multiple of k=2"),
        ({"devices": 7, "t": 3, "s": 3}, "7 devices do not divide 1 examples, 2 query heads"),
        ({"memory_limit": -1}, "memory_limit=-1: must be positive"),
    ],
)
def test_refusals(change, message):
    sizes = dict(b=1, n=2, k=2, t=64, s=64, h=8, devices=8) | change
    with pytest.raises(ValueError, match=message):
        plan_distributed(**sizes)
