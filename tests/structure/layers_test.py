# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and heavy libraries stay where they belong."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "attnjax"

_GROUND = {"attnjax", "audio", "typing", "timing", "errors", "registry", "recipe"}

# What each part of the package may import from it; "attnjax" is the lazy root module.
ALLOWED = {
    "attnjax": set(),
    "audio": set(),
    "typing": set(),
    "timing": set(),
    "errors": set(),
    "registry": {"errors"},
    "recipe": {"errors", "registry"},
    "claim": {"errors", "recipe", "registry"},
    "catalog": {"errors", "recipe", "registry", "claim"},
    "ops": _GROUND,
    "benchmarks": _GROUND | {"ops", "parallel"},
    "analysis": _GROUND | {"ops", "data"},
    "parallel": _GROUND | {"ops"},
    "nn": _GROUND | {"ops", "parallel"},
    "losses": _GROUND | {"ops"},
    "metrics": _GROUND | {"ops"},
    "data": _GROUND,
    "weights": _GROUND,
    "models": _GROUND | {"ops", "parallel", "nn", "weights"},
    "tasks": _GROUND | {"ops", "parallel", "nn", "models", "losses", "metrics", "analysis"},
    "train": _GROUND
    | {"claim", "ops", "parallel", "nn", "models", "tasks", "losses", "metrics", "data", "weights"}
    | {"benchmarks"},
}

FLAX = {"nn", "models", "methods"}
"""The only parts that may import flax, so that another module system touches nothing else."""

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "attnjax" if parts == ("__init__",) else parts[0]


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: pathlib.Path) -> set[str]:
    names = [name.split(".") for name in imports(path) if name.split(".")[0] == "attnjax"]
    return {name[1] if len(name) > 1 else "attnjax" for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    upward = parts_imported(path) - ALLOWED[part] - {part}
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


def test_package_imports_neither_launchers_nor_configs():
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in imports(path)
        if name.split(".")[0] in ("launch", "configs", "tests")
    }
    assert not wrong


def test_configs_import_only_recipes():
    permitted = ("attnjax.recipe.", "attnjax.claim.", "attnjax.errors.", "attnjax.registry.")
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "configs").rglob("*.py"))
        for name in imports(path)
        if not name.startswith(permitted)
    }
    assert not wrong


def test_flax_stays_in_modules():
    users = {part_of(path) for path in FILES if any(n.startswith("flax") for n in imports(path))}
    assert users <= FLAX


def test_ops_know_no_modules_optimisers_or_files():
    wrong = {
        f"{path.name}: {name}"
        for path in FILES
        if part_of(path) == "ops"
        for name in imports(path)
        if name.split(".")[0] in ("flax", "optax", "pathlib", "orbax", "grain")
    }
    # A table of measured tile sizes is a file that a benchmark writes; it is read once, on import.
    assert wrong == {"tuning.py: pathlib"}


def test_models_do_not_import_each_other():
    from attnjax import registry

    modules = {s.module for s in registry.SYSTEMS.values()}
    modules |= {target.partition(":")[0] for target in registry.BACKBONES.values()}
    for module in modules:
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        others = {
            name for name in imports(path) for m in modules - {module} if name.startswith(m + ".")
        }
        assert not others, f"{path.name} imports {sorted(others)}"


def test_private_jax_is_not_imported():
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*FILES, *sorted((ROOT / "launch").glob("*.py"))]
        for name in imports(path)
        if name.startswith(("jax._src", "jaxlib"))
    }
    assert not wrong
