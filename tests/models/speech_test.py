# SPDX-License-Identifier: Apache-2.0
"""FastSpeech 2 and Transformer-TTS: sizes, padding, lengths, synthesis step by step, refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models import build, fastspeech2, transformer_tts
from attnjax.models.load import abstract_params
from attnjax.nn.speech import regulate_lengths
from attnjax.weights import flatten, unflatten
from attnjax.weights.names import plan

NAMES = ("fastspeech2", "transformer_tts")
TINY = {"vocab_size": 9, "length": 6, "frames": 16, "mels": 4, "width": 16, "depths": (1, 1),
        "num_heads": 2, "hidden": 24}  # fmt: skip
OWN = {
    "fastspeech2": {"kernel": 3, "variance": {"width": 8, "bins": 8}},
    "transformer_tts": {"frames_per_step": 2},
}
LOCAL = {
    "fastspeech2": {"attention": {"name": "local", "window": 2}},
    "transformer_tts": {
        "encoder_attention": {"name": "local", "window": 2},
        "decoder_attention": {"name": "local", "window": 3},
    },
}
SAME_MATH = 2e-5  # float32 sums in another order
HALF = 6e-2  # eight bits of mantissa through a few layers, relative to the largest entry
QUICK = {"xla_backend_optimization_level": 0}


def formula(model, seed=0):
    """Parameters of every shape by formula: compiling an initialisation takes longer."""
    rng = np.random.default_rng(seed)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    leaves = {path: draw(leaf) for path, leaf in flatten(abstract_params(model)).items()}
    leaves |= {path: 1 + x for path, x in leaves.items() if path.endswith("/scale")}
    return unflatten(leaves)


@functools.cache
def prepared(name, is_local=False):
    model = build(name, **TINY, **OWN[name], **(LOCAL[name] if is_local else {}))
    return model, formula(model)


def draw(model, seed=0):
    """Two utterances: of 6 phonemes and 15 frames, and of 4 phonemes and 9 frames."""
    rng = np.random.default_rng(seed)
    phonemes = rng.integers(1, 9, (2, 6)).astype(np.int32)
    phonemes[1, 4:] = 0
    duration = np.array([[3, 1, 4, 2, 5, 0], [3, 0, 4, 2, 0, 0]], np.int32)
    batch = {
        "phonemes": phonemes,
        "duration": duration,
        "pitch": rng.uniform(4, 6, (2, 6)).astype(np.float32),
        "energy": rng.uniform(1, 4, (2, 6)).astype(np.float32),
        "mel": rng.standard_normal((2, 16, 4)).astype(np.float32),
        "frames": duration.sum(axis=1).astype(np.int32),
    }
    return {name: batch[name] for name in model.example(2)}


RUNNERS = {}


def runner(model):
    """The compiled model; models with options in a dict have no hash."""
    run = lambda p, x: model.apply({"params": p}, **x)
    return RUNNERS.setdefault(repr(model), jax.jit(run, compiler_options=QUICK))


def test_the_published_sizes():
    """Counts of fairseq's models, layer by layer; running statistics of BatchNorm left out."""
    attention, norm = 4 * (256 * 256 + 256), 2 * 256
    conv = lambda k, i, o: k * i * o + o
    block = attention + 2 * norm + conv(9, 256, 1024) + conv(9, 1024, 256)
    predictor = 2 * conv(3, 256, 256) + 2 * norm + 257
    expected = 74 * 256 + 8 * block + 3 * predictor + 2 * 256 * 256 + conv(1, 256, 80) + 2
    assert expected == 41_228_117
    assert count("fastspeech2", "cab") == expected

    attention, norm, line = 4 * (512 * 512 + 512), 2 * 512, functools.partial(conv, 1)
    mlp = line(512, 2048) + line(2048, 512)
    encoder = 3 * (conv(5, 512, 512) + norm) + line(512, 512) + norm
    encoder += 6 * (attention + mlp + 2 * norm)
    decoder = line(320, 256) + line(256, 256) + line(256, 512) + norm
    decoder += 6 * (2 * attention + mlp + 3 * norm) + line(512, 320) + line(512, 1)
    postnet = conv(5, 320, 512) + 3 * conv(5, 512, 512) + conv(5, 512, 320) + 4 * norm + 2 * 320
    expected = 74 * 512 + encoder + decoder + postnet + 2
    assert expected == 54_399_747
    assert count("transformer_tts", "cab") == expected


