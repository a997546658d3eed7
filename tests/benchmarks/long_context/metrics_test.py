# SPDX-License-Identifier: Apache-2.0
"""Operations, speeds and bytes against numbers worked out by hand."""

import numpy as np
import pytest

from attnjax.benchmarks.long_context import metrics, traffic
from attnjax.benchmarks.long_context.traffic import Problem


def test_operations():
    assert metrics.attention_flops(100, 4, 8) == 12_800
    assert metrics.attention_flops(100, 4, 8, "backward") == 32_000
    assert metrics.attention_flops(100, 4, 8, "both") == 44_800
    assert metrics.block_sparse_flops(64, 32, 4, 8, 0.25) == 4 * 64 * 32 * 4 * 8 * 0.25


def test_speeds_of_ranks():
    # 6e12 operations in 1, 2 and 3 seconds.
    assert metrics.per_device_tflops(6e12, [1000, 2000, 3000]) == pytest.approx(1)
    assert metrics.slowest_tflops(6e12, [1000, 2000, 3000]) == pytest.approx(6 / 9)
    assert metrics.slowest_tflops(8e12, [2000] * 4) == metrics.per_device_tflops(8e12, [2000] * 4)


def test_cells_without_a_time_have_values_of_their_own():
    assert metrics.value_of("ok", "2.5") == 2.5
    assert metrics.value_of("out of memory", "") == -1000
    assert metrics.value_of("refused: why", "") == -1
    assert metrics.mean_of(["ok", "refused: x", "ok"], ["1", "", "4"]) == 2.5
    assert metrics.mean_of(["out of memory"] * 2, ["", ""]) == -1000
    assert metrics.mean_of(["refused: x"], [""]) == -1


P8 = Problem(heads=64, kv_heads=8, width=128, tokens=65_536, devices=8)


def test_traffic_of_whole_programs():
    d, t = 128, 65_536
    assert traffic.ulysses_forward(P8) == 2 * 72 * d * t * 7 / 64 == traffic.ulysses_backward(P8)
    assert traffic.ring_forward(P8) == 2 * 8 * d * t * 7 / 8 == traffic.all_gather_backward(P8)
    assert traffic.ring_backward(P8) == 2 * 8 * d * t * (7 + 8) / 8
    assert traffic.fetched_forward(P8, 1000) == 2 * 8 * d * 1000
    # Two groups of four: a quarter of the heads, half the tokens, one hop.
    expected = 2 * 72 * d * t / 8 * 3 / 4 + 2 * 2 * d * t / 2
    assert traffic.usp_forward(P8, 4) == expected
    assert traffic.usp_backward(P8, 4) == 2 * 72 * d * t / 8 * 3 / 4 + 2 * 2 * d * t / 2 * 3


def test_ends_of_usp_are_ulysses_and_ring():
    assert traffic.usp_forward(P8, 8) == pytest.approx(traffic.ulysses_forward(P8))
    assert traffic.usp_forward(P8, 1) == pytest.approx(traffic.ring_forward(P8))
    assert traffic.usp_backward(P8, 1) == pytest.approx(traffic.ring_backward(P8))
    with pytest.raises(ValueError, match="groups of 3"):
        traffic.usp_forward(P8, 3)


def test_one_device_sends_nothing():
    alone = Problem(4, 2, 8, 64, 1)
    sent = [
        f(alone)
        for f in (
            traffic.ulysses_forward, traffic.ring_forward, traffic.ring_backward,
            traffic.all_gather_backward,
        )
    ]  # fmt: skip
    assert not np.any([*sent, traffic.usp_forward(alone, 1), traffic.usp_backward(alone, 1)])
    with pytest.raises(ValueError, match="tokens=0"):
        Problem(4, 2, 8, 0, 1)
