# SPDX-License-Identifier: Apache-2.0
"""What the attention core promises besides its numbers, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention
from attnjax.ops.cases import BIASES, CASES, MASKS, WORKLOADS, Case
from attnjax.ops.dropout import dropout_factor, dropout_seed

SERVED = ("reference", "chunked")
EMPTY_LSE = -1e30

TOLERANCE = 2e-5
"""Largest difference over largest entry, float32."""

BY_NAME = {case.name: case for case in CASES}


def assert_close(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def test_cases_cover_every_kind():
    names = [case.name for case in (*CASES, *WORKLOADS)]
    assert len(set(names)) == len(names)
    assert {case.mask for case in CASES} == {None, *MASKS}
    assert {case.bias for case in CASES} == {None, *BIASES}
    for field, kind in (("mask", "ring"), ("bias", "cone")):
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
    assert_close(outs[1], outs[0])
    np.testing.assert_array_equal(outs[0], attention(*arrays, **options, implementation=SERVED[0]))
    options["dropout_key"] = jax.random.key(99)
    assert np.abs(outs[0] - attention(*arrays, **options)).max() > 0.1
    # The probabilities that are returned are those before dropout.
    plain = {k: v for k, v in options.items() if not k.startswith("dropout")}
    a, b = (attention(*arrays, **o, return_probabilities=True) for o in (options, plain))
    np.testing.assert_array_equal(a.probabilities, b.probabilities)


def test_dropout_keeps_the_asked_share():
    index = np.indices((8, 64, 128)).astype(np.uint32)
    factor = dropout_factor(dropout_seed(jax.random.key(3)), 0.3, *index)
    kept = np.asarray(factor) > 0
    np.testing.assert_allclose(factor, kept / 0.7, rtol=1e-6)
    # Five standard deviations of as many independent draws, over all and along every axis.
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        share = kept.mean(axis=axes)
        draws = kept.size / np.size(share)
        assert np.abs(share - 0.7).max() < 5 * np.sqrt(0.3 * 0.7 / draws)


def test_probabilities_are_the_weights():
    case = BY_NAME["mask_dense"]
    arrays, options = case.arrays(), case.options()
    result = attention(*arrays, **options, return_probabilities=True, return_lse=True)
    p_bnts = np.asarray(result.probabilities)
    assert p_bnts.dtype == np.float32 and (p_bnts >= 0).all()
    empty = ~np.asarray(options["mask"].dense(case.t, case.s)).any(axis=-1)
    assert empty.any()
    np.testing.assert_allclose(p_bnts.sum(axis=-1), ~empty, atol=TOLERANCE)
    np.testing.assert_array_equal(result.lse[empty], np.float32(EMPTY_LSE))
    np.testing.assert_array_equal(np.einsum("btnh->bnth", result.out)[empty], 0)
    value_bsnh = np.repeat(arrays[2], case.n // case.k, axis=2)
    mixed = np.einsum("bnts,bsnh->btnh", p_bnts, value_bsnh)
    assert_close(result.out, mixed)


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("chunked", marks=pytest.mark.slow)]
)
def test_masks_and_biases_broadcast(implementation):
    case = BY_NAME["plain"]
    arrays = case.arrays()
    whole = (case.b, case.n, case.t, case.s)
    rng = np.random.default_rng(0)
    for shape in ((9,), (6, 9), (4, 1, 1), (2, 1, 1, 9), (1, 1, 6, 1), (1,)):
        for name, array in (("mask", rng.random(shape) < 0.7), ("bias", rng.normal(size=shape))):
            array = array if name == "mask" else array.astype(np.float32)
            run = lambda x: attention(*arrays, **{name: x}, implementation=implementation)
            full = jnp.asarray(np.broadcast_to(array, whole))
            assert_close(run(jnp.asarray(array)), run(full))


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
