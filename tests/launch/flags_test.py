# SPDX-License-Identifier: Apache-2.0
"""The command line is a promise: users script against these flags."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# `config` stands for --config and its overrides. Think twice before adding one.
FLAGS = {
    "analyze": {"system", "measure", "set", "workdir", "out", "cpu_devices"},
    "train": {"config", "workdir", "dry_run", "resume", "coordinator", "process_count",
              "process_id", "cpu_devices", "hang_timeout"},
    "evaluate": {"config", "workdir", "averaged", "last", "cpu_devices", "ngram", "choices"},
    "convert": {"base", "system", "preset", "set", "input", "output", "to", "resize_positions",
                "allow_torch_pickle"},
    "compile": {"config", "topology", "batch", "json"},
    "benchmark": {"config", "suite", "shapes", "only", "peer", "data", "seconds", "out", "dry_run",
                  "cpu_devices", "tune"},
    "generate": {"workdir", "prompt", "tokens", "temperature", "top_k", "top_p", "seed",
                 "cpu_devices"},
    "claims": {"system", "seeds", "out"},
    "systems": {"json", "readme"},
}  # fmt: skip

LAUNCHERS = sorted(
    path for path in (ROOT / "launch").glob("*.py") if path.stem not in ("__init__", "command")
)


def defined(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.startswith("DEFINE_"):
                names.add(node.args[0].value)
            elif node.func.attr == "define_config":
                names.add("config")
    return names


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_flags_are_frozen(path):
    assert path.stem in FLAGS
    assert defined(path) == FLAGS[path.stem]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda p: p.stem)
def test_docstring_shows_the_command(path):
    assert f"python -m launch.{path.stem}" in ast.get_docstring(ast.parse(path.read_text()))
