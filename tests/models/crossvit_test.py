# SPDX-License-Identifier: Apache-2.0
"""CrossViT: what the fusion may and may not touch, the ablations, stems, rates and refusals."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax
from attnjax.errors import RecipeError
from attnjax.models import crossvit
from attnjax.models.crossvit import FUSIONS, PRESETS, Bridge, CrossViT, Fusion
from attnjax.models.load import abstract_params, build
from attnjax.nn.attention import MultiHeadAttention
from attnjax.nn.blocks import EncoderBlock
from attnjax.nn.norm import LayerNorm
from attnjax.ops import bicubic_resize
from attnjax.weights import flatten, unflatten, write

# Float32 sums in another order.
TOLERANCE = 2e-6
ROUNDING = 1e-5  # a gradient below this part of the largest is nothing but rounding

# Optimising these graphs takes longer than running them.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

DIMS, HEADS = (16, 32), (2, 4)
PATCHES = dict(
    num_classes=3, image_size=(16, 16), patch_size=(4, 8), dims=DIMS, num_heads=HEADS,
    depth=((0, 0, 0), (1, 1, 0)), mlp_ratio=(2.0, 2.0), stem="patches",
)  # fmt: skip
IMAGES = {**PATCHES, "stem": "linear", "image_size": (48, 48), "patch_size": (12, 16)}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def draw(shapes, seed=0):
    """Parameters of the given shapes: normal numbers, scales around 1."""
    rng = np.random.default_rng(seed)

    def values(path, shape):
        # Wide keys would underflow the exponentials of the performer stem.
        size = 0.02 if path.startswith("stem_") else 0.2
        return (size * rng.standard_normal(shape) + path.endswith("/scale")).astype(np.float32)

    return unflatten({path: values(path, leaf.shape) for path, leaf in flatten(shapes).items()})


def inputs_of(model, batch=2, seed=1):
    return {k: normal(seed + i, *x.shape) for i, (k, x) in enumerate(model.example(batch).items())}


@functools.cache
def fusion(kind="cross", depth=0):
    """A fusion module, its parameters and the tokens of two branches (9 and 5 of them)."""
    tokens = (normal(10, 2, 1 + 9, DIMS[0]), normal(11, 2, 1 + 4, DIMS[1]))
    module = Fusion(kind, DIMS, HEADS, depth)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    return compiled(lambda p, x: module.apply({"params": p}, x)), draw(shapes), tokens


@pytest.mark.parametrize(("kind", "depth"), [("cross", 0), ("cross", 2), ("cross_keep", 2)])
def test_cross_attention_passes_patches_bit_identically(kind, depth):
    fuse, params, tokens = fusion(kind, depth)
    fused = fuse(params, tokens)
    for before, after in zip(tokens, fused, strict=True):
        np.testing.assert_array_equal(after[:, 1:], before[:, 1:])
        assert np.abs(after[:, 0] - before[:, 0]).max() > 0.01


@pytest.mark.parametrize("i", [0, 1])
def test_class_token_does_not_depend_on_the_order_of_patches(i):
    fuse, params, tokens = fusion()
    cls = fuse(params, tokens)[i][:, 0]
    order = np.random.default_rng(0).permutation(tokens[1 - i].shape[1] - 1)
    shuffled = list(tokens)
    shuffled[1 - i] = np.concatenate([tokens[1 - i][:, :1], tokens[1 - i][:, 1:][:, order]], axis=1)
    np.testing.assert_allclose(fuse(params, tuple(shuffled))[i][:, 0], cls, atol=TOLERANCE)
    # It reads those patches, and neither its own nor the other class token.
    changed = list(tokens)
    changed[1 - i] = tokens[1 - i].copy()
    changed[1 - i][:, 2] = normal(12, DIMS[1 - i])
    assert np.abs(fuse(params, tuple(changed))[i][:, 0] - cls).max() > 1e-3
    blind = list(tokens)
    blind[i] = np.concatenate([tokens[i][:, :1], -tokens[i][:, 1:]], axis=1)
    blind[1 - i] = np.concatenate([-tokens[1 - i][:, :1], tokens[1 - i][:, 1:]], axis=1)
    np.testing.assert_array_equal(fuse(params, tuple(blind))[i][:, 0], cls)


@pytest.mark.parametrize("i", [0, 1])
def test_class_token_is_the_first_row_of_full_self_attention(i):
    fuse, params, tokens = fusion()
    name, other = crossvit.BRANCHES[i], 1 - i
    p = lambda part: {"params": params[f"{part}_{name}"]}
    cls = compiled(Bridge(DIMS[other]).apply)(p("project"), tokens[i][:, :1])
    joint = jnp.concatenate([cls, tokens[other][:, 1:]], axis=1)
    cross = params[f"cross_{name}"]
    normed = compiled(LayerNorm().apply)({"params": cross["norm"]}, joint)
    full = compiled(MultiHeadAttention(HEADS[other]).apply)({"params": cross["attention"]}, normed)
    assert full.shape == joint.shape
    expected = compiled(Bridge(DIMS[i]).apply)(p("revert"), cls + full[:, :1])
    np.testing.assert_allclose(fuse(params, tokens)[i][:, :1], expected, atol=TOLERANCE)


def test_both_branches_read_what_was_there_before_the_fusion():
    """Simultaneous exchange: swapping the branches' roles must not change either result."""
    fuse, params, tokens = fusion()
    whole = fuse(params, tokens)
    for i in (0, 1):
        alone = list(tokens)
        alone[1 - i] = np.concatenate([0 * tokens[1 - i][:, :1], tokens[1 - i][:, 1:]], axis=1)
        np.testing.assert_array_equal(fuse(params, tuple(alone))[i], whole[i])


