# SPDX-License-Identifier: Apache-2.0
"""GPT-2, the encoder and the encoder-decoder: what tokens may see, padding, steps, weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax
from attnjax.errors import RecipeError
from attnjax.models.load import abstract_params, build
from attnjax.nn.generation import generate
from attnjax.weights import export_params, flatten, unflatten, write

# Float32 sums in another order, through two layers; logits are of size 1 to 10.
TOLERANCE = 2e-5
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = {"vocab_size": 40, "width": 32, "hidden": 48, "num_heads": 4}
LOCAL = {"name": "local", "window": 3}


@functools.cache
def make(slug, **fields):
    """A small model, its parameters, and its compiled logits."""
    fields = {name: LOCAL if value == "local" else value for name, value in fields.items()}
    lengths = {"lengths": (12, 10)} if slug == "encoder_decoder" else {"length": 12}
    model = build(slug, **SMALL, **lengths, **fields)
    run = quick(lambda p, *x: model.apply({"params": p}, *x).logits)
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
    return np.random.default_rng(seed).integers(3, 40, size=(b, t)).astype(np.int32)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["softmax", "local"])
def test_gpt2_sees_what_came_before(attention):
    _, params, run = make("gpt2", attention=attention, depth=1)
    tokens, changed = draw(1), draw(1)
    changed[0, 5] = (changed[0, 5] + 1) % 40
    moved = np.abs(run(params, tokens) - run(params, changed)).max(axis=-1)[0] > 1e-6
    reach = {"softmax": 12, "local": 8}[attention]
    assert np.flatnonzero(moved).tolist() == list(range(5, reach))


@pytest.mark.parametrize("attention", ["softmax", "local"])
def test_gpt2_step_by_step_equals_the_parallel_form(attention):
    model, params, run = make("gpt2", attention=attention)
    tokens = draw()
    expected = run(params, tokens)
    step = quick(lambda x, s: model.apply({"params": params}, x, s, method="step"))
    streams = model.empty_streams(2)
    for at in range(12):
        logits, streams = step(tokens[:, at], streams)
        close(logits, expected[:, at])


def test_gpt2_writes_its_likeliest_continuation():
    model, params, run = make("gpt2")
    step = lambda x, s: model.apply({"params": params}, x, s, method="step")
    prompt = draw(t=4)
    written = quick(lambda: generate(step, model.empty_streams(2), prompt, 6))()
    text = np.concatenate([prompt, written], axis=1)
    logits = run(params, np.pad(text, ((0, 0), (0, 2))))
    np.testing.assert_array_equal(written, logits[:, 3:9].argmax(axis=-1))


def test_packed_documents_of_gpt2_equal_separate_ones():
    _, params, run = make("gpt2")
    first, second = draw(t=5), draw(t=7, seed=1)
    segments = np.repeat([[1, 2]], [5, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    packed = run(params, np.concatenate([first, second], axis=1), segments)
    close(packed[:, :5], run(params, first))
    close(packed[:, 5:], run(params, second))
    local, params, _ = make("gpt2", attention="local")
    with pytest.raises(NotImplementedError, match="no map of scores"):
        local.apply({"params": params}, draw(), segments)


@pytest.mark.parametrize(("family", "attention"), [("bert", "local"), ("roberta", "softmax")])
def test_padding_of_the_encoder_has_no_influence(family, attention):
    _, params, run = make("encoder", family=family, attention=attention)
    tokens = draw(t=7)
    padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=family == "roberta")
    close(run(params, padded)[:, :7], run(params, tokens))


def test_the_encoder_sees_both_sides_and_types():
    _, params, run = make("encoder", depth=1, attention="local")
    tokens, changed = draw(1), draw(1)
    changed[0, 5] = (changed[0, 5] + 1) % 40
    moved = np.abs(run(params, tokens) - run(params, changed)).max(axis=-1)[0] > 1e-6
    assert np.flatnonzero(moved).tolist() == list(range(2, 9))
    types = np.ones_like(tokens)
    assert np.abs(run(params, tokens, types) - run(params, tokens)).max() > 0.1
    roberta, params, _ = make("encoder", family="roberta")
    with pytest.raises(ValueError, match="one type"):
        roberta.apply({"params": params}, tokens, types)


def test_the_encoder_without_a_head_pools():
    model, params, _ = make("encoder", head="none", pooler=True)
    output = jax.eval_shape(lambda p: model.apply({"params": p}, draw()), params)
    assert output.logits is None and output.aux["pooled"].shape == (2, 32)
    assert "masked" not in params and model.flops() > 0


@pytest.mark.parametrize("attention", ["softmax", pytest.param("local", marks=pytest.mark.slow)])
def test_decoder_step_by_step_equals_the_parallel_form(attention):
    model, params, run = make(
        "encoder_decoder", encoder_attention=attention, decoder_attention=attention, depth=(1, 2)
    )
    source, target = draw(), draw(t=10, seed=1)
    source[1, 8:] = 0
    expected = run(params, source, target)
    apply = lambda *x, method: model.apply({"params": params}, *x, method=method)
    state = quick(lambda x: apply(x, model.empty_streams(2), method="begin"))(source)
    step = quick(lambda x, s: apply(x, s, method="step"))
    for at in range(10):
        logits, state = step(target[:, at], state)
        close(logits, expected[:, at])


def test_padding_of_source_and_target_has_no_influence():
    _, params, run = make("encoder_decoder", depth=(1, 2))
    source, target = draw(t=7), draw(t=6, seed=1)
    pad = lambda x, width: np.pad(x, ((0, 0), (0, width)))
    close(run(params, pad(source, 5), pad(target, 4))[:, :6], run(params, source, target))


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["gpt2", "encoder", "encoder_decoder"])
def test_recomputation_changes_nothing(slug):
    model, params, _ = make(slug, dropout=0.2)
    inputs = (draw(),) if slug != "encoder_decoder" else (draw(), draw(t=10))

    def gradients(remat):
        def loss(p):
            rngs = {"dropout": jax.random.key(0)}
            again = model.clone(remat=remat)
            return jnp.mean(again.apply({"params": p}, *inputs, train=True, rngs=rngs).logits ** 2)

        return quick(jax.value_and_grad(loss))(params)

    (loss, expected), (again, found) = gradients("none"), gradients("full")
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, flatten(expected)[path], atol=5e-6, err_msg=path)


@pytest.mark.parametrize("slug", ["gpt2", "encoder", "encoder_decoder"])
def test_flops_are_the_matrix_products_of_the_compiled_forward_pass(slug):
    """Against XLA's count, which also holds elementwise work and pairs that the mask hides."""
    lengths = {"lengths": (64, 32), "depth": (1, 1)} if slug == "encoder_decoder" else {"depth": 1}
    model = build(slug, width=128, hidden=512, vocab_size=512, **lengths)
    run = quick(lambda p, x: model.apply({"params": p}, **x).logits)
    cost = run.lower(abstract_params(model), model.example(1)).compile().cost_analysis()
    assert 0.85 < model.flops() / cost["flops"] < 1


