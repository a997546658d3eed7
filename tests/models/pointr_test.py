# SPDX-License-Identifier: Apache-2.0
"""PoinTr: exact counts, the release's numbers, attentions by name, refusals."""

import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models import build, pointr
from attnjax.models.load import abstract_params
from attnjax.ops import points as clouds
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import flatten, unflatten

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_pointr", FOLDER / "make_pointr.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

SMALL = dict(
    points=40, groups=(24, 16), queries=12, fold=2, width=16, num_heads=2, global_width=16,
    depth=(1, 2), neighbours=4,
)  # fmt: skip
SAME_MATH = 2e-5  # float32 sums in another order through all layers; points are of size 1
HALF = 0.1  # eight bits of mantissa through all layers, relative to the largest entry
QUICK = {"xla_backend_optimization_level": 0}


def parameters(model):
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    return unflatten({path: golden.formula(path, shape) for path, shape in shapes.items()})


def draw(b=2):
    return np.random.default_rng(0).standard_normal((b, SMALL["points"], 3)).astype(np.float32)


@functools.cache
def prepared(**fields):
    """A small model, its parameters, and its compiled points and gradient."""
    model = build("pointr", **SMALL, **fields)

    def loss(params, partial):
        output = model.apply({"params": params}, partial)
        return jnp.mean(jnp.square(output.fine)), output

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return model, parameters(model), step


def complete(partial=None):
    _, params, step = prepared()
    (_, output), _ = step(params, draw() if partial is None else partial)
    return jax.device_get(output)


def test_points_equal_the_release():
    model = build("pointr", **golden.CASE)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x), compiler_options=QUICK)
    output = run(parameters(model), golden.partial())
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        coarse, fine, sample = (stored[name] for name in ("coarse", "fine", "sample"))
    q, points = model.queries, model.queries * model.fold**2
    assert np.abs(fine - np.repeat(coarse, model.fold**2, axis=1)).max() > 0.1
    np.testing.assert_allclose(output.coarse[:, :q], coarse, rtol=0, atol=SAME_MATH)
    np.testing.assert_allclose(output.fine[:, :points], fine, rtol=0, atol=SAME_MATH)
    np.testing.assert_array_equal(output.coarse[:, q:], sample)
    np.testing.assert_array_equal(output.fine[:, points:], golden.partial())


# The release's own counts, 224 and 3,584 queries, less the graph weights of later layers, which it
# has and does not use, plus biases of query, key and value, which it has not.
UNUSED, BIASES = 11_221_248, (6 * 3 + 8 * 6) * 384
COUNTS = {"pcn": 42_498_054 - UNUSED + BIASES, "cab": 52_830_054 - UNUSED + BIASES}


@pytest.mark.parametrize("preset", pointr.PRESETS)
def test_preset_by_shapes(preset):
    model = build("pointr", preset)
    output, variables = jax.eval_shape(
        lambda batch: model.init_with_output(jax.random.key(0), **batch), model.example(2)
    )
    leaves = flatten(variables["params"])
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in leaves.values()) == COUNTS[preset]
    assert output.fine.shape == (2, 16_384, 3) == (2, model.completed, 3)
    assert output.coarse.shape == (2, model.queries + min(model.queries, 2048), 3)
    assert output.aux["proxies"].shape == (2, model.groups[1], 3)
    assert model.flops() > 2 * 128 * sum(x.size for p, x in leaves.items() if "encoder" in p)


def test_what_is_seen_stays():
    """The input is part of both answers, and the proxies are its furthest points."""
    output, partial = complete(), draw()
    np.testing.assert_array_equal(output.fine[:, -40:], partial)
    order = np.asarray(clouds.furthest_point_sampling(partial, 16))
    for row in range(2):
        np.testing.assert_array_equal(output.coarse[row, 12:], partial[row][order[row, :12]])
        np.testing.assert_array_equal(output.aux["proxies"][row], partial[row][order[row]])


def test_order_of_points_does_not_matter_but_for_the_first():
    order = np.concatenate([[0], 1 + np.random.default_rng(1).permutation(39)])
    found, expected = complete(draw()[:, order]), complete()
    np.testing.assert_allclose(found.coarse, expected.coarse, atol=SAME_MATH)
    np.testing.assert_allclose(found.fine[:, :48], expected.fine[:, :48], atol=SAME_MATH)


def test_operations_are_those_that_xla_counts():
    """Before it optimises; besides products it counts norms, sums, softmax and distances."""
    model = build("pointr", "pcn", attention_implementation="reference")
    run = jax.jit(lambda p, b: model.apply({"params": p}, **b).fine)
    counted = run.lower(abstract_params(model), model.example(1)).cost_analysis()["flops"]
    assert counted / 1.05 < model.flops() < counted


