# SPDX-License-Identifier: Apache-2.0
"""The decoder: what tokens may see, caches, recomputation, devices, experts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models.load import abstract_params, build
from attnjax.nn.text import starts
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import flatten, unflatten

# Float32 sums in another order, through two layers; logits are of size 1.
TOLERANCE = 2e-5
QUICK = {"xla_backend_optimization_level": 0}
ROOM = {"count": 4, "top_k": 2, "capacity": 2.0, "group": 8}
"""Experts among which no token is dropped: every group has places for all of its tokens."""


@functools.cache
def make(**fields):
    """A small decoder, its parameters, and its compiled logits."""
    if fields.pop("has_experts", False):
        fields["experts"] = ROOM
    model = build("decoder", vocab_size=40, width=32, hidden=48, length=12, **fields)
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


FORMS = [{}, {"window": 4}, {"attention": "bidirectional"}, {"has_experts": True}]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_padding_has_no_influence(fields):
    """On the right and, with rotary positions, on the left."""
    _, params, run = make(**fields)
    tokens = draw()
    alone = run(params, tokens, np.ones((2, 12), np.int32))
    for left, right in ((0, 5), (5, 0), (3, 2)):
        pad = lambda x, left=left, right=right: np.pad(x, ((0, 0), (left, right)))
        padded = run(params, pad(tokens), pad(np.ones((2, 12), np.int32)))
        close(padded[:, left : left + 12], alone)


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_packed_documents_equal_separate_ones(fields):
    _, params, run = make(**fields)
    first, second = draw(t=5), draw(t=7, seed=1)
    segments = np.repeat([[1, 2]], [5, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    packed = run(params, np.concatenate([first, second], axis=1), segments)
    close(packed[:, :5], run(params, first))
    close(packed[:, 5:], run(params, second))


def test_positions_begin_again_with_every_segment():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 1], [0, 0, 1, 1, 1, 1]])
    assert starts(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3]]


def test_what_a_token_sees():
    """By change: of one token, and of what follows from it."""
    seen = {}
    for name, fields in {"causal": {}, "window": {"window": 4}, "both": FORMS[2]}.items():
        _, params, run = make(depth=1, **fields)
        before, tokens = run(params, draw(1)), draw(1)
        tokens[0, 5] = (tokens[0, 5] + 1) % 40
        moved = np.abs(run(params, tokens) - before).max(axis=-1)[0] > 0
        seen[name] = np.flatnonzero(moved).tolist()
    assert seen == {
        "causal": list(range(5, 12)), "window": [5, 6, 7, 8], "both": list(range(12)),
    }  # fmt: skip


def test_bidirectional_attention_drops_the_window():
    _, params, run = make(attention="bidirectional")
    _, _, windowed = make(attention="bidirectional", window=2)
    close(windowed(params, draw()), run(params, draw()))


QWEN3 = {"heads": (4, 2, 12), "projections": "normed"}


@pytest.mark.parametrize("fields", [{}, {"window": 4}, {"has_experts": True}, QWEN3], ids=str)
@pytest.mark.parametrize("prompt", [1, 7])
def test_cached_steps_equal_the_parallel_form(fields, prompt):
    model, params, run = make(**fields)
    tokens = draw()
    expected = run(params, tokens)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def extend(tokens, cache, lengths):
        output, cache = model.apply({"params": params}, tokens, cache, lengths, method="extend")
        return output.logits, cache

    cache = model.empty_cache(2, capacity=12, chunk=3)
    # The second example's prompt is shorter; the rest of its row does not count.
    lengths = np.array([prompt, max(1, prompt - 3)], np.int32)
    logits, cache = extend(tokens[:, :prompt], cache, lengths)
    for row in (0, 1):
        close(logits[row, : lengths[row]], expected[row, : lengths[row]])
    for step in range(12 - prompt):
        places = lengths + step
        new = tokens[np.arange(2), places][:, None]
        logits, cache = extend(new, cache, np.ones(2, np.int32))
        close(logits[:, 0], expected[np.arange(2), places])


def test_caches_that_do_not_fit_are_refused():
    model, params, _ = make()
    cache = model.empty_cache(3, capacity=4)
    with pytest.raises(ValueError, match="empty_cache"):
        model.apply({"params": params}, draw(), cache, method="extend")
    both, params, _ = make(attention="bidirectional")
    with pytest.raises(ValueError, match="only causal"):
        both.apply({"params": params}, draw(3, 1), cache, method="extend")


def test_attention_by_name_with_the_same_parameters_equals_the_own_one():
    """Softmax attention has biases in addition, which are zero here; window and rotation agree."""
    for fields, attention in (
        ({}, "softmax"),
        ({"window": 4}, {"name": "local", "window": 4}),
    ):
        _, params, run = make(heads=(4, 4), **fields)
        named = build(
            "decoder", vocab_size=40, width=32, hidden=48, length=12, heads=(4, 4),
            attention=attention,
        )  # fmt: skip
        shapes = flatten(abstract_params(named))
        leaves = flatten(params)
        assert {p for p in shapes if p not in leaves} == {
            f"layers/attention/{part}/bias" for part in ("query", "key", "value", "out")
        }
        leaves = {p: leaves.get(p, np.zeros(x.shape, np.float32)) for p, x in shapes.items()}
        logits = jax.jit(lambda p, *x, named=named: named.apply({"params": p}, *x).logits)
        close(logits(unflatten(leaves), draw()), run(params, draw()))
        assert named.flops() > 0
    segments = np.repeat([[1, 2]], [5, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    own = build("decoder", attention=None, vocab_size=40, width=32, hidden=48, length=12)
    assert own.make_attention() is None and own.is_causal
    _, params, run = make(heads=(4, 4))
    named = named.clone(attention="softmax")
    logits = named.apply({"params": unflatten(leaves)}, draw(), segments).logits
    close(logits, run(params, draw(), segments))


@pytest.mark.parametrize("attention", ["s4d", pytest.param("softmax", marks=pytest.mark.slow)])
def test_streams_equal_the_parallel_form(attention):
    model, params, run = make(heads=(2, 2), attention=attention)
    tokens = draw()
    expected = run(params, tokens)
    extend = jax.jit(
        lambda x, cache: model.apply({"params": params}, x, cache, method="extend"),
        compiler_options=QUICK,
    )
    streams, at = model.empty_cache(2, capacity=12), 0
    for count in (7, 1, 1, 1):
        output, streams = extend(tokens[:, at : at + count], streams)
        close(output.logits, expected[:, at : at + count])
        at += count
    with pytest.raises(NotImplementedError, match="lengths"):
        model.apply({"params": params}, tokens, streams, np.ones(2, np.int32), method="extend")
    with pytest.raises(ValueError, match="empty_cache"):
        model.apply({"params": params}, tokens, make()[0].empty_cache(2, 4), method="extend")
    with pytest.raises(NotImplementedError, match="positions"):
        model.apply({"params": params}, tokens, None, tokens)


def test_attention_by_name_refuses_what_it_cannot_have():
    for fields, message in (
        ({"attention": "locl"}, "did you mean 'local'"),
        ({"attention": "local"}, "as many key/value heads"),
        ({"attention": "local", "heads": (4, 4), "window": 3}, "its own windows"),
        ({"attention": "local", "heads": (4, 4), "projections": "biased"}, "biases of its own"),
        ({"attention": "local", "heads": (4, 4, 8)}, "heads of width d / n"),
        ({"attention": {"name": "s4d", "rotary_base": 1e4}, "heads": (4, 4)}, "nothing to rotate"),
    ):
        with pytest.raises(RecipeError, match=message):
            build("decoder", **fields)


def gradients(model, params, tokens):
    def loss(p):
        output = model.apply({"params": p}, tokens)
        return jnp.mean(output.logits**2) + output.aux.get("penalty", 0.0)

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


@functools.cache
def expected_gradients(**fields):
    """On one device, with nothing computed again."""
    model, params, _ = make(**fields)
    return gradients(model, params, draw(4))


@pytest.mark.parametrize(
    "remat", ["offload", *(pytest.param(x, marks=pytest.mark.slow) for x in ("full", "dots"))]
)
def test_recomputation_changes_nothing(remat):
    model, params, _ = make(has_experts=True)
    loss, expected = expected_gradients(has_experts=True)
    again, found = gradients(model.clone(remat=remat), params, draw(4))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, flatten(expected)[path], atol=2e-6, err_msg=path)


def test_recomputation_saves_memory():
    """What the forward pass leaves for the backward one, per layer."""
    sizes = {}
    for remat in ("none", "dots", "full"):
        model = build("decoder", width=32, depth=4, length=64, remat=remat)
        params = parameters(model)
        loss = lambda p, model=model: model.apply(
            {"params": p}, jnp.zeros((4, 64), jnp.int32), method="encode"
        )[0].sum()
        step = jax.jit(jax.grad(loss), compiler_options=QUICK).lower(params).compile()
        sizes[remat] = step.memory_analysis().temp_size_in_bytes
    assert sizes["full"] < sizes["dots"] < sizes["none"]


def test_offloaded_inputs_are_all_that_layers_leave():
    """Arrays with an axis of layers and the axes of activations: inputs, in the host's memory."""
    model, params, _ = make(remat="offload", depth=5)
    loss = lambda p: model.apply({"params": p}, draw(), method="encode")[0].sum()
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert set(re.findall(r"\w+(?:<host>)?\[5,2,12,[^]]*\]", program)) == {"f32<host>[5,2,12,32]"}


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        pytest.param(
            {"data": 2, "fsdp": 2, "model": 2}, {"has_experts": True}, marks=pytest.mark.slow
        ),
        ({"fsdp": 2, "model": 2, "context": 2}, {"has_experts": True}),
        pytest.param({"data": 2, "context": 4}, {"window": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_change_nothing(sizes, fields):
    model, params, _ = make(**fields)
    tokens = draw(4)
    loss, expected = expected_gradients(**fields)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(params, mesh)[0])
        rows = jax.device_put(tokens, batch_sharding(mesh))
        again, found = gradients(model, placed, rows)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    for path, leaf in flatten(found).items():
        wanted = flatten(expected)[path]
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=TOLERANCE * scale, err_msg=path)


