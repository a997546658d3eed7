# SPDX-License-Identifier: Apache-2.0
"""The attention core against float64 NumPy: outputs, log-sum-exp and every gradient.

Everything goes through the public function, so the same cases hold any implementation to the same
answers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import IMPLEMENTATIONS, attention
from attnjax.ops.cases import BIASES, CASES, MASKS, WORKLOADS, Case

SERVED = ("reference", "chunked")
EMPTY_LSE = -1e30

# Largest difference over largest entry. Float32: the scores pass through an exponential, which
# multiplies their rounding by their size. Bfloat16: weights and results have eight bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float64": 1e-12}

# Optimising these small programs takes longer than running them.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

BY_NAME = {case.name: case for case in CASES}
HALF = ("grouped", "mask_dense", "bias_blocked", "softcap", "extreme", "everything")


def wide(x):
    return np.asarray(x, np.float64)


def oracle(query, key, value, factor, dout, dlse, mask=None, bias=None, scale=None, softcap=None):
    """Attention and its gradients, term by term in float64.

    `factor [b,n,t,s]` multiplies the weights (dropout). Returns a dict with `out`, `lse`, `query`,
    `key`, `value` and `bias`, the last four being gradients of sum(out dout) + sum(lse dlse).
    """
    b, _, n, h = query.shape
    s, k = key.shape[1:3]
    group = n // k
    key_n, value_n = (np.repeat(x, group, axis=2) for x in (key, value))
    scale = h**-0.5 if scale is None else scale
    raw = scale * np.einsum("btnh,bsnh->bnts", query, key_n)
    slope = np.full_like(raw, scale)
    if softcap is not None:
        bend = np.tanh(raw / softcap)
        raw, slope = softcap * bend, scale * (1 - bend**2)
    shape = np.shape(bias) if bias is not None else ()
    scores = raw if bias is None else raw + bias
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    empty = np.isneginf(top)
    exponential = np.exp(scores - np.where(empty, 0, top))
    total = exponential.sum(axis=-1, keepdims=True)
    weights = exponential / np.where(empty, 1, total)
    lse = np.where(empty, EMPTY_LSE, np.where(empty, 0, top) + np.log(np.where(empty, 1, total)))
    kept = weights * factor
    dweights = factor * np.einsum("btnh,bsnh->bnts", dout, value_n)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    dscores += weights * dlse[..., None]
    draw = dscores * slope
    per_key = lambda x: x.reshape(b, s, k, group, -1).sum(axis=3)
    extra = tuple(range(dscores.ndim - len(shape)))
    dbias = dscores.sum(axis=extra)
    dbias = dbias.sum(axis=tuple(i for i, m in enumerate(shape) if m == 1), keepdims=True)
    return {
        "out": np.einsum("bnts,bsnh->btnh", kept, value_n),
        "lse": lse[..., 0],
        "query": np.einsum("bnts,bsnh->btnh", draw, key_n),
        "key": per_key(np.einsum("bnts,btnh->bsnh", draw, query)),
        "value": per_key(np.einsum("bnts,btnh->bsnh", kept, dout)),
        "bias": dbias,
    }


@functools.cache
def dropped(case):
    """What dropout multiplies every weight by `[b,n,t,s]`, read off with values that are one-hot.

    Without masks and biases, so that every weight counts.
    """
    if not case.dropout_rate:
        return 1.0
    query, key, _ = case.arrays()
    options = {k: v for k, v in case.options().items() if k.startswith("dropout")}
    one_hot = jnp.broadcast_to(jnp.eye(case.s)[:, None], (case.b, case.s, case.k, case.s))
    result = attention(
        0 * query, key, one_hot, **options, return_probabilities=True, implementation="reference"
    )
    factor = np.einsum("btns->bnts", result.out) / np.asarray(result.probabilities)
    is_kept = factor > 0.5
    np.testing.assert_allclose(factor, is_kept / (1 - case.dropout_rate), rtol=1e-5)
    return is_kept / (1 - case.dropout_rate)


@functools.cache
def expected(case, dtype):
    """The oracle's answers for the arrays as rounded to the dtype."""
    arrays, options, dout, dlse = problem(case, dtype)
    options = {
        name: value if isinstance(value, float) else np.asarray(value, np.float64)
        for name, value in options.items()
        if not name.startswith("dropout")
    }
    if "mask" in options:
        options["mask"] = options["mask"].astype(bool)
    return oracle(*map(wide, arrays), dropped(case), wide(dout), wide(dlse), **options)


def problem(case, dtype):
    """Arrays, options, and the cotangents of output and log-sum-exp."""
    arrays, options = case.arrays(dtype=dtype), case.options(dtype=dtype)
    rng = np.random.default_rng(5)
    dout = jnp.asarray(rng.standard_normal((case.b, case.t, case.n, case.hv)), dtype)
    dlse = jnp.asarray(rng.standard_normal((case.b, case.n, case.t)), jnp.float32)
    return arrays, options, dout, dlse