@functools.cache
def ablation(kind):
    """Logits and gradients of a fusion variant."""
    model = CrossViT(**PATCHES, fusion=kind)
    params, batch = draw(abstract_params(model)), inputs_of(model)

    def loss(params):
        output = model.apply({"params": params}, **batch)
        return jnp.sum(output.logits**2), output

    step = compiled(jax.value_and_grad(loss, has_aux=True))
    (_, output), gradients = step(params)
    return output, flatten(gradients)


@pytest.mark.parametrize(
    "kind",
    [f if f in ("cls", "cross") else pytest.param(f, marks=pytest.mark.slow) for f in FUSIONS],
)
def test_every_fusion_trains_all_its_parameters(kind):
    output, gradients = ablation(kind)
    assert np.isfinite(output.logits).all()
    largest = max(np.abs(g).max() for g in gradients.values())
    for path, gradient in gradients.items():
        inert = any(re.search(pattern, path) for pattern in crossvit.INERT)
        assert (np.abs(gradient).max() <= ROUNDING * largest) == inert, path
        if path.startswith("fusion") and "/cross_" in path:
            # Not even rounding: the key bias is never added.
            assert gradient.any() != inert, path


def test_fusions_differ():
    logits = {kind: ablation(kind)[0].logits for kind in FUSIONS}
    # With one fusion block per stage nothing is stacked, and keeping patches changes nothing.
    np.testing.assert_array_equal(logits.pop("cross_keep"), logits["cross"])
    kinds = list(logits)
    for n, a in enumerate(kinds):
        for b in kinds[n + 1 :]:
            assert np.abs(logits[a] - logits[b]).max() > 1e-3, (a, b)


def test_stacked_fusions_differ():
    fuse, params, tokens = fusion("cross", 2)
    keep, same, _ = fusion("cross_keep", 2)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    # The second block of "cross" sees one token: its attention is a linear map, whatever the query.
    changed = jax.tree.map(np.copy, params)
    changed["cross_fine_1"]["attention"]["query"]["kernel"] += 1
    np.testing.assert_array_equal(fuse(changed, tokens)[0], fuse(params, tokens)[0])
    assert np.abs(keep(changed, tokens)[0] - keep(params, tokens)[0]).max() > 1e-3
    assert np.abs(keep(params, tokens)[0] - fuse(params, tokens)[0]).max() > 1e-3