def test_hidden_states_of_every_layer():
    model, params, run = make()
    run_all = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["hidden"]))
    output, captured = run_all(params, draw())
    states = model.hidden_states(captured)
    assert states.shape == (3, 2, 12, 32)
    np.testing.assert_array_equal(states[0], np.asarray(params["embed"]["embedding"])[draw()])
    close(states[-1] @ params["head"]["kernel"], output.logits)
    close(output.logits, run(params, draw()))


def test_flops_are_the_matrix_products_of_the_compiled_forward_pass():
    """Against XLA's count, which also holds elementwise work and pairs that the mask hides."""
    model = build("decoder", width=128, depth=1, hidden=512, length=64, vocab_size=512)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x).logits)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    cost = run.lower(abstract_params(model), tokens).compile().cost_analysis()
    assert 0.9 < model.flops() / cost["flops"] < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "casual"}, "did you mean 'causal'"),
        ({"remat": "all"}, "known: dots, full, none, offload"),
        ({"heads": (4, 3)}, r"heads=\(4, 3\)"),
        ({"heads": (4,)}, "key/value heads"),
        ({"width": 36, "heads": (4, 4)}, "width=36"),
        ({"window": 0}, "window=0"),
        ({"depth": 0}, "depth=0"),
        ({"experts": {"cuont": 4}}, "did you mean 'count'"),
        ({"experts": {"top_k": 1}}, "count is required"),
        ({"experts": {"count": 4, "top_k": 3}}, "top_k=3"),
        ({"experts": {"count": 1}}, "count=1"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises((RecipeError, ValueError), match=message):
        build("decoder", **fields)


@pytest.mark.parametrize(
    ("tokens", "segments"),
    [(np.zeros((2, 3), np.float32), None), (np.zeros(3, np.int32), None),
     (np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32))],
)  # fmt: skip
def test_inputs_of_another_shape_are_refused(tokens, segments):
    model, params, _ = make()
    with pytest.raises(ValueError, match=r"must be integers \[b, t\]"):
        model.apply({"params": params}, tokens, segments)
