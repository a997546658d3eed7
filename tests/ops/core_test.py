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

from attnjax.ops import EMPTY_LSE, IMPLEMENTATIONS, NORMALIZERS, attention
from attnjax.ops.bias import Bias
from attnjax.ops.cases import CASES, MASKS, Case
from attnjax.ops.dropout import dropout_factor, dropout_seed
from attnjax.ops.normalizer import SoftmaxFamily

# Largest difference over largest entry. Float32: the scores pass through an exponential, which
# multiplies their rounding by their size. Bfloat16: weights and results have eight bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float64": 1e-12}
ROUNDING = {"float32": 1e-6, "bfloat16": 1e-6, "float64": 1e-15}
"""Of the terms that remain where they cancel, as in the gradient of a softmax of one score."""
STEP = 1e-5
"""Of central differences in float64, exact to its square."""

MATRIX = {
    (mask, normalizer): Case(
        f"{mask}_with_{normalizer}", t=9, hv=6, mask=mask, normalizer=normalizer, bias="heads",
        softcap=3.0,
    )
    for mask in MASKS
    for normalizer in NORMALIZERS
}  # fmt: skip
"""Every normalizer with every mask, and with a bias and a cap."""

BY_NAME = {case.name: case for case in (*CASES, *MATRIX.values())}

COMPILED = (
    "one_query", "bias_blocked", "bias_buckets", "extreme", "empty_tiles", "everything",
    *(f"extreme_{name}" for name in NORMALIZERS), *(f"one_query_{name}" for name in NORMALIZERS),
)  # fmt: skip
"""Cases that `chunked` compiles in the default run; `chunked_test` has others."""

REPEATED = (
    "tiled", "tiled_dropout", *(f"normalizer_{name}" for name in NORMALIZERS),
    *(f"one_query_{name}" for name in NORMALIZERS),
)  # fmt: skip
"""Cases of all but `chunked` left out of the default run: large, or much like others."""

HALF = ("extreme", "everything")
"""Those of the default run in bfloat16, besides rows of the matrix."""

UNLIKE = ("dense", "causal_segments", "ragged", "blocks")
"""Masks that need programs unlike each other: any, rows and segments, empty rows, rows per head."""

COMMON = ((6, 9, 4, 2), (9, 9, 4, 2), (1, 9, 4, 2))
"""Sizes t, s, n, k that most cases have."""

REFUSED = {"reference": set(), "chunked": {"normalizer Grouped"}}
"""What of an implementation that runs everywhere may be refused; of kernels anything by name."""


def refusal(implementation):
    """Why an implementation serves nothing on this machine, or None if it does."""
    try:
        attention(*BY_NAME["plain"].arrays(), implementation=implementation)
    except NotImplementedError as refusal:
        return str(refusal)
    return None


SERVED = [name for name in IMPLEMENTATIONS if refusal(name) is None]


