# SPDX-License-Identifier: Apache-2.0
"""Relaxed decoders: what maps depend on, layouts, skipping, caches, equal sizes and draws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.metrics.attention_maps import indicators
from attnjax.models import deconstructing_attention as home
from attnjax.models.deconstructing_attention import MIXERS, standard_layers
from attnjax.models.load import abstract_params, build
from attnjax.weights import flatten, unflatten

SLUG = "deconstructing_attention"
TOLERANCE = 2e-5  # float32 sums in another order, through two layers; logits are of size 1
QUICK = {"xla_backend_optimization_level": 0}
RELAXED = MIXERS[1:]
STREAMS = ("random_embedding", "fixed_sequence", "static_embedding")


@functools.cache
def make(mixer, layout="uniform", **fields):
    """A small model, its parameters, and its compiled logits."""
    fields = {"vocab_size": 40, "length": 12, "width": 32, "hidden": 48, **fields}
    # Joint denominators are far from zero for any parameters.
    if mixer == "approximate":
        fields["options"] = {"norm": "joint", "second": "full"}
    model = build(SLUG, mixer=mixer, layout=layout, **fields)
    run = jax.jit(lambda p, *x: model.apply({"params": p}, *x).logits, compiler_options=QUICK)
    return model, parameters(model), run


def parameters(model, seed=0):
    """Larger numbers than at the start of training, so that attention is not flat."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: np.float32(path.endswith("scale")) + 0.15 * rng.standard_normal(x.shape, np.float32)
        for path, x in flatten(abstract_params(model)).items()
    }
    return unflatten(leaves)


def draw(b=2, t=12, seed=0):
    return np.random.default_rng(seed).integers(40, size=(b, t)).astype(np.int32)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@functools.cache
