# SPDX-License-Identifier: Apache-2.0
"""What starting up imports: nothing that a user waits for without needing it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "numpy", "tensorflow", "torch", "matplotlib",
         "sklearn", "PIL", "tensorflow_datasets")  # fmt: skip
NEVER = ("tensorflow", "torch", "matplotlib", "tensorflow_datasets", "sklearn", "timm")


def imported(code: str, candidates=HEAVY) -> list[str]:
    """Run code in a fresh interpreter and say which of the candidates it imported."""
    report = f"import sys, json; print(json.dumps([m for m in {candidates!r} if m in sys.modules]))"
    probe = f"{code}\n{report}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_package_imports_nothing_heavy():
    assert imported("import attnjax, attnjax.registry, attnjax.recipe, attnjax.catalog") == []


def test_core_imports_no_other_framework_and_no_plotting():
    code = "import attnjax; attnjax.load; attnjax.ops.attention; import attnjax.train.program"
    assert imported(code, NEVER) == []


def test_whole_training_loop_imports_no_other_framework():
    assert imported("import attnjax.train.loop", ("tensorflow", "torch", "timm")) == []


@pytest.mark.parametrize("name", ["train", "evaluate", "systems", "claims", "compile"])
def test_launchers_parse_flags_without_jax(name):
    assert imported(f"import launch.{name}") == []


def test_every_public_name_of_the_package_exists():
    import attnjax

    for name in attnjax.__all__:
        assert getattr(attnjax, name) is not None
    assert set(dir(attnjax)) == set(attnjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = attnjax.lod
