# SPDX-License-Identifier: Apache-2.0
"""Landmarks in a decoder: the tape, chunks through the cache, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.data.patterns import KeyRecall
from attnjax.errors import RecipeError
from attnjax.models import decoder
from attnjax.models.landmark import PRESETS, Landmark, Reading
from attnjax.nn.stack import token_logits
from attnjax.ops.landmark_cache import RETRIEVALS
from attnjax.ops.landmark_tape import insert, strip, tape_length
from attnjax.tasks.long_language import LongLanguageModelling

ATOL = 2e-5


@pytest.fixture(scope="module")
def network():
    model = Landmark(vocab_size=30, width=32, num_heads=2, hidden=48, block=5, length=60)
    tokens = np.random.default_rng(0).integers(0, 30, (2, 34)).astype(np.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    return model, jax.tree.map(lambda x: 2 * x, params), tokens


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def read(model, params, tokens, cache, top_k, retrieval=RETRIEVALS[0]):
    return model.apply(
        {"params": params}, tokens, cache, top_k=top_k, retrieval=retrieval, method="read"
    )


@pytest.mark.parametrize(
    "retrieval",
    [RETRIEVALS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in RETRIEVALS[1:])],
)
def test_reading_in_chunks_with_enough_blocks_is_reading_whole(network, retrieval):
    model, params, tokens = network
    whole, _ = model.apply({"params": params}, tokens, method="encode")
    cache, parts, at = model.empty_cache(2, 6), [], 0
    for size in (7, 12, 11, 4):
        out, cache = read(model, params, tokens[:, at : at + size], cache, 6, retrieval)
        parts.append(out)
        at += size
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=ATOL)


def test_tokens_see_the_past_alone(network):
    model, params, tokens = network
    logits = model.apply({"params": params}, tokens).logits
    assert logits.shape == (2, 34, 31)
    later = tokens.copy()
    later[:, 20:] = (later[:, 20:] + 1) % 30
    changed = model.apply({"params": params}, later).logits
    np.testing.assert_allclose(changed[:, :20], logits[:, :20], atol=ATOL)
    assert np.abs(changed[:, 20:] - logits[:, 20:]).max() > 1e-3


def test_windows_end(network):
    model, params, tokens = network
    windowed = model.clone(attention="window", window=4)
    forward = lambda tokens: windowed.apply({"params": params}, tokens).logits
    logits, early = forward(tokens), tokens.copy()
    early[:, 0] = (early[:, 0] + 1) % 30
    # Two layers of 4 tokens reach 6 back.
    np.testing.assert_allclose(forward(early)[:, 7:], logits[:, 7:], atol=ATOL)
    assert np.abs(forward(early)[:, :7] - logits[:, :7]).max() > 1e-3


def test_gates_are_dropped_in_training_alone(network):
    model, params, tokens = network
    dropped = model.clone(landmarks={"group_dropout": 0.5})
    apply = lambda **options: dropped.apply({"params": params}, tokens, **options).logits
    calm = apply()
    np.testing.assert_allclose(calm, model.apply({"params": params}, tokens).logits, atol=ATOL)
    noisy = apply(train=True, rngs={"attention": jax.random.key(1)})
    np.testing.assert_allclose(noisy[:, :5], calm[:, :5], atol=ATOL)  # the own block has no gate
    assert np.abs(noisy[:, 6:] - calm[:, 6:]).max() > 1e-3


def test_positions_jump_in_training_alone(network):
    model, params, tokens = network
    jumping = model.clone(landmarks={"jump": 3})
    apply = lambda model, **options: model.apply({"params": params}, tokens, **options).logits
    key = {"attention": jax.random.key(1)}
    calm = apply(model)
    np.testing.assert_array_equal(apply(jumping), calm)
    far = apply(jumping, train=True, rngs=key)
    np.testing.assert_allclose(far[:, :5], calm[:, :5], atol=ATOL)  # no landmark before them
    assert np.abs(far[:, 6:] - calm[:, 6:]).max() > 1e-3
    # Jumps of one place are as if every landmark took two.
    single = apply(model.clone(landmarks={"jump": 1}), train=True, rngs=key)
    slots = np.arange(tape_length(34, 5))
    layers = model.bind({"params": params})
    streams, positions = layers._streams(insert(tokens, 5, 30)), (slots + slots // 6)[None]
    (x, _), _ = layers.layers(streams, None, positions, Reading(), False)
    expected = token_logits(strip(layers.norm(x), 5), params["embed"]["embedding"].T)
    np.testing.assert_allclose(single, expected, atol=ATOL)


def test_context_miss_token(network):
    """Control changes training; reading with enough blocks is one tape whose past is controlled."""
    model, _, tokens = network
    model = model.clone(landmarks={"context_miss": 0.5})
    params = jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0), tokens)["params"])
    assert params["miss"]["embedding"].shape == (1, 32)
    apply = lambda **options: model.apply({"params": params}, tokens, **options).logits
    calm, trained = apply(), apply(train=True, rngs={"attention": jax.random.key(1)})
    np.testing.assert_allclose(trained[:, :5], calm[:, :5], atol=ATOL)
    assert np.abs(trained[:, 6:] - calm[:, 6:]).max() > 1e-3
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens).logits ** 2))(params)
    assert np.abs(grads["miss"]["embedding"]).max() > 0
    rates = []
    for cutoff in (0.0, 0.2, 1.0):
        task = LongLanguageModelling(model, chunk=10, blocks=8, top_k=3, miss_cutoff=cutoff)
        states = jax.jit(task.evaluate)(params, {"tokens": tokens})
        rates.append(float(states["dropped"].compute()))
    assert rates[0] == 0 < rates[1] < rates[2] == 1


def test_parts_see_themselves_and_the_part_before(network):
    model, params, tokens = network
    recurrent = model.clone(attention="recurrent", window=4, depth=1)
    params = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    embedded = params["embed"]["embedding"][tokens]

    def mixed(x):
        layer = recurrent.bind({"params": params})
        (x, _), _ = layer.layers((x, None), None, None, Reading(), False)
        return x

    out = mixed(embedded)
    for place in range(34):
        changed = mixed(embedded.at[:, place].multiply(-1))
        seen = np.abs(changed - out).max(axis=(0, 2)) > 1e-6
        own, part = np.arange(34), np.arange(34) // 4
        assert (seen == ((own >= place) & (part - place // 4 <= 1))).all()
    # The part before gets no gradient: only what goes through the tokens themselves.
    grad = jax.grad(lambda x: jnp.sum(mixed(x)[:, 8:12] ** 2))(embedded)
    assert np.abs(grad[:, 8:12]).max() > 0 and np.abs(grad[:, :8]).max() == 0


def test_the_right_block_is_counted(network):
    model, params, tokens = network
    holder = np.full(tokens.shape, -1, np.int32)
    holder[:, 30:] = 2
    batch = {"tokens": tokens, "holder": holder, "scored": holder >= 0}
    rates = {}
    for blocks, top_k in ((8, 6), (1, 1)):
        task = LongLanguageModelling(model, chunk=10, blocks=blocks, top_k=top_k, scored=True)
        states = jax.jit(task.evaluate)(params, batch)
        rates[top_k] = float(states["retrieved"].compute())
    # Six blocks are all there are; the latest one is block 3 or later.
    assert rates == {6: 1.0, 1: 0.0}


def test_llamas_style(network):
    """RMS norms, SwiGLU, a head of its own: a decoder whose landmarks are never reached."""
    fields = dict(vocab_size=30, width=32, depth=2, hidden=48)
    model = Landmark(**fields, num_heads=2, block=40, length=34, style="llama")
    other = decoder.Decoder(**fields, heads=(2, 2), length=34, epsilon=1e-6)
    tokens = network[2]
    params = model.init(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: 2 * x, params)
    ours = model.apply({"params": params}, tokens).logits
    assert ours.shape == (2, 34, 31) and model.head_kernel(params).shape == (32, 31)
    theirs = dict(params)
    theirs["embed"] = {"embedding": params["embed"]["embedding"][:30]}
    theirs["head"] = {"kernel": params["head"]["kernel"][:, :30]}
    expected = other.apply({"params": theirs}, tokens).logits
    np.testing.assert_allclose(ours[..., :30], expected, atol=ATOL)


def test_the_papers_model_has_its_size():
    model = Landmark(**PRESETS["paper"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 60), np.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 202_531_840
    assert (model.rows, model.landmark) == (50_304, 50_260)


def test_initial_values_have_the_papers_sizes():
    """The last matrix of each branch is smaller, so that their sum does not grow with depth."""
    model = Landmark(depth=8, width=64, hidden=256)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    layers = params["layers"]
    for kernel in (layers["attention"]["query"], layers["mlp"]["up"]):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.03)
    np.testing.assert_allclose(np.std(params["embed"]["embedding"]), 0.02, rtol=0.03)
    for kernel in (layers["attention"]["out"], layers["mlp"]["down"]):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02 / 4, rtol=0.03)


@pytest.mark.parametrize("chunk", [9, 10])
@pytest.mark.slow
def test_evaluation_reads_chunks_of_any_length(network, chunk):
    model, params, tokens = network
    task = LongLanguageModelling(model, chunk=chunk, blocks=8, top_k=8, scored=True)
    scored = np.zeros(tokens.shape, bool)
    scored[:, -2:] = True
    batch = {"tokens": tokens, "scored": scored}
    task.check(batch)
    states = {name: state.compute() for name, state in task.evaluate(params, batch).items()}
    logits = model.apply({"params": params}, tokens).logits
    log = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log[:, :-1], tokens[:, 1:, None], axis=-1)[:, -2:, 0]
    np.testing.assert_allclose(states["loss"], nll.mean(), rtol=1e-4)
    hits = (log[:, :-1].argmax(axis=-1) == tokens[:, 1:])[:, -2:]
    assert states["exact_match"] == hits.all(axis=1).mean()
    loss, _ = task.loss(params, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(loss, nll.mean(), rtol=1e-4)


def test_keys_are_told_once_and_asked_for():
    source = KeyRecall(blocks=4)
    assert (source.length, source.vocab_size) == (36, 267)
    places = set()
    for index in range(50):
        row = source[index]
        tokens = row["tokens"]
        (place,) = np.flatnonzero(tokens[:-4] == 265)
        np.testing.assert_array_equal(tokens[place : place + 3], tokens[-3:])
        assert place % 8 <= 5 and tokens[-4] == 266
        assert row["scored"].sum() == 2 and row["scored"][-2:].all()
        assert ((tokens[:-4] >= 1) & (tokens[:-4] <= 64)).sum() == 29
        places.add(place // 8)
    assert places == {0, 1, 2, 3}
    with pytest.raises(RecipeError, match=r"source\.block=2"):
        KeyRecall(block=2)


def test_wrong_arguments_are_refused(network):
    model, params, tokens = network
    for fields, message in (
        (dict(attention="full"), "model.attention='full'"),
        (dict(attention="window"), "model.window=None"),
        (dict(window=4), "model.window=4"),
        (dict(landmarks={"group_dropout": 1.0}), r"landmarks\.group_dropout=1\.0"),
        (dict(landmarks={"context_miss": 2}), r"landmarks\.context_miss=2"),
        (dict(landmarks={"skip": 2}), "skip"),
        (dict(landmarks={"jump": 3}, attention="causal"), "has no landmarks"),
        (dict(attention="recurrent"), "model.window=None"),
        (dict(style="bert"), "model.style='bert'"),
        (dict(table=(300, 100)), "model.table"),
        (dict(width=33), "model.width=33"),
        (dict(block=0), "model.block=0"),
    ):
        with pytest.raises(RecipeError, match=message):
            Landmark(**fields)
    with pytest.raises(NotImplementedError, match="segments"):
        model.apply({"params": params}, tokens, tokens)
    cache = model.empty_cache(2, 4)
    with pytest.raises(ValueError, match="read shorter chunks"):
        read(model, params, np.zeros((2, 50), np.int32), cache, 3)
    with pytest.raises(ValueError, match="retrieval='all'"):
        read(model, params, tokens, cache, 1, "all")
    with pytest.raises(ValueError, match="only landmarks"):
        model.clone(attention="causal").empty_cache(2, 4)
    for options, message in (
        (dict(chunk=0), "task.chunk=0"),
        (dict(retrieval="all"), "task.retrieval='all'"),
        (dict(chunk=60), "read shorter chunks"),
    ):
        with pytest.raises(RecipeError, match=message):
            LongLanguageModelling(model, **options)