def test_published_files_hold_more_than_weights(tmp_path):
    """Masks, an index, copies of tied tensors, and names of the first release."""
    for slug, layout, extra in (
        ("gpt2", "hf_bare", {"h.0.attn.bias": np.ones((1, 1, 4, 4)), "lm_head.weight": np.ones(2)}),
        ("encoder", "bert", {"bert.embeddings.position_ids": np.arange(12)[None]}),
    ):
        _, params, _ = make(slug)
        tensors = export_params(params, attnjax.registry.home(slug).TORCH_NAMES[layout])
        if slug == "encoder":
            old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors = {old(name): tensor for name, tensor in tensors.items()}
        path = tmp_path / f"{slug}.safetensors"
        write(path, {k: np.asarray(x, np.float32) for k, x in (tensors | extra).items()}, {})
        fields = {**SMALL, "length": 12}
        _, loaded = attnjax.load(slug, weights=str(path), **fields)
        for name, leaf in flatten(loaded).items():
            np.testing.assert_array_equal(leaf, flatten(params)[name])


@pytest.mark.parametrize(
    ("slug", "fields", "message"),
    [
        ("gpt2", {"attention": "lokal"}, "did you mean 'local'"),
        ("gpt2", {"attention": {"name": "local", "windw": 3}}, "did you mean 'window'"),
        ("gpt2", {"num_heads": 3}, "num_heads=3 must divide"),
        ("gpt2", {"remat": "all"}, "remat='all'"),
        ("gpt2", {"depth": 0}, "depth=0"),
        ("encoder", {"family": "albert"}, "known: bert, roberta"),
        ("encoder", {"head": "pooled"}, "known: masked, none"),
        ("encoder", {"padding": 256}, "padding=256"),
        ("encoder_decoder", {"lengths": (4,)}, "lengths"),
        ("encoder_decoder", {"depth": (0, 1)}, "depth"),
        ("encoder_decoder", {"cross_attention": "local"}, "no causal_cross form"),
    ],
)
def test_impossible_models_are_refused(slug, fields, message):
    with pytest.raises(RecipeError, match=message):
        build(slug, **fields)


@pytest.mark.parametrize("slug", ["gpt2", "encoder"])
def test_inputs_that_do_not_fit_are_refused(slug):
    model, params, _ = make(slug)
    for tokens, message in (
        (np.zeros((2, 3), np.float32), "integers"),
        (np.zeros(3, np.int32), "integers"),
        (np.zeros((2, 13), np.int32), "positions for 12"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, tokens)
