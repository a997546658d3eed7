# SPDX-License-Identifier: Apache-2.0
"""What every registered model owes the rest of the library.

Presets are checked by their shapes alone. What must run does so on the model of the system's smoke
recipe, with parameters drawn here, so that nothing is zero that would not be after training.
"""

import ast
import dataclasses
import functools
import inspect
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax
from attnjax import recipe, registry
from attnjax.models.load import abstract_params, build
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import export_params, flatten, import_params, plan, unflatten

SYSTEMS = [system.slug for system in registry.SYSTEMS.values() if system.kind == "model"]
SLUGS = [*SYSTEMS, *registry.BACKBONES]
PRESETS = [(slug, preset) for slug in SLUGS for preset in registry.home(slug).PRESETS]

# Systems whose layouts belong to different presets; those not named have the first one.
LAYOUT_OF_PRESET = {"landmark": {"llama_7b": "hf"}}

# Parameters of every preset with its own defaults, counted in the reference code.
COUNTS = {
    "crossvit": {
        "tiny": 7_014_800,
        "small": 26_856_272,
        "base": 105_025_232,
        "9": 8_553_296,
        "15": 27_528_464,
        "18": 43_271_408,
        "9-dagger": 8_776_592,
        "15-dagger": 28_209_008,
        "18-dagger": 44_266_976,
        "15-dagger-384": 28_500_080,
        "18-dagger-384": 44_606_560,
    },
    "decoder": {
        "llama2_7b": 6_738_415_616,
        "llama2_13b": 13_015_864_320,
        "llama2_70b": 68_976_648_192,
        "llama3_70b": 70_553_706_496,
        "llama3_8b": 8_030_261_248,
        "llama31_8b": 8_030_261_248,
        "llama32_1b": 1_235_814_400,
        "mistral_7b_v01": 7_241_732_096,
        "moh_b": 881_542_656,
        "moh_llama3_8b": 8_030_261_248,
        "moh_s": 185_746_176,
        "qwen25_7b": 7_615_616_512,
        "qwen2_05b": 494_032_768,
        "qwen3_06b": 596_049_920,
        "qwen3_8b": 8_190_735_360,
        "tiny": 106_816,
    },
    # No code was found: counted by hand from the paper's sizes.
    "deconstructing_attention": {
        "70m": 50_937_344,
        "160m": 151_926_528,
        "500m": 436_037_504,
        "500m-gqa": 402_970_496,
        "1.7b": 1_732_895_744,
    },
    # Without the fixed positions, which the reference code counts.
    "dit": {
        "s-2": 32_865_056,
        "b-2": 130_315_808,
        "l-2": 457_840_672,
        "xl-2": 674_834_720,
        "moh-s-90": 32_898_848,
        "moh-s-75": 32_900_384,
        "moh-b-90": 130_441_760,
        "moh-b-75": 130_441_760,
        "moh-l-90": 458_250_272,
        "moh-l-75": 458_266_656,
        "moh-xl-90": 675_371_552,
        "moh-xl-75": 675_394_592,
    },
    "encoder": {
        "bert_base": 109_514_298,
        "bert_large": 335_174_458,
        "minilm_l6": 22_744_506,
        "roberta_base": 124_697_433,
        "roberta_large": 355_412_057,
        "tiny": 129_344,
    },
    "encoder_decoder": {"base": 123_649_536, "tiny": 289_024},
    "gpt2": {
        "small": 124_439_808,
        "medium": 354_823_168,
        "large": 774_030_080,
        "xl": 1_557_611_200,
        "tiny": 124_672,
    },
    # Counted by hand from the paper's sizes.
    "landmark": {
        "paper": 202_531_840,
        "baseline_512": 202_531_840,
        "baseline_360": 202_531_840,
        "baseline_xl": 202_531_840,
        "llama_7b": 6_738_432_000,
        "tiny": 115_072,
    },
    # Hand-checked against the released code's modules; TransNeXt has 49.7M and 89.7M.
    "moh": {
        "small_dense": 49_741_564,
        "small_80": 49_910_548,
        "small_75": 49_910_548,
        "base_dense": 89_721_496,
        "base_75": 90_020_632,
        "base_50": 90_023_512,
        "tiny": 57_274,
    },
    "vit": {
        "tiny": 5_717_416,
        "small": 22_050_664,
        "base": 86_567_656,
        "large": 304_326_632,
    },
}