def count(name, preset):
    model = build(name, preset)
    assert model.flops() > 2 * model.frames * model.width * model.mels
    return sum(math.prod(x.shape) for x in flatten(abstract_params(model)).values())


def test_fairseqs_names_are_a_bijection():
    leaves = flatten(abstract_params(build("fastspeech2", "cab")))
    entries = plan({k: x.shape for k, x in leaves.items()}, fastspeech2.TORCH_NAMES["fairseq"])
    assert entries["encoder.encoder_fft_layers.3.ffn.ffn.0.weight"].shape == (1024, 256, 9)
    assert entries["encoder.dec_pos_emb_alpha"].shape == (1,)
    assert len(entries) == len(leaves)


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_either_side_changes_nothing(name):
    model, params = prepared(name)
    batch = draw(model)
    expected = runner(model)(params, batch)
    # What is beyond the frames, and other utterances of the batch, must not matter either.
    if "mel" in batch:
        batch["mel"][0, 14:] = 7.0
        batch["mel"][1, 8:] = 7.0
    if "pitch" in batch:
        batch["pitch"][1, 4:] = 9.0
        batch["energy"][1, 4:] = 9.0
    longer = {k: np.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x for k, x in batch.items()}
    if "mel" in batch:
        longer["mel"] = np.pad(batch["mel"], ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
    else:
        model = dataclasses.replace(model, frames=20)
    found = runner(model)(params, {k: x[::-1] for k, x in longer.items()})
    assert_equal(jax.tree.map(lambda x: x[::-1], found), expected, model)


def assert_equal(found, expected, model, rows=(0, 1), tolerance=SAME_MATH):
    """Compare outputs where there is something."""
    for field in ("mel", "coarse", "end"):
        if hasattr(expected, field):
            for row in rows:
                step = model.frames_per_step if field == "end" else 1
                size = int(expected.frames[row]) // step
                a, b = (np.asarray(getattr(x, field)[row, :size]) for x in (found, expected))
                np.testing.assert_allclose(a, b, atol=tolerance * max(1, abs(b).max()))
    np.testing.assert_array_equal(np.asarray(found.frames)[list(rows)], expected.frames[rows,])


@pytest.mark.parametrize(
    "name", ["fastspeech2", pytest.param("transformer_tts", marks=pytest.mark.slow)]
)
def test_local_attention_and_half_precision(name):
    model, params = prepared(name, is_local=True)
    batch = draw(model)
    expected = runner(model)(params, batch)
    found = runner(dataclasses.replace(model, dtype="bfloat16"))(params, batch)
    assert found.mel.dtype == jnp.float32
    scale = float(jnp.abs(expected.mel).max())
    for row in (0, 1):
        size = int(expected.frames[row])
        difference = np.abs(np.asarray(found.mel - expected.mel)[row, :size])
        assert difference.mean() < HALF * scale


@pytest.mark.parametrize(
    "name", ["fastspeech2", pytest.param("transformer_tts", marks=pytest.mark.slow)]
)
def test_every_parameter_is_trained(name):
    model, params = prepared(name)
    batch = draw(model)
    keys = {"dropout": jax.random.key(0), "prenet": jax.random.key(1)}
    remat = dataclasses.replace(model, remat="blocks")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        def total(params):
            output = remat.apply({"params": params}, **batch, train=True, rngs=keys)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(output) if x.ndim > 1)

        return jax.grad(total)(params)

    for path, gradient in flatten(jax.device_get(run(params))).items():
        assert np.isfinite(gradient).all(), path
        # Softmax does not see what is added to all keys.
        assert np.abs(gradient).max() > 1e-7 or path.endswith("key/bias"), path


def test_durations_decide_the_frames():
    x = np.arange(6, dtype=np.float32).reshape(2, 3, 1) + 1
    duration = np.array([[2, 0, 3], [1, 1, 0]], np.int32)
    found, filled = regulate_lengths(x, duration, 6)
    np.testing.assert_array_equal(filled, [5, 2])
    np.testing.assert_array_equal(found[0, :5, 0], [1, 1, 3, 3, 3])
    np.testing.assert_array_equal(found[1, :2, 0], [4, 5])
    cut, filled = regulate_lengths(x, duration, 4)
    np.testing.assert_array_equal(filled, [4, 2])
    np.testing.assert_array_equal(cut[0, :, 0], [1, 1, 3, 3])
    nothing, filled = regulate_lengths(x, np.zeros((2, 3), np.int32), 4)
    np.testing.assert_array_equal(filled, [1, 1])
    assert np.isfinite(nothing).all()


