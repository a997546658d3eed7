# SPDX-License-Identifier: Apache-2.0
"""Published attention systems in JAX and Flax on one fast attention core.

Importing this package is cheap: every public name below is loaded on first use.

    attnjax.load("crossvit", "9-dagger")     a model and its parameters
    attnjax.ops.attention(query, key, value) the attention core
    attnjax.registry                         every system by its slug
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = ("data", "losses", "metrics", "models", "nn", "ops", "parallel", "recipe", "registry",
            "tasks", "train", "weights")  # fmt: skip
_NAMES = {"load": "attnjax.models.load", "Recipe": "attnjax.recipe"}

__all__ = ["Recipe", "__version__", "load", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"attnjax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'attnjax' has no attribute {name!r}; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
