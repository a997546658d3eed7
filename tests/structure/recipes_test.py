# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe says what it costs and can be built."""

import ast
import dataclasses
import importlib
import pathlib
import re

import pytest

from attnjax import claim, recipe, registry
from attnjax.errors import RecipeError

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = recipe.available()


def variants(path: str) -> list[str]:
    """The default and every name in the file's tuples of variants."""
    module = recipe.execute(path)
    names = [""]
    for attribute in ("VARIANTS", "FUSIONS", "PRESETS"):
        names += list(getattr(module, attribute, ()))
    first = names[1] if len(names) > 1 else ""
    return names + [f"{first},{option}" for option in getattr(module, "OPTIONS", ())]


CASES = [(path, variant) for path in RECIPES for variant in variants(path)]


@pytest.mark.parametrize("path", RECIPES)
def test_docstring_says_run_data_cost_expect(path):
    text = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    for field in ("Run:", "Data:", "Cost:", "Expect:"):
        assert re.search(rf"(^|\s){field} ", text), f"{path} lacks {field}"
    command = re.search(r"Run: +(.*)", text).group(1)
    assert command.startswith("python -m launch.train --config=")
    assert f"--config={path}" in command, "the command runs this very file"


@pytest.mark.parametrize(("path", "variant"), CASES)
def test_recipe_is_valid_and_survives_json(path, variant):
    loaded = recipe.load(f"{path}:{variant}").validate()
    assert recipe.Recipe.from_json(loaded.to_json()).validate().digest() == loaded.digest()


@pytest.mark.parametrize(("path", "variant"), CASES)
def test_model_of_recipe_can_be_built(path, variant):
    from attnjax.train.program import build_task

    loaded = recipe.load(f"{path}:{variant}")
    loaded.model.pop("weights", None)
    assert build_task(loaded).flops > 0


@pytest.mark.parametrize("path", RECIPES)
def test_unknown_variant_is_refused(path):
    with pytest.raises(RecipeError, match=r"unknown (variant|preset)"):
        recipe.load(f"{path}:no-such-variant").validate()


@pytest.mark.parametrize("slug", registry.SYSTEMS)
def test_every_system_has_a_smoke_recipe_and_a_claim(slug):
    assert claim.exists(slug)
    home = importlib.import_module(registry.system(slug).module)
    if registry.system(slug).kind == "benchmark" and "quick" in getattr(home, "PRESETS", ()):
        return  # It trains nothing: its smallest grid takes the place of a recipe.
    smoke = recipe.load(f"configs/{slug}/smoke.py")
    sources = [smoke.data.source, *(e.data.source for e in smoke.evals.values())]
    assert not {s["name"] for s in sources} & {"tfds", "image_folder"}, "smoke needs no data"


@pytest.mark.parametrize("slug", registry.SYSTEMS)
def test_claims_are_valid(slug):
    claim.load(slug).validate()


def test_imagenet_recipe_is_the_published_one():
    loaded = recipe.load("configs/crossvit/imagenet.py:18-dagger")
    epoch = 1_281_024 // loaded.batch
    assert (loaded.steps, loaded.optim.warmup, loaded.optim.cooldown) == (
        310 * epoch, 5 * epoch, 10 * epoch,
    )  # fmt: skip
    assert dataclasses.asdict(loaded.optim).items() >= {
        "lr": 5e-4 * loaded.batch / 512, "warmup_lr": 1e-6, "end_lr": 1e-5, "weight_decay": 0.05,
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip": 0.0, "ema": 0.0,
    }.items()  # fmt: skip
    assert loaded.data.repeats == 3
    assert loaded.model["drop_path"] == 0.1
    assert loaded.task == {
        "name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
    }  # fmt: skip
    large = recipe.load("configs/crossvit/imagenet.py:18-dagger,large_batch,ema")
    assert (large.batch, large.optim.warmup) == (4096, 30 * (1_281_024 // 4096))
    assert large.optim.ema > 0.9999