def test_late_ensemble_averages_two_lone_branches():
    output, _ = ablation("none")
    mean = (output.aux["fine_logits"] + output.aux["coarse_logits"]) / 2
    np.testing.assert_allclose(output.logits, mean, atol=TOLERANCE)
    model = CrossViT(**PATCHES, fusion="none")
    params, batch = draw(abstract_params(model)), inputs_of(model)
    for name in crossvit.BRANCHES:
        alone = CrossViT(**PATCHES, fusion=name)
        assert set(alone.example(1)) == {name}
        shapes = abstract_params(alone)
        part = {key: params[key] for key in shapes}
        logits = compiled(alone.apply)({"params": part}, **{name: batch[name]}).logits
        np.testing.assert_allclose(logits, output.aux[f"{name}_logits"], atol=TOLERANCE)


def reference_rates(depth, rate):
    """The reference's bookkeeping: a slice of the linear schedule per multi-scale block."""
    dpr = np.linspace(0, rate, sum(sum(stage[-2:]) for stage in depth)).tolist()
    blocks, fusions, start = [], [], 0
    for stage in depth:
        mine = dpr[start : start + max(stage[:-1]) + stage[-1]]
        blocks += [mine[d] for branch in stage[:-1] for d in range(branch)]
        fusions += [mine[-1]] * 2 * max(1, stage[-1])
        start += max(stage[:-1]) + stage[-1]
    return blocks, fusions