def mapper(mixer, layout="uniform"):
    model = make(mixer, layout)[0]

    def run(params, tokens):
        output, captured = model.apply({"params": params}, tokens, mutable=["attention", "logits"])
        return output.logits, model.layer_maps(captured), captured["logits"]

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_logit_knows_of_later_tokens(mixer):
    _, params, run = make(mixer)
    tokens, other = draw(), draw()
    other[:, 7:] = (other[:, 7:] + 1) % 40
    close(run(params, tokens)[:, :7], run(params, other)[:, :7])


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_and_padding_equal_separate_texts(mixer):
    _, params, run = make(mixer)
    first, second = draw(t=5), draw(t=7, seed=1)
    segments = np.repeat([[1, 2]], [5, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    packed = run(params, np.concatenate([first, second], axis=1), segments)
    close(packed[:, :5], run(params, first))
    close(packed[:, 5:], run(params, second))
    segments = np.repeat([[0, 1]], [5, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    padded = run(params, np.concatenate([first, second], axis=1), segments)
    close(padded[:, 5:], packed[:, 5:])


@pytest.mark.parametrize("layout", [pytest.param("uniform", marks=pytest.mark.slow), "hybrid"])
@pytest.mark.parametrize("mixer", RELAXED)
def test_a_prompt_and_steps_equal_the_whole(mixer, layout):
    model, params, run = make(mixer, layout)
    tokens = draw()
    cache = model.apply({"params": params}, 2, 12, method="empty_cache")
    extend = jax.jit(
        lambda p, x, cache: model.apply({"params": p}, x, cache, method="extend"),
        compiler_options=QUICK,
    )
    outs = []
    for part in (tokens[:, :5], *(tokens[:, i : i + 1] for i in range(5, 12))):
        output, cache = extend(params, part, cache)
        outs.append(output.logits)
    assert int(cache.position) == 12
    close(np.concatenate(outs, axis=1), run(params, tokens))


@pytest.mark.parametrize("mixer", ["random_embedding", "fixed_sequence"])
def test_constant_maps_are_the_same_for_all_texts_and_change_with_the_parameters(mixer):
    model, params, _ = make(mixer)
    run = mapper(mixer)
    _, maps, _ = run(params, draw())
    _, other, _ = run(params, draw(seed=1))
    _, changed, _ = run(parameters(model, seed=1), draw())
    assert list(maps) == [1, 2]
    for layer, weights in maps.items():
        np.testing.assert_array_equal(weights[0], weights[1])
        np.testing.assert_array_equal(weights, other[layer])
        assert np.abs(weights - changed[layer]).max() > 1e-3


def test_static_maps_depend_on_tokens_alone():
    """Other parameters of the first layer's channels change hidden states and nothing else."""
    _, params, _ = make("static_embedding")
    run = mapper("static_embedding")
    logits, maps, _ = run(params, draw())
    changed = flatten(params)
    changed["layers_0/mlp/up/kernel"] = 2 * changed["layers_0/mlp/up/kernel"]
    other, same, _ = run(unflatten(changed), draw())
    _, different, _ = run(params, draw(seed=1))
    assert np.abs(logits - other).max() > 1e-3
    for layer in (1, 2):
        np.testing.assert_array_equal(maps[layer], same[layer])
        assert np.abs(maps[layer] - different[layer]).max() > 1e-3


@pytest.mark.parametrize("mixer", ["standard", "non_approximate", *STREAMS])
def test_maps_are_causal_and_sum_to_one(mixer):
    _, params, _ = make(mixer)
    _, maps, logits = mapper(mixer)(params, draw())
    for weights_bnts in maps.values():
        np.testing.assert_allclose(weights_bnts.sum(-1), 1, atol=1e-5)
        assert not np.triu(weights_bnts, 1).any()
    assert all(x.min() > 0 and x.shape[1] == 4 for x in jax.tree.leaves(logits))
    measured = indicators(jnp.stack(list(maps.values())))
    assert measured["entropy"].shape == (2,) and 0 < measured["entropy"].min() < math.log(12)


def test_a_model_of_standard_layers_is_the_decoder_backbone():
    """Captured maps and logits are those that the shared blocks give for the same parameters."""
    model, params, run = make("standard")
    decoder = build(
        "decoder", vocab_size=40, length=12, width=32, hidden=48, heads=(4, 4), tied=True,
        projections="biased", epsilon=home.EPSILON, rotary=model.rope_base,
    )  # fmt: skip
    leaves = flatten(params)
    stacked = {path: x for path, x in leaves.items() if not path.startswith("layers_")}
    for path in (p.removeprefix("layers_0/") for p in leaves if p.startswith("layers_0/")):
        stacked[f"layers/{path}"] = np.stack([leaves[f"layers_{i}/{path}"] for i in range(2)])
    output, captured = decoder.apply({"params": unflatten(stacked)}, draw(), mutable=["attention"])
    close(run(params, draw()), output.logits)
    maps = mapper("standard")(params, draw())[1]
    (expected,) = captured["attention"]["layers"]["attention"]["probabilities"]
    close(np.stack(list(maps.values())), expected)


def test_placements_of_24_layers():
    expected = {
        "uniform": set(), "even": set(range(2, 25, 2)), "odd": set(range(1, 24, 2)),
        "hybrid": set(range(2, 25, 2)), "top": set(range(1, 13)), "bottom": set(range(13, 25)),
        "middle": {*range(1, 7), *range(19, 25)}, "quarter": {4, 8, 12, 16, 20, 24},
        "first": {1}, "last": {24}, "bilateral": {1, 24},
    }  # fmt: skip
    assert set(expected) == set(home.LAYOUTS)
    for layout, layers in expected.items():
        assert set(standard_layers(layout, 24)) == layers
    assert standard_layers((7, 3), 24) == (3, 7)


def test_layers_left_out_do_not_touch_the_residual():
    """A hybrid of three layers without its odd ones is a standard model of the second alone."""
    fields = {"vocab_size": 40, "length": 12, "width": 32, "hidden": 48}
    hybrid = build(SLUG, mixer="random_embedding", layout="hybrid", depth=3, **fields)
    params = parameters(hybrid)
    skipped = hybrid.clone(skip="layer")
    shapes = lambda model: jax.tree.map(lambda x: x.shape, abstract_params(model))
    assert shapes(skipped) == shapes(hybrid)
    alone = {k: v for k, v in params.items() if not k.startswith("layers_")}
    alone["layers_0"] = params["layers_1"]
    expected = build(SLUG, depth=1, **fields).apply({"params": alone}, draw())
    close(skipped.apply({"params": params}, draw()).logits, expected.logits)
    without = hybrid.clone(skip="mixer")
    assert shapes(without) == shapes(hybrid)
    silent = {k: dict(v) if isinstance(v, dict) else v for k, v in params.items()}
    for layer in ("layers_0", "layers_2"):
        attention = dict(params[layer]["attention"])
        attention["out"] = jax.tree.map(np.zeros_like, attention["out"])
        silent[layer] = {**params[layer], "attention": attention}
    expected = hybrid.apply({"params": silent}, draw())
    close(without.apply({"params": params}, draw()).logits, expected.logits)
    assert skipped.flops() < without.flops()


@pytest.mark.parametrize("preset", home.PRESETS)
def test_mixers_of_a_size_have_the_same_number_of_parameters(preset):
    depth, sizes = home.PRESETS[preset]["depth"], {}
    for mixer in MIXERS:
        leaves = flatten(abstract_params(build(SLUG, preset, mixer=mixer, depth=1)))
        count = lambda prefix: sum(
            math.prod(x.shape) for path, x in leaves.items() if path.startswith(prefix)
        )
        sizes[mixer] = count("") + (depth - 1) * count("layers_")
    assert max(sizes.values()) <= 1.01 * min(sizes.values())


def test_one_key_draws_the_same_parameters_for_all_mixers():
    fields = {"width": 16, "heads": (2, 2), "hidden": 8, "vocab_size": 12, "length": 4}
    draws = {}
    for mixer in ("standard", "mlp", "non_approximate", "random_embedding"):
        model = build(SLUG, mixer=mixer, depth=1, **fields)
        init = jax.jit(model.init, compiler_options=QUICK)
        variables = init(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))
        draws[mixer] = flatten(variables["params"])
    for mixer, leaves in draws.items():
        for path, leaf in draws["standard"].items():
            if mixer == "mlp" and "/attention/" in path and "/out/" not in path:
                continue
            np.testing.assert_array_equal(leaves[path], leaf)


def test_grouped_heads_and_norms_of_queries_and_keys_go_with_all_mixers():
    for mixer in ("approximate", "non_approximate", "random_embedding"):
        _, params, run = make(mixer, heads=(4, 2), family="qwen3", tied=False, depth=1)
        assert np.isfinite(run(params, draw(t=6))).all()


def test_separate_denominators_are_watched():
    fields = {"vocab_size": 40, "length": 12, "width": 32, "hidden": 48}
    model = build(SLUG, mixer="approximate", **fields)
    hidden, aux = model.apply({"params": parameters(model)}, draw(), method="encode")
    assert hidden.shape == (2, 12, 32)
    assert set(aux) == {"negative_denominators"} and 0 < aux["negative_denominators"] < 1


def test_the_constant_streams_are_trained():
    """Gradients reach queries and keys of the second layer through the stream's first layer."""
    model, params, _ = make("random_embedding")
    score = lambda p: jnp.mean(model.apply({"params": p}, draw()).logits ** 2)
    gradient = flatten(jax.jit(jax.grad(score), compiler_options=QUICK)(params))
    assert all(np.abs(x).max() > 0 for x in gradient.values())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mixer": "rnn"}, "model.mixer='rnn'"),
        ({"mixer": "approximated"}, "did you mean 'approximate'"),
        ({"layout": "centre"}, "model.layout='centre'"),
        ({"layout": (0, 1)}, "layer 0 is none of 1 to 2"),
        ({"layout": (3,)}, "layer 3 is none of 1 to 2"),
        ({"skip": "all"}, "model.skip='all'"),
        ({"family": "llama"}, "model.family='llama'"),
        ({"heads": (4, 3)}, "a divisor of their number"),
        ({"width": 36}, "even multiple of the 4 heads"),
        ({"depth": 0}, "model.depth=0"),
        ({"mixer": "approximate", "options": {"norm": "sum"}}, "choose from separate, joint"),
        ({"mixer": "approximate", "options": {"epsilon": 0.0}}, "epsilon=0.0"),
        ({"mixer": "mlp", "options": {"sigma": 1.0}}, "mlp has no 'sigma'"),
        ({"mixer": "random_embedding", "options": {"sigma": 0.0}}, "sigma=0.0"),
        ({"mixer": "fixed_sequence", "options": {"tokens": (1, 2)}}, "2 tokens of the fixed"),
        (
            {"mixer": "fixed_sequence", "length": 2, "options": {"tokens": (1, 256)}},
            "must be in 0 to 255",
        ),
    ],
)
def test_refused_fields(fields, named):
    with pytest.raises(RecipeError, match=named):
        build(SLUG, **fields)


def test_texts_longer_than_the_constant_are_refused():
    model, params, _ = make("random_embedding")
    with pytest.raises(ValueError, match="13 tokens, but the constant sequence"):
        model.apply({"params": params}, draw(t=13))
    with pytest.raises(ValueError, match="13 tokens, but the constant"):
        model.apply({"params": params}, 2, 13, method="empty_cache")
    _, params, run = make("standard")
    assert run(params, draw(t=13)).shape == (2, 13, 40)


def test_another_models_cache_is_refused():
    model, params, _ = make("standard")
    cache = model.apply({"params": params}, 2, 12, method="empty_cache")
    other = model.clone(depth=3)
    with pytest.raises(ValueError, match="for 2 layers, not 3"):
        other.apply({"params": parameters(other)}, draw(), cache, method="extend")
