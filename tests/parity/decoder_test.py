# SPDX-License-Identifier: Apache-2.0
"""The decoder against stored hidden states and logits of transformers."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from attnjax.models import decoder
from attnjax.models.load import abstract_params, build
from attnjax.weights import flatten, import_params, plan

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_decoder", FOLDER / "make_decoder.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

# Float32 sums in another order through three layers; values are of size 1 to 3.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", golden.CASES)
def test_hidden_states_and_logits_equal_the_reference(name):
    model = build("decoder", **golden.CASES[name])
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    entries = plan(shapes, decoder.TORCH_NAMES["hf"])
    tensors = {tensor: golden.formula(tensor, entry.shape) for tensor, entry in entries.items()}
    params = import_params(tensors, shapes, decoder.TORCH_NAMES)
    tokens = golden.tokens().astype(np.int32)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["hidden"]))
    output, captured = run(params, tokens)
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        hidden, logits = stored[f"{name}/hidden"], stored[f"{name}/logits"]
    assert hidden.shape == (model.depth + 1, *tokens.shape, model.width)
    for ours, expected in zip(model.hidden_states(captured), hidden, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(output.logits, logits, rtol=0, atol=TOLERANCE)