FIELDS = 16
BATCH = 8

SAME_MATH = 2e-5  # float32 sums in another order, relative to the largest entry
HALF = 5e-2  # eight bits of mantissa through a few layers, relative to the largest entry
ROUNDING = 1e-5  # a gradient below this part of the largest is nothing but rounding

# Gradients are large graphs; optimising them takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0}


def answer(output):
    """What a model says, such as logits: the first field of its output."""
    return getattr(output, dataclasses.fields(output)[0].name)


def forward(model):
    """The answer as a function of parameters and batch."""
    return lambda params, batch: answer(model.apply({"params": params}, **batch))


def draw_batch(model, rng):
    """A batch of normal numbers, or of any tokens or classes."""
    kinds = getattr(model, "vocab_size", None) or model.num_classes

    def values(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(kinds, size=leaf.shape).astype(leaf.dtype)
        return rng.standard_normal(leaf.shape).astype(leaf.dtype)

    return {name: values(leaf) for name, leaf in model.example(BATCH).items()}


def draw(model, seed=0):
    """Parameters of normal numbers, and a batch."""
    rng = np.random.default_rng(seed)
    normal = lambda leaf: 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    leaves = {path: normal(leaf) for path, leaf in flatten(abstract_params(model)).items()}
    leaves |= {path: 1 + leaf for path, leaf in leaves.items() if path.endswith("/scale")}
    return unflatten(leaves), draw_batch(model, rng)


@functools.cache
def small(slug):
    """The model of the smoke recipe, its parameters, a batch, the loss and its gradient."""
    fields = dict(recipe.load(f"configs/{slug}/smoke.py").model)
    fields = {k: v for k, v in fields.items() if k not in ("name", "preset", "weights")}
    model = build(slug, **fields)
    params, batch = draw(model)

    def loss(params, batch):
        logits = forward(model)(params, batch)
        return jnp.mean(logits.astype(jnp.float32) ** 2), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, logits), gradients = step(params, batch)
    return types.SimpleNamespace(
        slug=slug, home=registry.home(slug), fields=fields, model=model, params=params, batch=batch,
        step=step, logits=np.asarray(logits), gradients=flatten(jax.device_get(gradients)),
    )  # fmt: skip


def assert_close(ours, expected, tolerance, message=""):
    scale = np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), expected, rtol=0, atol=tolerance * scale, err_msg=message
    )


@pytest.mark.parametrize("slug", SYSTEMS)
def test_paper_is_cited(slug):
    paper = registry.home(slug).PAPER
    assert set(paper) == {"title", "id", "year", "code", "licence", "claim"}
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|doi:\S+", paper["id"])
    assert paper["id"].removeprefix("arXiv:") in inspect.getdoc(registry.home(slug))
    assert type(paper["year"]) is int and 2014 <= paper["year"] <= 2030
    assert paper["code"].startswith("https://") and paper["licence"]
    assert paper["title"] and paper["claim"].endswith(".")


@pytest.mark.parametrize("slug", SLUGS)
def test_file_reads_in_the_agreed_order(slug):
    home = registry.home(slug)
    model_class = registry.resolve("model", slug)
    body = ast.parse(inspect.getsource(home)).body
    lines = {}
    for node in body:
        for target in getattr(node, "targets", [node]):
            lines[getattr(target, "id", getattr(target, "name", ""))] = node.lineno
    blocks = [
        name
        for name, value in vars(home).items()
        if inspect.isclass(value) and value.__module__ == home.__name__
        and name not in ("Output", model_class.__name__)
    ]  # fmt: skip
    paper = ["PAPER"] if slug in SYSTEMS else []
    order = [*paper, "PRESETS", "Output", *blocks, model_class.__name__, "TORCH_NAMES"]
    assert [name for name in sorted(lines, key=lines.get) if name in order] == order