def test_every_parameter_is_trained():
    _, params, step = prepared()
    _, gradients = step(params, draw())
    gradients = flatten(jax.device_get(gradients))
    largest = max(np.abs(g).max() for g in gradients.values())
    for path, gradient in gradients.items():
        # Softmax does not see what is added to all keys.
        is_inert = re.search("(attention|cross)/key/bias", path) is not None
        assert (np.abs(gradient).max() > 1e-7 * largest) != is_inert, path


def test_attentions_by_name():
    """All have the same parameters; where keys are hidden the answer is another."""
    local = {"name": "local", "window": 2}
    model = build("pointr", **SMALL, encoder_attention=local, decoder_attention=local)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x), compiler_options=QUICK)
    found, expected = run(parameters(model), draw()), complete()
    assert np.isfinite(found.fine).all()
    for name in ("coarse", "fine"):  # the encoder decides the first, both the second
        assert np.abs(getattr(found, name) - getattr(expected, name)).max() > 1e-3


def test_half_precision_is_close():
    """Answers differ as much as their dtype lets them; what is seen is not rounded."""
    model = build("pointr", **SMALL, dtype="bfloat16")
    run = jax.jit(lambda p, x: model.apply({"params": p}, x), compiler_options=QUICK)
    found, expected = run(parameters(model), draw()), complete()
    assert found.fine.dtype == found.coarse.dtype == jnp.float32
    np.testing.assert_array_equal(found.fine[:, 48:], expected.fine[:, 48:])
    tolerance = HALF * np.abs(expected.coarse).max()
    np.testing.assert_allclose(found.coarse, expected.coarse, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_recomputing_changes_nothing():
    _, params, step = prepared()
    _, _, again = prepared(remat="blocks")
    found, expected = (f(params, draw()) for f in (again, step))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_MATH), found, expected)


def test_examples_of_a_batch_do_not_meet():
    partial = draw()
    turned, expected = complete(partial[::-1]), complete()
    np.testing.assert_allclose(turned.fine[::-1], expected.fine, atol=SAME_MATH)
    other = complete(np.concatenate([partial[:1], 2 * partial[1:]]))
    np.testing.assert_allclose(other.fine[:1], expected.fine[:1], atol=SAME_MATH)


@pytest.mark.slow
def test_sharded_equals_unsharded():
    model, params, _ = prepared()
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, _ = tree_shardings(params, mesh)
    specs = [s.spec for s in jax.tree.leaves(shardings)]
    assert any("fsdp" in spec for spec in specs) and any("model" in spec for spec in specs)
    with jax.set_mesh(mesh):
        partial = jax.device_put(draw().repeat(2, axis=0), batch_sharding(mesh))
        run = jax.jit(lambda p, x: model.apply({"params": p}, x).fine, compiler_options=QUICK)
        found = run(jax.device_put(params, shardings), partial)
    np.testing.assert_allclose(found[::2], complete().fine, atol=SAME_MATH)


def test_maps_say_where_queries_look():
    model, params, _ = prepared()
    run = lambda p, x: model.apply({"params": p}, x, mutable=["attention"])
    _, captured = jax.jit(run, compiler_options=QUICK)(params, draw())
    (weights,) = model.attention_maps(captured).values()
    assert weights.shape == (2, 1, 16)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=SAME_MATH)


def test_file_keeps_the_contract_of_models():
    fields = [f for f in dataclasses.fields(pointr.PoinTr) if f.name not in ("parent", "name")]
    assert len(fields) <= 16
    assert all(f.default is not dataclasses.MISSING for f in fields)
    documented = inspect.getdoc(pointr.PoinTr)
    assert all(f"\n  {f.name}:" in documented for f in fields)
    # A citation may be broken over two lines.
    text = " ".join(inspect.getdoc(pointr).split())
    assert pointr.PAPER["id"].removeprefix("arXiv:") in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (50, 16)}, r"groups=\(50, 16\): must be two numbers that fall from points=40"),
        ({"groups": (24, 12)}, r"groups=\(24, 12\): fewer than 16 neighbours"),
        ({"queries": 3}, "queries=3: fewer than 4 neighbours"),
        ({"num_heads": 3}, "num_heads=3 does not divide width=16"),
        ({"fold": 0}, "fold=0: must be at least 1"),
        ({"depth": (1,)}, r"depth=\(1,\): must be two numbers of layers of at least 1"),
        ({"remat": "all"}, "remat='all': .*known: blocks, none"),
        ({"geometric_layers": -1}, "geometric_layers=-1"),
        ({"decoder_attention": "locl"}, "model.decoder_attention='locl': .*did you mean 'local'"),
        ({"cross_attention": "local"}, "Local has no noncausal_cross form"),
        ({"query": 1}, "did you mean 'queries'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        build("pointr", **{**SMALL, **fields})


def test_wrong_inputs_are_refused():
    model, params, _ = prepared()
    with pytest.raises(ValueError, match=r"partial must be \[b, 40, 3\], got \(2, 39, 3\)"):
        model.apply({"params": params}, draw()[:, 1:])
