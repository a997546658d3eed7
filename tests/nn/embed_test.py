# SPDX-License-Identifier: Apache-2.0
"""Stems: shapes, initial values and the order of patches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.embed import ConvStem, PatchEmbed, TokensToToken, TokenTransformer
from attnjax.nn.vision import extract_patches

# Float32 sums of a few hundred terms in another order.
TOLERANCE = 1e-5


def test_patch_embed_is_a_strided_convolution():
    image = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    module = PatchEmbed(5, 4)
    params = module.init(jax.random.key(1), image)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    conv = jax.lax.conv_general_dilated(
        image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = conv.reshape(2, 9, 5) + bias
    np.testing.assert_allclose(module.apply(params, image), expected, atol=TOLERANCE)


def test_patch_embed_refuses_a_size_it_does_not_divide():
    with pytest.raises(ValueError, match="patch size 5 does not divide an image of 12x12"):
        PatchEmbed(5, 5).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))


def test_initial_values_follow_the_fan_in():
    module = PatchEmbed(64, 4)
    params = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    for leaf in params.values():
        assert 0.95 < np.abs(leaf).max() * np.sqrt(48) <= 1


@pytest.mark.parametrize(("patch", "side"), [(12, 240), (16, 224), (12, 48), (16, 48)])
def test_conv_stems_reduce_by_the_patch_size(patch, side):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    for module in (ConvStem(16, patch), TokensToToken(16, patch, "performer")):
        out, _ = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), image)
        assert out.shape == (1, (side // patch) ** 2, 16)


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 4, 2), (3, 3, 1), (3, 1, 1)])
def test_extract_patches_orders_channels_outermost(size, stride, padding):
    image = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
    ours = extract_patches(image, size, stride, padding)
    expected = jax.lax.conv_general_dilated_patches(
        image, (size, size), (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["t2t", "performer"])
def test_token_stems_capture_attention_that_sums_to_one(kind):
    image = jax.random.normal(jax.random.key(0), (1, 24, 24, 3))
    module = TokensToToken(16, 12, kind)
    params = module.init(jax.random.key(1), image)
    _, captured = module.apply(params, image, mutable=["attention"])
    maps = jax.tree.leaves(captured)
    assert [m.shape for m in maps] == [(1, 1, 36, 36), (1, 1, 4, 4)]
    for m in maps:
        np.testing.assert_allclose(m.sum(-1), 1, atol=TOLERANCE)


def token_by_hand(p, x, kind):
    """The token transformer in float64, from its formula: values on the skip path."""
    norm = lambda x, q: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"]
        + q["bias"]
    )
    affine = lambda x, q: (
        x @ q["kernel"].reshape(q["kernel"].shape[0], -1) + np.ravel(q.get("bias", 0.0))
    )
    erf = np.vectorize(math.erf)
    normal = norm(x, p["attention_norm"])
    query, key, value = (affine(normal, p["attention"][n]) for n in ("query", "key", "value"))
    if kind == "t2t":
        scores = np.einsum("bth,bsh->bts", query, key) / math.sqrt(x.shape[-1])
        weights = np.exp(scores)
    else:
        w = p["random_projection"]
        phi = lambda x: np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2) / math.sqrt(len(w))
        weights = np.einsum("btm,bsm->bts", phi(query), phi(key))
    weights /= weights.sum(-1, keepdims=True) + (1e-8 if kind == "performer" else 0)
    out = p["attention"]["out"]
    x = value + np.einsum("bts,bsh->bth", weights, value) @ out["kernel"][0] + out["bias"]
    hidden = affine(norm(x, p["mlp_norm"]), p["mlp"]["up"])
    return x + affine(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, p["mlp"]["down"])


@pytest.mark.parametrize("kind", ["t2t", "performer"])
def test_token_transformer_equals_its_formula(kind):
    """With keys of a size at which attention matters, unlike in the stored logits."""
    module = TokenTransformer(features=8, kind=kind)
    x = jax.random.normal(jax.random.key(0), (2, 9, 12))
    shapes = jax.eval_shape(module.init, jax.random.key(1), x)["params"]
    rng = np.random.default_rng(0)
    size = {"t2t": 0.6, "performer": 0.3}[kind]
    params = jax.tree.map(lambda leaf: size * rng.standard_normal(leaf.shape, np.float32), shapes)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
    found, captured = module.apply({"params": params}, x, mutable=["attention"])
    np.testing.assert_allclose(found, token_by_hand(*wide, kind), atol=TOLERANCE)
    # The attention is neither flat nor lost beside the small number that guards the division.
    (weights,) = jax.tree.leaves(captured)
    assert weights.std() > 0.02
    flat = {**params, "attention": {**params["attention"]}}
    flat["attention"]["query"] = jax.tree.map(jnp.zeros_like, params["attention"]["query"])
    assert np.abs(module.apply({"params": flat}, x) - found).max() > 100 * TOLERANCE