@pytest.mark.parametrize("slug", SLUGS)
def test_constructor_is_small_and_has_the_papers_defaults(slug):
    model_class = registry.resolve("model", slug)
    fields = [f for f in dataclasses.fields(model_class) if f.name not in ("name", "parent")]
    assert len(fields) <= FIELDS
    assert all(f.default is not dataclasses.MISSING for f in fields)
    documented = set(re.findall(r"^  (?:  )?(\w+):", inspect.getdoc(model_class), re.MULTILINE))
    assert {f.name for f in fields} == documented


@pytest.mark.parametrize("slug", SLUGS)
def test_every_preset_has_a_count(slug):
    presets = registry.home(slug).PRESETS
    assert all(isinstance(name, str) and name for name in presets)
    assert set(COUNTS[slug]) == set(presets)


@pytest.mark.parametrize(("slug", "preset"), PRESETS)
def test_preset_by_shapes(slug, preset):
    """Abstract initialisation, forward pass and `load`; the exact count; complete name tables."""
    model = build(slug, preset)
    example = model.example(2)
    assert all(x.shape[0] == 2 for x in example.values())
    assert set(example) <= set(inspect.signature(model.__call__).parameters)
    output, variables = jax.eval_shape(
        lambda batch: model.init_with_output(jax.random.key(0), **batch), example
    )
    assert isinstance(output, registry.home(slug).Output)
    assert all(leaf.shape[:1] in ((), (2,)) for leaf in jax.tree.leaves(output))
    assert isinstance(output.aux, dict) and answer(output).dtype == jnp.float32
    assert set(variables) == {"params"}
    leaves = flatten(variables["params"])
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in leaves.values()) == COUNTS[slug][preset]
    loaded = flatten(jax.eval_shape(lambda: attnjax.load(slug, preset)[1]))
    assert {k: x.shape for k, x in loaded.items()} == {k: x.shape for k, x in leaves.items()}
    assert model.flops() > 2 * sum(leaf.size for p, leaf in leaves.items() if "head" in p)
    tables, shapes = registry.home(slug).TORCH_NAMES or {}, {p: x.shape for p, x in leaves.items()}
    if slug in LAYOUT_OF_PRESET:
        chosen = LAYOUT_OF_PRESET[slug].get(preset, next(iter(tables)))
        tables = {chosen: tables[chosen]}
    for rules in tables.values():
        entries = plan(shapes, rules)
        rows = [(p, entry.row) for entry in entries.values() for p in entry.paths]
        assert len(rows) == len(set(rows)) and {path for path, _ in rows} == set(leaves)
        assert sum(math.prod(entry.shape) for entry in entries.values()) == COUNTS[slug][preset]


@pytest.mark.parametrize("slug", SLUGS)
def test_weight_map_goes_there_and_back(slug):
    case = small(slug)
    shapes = {path: leaf.shape for path, leaf in flatten(case.params).items()}
    for rules in (None, *(case.home.TORCH_NAMES or {}).values()):
        tensors = export_params(case.params, rules)
        again = flatten(import_params(tensors, shapes, case.home.TORCH_NAMES))
        for path, leaf in flatten(case.params).items():
            np.testing.assert_array_equal(again[path], leaf)


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_forward_is_finite_and_deterministic(slug, dtype):
    case = small(slug)
    model = build(slug, **case.fields, dtype=dtype)
    run = jax.jit(forward(model))
    logits = run(case.params, case.batch)
    assert logits.dtype == jnp.float32 and logits.shape == case.logits.shape
    assert np.isfinite(logits).all()
    assert_close(logits, case.logits, {"float32": SAME_MATH, "bfloat16": HALF}[dtype])
    np.testing.assert_array_equal(run(case.params, case.batch), logits)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_parameter_is_trained_or_listed(slug):
    case = small(slug)
    listed = (*getattr(case.home, "FROZEN", ()), *getattr(case.home, "INERT", ()))
    largest = max(np.abs(g).max() for g in case.gradients.values())
    for path, gradient in case.gradients.items():
        assert np.isfinite(gradient).all(), path
        is_listed = any(re.search(pattern, path) for pattern in listed)
        assert (np.abs(gradient).max() <= ROUNDING * largest) == is_listed, path


