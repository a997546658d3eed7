# SPDX-License-Identifier: Apache-2.0
"""The attention core against float64 NumPy: outputs, log-sum-exp and every gradient.

Everything goes through the public function, so the same cases hold any implementation to the same
answers. The oracle goes row by row; its derivatives are central differences of the row's own
contribution, except for plain softmax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import EMPTY_LSE, IMPLEMENTATIONS, attention
from attnjax.ops.bias import Bias
from attnjax.ops.core_cases import CASES
from attnjax.ops.dropout import dropout_factor, dropout_seed

# Largest difference over largest entry. Float32: the scores pass through an exponential, which
# multiplies their rounding by their size. Bfloat16: weights and results have eight bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
ROUNDING = 1e-6
"""Of the terms that remain where they cancel, as in the gradient of a softmax of one score."""
LARGE_LSE = 10_000 * 2.0**-24
"""Relative error of exp(score - lse) where the log-sum-exp 10,000 is stored in float32."""
STEP = 1e-5
"""Of central differences in float64, exact to its square."""

BY_NAME = {case.name: case for case in CASES}
HALF = (
    "plain", "mask_dense", "mask_causal", "bias_blocked", "softcap", "extreme", "everything",
    "normalizer_kv_bias", "normalizer_elastic", "normalizer_softpick",
)  # fmt: skip


@functools.cache
def served():
    """The implementations that serve a plain call on this machine."""
    names = []
    arrays = BY_NAME["plain"].arrays()
    for name in IMPLEMENTATIONS:
        try:
            attention(*arrays, implementation=name)
        except NotImplementedError as refusal:
            assert str(refusal).startswith(f"{name}: ")
        else:
            names.append(name)
    return names


def test_reference_and_chunked_are_served_everywhere():
    assert served()[:2] == ["reference", "chunked"]


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def weights_of(case, z, extra, row, position):
    """Return weights `[..., s]`, share of the extra term `[...]`, and log-sum-exp `[...]`.

    z `[..., s]` are scores, -inf where masked; `extra [...]` is the extra logit, `row` what a
    normalizer has for this row; `position` is that of the query.
    """
    name, seen = case.normalizer, np.isfinite(z)
    if not seen.any():
        z = np.where(seen, z, -np.inf)
    top = np.max(z, axis=-1, keepdims=True, initial=-1e300)
    exponential = np.where(seen, np.exp(z - np.where(seen.any(-1, keepdims=True), top, 0)), 0)
    total = exponential.sum(-1, keepdims=True)
    p = exponential / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, EMPTY_LSE, top + np.log(total))
    zero = 0 * lse[..., 0]
    match name:
        case "softmax":
            return p, zero, lse[..., 0]
        case "softmax_one" | "sink_logit" | "k_bias" | "kv_bias":
            both = np.logaddexp(lse[..., 0], extra)
            return p * np.exp(lse[..., 0] - both)[..., None], np.exp(extra - both), both
        case "v_bias":
            return p, zero + 1, lse[..., 0]
        case "ca_bias":
            return p, sigmoid(extra - lse[..., 0]), lse[..., 0]
        case "clipped":
            return np.clip(1.13 * p - 0.03, 0, 1), zero, None
        case "softpick":
            shift = np.maximum(top, 0)
            difference = np.where(seen, np.exp(z - shift) - np.exp(-shift), 0)
            total = np.abs(difference).sum(-1, keepdims=True) + 1e-8
            return np.maximum(difference, 0) / total, zero, None
        case "softpick_survey" | "elastic":
            return np.where(seen, np.maximum(p + row, 0), 0), zero, None
        case "elastic_survey":
            exponential = np.where(seen, np.exp((z - lse) / 1.7), 0)
            total = exponential.sum(-1, keepdims=True)
            return exponential / np.where(total == 0, 1, total), zero, None
        case "sigmoid":
            weights = np.where(seen, sigmoid(np.where(seen, z, 0) + row), 0)
            return weights / (weights.sum(-1, keepdims=True) + 1e-8), zero, None
        case "elu1":
            weights = np.where(seen, np.where(z > 0, z + 1, np.exp(np.minimum(z, 0))), 0)
            return weights / (weights.sum(-1, keepdims=True) + 1e-8), zero, None
        case "kernel":
            weights = np.where(seen, z, 0)
            return weights / np.maximum(np.abs(weights.sum(-1, keepdims=True)), 1), zero, None
        case "grouped":
            return grouped(z, position), zero, None
    raise AssertionError(name)


def grouped(z, position):
    """Softmax in groups where every fourth key is a landmark."""
    key = np.arange(z.shape[-1])
    landmark, own = key % 4 == 3, key // 4 == position // 4
    safe = lambda x: np.exp(x - np.max(x, axis=-1, keepdims=True, initial=-1e300))

    def softmax(chosen):
        exponential = np.where(chosen & np.isfinite(z), safe(np.where(chosen, z, -np.inf)), 0)
        total = exponential.sum(-1, keepdims=True)
        return exponential / np.where(total == 0, 1, total)

    main = softmax((own & ~landmark) | (~own & landmark))
    weights = np.where(own & ~landmark, main, 0)
    for block in range(key[-1] // 4 + 1):
        if block != position // 4 and 4 * block + 3 < len(key):
            inside = (key // 4 == block) & ~landmark
            weights = weights + softmax(inside) * main[..., [4 * block + 3]]
    return weights


def oracle(case, arrays, options, dout, dlse):
    """Outputs, log-sum-exp, and gradients of sum(out dout) + sum(lse dlse), in float64."""
    query, key, value, dout, dlse = (np.asarray(x, np.float64) for x in (*arrays, dout, dlse))
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    scale, softcap = options.get("scale", h**-0.5), options.get("softcap")
    visible = np.ones((b, n, t, s), bool)
    if "mask" in options:
        visible &= np.asarray(options["mask"].dense_bnts(t, s))
    bias = options.get("bias", np.zeros((1, 1, 1, 1)))
    bias = np.asarray(bias.dense(t, s) if isinstance(bias, Bias) else bias, np.float64)
    bias_bnts = np.broadcast_to(bias, (b, n, t, s))
    factor = np.ones((b, n, t, s))
    if case.dropout_rate:
        index = np.indices((b * n, t, s)).reshape(3, b, n, t, s).astype(np.uint32)
        seed = dropout_seed(options["dropout_key"])
        factor = np.asarray(dropout_factor(seed, case.dropout_rate, *index), np.float64)
    normalizer = options.get("normalizer")
    of_heads = lambda name: np.resize(np.asarray(getattr(normalizer, name, 0), np.float64), n)
    vectors = lambda name, width: np.broadcast_to(
        np.asarray(getattr(normalizer, name, np.zeros((1, width))), np.float64), (n, width)
    )
    extra_key, extra_value = vectors("key", h), vectors("value", value.shape[-1])
    result = {
        "out": np.zeros((b, t, n, value.shape[-1])),
        "lse": np.full((b, n, t), EMPTY_LSE),
        "query": np.zeros_like(query),
        "key": np.zeros_like(key),
        "value": np.zeros_like(value),
    }
    dscores = np.zeros((b, n, t, s))
    terms = np.zeros((b, n, t, s))
    bent = lambda x: (
        (x, np.full_like(x, scale))
        if softcap is None
        else (softcap * np.tanh(x / softcap), scale * (1 - np.tanh(x / softcap) ** 2))
    )
    for i, j in np.ndindex(b, n):
        head = j // (n // k)
        raw_ts, slope_ts = bent(scale * query[i, :, j] @ key[i, :, head].T)
        z_ts = np.where(visible[i, j], raw_ts + bias_bnts[i, j], -np.inf)
        extra_t, extra_slope_t = bent(scale * query[i, :, j] @ extra_key[j])
        if case.normalizer == "sink_logit":
            extra_t = np.full(t, of_heads("logits")[j])
        for r in range(t):
            count = max(1, visible[i, j, r].sum())
            row = {
                "softpick_survey": -of_heads("threshold")[j],
                "elastic": of_heads("tau")[j] / count,
                "sigmoid": -np.log(count),
            }.get(case.normalizer)
            position = r + s - t
            weights, share, lse = weights_of(case, z_ts[r], extra_t[r], row, position)
            kept = weights * factor[i, j, r]
            result["out"][i, r, j] = kept @ value[i, :, head] + share * extra_value[j]
            if lse is not None:
                result["lse"][i, j, r] = lse
            result["value"][i, :, head] += kept[:, None] * dout[i, r, j]
            dweights = factor[i, j, r] * (value[i, :, head] @ dout[i, r, j])
            if case.normalizer == "softmax":
                dz = weights * (dweights - weights @ dweights + dlse[i, j, r])
            else:
                seen = np.flatnonzero(np.isfinite(z_ts[r]))
                sides = []
                for sign in (1, -1):
                    moved = np.repeat(z_ts[r][None], len(seen) + 1, axis=0)
                    moved[np.arange(len(seen)), seen] += sign * STEP
                    extras = np.full(len(seen) + 1, extra_t[r])
                    extras[-1] += sign * STEP
                    w, u, x = weights_of(case, moved, extras, row, position)
                    side = w @ dweights + u * (extra_value[j] @ dout[i, r, j])
                    sides.append(side + (0 if x is None else x * dlse[i, j, r]))
                slopes = (sides[0] - sides[1]) / (2 * STEP)
                dz = np.zeros(s)
                dz[seen] = slopes[:-1]
                if extra_key.any():
                    result["query"][i, r, j] += slopes[-1] * extra_slope_t[r] * extra_key[j]
            dscores[i, j, r] = dz
            sizes = np.abs(dweights) + np.abs(dlse[i, j, r])
            terms[i, j, r] = np.abs(weights) * (sizes + np.abs(weights) @ sizes)
        draw_ts = dscores[i, j] * slope_ts
        result["query"][i, :, j] += draw_ts @ key[i, :, head]
        result["key"][i, :, head] += draw_ts.T @ query[i, :, j]
    steepest = scale * terms.max()
    result["terms"] = {
        "query": steepest * np.abs(key).max(),
        "key": steepest * np.abs(query).max(),
        "bias": terms.max(),
    }
    given = options.get("bias")
    if isinstance(given, Bias):
        _, pull = jax.vjp(lambda x: x.dense(t, s), given)
        dense = dscores.sum(axis=0, keepdims=True).astype(np.float32)
        result["bias"] = jax.tree.leaves(pull(jnp.asarray(dense))[0])[0]
    elif given is not None:
        shape = (1,) * (4 - given.ndim) + given.shape
        axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
        result["bias"] = dscores.sum(axis=axes, keepdims=True).reshape(given.shape)
    return result


@functools.cache
def problem(name, dtype):
    case = BY_NAME[name]
    arrays, options = case.arrays(1, jnp.dtype(dtype)), case.options(1, jnp.dtype(dtype))
    rng = np.random.default_rng(7)
    b, t, n, _ = arrays[0].shape
    dout = jnp.asarray(rng.standard_normal((b, t, n, case.hv)), dtype)
    dlse = jnp.asarray(rng.standard_normal((b, n, t)), jnp.float32)
    return arrays, options, dout, dlse


@functools.cache
def expected(name, dtype):
    return oracle(BY_NAME[name], *problem(name, dtype))


def has_lse(case):
    return case.normalizer in (
        "softmax", "softmax_one", "sink_logit", "k_bias", "kv_bias", "v_bias", "ca_bias",
    )  # fmt: skip


def computed(name, dtype, implementation):
    """What an implementation says, or None if it refuses by naming an option of the case."""
    case = BY_NAME[name]
    arrays, options, dout, dlse = problem(name, dtype)
    options = dict(options)
    bias = options.pop("bias", None)

    def call(query, key, value, bias):
        result = attention(
            query, key, value, bias=bias, implementation=implementation,
            return_lse=has_lse(case), **options,
        )  # fmt: skip
        return (result.out, result.lse) if has_lse(case) else (result, jnp.zeros_like(dlse))

    try:
        (out, lse), pull = jax.vjp(call, *arrays, bias)
        gradients = pull((dout, dlse.astype(lse.dtype)))
    except NotImplementedError as refusal:
        check_refusal(str(refusal), implementation, case)
        return None
    found = dict(zip(("query", "key", "value", "bias"), gradients, strict=True))
    if bias is not None:
        found["bias"] = jax.tree.leaves(found["bias"])[0]
    return {"out": out, "lse": lse, **found}


def check_refusal(message, implementation, case):
    used = {
        "bias": case.bias is not None,
        "softcap": case.softcap is not None,
        "normalizer": case.normalizer != "softmax",
        "lse": has_lse(case),
        "dropout": case.dropout_rate > 0,
        "mask": case.mask is not None,
    }
    assert message.startswith(f"{implementation}: ")
    assert any(option in message for option, is_used in used.items() if is_used), message


def close(found, wanted, tolerance, floor=0.0):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.isfinite(found).all()
    is_empty = wanted < -1e29
    np.testing.assert_array_equal(found < -1e29, is_empty)
    found, wanted = (np.where(is_empty, 0, x) for x in (found, wanted))
    assert np.abs(found - wanted).max() <= max(tolerance * np.abs(wanted).max(), floor)


def check(name, dtype):
    case = BY_NAME[name]
    wanted = expected(name, dtype)
    for implementation in served():
        found = computed(name, dtype, implementation)
        if found is None:
            assert implementation != "reference"
            continue
        tolerance = TOLERANCE[dtype]
        close(found["out"], wanted["out"], tolerance)
        if has_lse(case):
            close(found["lse"], wanted["lse"], tolerance)
        if case.is_extreme and implementation != "reference":
            tolerance = max(tolerance, LARGE_LSE)  # Those recompute weights from the log-sum-exp.
        for part in ("query", "key", "value", *(["bias"] if case.bias else [])):
            close(found[part], wanted[part], tolerance, ROUNDING * wanted["terms"].get(part, 0))


@pytest.mark.parametrize("name", BY_NAME)
def test_float32(name):
    check(name, "float32")


@pytest.mark.parametrize("name", HALF)
def test_bfloat16(name):
    check(name, "bfloat16")
