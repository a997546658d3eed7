# SPDX-License-Identifier: Apache-2.0
"""Every registered name exists and carries what its kind promises."""

import dataclasses
import importlib
import inspect
import re

import pytest

from attnjax import catalog, registry
from attnjax.errors import RecipeError

NAMES = [(table, name) for table, entries in registry.TABLES.items() for name in entries]
MODELS = [system for system in registry.SYSTEMS.values() if system.kind == "model"]
KINDS = {"model", "method", "analysis", "benchmark"}

FIELDS = 16
"""Constructor fields of a model; more means that a sub-module is missing. Recipe dataclasses are
exempt: they are flat on purpose, so that every field can be overridden by name."""

PAPER_KEYS = {"title", "id", "year", "code", "licence", "claim"}


def model_module(system):
    return importlib.import_module(system.module)


@pytest.mark.parametrize(("table", "name"), NAMES)
def test_every_target_can_be_imported(table, name):
    assert inspect.isclass(registry.resolve(table, name))


@pytest.mark.parametrize("system", registry.SYSTEMS.values(), ids=lambda s: s.slug)
def test_systems_are_described(system):
    assert system.kind in KINDS
    assert re.fullmatch(r"[a-z0-9_]+", system.slug)
    assert system.title
    paper = model_module(system).PAPER
    assert set(paper) == PAPER_KEYS
    assert all(paper.values())
    assert re.match(r"arXiv:\d{4}\.\d{4,5}$|doi:", paper["id"])


@pytest.mark.parametrize("system", MODELS, ids=lambda s: s.slug)
def test_presets_are_valid_and_cited(system):
    from attnjax.recipe import check_arguments

    module, model = model_module(system), registry.resolve("model", system.slug)
    assert module.PRESETS
    for name, overrides in module.PRESETS.items():
        check_arguments(model, overrides, name)
    source = inspect.getsource(module)
    before, _, _ = source.partition("\nPRESETS")
    comment = re.search(r"((?:^#.*\n?)+)\Z", before, re.MULTILINE)
    assert comment, "a comment above PRESETS says which tables its numbers are from"
    assert re.search(r"Table|Section|Appendix|reference code", comment.group())


@pytest.mark.parametrize("system", MODELS, ids=lambda s: s.slug)
def test_model_files_export_the_contract(system):
    module, model = model_module(system), registry.resolve("model", system.slug)
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    assert len(fields) <= FIELDS
    assert {"dtype", "remat", "attention_implementation"} <= set(fields)
    for method in ("example", "flops", "attention_maps"):
        assert callable(getattr(model, method))
    assert hasattr(module, "Output")
    assert hasattr(module, "TORCH_NAMES")


def check_model(module, model):
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    assert len(fields) <= FIELDS
    assert {"dtype", "remat", "attention_implementation"} <= set(fields)
    for method in ("example", "flops", "attention_maps"):
        assert callable(getattr(model, method))
    from attnjax.recipe import check_arguments

    assert module.PRESETS and hasattr(module, "Output") and hasattr(module, "TORCH_NAMES")
    for preset, overrides in module.PRESETS.items():
        check_arguments(model, overrides, preset)


@pytest.mark.parametrize("slug", registry.BACKBONES)
def test_backbones_export_the_contract_without_a_paper(slug):
    assert slug not in registry.SYSTEMS and slug in registry.TABLES["model"]
    module = registry.home(slug)
    check_model(module, registry.resolve("model", slug))
    assert not hasattr(module, "PAPER") and module.TORCH_NAMES


@pytest.mark.parametrize(
    "system", [s for s in registry.SYSTEMS.values() if s.kind != "model"], ids=lambda s: s.slug
)
def test_homes_of_other_kinds_name_their_paper_in_the_docstring(system):
    module = model_module(system)
    assert module.PAPER["id"].removeprefix("arXiv:") in inspect.getdoc(module)
    assert module.PAPER["claim"].endswith(".")
    assert callable(getattr(module, system.target.partition(":")[2]))


@pytest.mark.parametrize("slug", registry.MODELS)
def test_models_of_other_systems_keep_the_contract_of_models(slug):
    assert slug not in registry.SYSTEMS and slug in registry.TABLES["model"]
    module = registry.home(slug)
    check_model(module, registry.resolve("model", slug))
    assert set(module.PAPER) == PAPER_KEYS


def test_homes_of_unknown_models_are_refused():
    with pytest.raises(RecipeError, match="did you mean 'decoder'"):
        registry.home("decodr")


def test_catalogue_agrees_with_the_modules():
    for row in catalog.rows():
        module = model_module(registry.system(row.slug))
        assert row.presets == tuple(getattr(module, "PRESETS", ()))
        assert module.PAPER["id"] in row.paper
        assert ("weight map" in row.status) == bool(getattr(module, "TORCH_NAMES", None))


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(RecipeError, match="did you mean 'crossvit'"):
        registry.resolve("model", "crosvit")
    with pytest.raises(RecipeError, match="did you mean 'crossvit'"):
        registry.system("cross_vit")


@pytest.mark.parametrize("name", ["os:system", "attnjax.models.crossvit:CrossViT", "os"])
@pytest.mark.parametrize("table", registry.TABLES)
def test_import_paths_are_no_names(table, name):
    with pytest.raises(RecipeError, match="unknown"):
        registry.resolve(table, name)


def test_nearest_without_anything_known():
    assert registry.nearest("a", ()) == "(none is known)"