@pytest.mark.parametrize("depth", ["tiny", "15", "18", ((1, 2, 1), (2, 3, 2)), ((2, 2, 0),) * 2])
def test_drop_path_rates_follow_the_reference(depth):
    depth = PRESETS[depth]["depth"] if isinstance(depth, str) else depth
    model = CrossViT(**{**PATCHES, "depth": depth}, drop_path=0.1)
    blocks, fusions = [], []

    def record(call, arguments, keywords, context):
        if context.method_name == "__call__":
            if isinstance(context.module, EncoderBlock):
                blocks.append(context.module.drop_path)
            if isinstance(context.module, crossvit.CrossAttention):
                fusions.append(context.module.drop_path)
        return call(*arguments, **keywords)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs_of(model, 1)))
    expected_blocks, expected_fusions = reference_rates(depth, 0.1)
    np.testing.assert_allclose(blocks, expected_blocks, rtol=1e-12)
    np.testing.assert_allclose(fusions, expected_fusions, rtol=1e-12)
    assert fusions[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("stem", ["dagger", "t2t", "performer"])
def test_stems_make_the_published_numbers_of_tokens(stem):
    for size in ((240, 224), (408, 384)):
        model = CrossViT(stem=stem, image_size=size, depth=((1, 1, 0),))
        shapes = flatten(abstract_params(model))
        tokens = [shapes[f"positions_{name}"].shape[1] - 1 for name in crossvit.BRANCHES]
        assert tokens == {240: [400, 196], 408: [1156, 576]}[size[0]]


@pytest.mark.parametrize("stem", [pytest.param("t2t", marks=pytest.mark.slow), "performer"])
def test_hybrid_stems_train_all_but_the_random_projection(stem):
    model = build("crossvit", **{**IMAGES, "fusion": "fine", "stem": stem})
    params, batch = draw(abstract_params(model)), inputs_of(model)
    loss = lambda p: jnp.sum(model.apply({"params": p}, **batch).logits ** 2)
    gradients = flatten(compiled(jax.grad(loss))(params))
    stems = {path: g for path, g in gradients.items() if path.startswith("stem_")}
    assert any("random_projection" in path for path in stems) == (stem == "performer")
    for path, gradient in stems.items():
        assert np.isfinite(gradient).all()
        frozen = any(re.search(pattern, path) for pattern in crossvit.FROZEN)
        assert gradient.any() != frozen, path


def test_hybrid_stems_honour_the_attention_implementation():
    model = build("crossvit", **{**IMAGES, "stem": "t2t", "attention_implementation": "nonesuch"})
    with pytest.raises(ValueError, match="'nonesuch' is unknown"):
        abstract_params(model)


def test_branch_filters_show_each_branch_its_band():
    model = build("crossvit", **IMAGES, fusion="none", branch_filters=("highpass", "lowpass"))
    params = draw(abstract_params(model))
    run = compiled(lambda x: model.apply({"params": params}, x).aux)
    image = normal(5, 2, 48, 48, 3)
    plain = run(image)
    # Waves that stay waves when they are mirrored at the border.
    wave = lambda cycles: np.cos(np.pi * cycles * (np.arange(48) + 0.5) / 48)[None, None, :, None]
    for cycles, blind, sees in ((1, "fine", "coarse"), (40, "coarse", "fine")):
        changed = run((image + wave(cycles)).astype(np.float32))
        moved = {
            name: np.abs(changed[f"{name}_logits"] - plain[f"{name}_logits"]).max()
            for name in (blind, sees)
        }
        assert moved[blind] < moved[sees] / 100, (cycles, moved)


def test_coarse_branch_sees_a_resized_or_a_cropped_picture():
    sizes = {**IMAGES, "image_size": (60, 48), "fusion": "coarse"}
    image = normal(6, 2, 60, 60, 3)
    for resize, seen in (
        ("bicubic", bicubic_resize(jnp.asarray(image), 48, 48)),
        ("crop", image[:, 6:54, 6:54]),
    ):
        model = CrossViT(**sizes, resize=resize)
        same = CrossViT(**{**sizes, "image_size": (48, 48)})
        params = draw(abstract_params(model))
        np.testing.assert_allclose(
            compiled(model.apply)({"params": params}, image).logits,
            compiled(same.apply)({"params": params}, seen).logits,
            atol=TOLERANCE,
        )


def test_recomputation_changes_nothing():
    fields = {**PATCHES, "fusion": "fine"}
    plain, again = (CrossViT(**fields, remat=remat) for remat in ("none", "blocks"))
    params, batch = draw(abstract_params(plain)), inputs_of(plain)
    results = []
    for model in (plain, again):
        loss = lambda p: jnp.sum(model.apply({"params": p}, **batch).logits ** 2)
        traced = compiled(jax.grad(loss)).trace(params)
        assert ("remat" in str(traced.jaxpr)) == (model.remat == "blocks")
        results.append(traced.lower().compile()(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_initial_values():
    model = build("crossvit", **{**IMAGES, "depth": ((1, 1, 0),)})
    init = compiled(lambda key, x: model.init(key, x)["params"])
    params = init(jax.random.key(0), jnp.zeros((1, 48, 48, 3)))
    for path, leaf in flatten(params).items():
        if path.endswith("/scale"):
            assert (leaf == 1).all(), path
        elif path.startswith("stem_"):
            bound = 1 / np.sqrt(3 * (12 if "fine" in path else 16) ** 2)
            assert 0 < np.abs(leaf).max() <= bound, path
        elif path.endswith("/bias"):
            assert not leaf.any(), path
        elif leaf.size > 200:
            # Five standard deviations of the estimate from that many draws.
            assert abs(leaf.std() / 0.02 - 1) < 5 / np.sqrt(2 * leaf.size), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": (3, 4)}, "num_heads=3 of the fine branch does not divide dims=16"),
        ({"num_heads": (2, 5)}, "num_heads=5 of the coarse branch does not divide dims=32"),
        ({"patch_size": (8, 16), "stem": "dagger"}, "stem 'dagger' knows only 12 and 16"),
        ({"patch_size": (12, 8), "stem": "t2t"}, "stem 't2t' knows only 12 and 16"),
        ({"image_size": (50, 48)}, "patch_size=12 of the fine branch does not divide 50"),
        ({"image_size": (48, 64), "resize": "crop"}, "cannot crop to a larger size"),
        ({"dims": (16, 32, 64)}, "dims=.*: needs one entry per branch"),
        ({"depth": ((1, 1),)}, "each entry is"),
        ({"fusion": "croos"}, "did you mean 'cross'"),
        ({"stem": "conv"}, "stem='conv'"),
        ({"resize": "nearest"}, "resize='nearest'"),
        ({"remat": "all"}, "remat='all'"),
        ({"branch_filters": ("highpass",)}, "branch_filters=.*: two of"),
        ({"branch_filters": ("highpass", "midpass")}, "branch_filters=.*: two of"),
        ({"num_clases": 3}, "did you mean 'num_classes'"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        build("crossvit", **{**IMAGES, **changes})


@pytest.mark.parametrize(
    ("fields", "batch", "message"),
    [
        (IMAGES, {"image": (2, 40, 40, 3)}, r"image has shape \(2, 40, 40, 3\), expected \[b, 48"),
        (IMAGES, {"image": (2, 48, 48, 1)}, r"expected \[b, 48, 48, 3\]"),
        (IMAGES, {}, "the batch lacks 'image'"),
        (PATCHES, {"fine": (2, 16, 48)}, "the batch lacks 'coarse'"),
        (PATCHES, {"fine": (2, 16, 48), "coarse": (2, 5, 192)}, r"coarse has shape \(2, 5, 192\)"),
    ],
)
def test_wrong_inputs_are_refused(fields, batch, message):
    model = build("crossvit", **fields)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in batch.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda **x: model.init(jax.random.key(0), **x), **arrays)


def test_load_refuses_unknown_names():
    with pytest.raises(RecipeError, match="did you mean 'crossvit'"):
        attnjax.load("crossvitt")
    with pytest.raises(RecipeError, match="did you mean '18-dagger'"):
        attnjax.load("crossvit", "18dagger")


def test_load_fits_position_tables_of_another_size(tmp_path):
    """The step from 240/224 to 408/384, in small: only the tables change, class token apart."""
    old = build("crossvit", **IMAGES)
    params = draw(abstract_params(old))
    path = tmp_path / "48.safetensors"
    write(path, flatten(params), {})
    sizes = {**IMAGES, "image_size": (96, 80)}
    with pytest.raises(RecipeError, match=r"positions_fine \[1,17,16\] in the file, \[1,65,16\]"):
        attnjax.load("crossvit", weights=str(path), **sizes)
    model, resized = attnjax.load("crossvit", weights=str(path), resize_positions=True, **sizes)
    assert model.grids == (8, 5)
    before, after = flatten(params), flatten(resized)
    assert set(before) == set(after)
    for name, leaf in before.items():
        if not name.startswith("positions_"):
            np.testing.assert_array_equal(after[name], leaf)
    for branch, old_side, side in (("fine", 4, 8), ("coarse", 3, 5)):
        table, new = before[f"positions_{branch}"], after[f"positions_{branch}"]
        np.testing.assert_array_equal(new[:, 0], table[:, 0])
        grid = jnp.asarray(table[:, 1:].reshape(1, old_side, old_side, -1))
        expected = bicubic_resize(grid, side, side).reshape(1, side * side, -1)
        np.testing.assert_allclose(new[:, 1:], expected, atol=TOLERANCE)
    # A wrong width is no other image size.
    with pytest.raises(RecipeError, match="does not fit the model"):
        attnjax.load(
            "crossvit", weights=str(path), resize_positions=True, **{**sizes, "dims": (32, 32)}
        )
