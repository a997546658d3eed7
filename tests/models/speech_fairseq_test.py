# SPDX-License-Identifier: Apache-2.0
"""Both models of speech agree with fairseq's, to whose weights CAB's belong."""

import jax
import numpy as np
import pytest

from attnjax.models import build, fastspeech2
from attnjax.models.load import abstract_params
from attnjax.weights import flatten, import_params
from attnjax.weights.names import conv1d, linear, norm, output, plan, projections, rule
from tests.goldens import make_fairseq_speech as golden

TOLERANCE = 2e-5  # float32 sums in another order; numbers are around 1
QUICK = {"xla_backend_optimization_level": 0}


def layer(ours, theirs, names):
    """The rules of a pre-norm layer with the given attentions."""
    for part, attention in names.items():
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            yield from projections(f"{ours}/{part}", f"{theirs}.{attention}.{letter}_proj", [name])
        yield from output(f"{ours}/{part}/out", f"{theirs}.{attention}.out_proj")
        yield from norm(f"{ours}/{part}_norm", f"{theirs}.{attention}_layer_norm")
    yield from linear(f"{ours}/mlp/up", f"{theirs}.fc1")
    yield from linear(f"{ours}/mlp/down", f"{theirs}.fc2")
    yield from norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm")


def stack(ours, theirs):
    """The rules of convolutions with norms."""
    yield from conv1d(f"{ours}/conv_{{}}/conv", f"{theirs}.{{}}.0")
    yield from norm(f"{ours}/norm_{{}}", f"{theirs}.{{}}.1")


def stepwise_names():
    """Transformer-TTS with GroupNorm: weights that are published do not fit, so no table ships."""
    yield rule("embedding", "encoder.embed_tokens.weight")
    yield from stack("encoder_prenet", "encoder.prenet")
    yield from linear("encoder_projection", "encoder.prenet_proj")
    encoder = {"attention": "self_attn"}
    yield from layer("encoder_{}", "encoder.transformer_layers.{}", encoder)
    yield from linear("prenet_{}", "decoder.prenet.0.layers.{}.0")
    yield from linear("prenet_projection", "decoder.prenet.1")
    decoder = encoder | {"cross": "encoder_attn"}
    yield from layer("decoder_{}", "decoder.transformer_layers.{}", decoder)
    for side in ("encoder", "decoder"):
        yield rule(f"{side}_positions/alpha", f"{side}.pos_emb_alpha", "vector")
        yield from norm(f"{side}_norm", f"{side}.layer_norm")
    yield from linear("mel_head", "decoder.feat_proj")
    yield from linear("end_head", "decoder.eos_proj")
    yield from stack("postnet", "decoder.postnet.convolutions")


def run(name, fields, rules):
    """Apply a model to the inputs of the goldens with the formula's weights."""
    model = build(name, **fields)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    entries = plan(shapes, rules)
    tensors = {tensor: golden.formula(tensor, entry.shape) for tensor, entry in entries.items()}
    params = import_params(tensors, shapes, {"fairseq": rules})
    given = {key: golden.inputs()[key] for key in model.example(1)}
    apply = jax.jit(lambda p, x: model.apply({"params": p}, **x), compiler_options=QUICK)
    return apply(params, given)


@pytest.fixture(scope="module")
def expected():
    with np.load(golden.GOLDENS, allow_pickle=False) as file:
        return dict(file)


def test_fastspeech2(expected):
    found = run("fastspeech2", golden.FAST, fastspeech2.TORCH_NAMES["fairseq"])
    assert int(found.frames[0]) == 20
    for field in ("mel", "log_duration", "pitch", "energy"):
        reference = expected[f"fast_{field}"]
        np.testing.assert_allclose(getattr(found, field), reference, atol=TOLERANCE, err_msg=field)


def test_transformer_tts(expected):
    found = run("transformer_tts", golden.STEPWISE, tuple(stepwise_names()))
    apart = lambda x: x.reshape(1, 20, 8)
    np.testing.assert_allclose(found.end, expected["step_end"][..., 0], atol=TOLERANCE)
    np.testing.assert_allclose(found.coarse, apart(expected["step_coarse"]), atol=TOLERANCE)
    np.testing.assert_allclose(found.mel, apart(expected["step_mel"]), atol=5 * TOLERANCE)