def measured(case, dtype, implementation):
    """What the implementation answers, under the same names as the oracle's."""
    (query, key, value), options, dout, dlse = problem(case, dtype)
    static = {k: v for k, v in options.items() if isinstance(v, float)}
    arrays = {"query": query, "key": key, "value": value}
    arrays |= {"bias": options["bias"]} if "bias" in options else {}
    fixed = {k: v for k, v in options.items() if k in ("mask", "dropout_key")}

    def run(arrays, fixed):
        result = attention(
            **arrays, **fixed, **static, return_lse=True, implementation=implementation
        )
        # Rows without keys have a log-sum-exp of -1e30; that must not drown the sum.
        lse = jnp.where(result.lse > EMPTY_LSE / 2, result.lse, 0)
        total = jnp.sum(result.out * dout, dtype=jnp.float32) + jnp.sum(lse * dlse)
        return total, (result.out, result.lse)

    step = compiled(jax.value_and_grad(run, has_aux=True))
    (_, (out, lse)), gradients = step(arrays, fixed)
    assert out.dtype == query.dtype
    assert all(gradients[name].dtype == x.dtype for name, x in arrays.items())
    return {"out": out, "lse": lse, **gradients}


def assert_close(ours, theirs, tolerance, name=""):
    ours, theirs = wide(ours), wide(theirs)
    assert ours.shape == theirs.shape, name
    empty = theirs == EMPTY_LSE
    np.testing.assert_allclose(ours[empty], EMPTY_LSE, rtol=1e-7)  # float32 has no exact 1e30
    difference = np.abs(ours - theirs)[~empty]
    scale = np.abs(theirs[~empty]).max(initial=0)
    # With one key everything cancels; what is left is rounding of terms of size one.
    scale = scale if scale > 1e-12 else 1.0
    assert np.isfinite(difference).all(), name
    worst = difference.max(initial=0)
    assert worst <= tolerance * scale, f"{name}: {worst:.1e} beside {scale:.1e}"


def check(case, dtype, implementation):
    answers, truth = measured(case, dtype, implementation), expected(case, dtype)
    for name, answer in answers.items():
        assert_close(answer, truth[name], TOLERANCE[dtype], name)


@pytest.mark.parametrize("implementation", SERVED)
@pytest.mark.parametrize("name", BY_NAME)
def test_float32_equals_float64_numpy(name, implementation):
    check(BY_NAME[name], "float32", implementation)


@pytest.mark.parametrize("implementation", SERVED)
@pytest.mark.parametrize(
    "name", [n if n in HALF else pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME]
)
def test_bfloat16_equals_float64_numpy(name, implementation):
    check(BY_NAME[name], "bfloat16", implementation)


@pytest.mark.parametrize("implementation", SERVED)
def test_float64_is_kept(implementation):
    with jax.enable_x64(True):
        check(BY_NAME["mask_dense"], "float64", implementation)


def test_cases_cover_every_kind():
    names = [case.name for case in (*CASES, *WORKLOADS)]
    assert len(set(names)) == len(names)
    assert {case.mask for case in CASES} == {None, *MASKS}
    assert {case.bias for case in CASES} == {None, *BIASES}
    for field, kind in (("mask", "ring"), ("bias", "alibi")):
        with pytest.raises(ValueError, match=f"{field} '{kind}' is unknown"):
            Case("wrong", **{field: kind}).options()


@pytest.mark.parametrize("case", WORKLOADS, ids=lambda case: case.name)
def test_workloads_are_calls(case):
    out = jax.eval_shape(lambda *arrays: attention(*arrays, **case.options()), *case.shapes())
    assert out.shape == (case.b, case.t, case.n, case.hv)


@pytest.mark.parametrize("name", ["dropout", "everything"])
def test_dropout_is_a_function_of_the_key_alone(name):
    case = BY_NAME[name]
    arrays, options = case.arrays(), case.options()
    outs = [attention(*arrays, **options, implementation=i) for i in SERVED]
    assert_close(outs[1], outs[0], TOLERANCE["float32"])
    np.testing.assert_array_equal(outs[0], attention(*arrays, **options, implementation=SERVED[0]))
    options["dropout_key"] = jax.random.key(99)
    assert np.abs(outs[0] - attention(*arrays, **options)).max() > 0.1
    # The probabilities that are returned are those before dropout.
    plain = {k: v for k, v in options.items() if not k.startswith("dropout")}
    a, b = (attention(*arrays, **o, return_probabilities=True) for o in (options, plain))
    np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_dropout_keeps_the_asked_share():
    case = Case("many", t=64, s=128, n=4, k=4, dropout_rate=0.3)
    kept = dropped(case) > 0
    # Five standard deviations of as many independent draws, over all and along every axis.
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 2), (0, 1, 3)):
        share = kept.mean(axis=axes)
        draws = kept.size / np.size(share)
        assert np.abs(share - 0.7).max() < 5 * np.sqrt(0.3 * 0.7 / draws)


