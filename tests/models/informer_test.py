# SPDX-License-Identifier: Apache-2.0
"""Informer: exact counts, the release's numbers, attentions by name, lengths, refusals."""

import dataclasses
import functools
import importlib.util
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import recipe
from attnjax.errors import RecipeError
from attnjax.models import build, informer
from attnjax.models.load import abstract_params
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import flatten, unflatten

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_informer", FOLDER / "make_informer.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

SAME_MATH = 1e-5  # float32 sums in another order; forecasts are of size 1
HALF = 5e-2  # eight bits of mantissa through a few layers, relative to the largest entry
QUICK = {"xla_backend_optimization_level": 0}

# 512 wide, 8 heads, hidden width 2048, as the release counts them (its running statistics aside).
COUNTS = {
    "etth1_m": 11_330_055, "etth1_s": 11_308_545, "etth2_m": 11_330_055, "etth2_s": 11_308_545,
    "ettm1_m": 11_330_055, "ettm1_s": 11_308_545, "ecl_m": 20_600_129, "ecl_s": 19_452_929,
    "weather_m": 19_492_364, "weather_s": 19_452_929,
}  # fmt: skip


def parameters(model):
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    return unflatten({path: golden.formula(path, shape) for path, shape in shapes.items()})


@functools.cache
def prepared(**fields):
    """A small model, its parameters, and its compiled forecast and gradient."""
    model = build("informer", **{**golden.CASE, **fields})
    params = parameters(model)

    def loss(params, batch):
        forecast = model.apply({"params": params}, **batch).forecast
        return jnp.mean(jnp.square(forecast)), forecast

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return model, params, step


def forecast(batch=None, **fields):
    _, params, step = prepared(**fields)
    (_, found), _ = step(params, golden.inputs() if batch is None else batch)
    return np.asarray(found)


def test_forecast_equals_the_release():
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        expected = stored["forecast"]
    found = forecast()
    assert found.dtype == np.float32 and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME_MATH)


@pytest.mark.parametrize("preset", informer.PRESETS)
def test_preset_by_shapes(preset):
    model = build("informer", preset)
    output, variables = jax.eval_shape(
        lambda batch: model.init_with_output(jax.random.key(0), **batch), model.example(2)
    )
    leaves = flatten(variables["params"])
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in leaves.values()) == COUNTS[preset]
    assert output.forecast.shape == (2, model.horizon, model.channels)
    assert output.aux["memory"].shape == (2, model.encoder_lengths()[-1], 512)
    assert model.flops() > 2 * sum(leaf.size for leaf in leaves.values())
    # The recipe reads windows of the same lengths.
    source = recipe.load(f"configs/cab/informer_ett.py:{preset}").data.source
    assert (source["length"], source["horizon"]) == (model.length, model.horizon)


def test_count_by_hand():
    d, f, c, t = 512, 2048, 7, 4
    attention, norm, mlp = 4 * (d * d + d), 2 * d, 2 * d * f + d + f
    embedding = 3 * c * d + d + t * d + d
    encoder = 2 * (attention + 2 * norm + mlp) + (3 * d * d + d + norm) + norm
    decoder = 2 * attention + 3 * norm + mlp + norm
    assert 2 * embedding + encoder + decoder + c * d + c == COUNTS["etth1_m"]


def test_operations_are_those_that_xla_counts():
    """Before it optimises; besides products it counts norms, sums and softmax."""
    model = build("informer", decoder_causal=False, attention_implementation="reference")
    run = jax.jit(lambda p, b: model.apply({"params": p}, **b).forecast)
    counted = run.lower(abstract_params(model), model.example(1)).cost_analysis()["flops"]
    assert counted / 1.05 < model.flops() < counted


def test_every_parameter_is_trained():
    _, params, step = prepared()
    _, gradients = step(params, golden.inputs())
    for path, gradient in flatten(jax.device_get(gradients)).items():
        # Softmax does not see what is added to all keys.
        assert (np.abs(gradient).max() > 1e-6) != path.endswith("key/bias"), path


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_attention": {"name": "local", "window": 2}},
        {"decoder_attention": "local"},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in (
                {"decoder_attention": "local", "decoder_causal": False},
                {"cross_attention": "softmax", "decoder_causal": False},
            )
        ),
    ],
    ids=str,
)
def test_attentions_by_name(fields):
    """All have the same parameters; where keys are hidden the forecast is another."""
    model = build("informer", **golden.CASE, **fields)
    found = jax.jit(lambda p, b: model.apply({"params": p}, **b).forecast, compiler_options=QUICK)(
        parameters(model), golden.inputs()
    )
    assert np.isfinite(found).all()
    is_same = fields == {"decoder_attention": "local"}  # 15 keys are all that there are
    assert (np.abs(found - forecast()).max() < SAME_MATH) == is_same


def test_half_precision_is_close():
    model = build("informer", **golden.CASE, dtype="bfloat16")
    found = jax.jit(lambda p, b: model.apply({"params": p}, **b).forecast)(
        parameters(model), golden.inputs()
    )
    assert found.dtype == jnp.float32
    expected = forecast()
    np.testing.assert_allclose(found, expected, rtol=0, atol=HALF * np.abs(expected).max())


