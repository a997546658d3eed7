# SPDX-License-Identifier: Apache-2.0
"""Decoding with the axis of keys in parts, on one device and over several."""

import dataclasses
import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnjax.ops import attention, mask
from attnjax.ops.decode import decode_attention
from attnjax.ops.normalizer import EMPTY_LSE, SoftmaxFamily

B, N, K, H, HV, S = 4, 4, 2, 8, 6, 48
LENGTHS = np.array([48, 0, 17, 2], np.int32)
SPLIT = 1e-6  # Parts and whole differ in the order of sums alone.
BF16 = 8e-3  # One rounding of an output below 2: parts are merged before it.


@dataclasses.dataclass(frozen=True)
class Sink(SoftmaxFamily):
    """Softmax with a logit per head in its denominator."""

    logits: tuple

    def extra_logit(self, query, scale, *rest):
        return jnp.asarray(self.logits)[None, :, None]


SINK = Sink((0.5, -1.0, 2.0, 0.0))


def arrays(t, dtype=jnp.float32, s=S):
    rng = np.random.default_rng(t)
    shapes = (B, t, N, H), (B, s, K, H), (B, s, K, HV)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def seen(t, lengths=LENGTHS):
    """Query j of the last t positions sees the keys before its own, and that."""
    upper = np.maximum(lengths[:, None] - t + 1 + np.arange(t), 0)[:, None, None]
    return mask.ranges(np.zeros_like(upper), upper)


def but(first, second):
    """All keys but two."""
    edges = np.array([0, first, first + 1, second, second + 1, S], np.int32).reshape(1, 1, 3, 2, 1)
    return mask.ranges(edges[..., 0, :], edges[..., 1, :])


STATIC = ("splits", "softcap", "scale", "normalizer", "return_lse")
decode = jax.jit(functools.partial(decode_attention, return_lse=True), static_argnames=STATIC)


@functools.partial(jax.jit, static_argnames=STATIC)
def whole(query, key, value, **options):
    return attention(query, key, value, implementation="reference", return_lse=True, **options)


def assert_same(found, expected, tolerance):
    for name in ("out", "lse"):
        one, two = (np.asarray(getattr(x, name), np.float32) for x in (found, expected))
        np.testing.assert_allclose(one, two, atol=tolerance, rtol=tolerance)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "splits", [1, 3, 8, *(pytest.param(x, marks=SLOW) for x in (2, 4, 5, 6, 7))]
)
def test_parts_equal_the_whole(splits):
    t = 1 + splits % 3
    query, key, value = arrays(t)
    found = decode(query, key, value, LENGTHS, splits=splits)
    assert_same(found, whole(query, key, value, mask=seen(t)), SPLIT)
    np.testing.assert_array_equal(found.out[1], 0)
    np.testing.assert_array_equal(found.lse[1], np.float32(EMPTY_LSE))


def test_sizes_that_divide_nothing():
    query, key, value = arrays(2, s=37)
    lengths = np.array([37, 36, 1, 0], np.int32)
    for splits in (2, 5, 37):
        found = decode(query, key, value, lengths, splits=splits)
        assert_same(found, whole(query, key, value, mask=seen(2, lengths)), SPLIT)


@pytest.mark.parametrize("splits", [1, 4])
def test_options(splits):
    query, key, value = arrays(3)
    options = dict(
        mask=but(5, 21),
        bias=np.random.default_rng(9).standard_normal((1, N, 1, S), np.float32),
        softcap=3.0,
        scale=0.4,
        normalizer=SINK,
    )
    expected = whole(query, key, value, **options | {"mask": seen(3) & options["mask"]})
    found = decode(query, key, value, LENGTHS, splits=splits, **options)
    assert_same(found, expected, SPLIT)


def test_mask_alone_may_be_an_array():
    query, key, value = arrays(2)
    visible = np.random.default_rng(5).random((B, 1, 2, S)) < 0.4
    found = decode(query, key, value, mask=visible, splits=3)
    assert_same(found, whole(query, key, value, mask=visible), SPLIT)


