# SPDX-License-Identifier: Apache-2.0
"""Weights of landmark models: both layouts of the release, and a published difference."""

import jax
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models import landmark
from attnjax.models.convert import add_difference, convert
from attnjax.models.load import build, load_params
from attnjax.weights import export_params, flatten, read, write

FIELDS = {"vocab_size": 20, "table": (22, 21), "width": 16, "num_heads": 2, "hidden": 24}


def drawn(**fields):
    model = build("landmark", None, **FIELDS, **fields)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return model, jax.tree.map(np.asarray, params)


def assert_equal(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_both_layouts_of_the_release_are_read(tmp_path):
    """The tied head that one of them repeats is dropped, the other's own head is not."""
    model, params = drawn(landmarks={"context_miss": 0.5})
    tensors = export_params(params, landmark.TORCH_NAMES["release"])
    assert tensors["rem_token_embedding.weight"].shape == (1, 16)
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (48, 16)
    head = {"lm_head.weight": tensors["transformer.wte.weight"]}
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    write(tmp_path / "release.safetensors", {**tensors, **head, **masks}, {})
    assert_equal(load_params(model, tmp_path / "release.safetensors"), params)

    model, params = drawn(style="llama")
    tensors = export_params(params, landmark.TORCH_NAMES["hf"])
    assert tensors["lm_head.weight"].shape == (22, 16)
    write(tmp_path / "hf.safetensors", tensors, {})
    assert_equal(load_params(model, tmp_path / "hf.safetensors"), params)


def test_a_published_difference_is_added_to_its_base(tmp_path):
    """Rows of tokens that the base lacks count as the mean of its rows."""
    model, params = drawn(style="llama")
    tuned = export_params(params, landmark.TORCH_NAMES["hf"])
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in tuned.items()}
    difference = {name: tuned[name] - base[name] for name in tuned}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:20]
        grown = np.concatenate([base[name], np.tile(base[name].mean(axis=0), (2, 1))])
        difference[name] = tuned[name] - grown
    base["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "change", "sum")}
    write(paths["base"], base, {})
    write(paths["change"], difference, {})
    fields = {**FIELDS, "style": "llama"}
    said = convert(
        "landmark", None, fields, source=paths["change"], target=paths["sum"], base=paths["base"]
    )
    assert "layout attnjax" in said
    found = flatten(load_params(model, paths["sum"]))
    for name, expected in flatten(params).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)
    assert "base_sha256" in read(paths["sum"])[1]


def test_bases_that_do_not_fit_are_refused():
    square, vector = np.zeros((3, 3)), np.zeros(3)
    with pytest.raises(RecipeError, match="extra is in one of both only") as caught:
        add_difference(
            {"table": square, "scale": vector, "wide": np.zeros((3, 4)), "extra": vector},
            {"table": np.zeros((2, 3)), "scale": np.zeros(4), "wide": square},
        )
    for name in ("table is (3, 3) in the base, (2, 3)", "scale is (3,)", "wide is (3, 4)"):
        assert name in str(caught.value)
