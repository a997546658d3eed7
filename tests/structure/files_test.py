# SPDX-License-Identifier: Apache-2.0
"""Limits and habits that every file of the project keeps."""

import ast
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("attnjax", "launch", "configs", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = [ROOT / "Makefile", ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.*"))]

LINES = 700
KERNEL_LINES = 1_000
LAUNCHER_LINES = 100
LOOP_LINES = 300
POSITIONAL = 8
"""Arguments of a function that may be given by position."""

FORBIDDEN = {"util", "utils", "helper", "helpers", "common", "misc", "base", "tmp", "new", "old"}


def name_of(path):
    return str(path.relative_to(ROOT))


def source(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_length(path):
    limit = KERNEL_LINES if path.stem.startswith("pallas") else LINES
    if path.parent == ROOT / "launch" and "__main__" in source(path):
        limit = LAUNCHER_LINES
    if path == ROOT / "attnjax/train/loop.py":
        limit = LOOP_LINES
    assert len(source(path).splitlines()) <= limit


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=name_of)
def test_licence_line(path):
    head = source(path).splitlines()[:2] if source(path) else []
    assert "# SPDX-License-Identifier: Apache-2.0" in head


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_docstring(path):
    assert ast.get_docstring(ast.parse(source(path)))


def test_names_say_something():
    names = [
        name_of(path)
        for path in FILES
        if FORBIDDEN & set(path.relative_to(ROOT).with_suffix("").parts)
        or re.search(r"_v\d$", path.stem)
    ]
    assert not names


def test_test_files_are_found_by_pytest():
    wrong = [
        name_of(path)
        for path in FILES
        if path.parts[len(ROOT.parts)] == "tests"
        and re.search(r"^def test_", source(path), re.MULTILINE)
        and not path.stem.endswith("_test")
    ]
    assert not wrong


@pytest.mark.parametrize(
    "path", [path for path in FILES if ROOT / "attnjax" in path.parents], ids=name_of
)
def test_functions_take_few_positional_arguments(path):
    wrong = [
        f"{node.name}: {len(node.args.args)}"
        for node in ast.walk(ast.parse(source(path)))
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and len([a for a in node.args.args if a.arg not in ("self", "cls")]) > POSITIONAL
    ]
    assert not wrong


PUBLIC = [path for path in FILES if path.parts[len(ROOT.parts)] in ("attnjax", "launch")]


@pytest.mark.parametrize("path", PUBLIC, ids=name_of)
def test_public_names_have_docstrings(path):
    tree = ast.parse(source(path))
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    found = [node for node in found if not node.name.startswith("_")]
    for holder in [node for node in found if isinstance(node, ast.ClassDef)]:
        methods = [node for node in holder.body if isinstance(node, ast.FunctionDef)]
        methods = [method for method in methods if not method.name.startswith("_")]
        found += [method for method in methods if not _inherited(path, holder, method)]
    missing = [node.name for node in found if not ast.get_docstring(node)]
    missing = [name for name in missing if name not in ("main", "setup")]
    assert not missing


def _inherited(path, holder, method):
    """Overloads, and overrides of a documented method of ours, take over its docstring."""
    names = {getattr(d, "attr", getattr(d, "id", "")) for d in method.decorator_list}
    if names & {"overload", "override", "setter"}:
        return True
    if not holder.bases or ROOT / "launch" in path.parents:
        return False
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(p for p in parts if p != "__init__"))
    bases = getattr(module, holder.name).__mro__[1:]
    ours = [vars(base) for base in bases if base.__module__.startswith("attnjax.")]
    return any(getattr(scope.get(method.name), "__doc__", None) for scope in ours)


UNPICKLING = re.compile(
    r"\bimport (c?pickle|dill|joblib|cloudpickle|marshal|shelve)\b|allow_pickle\s*=\s*True"
    r"|pickle\.loads?\("
)
TORCH_LOAD = re.compile(r"torch\.load\((?P<arguments>[^)]*)\)?")


@pytest.mark.parametrize(
    "path", [path for path in FILES if ROOT / "tests" not in path.parents], ids=name_of
)
def test_nothing_is_unpickled(path):
    assert not UNPICKLING.search(source(path))
    for call in TORCH_LOAD.finditer(source(path)):
        assert "weights_only=True" in call.group("arguments")
    for call in re.finditer(r"np\.load\(([^)]*)", source(path)):
        assert "allow_pickle=False" in call.group(1)


def test_nothing_is_left_unfinished():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    this = pathlib.Path(__file__).resolve()
    assert not [name_of(p) for p in FILES if p.resolve() != this and marks.search(source(p))]