def test_bfloat16_parts_are_merged_before_they_are_rounded():
    query, key, value = arrays(2, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    found = decode(query, key, value, LENGTHS, splits=6)
    assert found.out.dtype == jnp.bfloat16
    assert_same(found, whole(*wide, mask=seen(2)), BF16)


def test_gradients_pass_through_parts():
    query, key, value = arrays(2)

    def loss(attend, arrays):
        result = attend(*arrays)
        # Of rows without keys the log-sum-exp is a constant.
        lse = jnp.where(result.lse > EMPTY_LSE, result.lse, 0)
        return (result.out**2).sum() + (lse**2).sum()

    attends = (
        functools.partial(decode, lengths=LENGTHS, splits=5, normalizer=SINK),
        functools.partial(whole, mask=seen(2), normalizer=SINK),
    )
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, attend)))((query, key, value))
        for attend in attends
    )
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5, rtol=2e-5)


def sharded(devices, **options):
    """`decode_attention` with keys and values in order over some devices."""
    mesh = jax.make_mesh(
        (devices,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    keys = P(None, "context")
    return jax.jit(
        jax.shard_map(
            functools.partial(
                decode_attention, axis_name="context", return_lse=True, **options
            ),
            mesh=mesh,
            in_specs=(P(), keys, keys, P()),
            out_specs=P(),
        )
    )  # fmt: skip


@pytest.mark.parametrize("devices", [pytest.param(2, marks=SLOW), pytest.param(4, marks=SLOW), 8])
def test_shards_equal_the_whole(devices):
    t = 1 + devices // 4
    query, key, value = arrays(t)
    hidden = but(1, 40)
    attend = sharded(devices, normalizer=SINK, splits=2, mask=hidden, softcap=4.0)
    found = attend(query, key, value, LENGTHS)
    expected = whole(query, key, value, mask=seen(t) & hidden, normalizer=SINK, softcap=4.0)
    assert_same(found, expected, SPLIT)
    np.testing.assert_array_equal(found.out[1], 0)


def test_gradients_pass_through_shards():
    query, key, value = arrays(1)
    attend = sharded(4)
    loss = lambda attend, arrays: (attend(*arrays).out ** 2).sum()
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, one)))([query, key, value])
        for one in (lambda *x: attend(*x, LENGTHS), functools.partial(whole, mask=seen(1)))
    )
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5, rtol=2e-5)


def test_new_lengths_do_not_compile_anew():
    query, key, value = arrays(1)
    traces = []

    @jax.jit
    def attend(query, key, value, lengths):
        traces.append(1)
        return decode_attention(query, key, value, lengths, splits=4)

    for length in range(S + 1):
        out = attend(query, key, value, jnp.full((B,), length, jnp.int32))
    assert len(traces) == 1
    np.testing.assert_allclose(out, whole(query, key, value).out, atol=SPLIT)
    # What cannot be refused any more does not pass for an answer.
    too_long = attend(query, key, value, jnp.array([S + 1, S, 1, 0], jnp.int32))
    assert np.isnan(too_long[0]).all() and np.isfinite(too_long[1:]).all()


class NoLse:
    """Not a normalizer at all."""


def test_refusals_name_what_is_wrong():
    query, key, value = arrays(1)
    attend = functools.partial(decode_attention, query, key, value)
    for message, call in {
        r"splits=49: choose from 1 to .* 48": lambda: attend(splits=49),
        r"splits=0": lambda: attend(splits=0),
        r"lengths\[2\]=49: choose from 0 to .* 48": lambda: attend(np.array([1, 2, 49, 0])),
        r"lengths\[0\]=-1": lambda: attend(np.array([-1, 2, 4, 0])),
        r"lengths must be integers \[b\] = \(4,\).*\(3,\)": lambda: attend(np.array([1, 2, 4])),
        r"normalizer must be": lambda: attend(normalizer=NoLse()),
        r"query axis h|key axis h": lambda: decode_attention(query[..., :4], key, value),
        r"softcap must be positive": lambda: attend(softcap=-1.0),
        r"scale must be a finite": lambda: attend(scale=float("nan")),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="must be a Mask"):
        sharded(2, mask=np.ones((1, S), bool))(query, key, value, LENGTHS)


def test_documentation_runs():
    result = doctest.testmod(importlib.import_module("attnjax.ops.decode"))
    assert result.attempted >= 8 and result.failed == 0