def test_predicted_variances_take_the_place_of_given_ones():
    model, params = prepared("fastspeech2")
    batch = draw(model)
    free = runner(model)(params, {"phonemes": batch["phonemes"]})
    frames = np.rint(np.expm1(np.asarray(free.log_duration))).clip(0, 16)
    frames[1, 4:] = 0
    np.testing.assert_array_equal(free.frames, frames.sum(axis=1).clip(1, 16))
    given = {"duration": frames.astype(np.int32), "pitch": free.pitch, "energy": free.energy}
    again = runner(model)(params, {"phonemes": batch["phonemes"], **given})
    assert_equal(again, free, model)


@pytest.mark.parametrize("is_local", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_synthesis_writes_what_the_parallel_pass_predicts(is_local):
    model, params = prepared("transformer_tts", is_local)
    phonemes = draw(model)["phonemes"]
    run = jax.jit(functools.partial(model.synthesise, threshold=0.8), compiler_options=QUICK)
    written = run(params, phonemes)
    assert (np.asarray(written.frames) % 2 == 0).all() and written.frames.min() >= 2
    batch = {"phonemes": phonemes, "mel": written.coarse, "frames": written.frames}
    assert_equal(runner(model)(params, batch), written, model, tolerance=1e-4)
    ends = jax.nn.sigmoid(written.end)
    for row, frames in enumerate(np.asarray(written.frames)):
        assert (ends[row, : frames // 2 - 1] <= 0.8).all()
        assert frames == 16 or ends[row, frames // 2 - 1] > 0.8


def test_the_prenet_has_dropout_wherever_it_has_a_key():
    model, params = prepared("transformer_tts")
    run = jax.jit(model.synthesise, compiler_options=QUICK)
    phonemes = draw(model)["phonemes"]
    first, again, other = (
        np.asarray(run(params, phonemes, jax.random.key(i)).coarse) for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_maps_show_the_last_layer(name):
    model, params = prepared(name)
    batch = draw(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        _, captured = model.apply({"params": params}, **batch, mutable=["attention"])
        return model.attention_maps(captured)

    (found,) = run(params).values()
    assert found.shape == {"fastspeech2": (2, 16, 16), "transformer_tts": (2, 8, 6)}[name]
    valid = {"fastspeech2": (9, 9), "transformer_tts": (4, 4)}[name]
    shown = np.asarray(found[1, : valid[0]])
    np.testing.assert_allclose(shown[:, : valid[1]].sum(axis=1), 1, atol=SAME_MATH)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fastspeech2", {"kernel": 4}, "model.kernel=4: must be odd"),
        ("fastspeech2", {"depths": (1,)}, "model.depths=.* two numbers"),
        ("fastspeech2", {"num_heads": 3}, "model.width=16: must be even, and a multiple of the 3"),
        ("fastspeech2", {"attention": "lokal"}, "model.attention='lokal'.*'local'"),
        ("fastspeech2", {"variance": {"bin": 3}}, "model.variance.bin: unknown.*'bins'"),
        ("fastspeech2", {"variance": {"pitch": (3.0, 1.0)}}, "model.variance.pitch"),
        ("transformer_tts", {"frames": 15}, "model.frames=15: must be a multiple"),
        ("transformer_tts", {"cross_attention": "local"}, "Local has no causal_cross form"),
        ("transformer_tts", {"remat": "all"}, "model.remat='all'.*blocks"),
        ("transformer_tts", {"hidden": 0}, "model.hidden=0"),
    ],
)
def test_what_does_not_fit_is_refused(name, change, message):
    with pytest.raises(RecipeError, match=message):
        build(name, **(TINY | OWN[name] | change))


def test_an_incomplete_step_is_refused():
    model, params = prepared("transformer_tts")
    batch = draw(model)
    batch["mel"] = batch["mel"][:, :15]
    with pytest.raises(ValueError, match="15 frames are no multiple of 2"):
        jax.eval_shape(lambda: model.apply({"params": params}, **batch))
    assert transformer_tts.TORCH_NAMES is None