@pytest.mark.slow
def test_recomputing_changes_nothing():
    _, params, step = prepared()
    _, _, again = prepared(remat="blocks")
    found, expected = (f(params, golden.inputs()) for f in (again, step))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_MATH), found, expected)


def test_examples_of_a_batch_do_not_meet():
    batch = golden.inputs()
    turned = forecast({name: x[::-1] for name, x in batch.items()})
    np.testing.assert_allclose(turned[::-1], forecast(), atol=SAME_MATH)
    other = {name: np.concatenate([x[:1], -x[1:]]) for name, x in batch.items()}
    np.testing.assert_allclose(forecast(other)[:1], forecast()[:1], atol=SAME_MATH)


def test_decoder_reads_only_the_last_known_values():
    """With an encoder that is cut off, the first steps of the past do not matter."""
    model, params, step = prepared()
    params = jax.tree.map_with_path(
        lambda path, x: np.zeros_like(x) if "cross" in str(path) and "value" in str(path) else x,
        params,
    )
    batch = golden.inputs()
    (_, before), _ = step(params, batch)
    known = model.length - model.label_length
    changed = {**batch, "past": batch["past"] + (np.arange(model.length) < known)[:, None]}
    (_, after), _ = step(params, {k: np.float32(x) for k, x in changed.items()})
    np.testing.assert_array_equal(after, before)
    changed["past"] = batch["past"] + np.float32(np.arange(model.length) == known)[:, None]
    (_, after), _ = step(params, {k: np.float32(x) for k, x in changed.items()})
    assert np.abs(after - before).max() > 1e-3


def test_dropout_is_for_training_only():
    model = build("informer", **{**golden.CASE, "dropout": 0.3})
    params, batch = parameters(model), golden.inputs()

    @functools.partial(jax.jit, static_argnames="train", compiler_options=QUICK)
    def run(key, train):
        return model.apply({"params": params}, **batch, train=train, rngs={"dropout": key}).forecast

    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_allclose(run(keys[0], False), forecast(), atol=SAME_MATH)
    np.testing.assert_array_equal(run(keys[0], True), run(keys[0], True))
    assert np.abs(run(keys[0], True) - run(keys[1], True)).max() > 1e-3


@pytest.mark.slow
def test_sharded_equals_unsharded():
    model, params, _ = prepared()
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, _ = tree_shardings(params, mesh)
    specs = [s.spec for s in jax.tree.leaves(shardings)]
    assert any("fsdp" in spec for spec in specs) and any("model" in spec for spec in specs)
    batch = {name: np.concatenate([x, x]) for name, x in golden.inputs().items()}
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_sharding(mesh))
        run = jax.jit(lambda p, b: model.apply({"params": p}, **b).forecast, compiler_options=QUICK)
        found = run(jax.device_put(params, shardings), placed)
    np.testing.assert_allclose(found[:2], forecast(), atol=SAME_MATH)


def test_maps_say_where_the_forecast_looks():
    model, params, _ = prepared()
    run = lambda p, b: model.apply({"params": p}, **b, mutable=["attention"])
    _, captured = jax.jit(run, compiler_options=QUICK)(params, golden.inputs())
    (weights,) = model.attention_maps(captured).values()
    assert weights.shape == (2, 1, 4) and model.encoder_lengths() == [13, 7, 4]
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=SAME_MATH)


def test_file_keeps_the_contract_of_models():
    fields = [f for f in dataclasses.fields(informer.Informer) if f.name not in ("parent", "name")]
    assert len(fields) <= 16
    assert all(f.default is not dataclasses.MISSING for f in fields)
    documented = inspect.getdoc(informer.Informer)
    assert all(f"\n  {f.name}:" in documented for f in fields)
    assert informer.PAPER["id"].removeprefix("arXiv:") in inspect.getdoc(informer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (13, 14, 6)}, r"lengths=\(13, 14, 6\): must be known steps"),
        ({"lengths": (13, 5, 0)}, r"lengths=\(13, 5, 0\): must be known steps"),
        ({"depth": (0, 1)}, r"depth=\(0, 1\): must be two numbers of layers of at least 1"),
        ({"hidden": 0}, "hidden=0: must be at least 1"),
        ({"remat": "all"}, "remat='all': .*known: blocks, none"),
        ({"width": 18, "num_heads": 4}, "width=18: must be even and divisible by num_heads=4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"encoder_attention": "soft"}, "model.encoder_attention='soft': .*did you mean 'softmax'"),
        ({"cross_attention": "local"}, "model.cross_attention='local': Local has no noncausal_cro"),
        ({"widht": 1}, "did you mean 'width'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        build("informer", **{**golden.CASE, **fields})


def test_wrong_inputs_are_refused():
    model, params, _ = prepared()
    batch = golden.inputs()
    with pytest.raises(ValueError, match=r"past must be \[b, \*\(13, 3\)\], got \(2, 12, 3\)"):
        model.apply({"params": params}, **{**batch, "past": batch["past"][:, 1:]})
