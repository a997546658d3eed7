# SPDX-License-Identifier: Apache-2.0
"""Parts of a call, merged, are the whole call: masks, outputs, gradients and dropout."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, merge_partials, pallas_gpu, pallas_tpu
from attnjax.ops.attention import Call, check_bias, check_mask, serve, serve_gradients
from attnjax.ops.cases import MASKS, Case
from attnjax.ops.dropout import Place, whole_place
from attnjax.ops.mask import Runs

T = 12
CASE = Case("parts", b=2, t=T, s=T, n=4, k=2, h=8, hv=6)
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


def draw(name):
    return MASKS[name](CASE, np.random.default_rng(zlib.crc32(name.encode())))


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_pick_out_queries_and_keys(name, is_traced):
    rng = np.random.default_rng(0)
    visibility = draw(name).visibility(T, T)
    whole = np.broadcast_to(visibility.dense(T, T), (2, 4, T, T))
    queries = rng.permutation(T)[:7]
    keys = np.sort(rng.permutation(T)[:5])
    # Two positions that are not there, at the end of each.
    at = [np.append(x, [T, T + 3]).astype(np.int32) for x in (queries, keys)]

    def take(queries, keys):
        part = visibility.take(queries, keys, T, T)
        return part.dense(9, 7), part.block_map(9, 7, 4, 3), part.tile(0, 0, 9, 7)

    dense, kinds, tile = jax.jit(take)(*at) if is_traced else take(*at)
    dense = np.broadcast_to(dense, (2, 4, 9, 7))
    np.testing.assert_array_equal(dense[..., :7, :5], whole[..., queries[:, None], keys])
    assert not dense[..., 7:, :].any() and not dense[..., 5:].any()
    np.testing.assert_array_equal(np.broadcast_to(tile, dense.shape), dense)
    for i, j in np.ndindex(3, 3):
        cut = dense[..., 4 * i : 4 * i + 4, 3 * j : 3 * j + 3]
        kind = np.broadcast_to(kinds[..., i, j], (2, 4))
        assert not cut[kind == 0].any() and cut[kind == 2].all()


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("name", ["heads", "documents", "predicate", "blocks", "dense", "segments"])
def test_masks_pick_out_runs(name, is_traced):
    visibility = draw(name).visibility(T, T)
    # The second run of keys and the last one of queries end beyond the end.
    queries, keys = np.array([7, 2, 9], np.int32), np.array([1, 8], np.int32)
    sizes = (4, 5)

    def take(*starts, as_runs):
        at = [Runs(start, size) for start, size in zip(starts, sizes, strict=True)]
        return visibility.take(*(at if as_runs else (x.positions for x in at)), T, T).dense(12, 10)

    take_runs = functools.partial(take, as_runs=True)
    found = jax.jit(take_runs)(queries, keys) if is_traced else take_runs(queries, keys)
    np.testing.assert_array_equal(found, take(queries, keys, as_runs=False))


@pytest.mark.parametrize("name", MASKS)
def test_masks_restrict_to_heads(name):
    visibility = draw(name).visibility(T, T)
    whole = np.broadcast_to(visibility.dense(T, T), (2, 4, T, T))
    for start in (1, jnp.int32(2)):
        part = visibility.heads(start, 2).dense(T, T)
        begin = int(start)
        np.testing.assert_array_equal(
            np.broadcast_to(part, (2, 2, T, T)), whole[:, begin : begin + 2]
        )


def make_call(arrays, mask, *, bias=None, rate=0.0, softcap=None):
    query, key, value = arrays
    b, t, n, h = query.shape
    s = key.shape[1]
    return Call(
        query=query, key=key, value=value, visibility=check_mask(mask, b, n, t, s),
        bias=check_bias(bias, (b, n, t, s)), scale=h**-0.5, softcap=softcap, normalizer=None,
        extra_logit=None, return_lse=True, probability_heads=(), score_heads=(), statistics=(),
        edit=None, dropout_rate=rate, dropout_key=jax.random.key(5) if rate else None,
        is_partial=True,
    )  # fmt: skip


def cut(call, keys):
    """Return the part of a call that has only some of its keys."""
    b, n, t, s = call.scores_shape
    place = whole_place(b, n, t, s)
    bias = call.bias
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., keys]
    return dataclasses.replace(
        call, key=call.key[:, keys], value=call.value[:, keys], bias=bias,
        visibility=call.visibility.take(None, keys, t, s),
        place=Place(place.heads, place.queries, place.keys[keys]),
    )  # fmt: skip


def served(name, call):
    if name == "pallas_gpu":
        return pallas_gpu.attend(call, interpret=True)
    return serve(call, name)


def differentiated(name, call, results, cotangents):
    if name == "pallas_gpu":
        return pallas_gpu.gradients(call, results, cotangents, interpret=True)
    return serve_gradients(call, results, cotangents, name)


EMULATED = pytest.param("pallas_gpu", marks=pytest.mark.slow)
"""Emulating the kernels for GPUs takes half a minute for each case."""


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", ["plain", "bias", "dropout"])
@pytest.mark.parametrize("name", ["reference", "chunked", "pallas_tpu", EMULATED])
def test_parts_add_up_to_the_whole(name, options, dtype):
    if options == "dropout" and name.startswith("pallas"):
        pytest.skip("the kernels refuse dropout of a part, see below")
    arrays = CASE.arrays(1, dtype)
    rng = np.random.default_rng(2)
    bias = jnp.asarray(rng.standard_normal((1, 4, T, T)), dtype) if options == "bias" else None
    rate = 0.3 if options == "dropout" else 0.0
    visible = MASKS["documents_full"](CASE, np.random.default_rng(3))
    call = make_call(arrays, visible, bias=bias, rate=rate, softcap=2.0)

    def whole(query, key, value, bias):
        output = attention(
            query, key, value, mask=visible, bias=bias, softcap=2.0, return_lse=True,
            implementation="reference", dropout_rate=rate, dropout_key=call.dropout_key,
        )  # fmt: skip
        return output.out, output.lse

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (*arrays, bias))
    (out, lse), pull = jax.vjp(whole, *wide)
    cotangents = tuple(jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (out, lse))
    expected = pull(cotangents)

    with pallas_tpu.interpreted():
        parts = [cut(call, np.array(keys)) for keys in ([0, 1, 5, 9, 11], [2, 3, 4, 6, 7, 8, 10])]
        pieces = [served(name, part) for part in parts]
        assert all(piece.out.dtype == jnp.float32 for piece in pieces)
        results = merge_partials([(piece.out, piece.lse) for piece in pieces])
        for got, want in zip(results, (out, lse), strict=True):
            np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])
        found = [differentiated(name, part, (out, lse), cotangents) for part in parts]
    dquery = sum(gradient[0] for gradient in found)
    dkey, dvalue = (jnp.zeros_like(x) for x in expected[1:3])
    dbias = None if bias is None else jnp.zeros(bias.shape)
    for keys, gradient in zip(([0, 1, 5, 9, 11], [2, 3, 4, 6, 7, 8, 10]), found, strict=True):
        at = np.array(keys)
        assert all(x.dtype == jnp.float32 for x in gradient[:3])
        dkey, dvalue = dkey.at[:, at].add(gradient[1]), dvalue.at[:, at].add(gradient[2])
        if bias is not None:
            dbias = dbias.at[..., at].add(gradient[3].astype(jnp.float32))
    for got, want in zip((dquery, dkey, dvalue, dbias), expected, strict=True):
        if want is not None:
            scale = float(jnp.abs(want).max())
            np.testing.assert_allclose(got, want, atol=TOLERANCE[dtype] * scale)


def test_kernels_refuse_dropout_of_a_part():
    call = cut(make_call(CASE.arrays(1), None, rate=0.2), np.arange(4))
    with pallas_tpu.interpreted(), pytest.raises(NotImplementedError, match="place"):
        serve(call, "pallas_tpu")
    with pytest.raises(NotImplementedError, match="place"):
        pallas_gpu.attend(call, interpret=True)


def test_cudnn_refuses_gradients_of_a_part():
    call = make_call(CASE.arrays(1), None)
    with pytest.raises(NotImplementedError, match="cudnn"):
        serve_gradients(call, (call.query, None), (call.query, None), "cudnn")
