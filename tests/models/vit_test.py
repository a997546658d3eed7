# SPDX-License-Identifier: Apache-2.0
"""The vision transformer: PyTorch's layers, other image sizes, other attentions, refusals."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import attnjax
from attnjax.errors import RecipeError
from attnjax.models import vit
from attnjax.models.load import abstract_params, build
from attnjax.weights import export_params, flatten, import_params, plan, write

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_vit", FOLDER / "make_vit.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

# Float32 sums in another order through two layers; logits are of size 1.
TOLERANCE = 2e-5

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def made(name, **fields):
    """A small model and its parameters, from tensors of timm's names."""
    model = build("vit", **(golden.CASES[name] | fields))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    entries = plan(shapes, vit.TORCH_NAMES["timm"])
    tensors = {tensor: golden.formula(tensor, entry.shape) for tensor, entry in entries.items()}
    return model, import_params(tensors, shapes, vit.TORCH_NAMES)


@pytest.mark.parametrize("name", golden.CASES)
def test_logits_equal_the_reference(name):
    model, params = made(name)
    output = quick(lambda p, x: model.apply({"params": p}, x))(params, golden.images())
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        np.testing.assert_allclose(output.logits, stored[name], rtol=0, atol=TOLERANCE)
    assert output.aux["features"].shape == (2, model.width)


def test_weights_of_another_image_size_are_fitted(tmp_path):
    _, params = made("token")
    path = tmp_path / "weights.safetensors"
    write(path, export_params(params, vit.TORCH_NAMES["timm"]), {})
    fields = golden.CASES["token"] | {"image_size": 32}
    with pytest.raises(RecipeError, match="pos_embed"):
        attnjax.load("vit", weights=str(path), **fields)
    model, loaded = attnjax.load("vit", weights=str(path), resize_positions=True, **fields)
    assert loaded["positions"].shape == (1, model.tokens, model.width) == (1, 17, 24)
    np.testing.assert_array_equal(loaded["positions"][:, 0], params["positions"][:, 0])


@pytest.mark.parametrize("attention", ["s4d", {"name": "local", "window": 2}])
def test_other_attentions_show_maps_if_they_have_some(attention):
    model = build("vit", **golden.FIELDS, attention=attention)
    show = lambda: model.init_with_output(
        jax.random.key(0), golden.images(), mutable=["params", "attention"]
    )
    params = quick(show)()[1]["params"]
    run = quick(lambda p: model.apply({"params": p}, golden.images(), mutable=["attention"]))
    maps = model.attention_maps(run(params)[1])
    assert {x.shape for x in maps.values()} == (set() if attention == "s4d" else {(2, 3, 3)})


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_changes_nothing(remat):
    model, params = made("token")

    def gradients(model):
        loss = lambda p: (model.apply({"params": p}, golden.images()).logits ** 2).sum()
        return flatten(quick(jax.grad(loss))(params))

    expected = gradients(model)
    for path, leaf in gradients(model.clone(remat=remat)).items():
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(
            leaf, expected[path], rtol=0, atol=TOLERANCE * max(scale, 1), err_msg=path
        )


def test_impossible_models_are_refused():
    for fields, message in (
        ({"attention": "sfotmax"}, "did you mean 'softmax'"),
        ({"pool": "cls"}, "known: mean, token"),
        ({"remat": "all"}, "known: dots, full, none, offload"),
        ({"num_heads": 5}, "num_heads=5 must divide width=768"),
        ({"patch_size": 15}, "patch_size=15 must divide image_size=224"),
        ({"depth": 0}, "depth=0"),
    ):
        with pytest.raises(RecipeError, match=message):
            build("vit", **fields)
    model, params = made("token")
    with pytest.raises(ValueError, match=r"must be \[b, 24, 24, 3\]"):
        model.apply({"params": params}, golden.images()[:, :16])