def test_probabilities_are_the_weights():
    case = BY_NAME["mask_dense"]
    arrays, options = case.arrays(), case.options()
    result = attention(*arrays, **options, return_probabilities=True, return_lse=True)
    p_bnts = np.asarray(result.probabilities)
    assert p_bnts.dtype == np.float32 and (p_bnts >= 0).all()
    empty = ~np.asarray(options["mask"]).any(axis=-1)
    assert empty.any()
    np.testing.assert_allclose(p_bnts.sum(axis=-1), ~empty, atol=TOLERANCE["float32"])
    np.testing.assert_array_equal(result.lse[empty], np.float32(EMPTY_LSE))
    np.testing.assert_array_equal(np.einsum("btnh->bnth", result.out)[empty], 0)
    mixed = np.einsum("bnts,bsnh->btnh", p_bnts, arrays[2])
    assert_close(result.out, mixed, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", SERVED)
def test_masks_and_biases_broadcast(implementation):
    case = BY_NAME["plain"]
    arrays = case.arrays()
    whole = (case.b, case.n, case.t, case.s)
    rng = np.random.default_rng(0)
    for shape in ((5,), (5, 5), (2, 1, 1), (2, 1, 1, 5), (1, 1, 5, 1), (1,)):
        for name, array in (("mask", rng.random(shape) < 0.7), ("bias", rng.normal(size=shape))):
            array = array if name == "mask" else array.astype(np.float32)
            run = lambda x: attention(*arrays, **{name: x}, implementation=implementation)
            full = jnp.asarray(np.broadcast_to(array, whole))
            assert_close(run(jnp.asarray(array)), run(full), TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_implementation_serves_or_says_why_not(implementation):
    """Each name either answers like the others or refuses with a reason that begins with it."""
    case = BY_NAME["everything"]
    try:
        check(case, "float32", implementation)
    except NotImplementedError as refusal:
        assert implementation not in SERVED
        assert str(refusal).startswith(f"{implementation}: ")


def test_chunked_refuses_to_return_probabilities():
    with pytest.raises(NotImplementedError, match=r"^chunked: .*return_probabilities"):
        attention(*BY_NAME["plain"].arrays(), return_probabilities=True, implementation="chunked")
    # Nothing else stands in the way: somebody serves it.
    result = attention(*BY_NAME["tiled"].arrays(), return_probabilities=True)
    assert result.probabilities.shape == (2, 8, 380, 1100)


QUERY = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32)
KEY = jax.ShapeDtypeStruct((2, 7, 2, 8), jnp.float32)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(query=shape(5, 4, 8)), r"query must have axes \[b,t,n,h\], got shape \(5, 4, 8\)"),
        (dict(value=shape(2, 7, 16)), r"value must have axes"),
        (dict(key=shape(3, 7, 2, 8)), r"key axis b .* has size 3, but query has 2"),
        (dict(value=shape(3, 7, 2, 8)), r"value axis b .* has size 3, but query has 2"),
        (dict(value=shape(2, 6, 2, 8)), r"value axis s .* has size 6, but key has 7"),
        (dict(value=shape(2, 7, 1, 8)), r"value axis k .* has size 1, but key has 2"),
        (dict(key=shape(2, 7, 2, 4)), r"key axis h .* has size 4, but query has 8"),
        (dict(query=shape(2, 5, 3, 8)), r"query axis n .* size 3, not a multiple of .* k = 2"),
        (dict(query=shape(2, 0, 4, 8)), r"query axis t has size 0"),
        (dict(key=shape(2, 7, 2, 8, dtype=jnp.bfloat16)), r"key is bfloat16 but query is float32"),
        (dict(query=shape(2, 5, 4, 8, dtype=jnp.int32)), r"query must be floating, got int32"),
        (dict(mask=shape(5, 6, dtype=bool)), r"mask axis s .* has size 6, expected 1 or 7"),
        (dict(mask=shape(3, 5, 7, dtype=bool)), r"mask axis n .* has size 3, expected 1 or 4"),
        (dict(mask=shape(1, 2, 4, 5, 7, dtype=bool)), r"mask must broadcast to \[b,n,t,s\]"),
        (dict(mask=shape(5, 7)), r"mask must be bool .*, got float32"),
        (dict(bias=shape(4, 6, 7)), r"bias axis t .* has size 6, expected 1 or 5"),
        (dict(bias=shape(5, 7, dtype=jnp.int32)), r"bias must be floating, got int32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message):
    arrays = {"query": QUERY, "key": KEY, "value": KEY, **arrays}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda arrays: attention(**arrays), arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(implementation="flash"), r"'flash' is unknown; choose from .*'reference'"),
        (dict(normalizer="sparsemax2"), r"normalizer 'sparsemax2' is unknown"),
        (dict(scale=float("nan")), r"scale must be a finite Python number"),
        (dict(scale="large"), r"scale must be a finite Python number"),
        (dict(softcap=0.0), r"softcap must be positive"),
        (dict(softcap=-2.0), r"softcap must be positive"),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\)"),
        (dict(dropout_rate=-0.1), r"dropout_rate must be in \[0, 1\)"),
        (dict(dropout_rate=0.1), r"dropout_rate 0.1 needs a dropout_key"),
        (dict(dropout_rate=0.1, dropout_key=jnp.zeros(2, jnp.uint32)), r"one typed key"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q, k: attention(q, k, k, **options), QUERY, KEY)