def test_who_serves():
    assert SERVED[:2] == ["reference", "chunked"]
    for name in set(IMPLEMENTATIONS) - set(SERVED):
        assert refusal(name).startswith(f"{name}: ")


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
            total = np.abs(difference).sum(-1, keepdims=True) + 1e-8 * np.exp(-shift)
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
    given = options.get("bias", np.zeros((1, 1, 1, 1)))
    if isinstance(given, Bias):
        given = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    bias = np.asarray(given.dense(t, s) if isinstance(given, Bias) else given, np.float64)
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
            steep = np.abs(weights)
            if case.normalizer == "softpick":
                # A weight is a difference of two such exponentials, and small where they cancel.
                top = max(0, z_ts[r].max())
                seen = np.isfinite(z_ts[r])
                difference = np.where(seen, np.exp(z_ts[r] - top) - np.exp(-top), 0)
                steep = np.exp(z_ts[r] - top) / (np.abs(difference).sum() + 1e-8 * np.exp(-top))
            terms[i, j, r] = steep * (sizes + np.abs(weights) @ sizes)
        draw_ts = dscores[i, j] * slope_ts
        result["query"][i, :, j] += draw_ts @ key[i, :, head]
        result["key"][i, :, head] += draw_ts.T @ query[i, :, j]
    of_query = terms.max(axis=3).swapaxes(1, 2)
    of_key = terms.max(axis=2).reshape(b, k, n // k, s).max(axis=2).swapaxes(1, 2)
    result["terms"] = {
        "query": scale * np.abs(key).max() * of_query[..., None],
        "key": scale * np.abs(query).max() * of_key[..., None],
        "bias": terms.max(),
    }
    if isinstance(given, Bias):
        _, pull = jax.vjp(lambda x: x.dense(t, s), given)
        dense = dscores.sum(axis=0, keepdims=True).astype(np.float32)
        result["bias"] = jax.tree.leaves(pull(jnp.asarray(dense))[0])[0]
    else:
        shape = (1,) * (4 - given.ndim) + given.shape
        axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
        result["bias"] = dscores.sum(axis=axes, keepdims=True).reshape(given.shape)
        result["terms"]["bias"] = terms.max(axis=axes, keepdims=True).reshape(given.shape)
    return result


@functools.cache
def problem(name, dtype):
    case = BY_NAME[name]
    arrays, options = case.arrays(1, jnp.dtype(dtype)), case.options(1, jnp.dtype(dtype))
    rng = np.random.default_rng(7)
    b, t, n, _ = arrays[0].shape
    dout = jnp.asarray(rng.standard_normal((b, t, n, case.hv)), dtype)
    dlse = jnp.asarray(rng.standard_normal((b, n, t)), jnp.promote_types(dtype, jnp.float32))
    return arrays, options, dout, dlse


@functools.cache
def expected(name, dtype):
    return oracle(BY_NAME[name], *problem(name, dtype))


def has_lse(case):
    return issubclass(NORMALIZERS[case.normalizer], SoftmaxFamily)


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

    def both(*inputs):
        (out, lse), pull = jax.vjp(call, *inputs)
        return out, lse, pull((dout, dlse))

    # One primitive after the other is compiled once for many cases of equal shapes; a program of
    # its own only pays where the shapes are rare.
    if (case.t, case.s, case.n, case.k) not in COMMON or dtype == "float64":
        both = jax.jit(both)
    try:
        out, lse, gradients = both(*arrays, bias)
    except NotImplementedError as refusal:
        check_refusal(str(refusal), implementation, case)
        return None
    found = dict(zip(("query", "key", "value", "bias"), gradients, strict=True))
    if bias is not None:
        found["bias"] = jax.tree.leaves(found["bias"])[0]
    return {"out": out, "lse": lse, **found}


def check_refusal(message, implementation, case):
    """Hold a refusal to naming something that the case uses and that may be refused.

    What is not refused any more is compared from then on without a change here.
    """
    assert message.startswith(f"{implementation}: ")
    used = {
        "bias": case.bias is not None,
        "softcap": case.softcap is not None,
        "normalizer": not has_lse(case),
        "lse": has_lse(case),
        "dropout": case.dropout_rate > 0,
        "mask": case.mask is not None,
    }
    if case.normalizer == "grouped":
        used["normalizer Grouped"] = True
    named = {option for option, is_used in used.items() if is_used and option in message}
    assert named & REFUSED.get(implementation, named), f"{case.name}: {message}"


def close(found, wanted, tolerance, floor, name):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, name
    assert np.isfinite(found).all(), name
    is_empty = wanted < -1e29
    np.testing.assert_allclose(found[is_empty], EMPTY_LSE, rtol=1e-7, err_msg=name)
    difference = np.where(is_empty, 0, np.abs(found - wanted))
    size = np.abs(wanted[~is_empty]).max(initial=0)
    is_close = difference <= np.maximum(tolerance * size, floor)
    assert is_close.all(), f"{name}: {difference.max():.1e} beside {size:.1e}"


def check(case, dtype, implementation):
    found = computed(case.name, dtype, implementation)
    if found is None:
        return
    wanted, arrays = expected(case.name, dtype), problem(case.name, dtype)[0]
    assert found["out"].dtype == dtype
    parts = ["out", "query", "key", "value"]
    parts += ["lse"] if has_lse(case) else []
    parts += ["bias"] if case.bias else []
    for part in parts:
        floor = ROUNDING[dtype] * wanted["terms"].get(part, 0)
        close(found[part], wanted[part], TOLERANCE[dtype], floor, f"{case.name}: {part}")
    for part, array in zip(("query", "key", "value"), arrays, strict=True):
        assert found[part].dtype == array.dtype


def pairs(names, dtype):
    """Every implementation of every case; in the default run, what compiles slowly is sampled."""
    result = []
    for implementation in SERVED:
        for name in names:
            quick = name in COMPILED if implementation == "chunked" else name not in REPEATED
            if dtype == "bfloat16":
                quick = quick and name in HALF
            marks = () if quick else pytest.mark.slow
            result.append(pytest.param(name, implementation, marks=marks))
    return result


NAMES = [case.name for case in CASES]


@pytest.mark.parametrize(("name", "implementation"), pairs(NAMES, "float32"))
def test_float32(name, implementation):
    check(BY_NAME[name], "float32", implementation)


@pytest.mark.parametrize(("name", "implementation"), pairs(NAMES, "bfloat16"))
def test_bfloat16(name, implementation):
    check(BY_NAME[name], "bfloat16", implementation)


def rows_of_the_matrix():
    result = []
    for implementation in SERVED:
        for mask in MASKS:
            for dtype in ("float32", "bfloat16"):
                is_tiled = implementation != "reference"
                quick = mask == "dense" or (mask in UNLIKE and dtype == "float32" and is_tiled)
                marks = () if quick else pytest.mark.slow
                result.append(pytest.param(implementation, mask, dtype, marks=marks))
    return result


@pytest.mark.parametrize(("implementation", "mask", "dtype"), rows_of_the_matrix())
def test_every_normalizer_with_a_mask(implementation, mask, dtype):
    for normalizer in NORMALIZERS:
        check(MATRIX[mask, normalizer], dtype, implementation)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_float64_is_kept(implementation):
    with jax.enable_x64(True):
        check(BY_NAME["mask_dense"], "float64", implementation)
