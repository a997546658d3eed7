# SPDX-License-Identifier: Apache-2.0
"""What CrossViT costs: counted by hand, in the traced program, and in what XLA compiles.

Nothing here runs; programs are traced or compiled for shapes.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from attnjax.models.crossvit import FUSIONS, PRESETS, STEMS, Fusion
from attnjax.models.load import abstract_params, build

# XLA also counts norms, softmax and activations, and leaves out the zeros that pad a convolution.
ELEMENTWISE = 0.03
CURVATURE = 1e-3  # of the number of operations over the number of tokens, relative
SLACK = 1.35  # memory per token: the allocator packs differently at every size

PATCHES = (196, 1156, 4096)
DIMS, HEADS = (192, 384), (6, 6)


def products(jaxpr) -> int:
    """Multiply-adds of all matrix products and convolutions of a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars]
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += out * math.prod(shapes[1]) // shapes[1][features]
        repeats = equation.params.get("length", 1)
        total += repeats * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


def resize_products(old, new, channels, batch=1):
    """Multiply-adds of a separable resize of square pictures: rows first, then columns."""
    return batch * channels * (new * old * old + new * old * new) if old != new else 0


def traced(model):
    """The forward pass as a traced program."""
    forward = jax.jit(lambda p, batch: model.apply({"params": p}, **batch).logits)
    return forward.trace(abstract_params(model), model.example(1))


@pytest.mark.parametrize(
    "preset",
    [p if p in ("tiny", "18-dagger") else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS],
)
def test_flops_of_presets(preset):
    model = build("crossvit", preset, attention_implementation="reference")
    program = traced(model)
    resize = 2 * resize_products(*model.image_size, 3)
    assert 2 * products(program.jaxpr.jaxpr) == model.flops() + resize
    counted = program.lower().cost_analysis()["flops"]
    assert counted == pytest.approx(model.flops() + resize, rel=ELEMENTWISE)


@pytest.mark.parametrize(
    ("stem", "fusion"), [(s, "cross") for s in STEMS] + [("linear", f) for f in FUSIONS]
)
def test_flops_of_stems_and_fusions(stem, fusion):
    depth = ((1, 2, 1), (1, 2, 2))
    model = build(
        "crossvit", "9", stem=stem, fusion=fusion, depth=depth, image_size=(192, 192),
        attention_implementation="reference",
    )  # fmt: skip
    grids = 0
    if fusion == "pairwise":
        grids = resize_products(16, 12, 256) + resize_products(12, 16, 256)
    assert 2 * products(traced(model).jaxpr.jaxpr) == model.flops() + 2 * grids


@functools.cache
def fusion(kind, patches, backward=False, implementation="reference"):
    """A fusion block over two branches of so many patches each, traced for one example."""
    module = Fusion(kind, DIMS, HEADS, implementation=implementation)
    tokens = tuple(jax.ShapeDtypeStruct((1, 1 + patches, d), jnp.float32) for d in DIMS)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)

    def loss(params, tokens):
        return sum(jnp.sum(x**2) for x in module.apply(params, tokens))

    function = jax.grad(loss, argnums=(0, 1)) if backward else module.apply
    return jax.jit(function).trace(params, tokens)


@functools.cache
def compiled(*arguments, **keywords):
    # The level concerns the machine code, not the arrays of the program.
    quick = {"xla_backend_optimization_level": 0}
    return fusion(*arguments, **keywords).lower().compile(compiler_options=quick)


def flops_of(*arguments):
    """XLA's count, before the CPU backend hides products in library calls that it cannot count."""
    return fusion(*arguments).lower().cost_analysis()["flops"]


def bytes_of(*arguments, **keywords):
    return compiled(*arguments, **keywords).memory_analysis().temp_size_in_bytes


def buffers(*arguments):
    """Shapes of all arrays in the compiled program."""
    text = compiled(*arguments).as_text()
    found = re.findall(r"\b(?:f32|bf16|f16|pred|s32|u32)\[([\d,]*)\]", text)
    return {tuple(map(int, sizes.split(","))) for sizes in found if sizes}


def squares(shapes, patches):
    """Buffers with two axes as long as a sequence of tokens, or of patches, or of both branches."""
    lengths = (patches, patches + 1, 2 * (patches + 1))
    return [shape for shape in shapes if sum(n in lengths for n in shape) > 1]


def bend(values):
    """How much steeper the second of two chords is than the first: 0 for a line."""
    (a, b, c), (x, y, z) = values, PATCHES
    return (c - b) / (z - y) / ((b - a) / (y - x)) - 1


@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cross_attention_is_linear_in_the_tokens(backward):
    assert abs(bend([flops_of("cross", n, backward) for n in PATCHES])) < CURVATURE
    memory = [bytes_of("cross", n, backward) / (n + 1) for n in PATCHES]
    assert memory[2] < SLACK * memory[1] < SLACK**2 * memory[0]
    for n in PATCHES:
        shapes = buffers("cross", n, backward)
        assert not squares(shapes, n)
        # Nothing is larger than the tokens of the wide branch, or than a weight.
        assert max(map(math.prod, shapes)) <= max((n + 1) * DIMS[1], DIMS[1] ** 2)


def test_all_attention_is_quadratic_in_the_tokens():
    lengths = np.asarray([2 * (n + 1) for n in PATCHES])
    flops = np.asarray([flops_of("all_attention", n) for n in PATCHES])
    pairs = 4 * DIMS[1] * lengths**2
    assert ((flops > pairs) & (flops < 1.1 * pairs + flops[0] / lengths[0] * lengths)).all()
    memory = np.asarray([bytes_of("all_attention", n) for n in PATCHES])
    assert (memory >= 4 * HEADS[1] * lengths**2).all()
    for n in PATCHES:
        assert squares(buffers("all_attention", n), n)


def test_all_attention_can_do_without_the_square():
    """The time stays quadratic, the memory does not, where the core may cut the scores."""
    assert bytes_of("all_attention", 4096, implementation="chunked") < (
        bytes_of("all_attention", 4096) / 10
    )


@pytest.mark.parametrize("patches", PATCHES)
def test_formula_matches_the_block(patches):
    """`flops` of a model with its fusion less those without, against one block."""
    side = 4 * math.isqrt(patches)
    fields = dict(
        dims=DIMS, num_heads=HEADS, stem="patches", patch_size=(4, 4), image_size=(side, side),
        depth=((1, 1, 0),),
    )  # fmt: skip
    without = build("crossvit", **fields, fusion="none").flops()
    for kind in ("cross", "all_attention"):
        expected = build("crossvit", **fields, fusion=kind).flops() - without
        assert 2 * products(fusion(kind, patches).jaxpr.jaxpr) == expected
