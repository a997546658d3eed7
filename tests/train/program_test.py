# SPDX-License-Identifier: Apache-2.0
"""A recipe bound to a mesh: its first state, with and without pretrained weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models import crossvit
from attnjax.models.load import abstract_params, build
from attnjax.ops import bicubic_resize
from attnjax.parallel import make_mesh
from attnjax.recipe import Data, Mesh, Optim, Recipe
from attnjax.train import program
from attnjax.weights import export_params, flatten, unflatten, write

MODEL = {
    "name": "crossvit", "num_classes": 2, "image_size": (16, 16), "patch_size": (4, 8),
    "dims": (8, 16), "depth": ((1, 1, 0),), "num_heads": (2, 2), "mlp_ratio": (1.0, 1.0),
    "stem": "patches",
}  # fmt: skip


def recipe(**model) -> Recipe:
    return Recipe(
        seed=1,
        steps=4,
        batch=8,
        model={**MODEL, **model},
        task={"name": "classification"},
        data=Data(source={"name": "information_exchange"}),
        optim=Optim(lr=1e-3, ema=0.9),
        mesh=Mesh(data=2, fsdp=2, model=2),
    )


def fields(recipe):
    return {k: v for k, v in recipe.model.items() if k not in ("name", "weights")}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


@functools.cache
def drawn():
    """Parameters that no initialiser draws."""
    rng = np.random.default_rng(0)
    shapes = flatten(abstract_params(build("crossvit", **fields(recipe()))))
    return {p: 3 + rng.standard_normal(x.shape).astype(np.float32) for p, x in shapes.items()}


def start(recipe, mesh):
    built = program.build(recipe, mesh)
    with jax.set_mesh(mesh):
        return built, built.init()


@pytest.mark.parametrize("layout", [None, "timm"])
def test_training_starts_from_the_weights_of_a_file(tmp_path, mesh, layout):
    path = tmp_path / "weights.safetensors"
    rules = None if layout is None else crossvit.TORCH_NAMES[layout]
    write(path, export_params(unflatten(drawn()), rules), {})
    built, state = start(recipe(weights=str(path)), mesh)
    for tree in (state.params, state.ema, state.averaged):
        leaves = flatten(jax.device_get(tree))
        assert set(leaves) == set(drawn())
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, drawn()[name])
    # Everything else is as for a new run, and sharded as planned.
    assert int(state.step) == 0
    assert all((x == 0).all() for x in jax.tree.leaves(state.opt_state))
    placed = jax.tree.map(lambda x, like: x.sharding == like.sharding, state, built.state)
    assert all(jax.tree.leaves(placed))
    # Both copies are updated in place by the step: they must not share memory.
    first, second = (jax.tree.leaves(tree)[0] for tree in (state.params, state.ema))
    pointers = [x.addressable_data(0).unsafe_buffer_pointer() for x in (first, second)]
    assert pointers[0] != pointers[1]


def test_position_tables_of_another_size_are_fitted(tmp_path, mesh):
    path = tmp_path / "weights.safetensors"
    write(path, drawn(), {})
    large = recipe(weights=str(path), image_size=(24, 16))
    _, state = start(large, mesh)
    table = drawn()["positions_fine"]
    grid = table[:, 1:].reshape(1, 4, 4, -1)
    expected = bicubic_resize(jax.numpy.asarray(grid), 6, 6).reshape(1, 36, -1)
    found = np.asarray(state.params["positions_fine"])
    np.testing.assert_array_equal(found[:, :1], table[:, :1])
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 5}, r"head_fine/kernel \[8,2\] in the file, \[8,5\] here"),
        ({"weights": "nowhere.safetensors"}, "cannot be read"),
    ],
)
def test_weights_that_do_not_fit_stop_the_run(tmp_path, mesh, changes, message):
    path = tmp_path / "weights.safetensors"
    write(path, drawn(), {})
    wrong = recipe(**{"weights": str(path), **changes})
    with pytest.raises(RecipeError, match=message):
        start(wrong, mesh)


def test_without_weights_the_seed_decides():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    alone = dataclasses.replace(recipe(), mesh=Mesh(data=1))
    one, again = (start(alone, mesh)[1] for _ in range(2))
    other = start(dataclasses.replace(alone, seed=2), mesh)[1]
    leaf = lambda state: np.asarray(state.params["positions_fine"])
    np.testing.assert_array_equal(leaf(one), leaf(again))
    assert np.abs(leaf(one) - leaf(other)).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, one.ema, one.params)