@pytest.mark.parametrize("slug", SLUGS)
def test_examples_of_a_batch_do_not_meet(slug):
    case = small(slug)
    rng = np.random.default_rng(1)
    rows = rng.permutation(BATCH)
    (_, logits), _ = case.step(case.params, {k: x[rows] for k, x in case.batch.items()})
    assert_close(logits, case.logits[rows], SAME_MATH)
    # The first example keeps its answer beside others.
    other = draw_batch(case.model, rng)
    other = {k: np.concatenate([case.batch[k][:1], x[1:]]) for k, x in other.items()}
    (_, logits), _ = case.step(case.params, other)
    assert_close(logits[:1], case.logits[:1], SAME_MATH)
    assert np.abs(logits[1:] - case.logits[1:]).max() > SAME_MATH


@pytest.mark.parametrize("slug", SLUGS)
def test_sharded_equals_unsharded(slug):
    case = small(slug)
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    axes = getattr(case.home, "PARAM_AXES", ())
    shardings, notes = tree_shardings(case.params, mesh, axes)
    specs = [s.spec for s in jax.tree.leaves(shardings)]
    assert any("fsdp" in spec for spec in specs) and any("model" in spec for spec in specs)
    assert len(notes) < len(specs) / 4, notes
    with jax.set_mesh(mesh):
        params = jax.device_put(case.params, shardings)
        batch = jax.device_put(case.batch, batch_sharding(mesh))
        (_, logits), gradients = case.step(params, batch)
    assert_close(logits, case.logits, SAME_MATH)
    inert = getattr(case.home, "INERT", ())
    for path, gradient in flatten(jax.device_get(gradients)).items():
        if not any(re.search(pattern, path) for pattern in inert):
            assert_close(gradient, case.gradients[path], SAME_MATH, path)


@pytest.mark.parametrize("slug", SLUGS)
def test_captured_attention_sums_to_one_and_changes_nothing(slug):
    case = small(slug)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, batch):
        output, captured = case.model.apply({"params": params}, **batch, mutable=["attention"])
        return answer(output), captured, case.model.attention_maps(captured)

    logits, captured, maps = run(case.params, case.batch)
    assert_close(logits, case.logits, SAME_MATH)
    # Layers that are stacked by a scan have their maps stacked, too.
    weights = [x for x in jax.tree.leaves(captured) if x.ndim == 4]
    weights += [x for stack in jax.tree.leaves(captured) if stack.ndim == 5 for x in stack]
    assert weights and {x.ndim for x in jax.tree.leaves(captured)} <= {4, 5}
    for weights_bnts in weights:
        assert weights_bnts.dtype == jnp.float32
        assert weights_bnts.shape[0] == BATCH and weights_bnts.min() >= 0
        np.testing.assert_allclose(weights_bnts.sum(axis=-1), 1, atol=SAME_MATH)
    assert maps
    for title, map_byx in maps.items():
        assert title and map_byx.ndim == 3 and map_byx.shape[0] == BATCH
        assert map_byx.min() >= 0 and map_byx.sum(axis=(1, 2)).max() <= 1 + SAME_MATH


@pytest.mark.parametrize("slug", SLUGS)
def test_randomness_is_for_training_only(slug):
    """With every rate up, evaluation needs no key and ignores one; training follows its key."""
    case = small(slug)
    rates = [f.name for f in dataclasses.fields(case.model) if f.name.startswith("drop")]
    model = build(slug, **(case.fields | {name: 0.5 for name in rates}))

    @functools.partial(jax.jit, static_argnames="train", compiler_options=QUICK)
    def run(params, batch, key, train):
        rngs = {"dropout": key}
        return answer(model.apply({"params": params}, **batch, train=train, rngs=rngs))

    first, second = jax.random.key(0), jax.random.key(1)
    for key in (first, second):
        assert_close(run(case.params, case.batch, key, False), case.logits, SAME_MATH)
    trained = [run(case.params, case.batch, key, True) for key in (first, first, second)]
    assert np.isfinite(trained).all()
    np.testing.assert_array_equal(trained[0], trained[1])
    assert bool(rates) == bool(np.abs(trained[0] - trained[2]).max() > SAME_MATH)
