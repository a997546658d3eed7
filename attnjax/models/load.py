# SPDX-License-Identifier: Apache-2.0
"""Models by name: slug, preset, overrides, and published weights."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import registry
from attnjax.errors import RecipeError
from attnjax.recipe import check_arguments
from attnjax.typing import Params


def build(slug: str, preset: str | None = None, **overrides: Any) -> Any:
    """Construct a model without parameters.

    Args:
      slug: a registered system of kind model.
      preset: a key of its PRESETS; None takes the module's defaults.
      **overrides: fields of the module, such as `num_classes=10`.

    Returns:
      The Linen module.

    Raises:
      RecipeError: unknown slug, preset or field (with the nearest known name), or values that do
        not fit together.
    """
    module_class = registry.resolve("model", slug)
    presets = importlib.import_module(registry.system(slug).module).PRESETS
    if preset is not None and preset not in presets:
        raise RecipeError(
            f"unknown preset {preset!r} of {slug}: {registry.nearest(preset, presets)}"
        )
    arguments = {**presets.get(preset, {}), **{k: _hashable(v) for k, v in overrides.items()}}
    check_arguments(module_class, arguments, slug)
    return module_class(**arguments)


def load(
    slug: str, preset: str | None = None, weights: str | None = None, **overrides: Any
) -> tuple[Any, Params]:
    """Construct a model and its parameters.

    Args:
      slug: a registered system of kind model.
      preset: a key of its PRESETS; None takes the module's defaults.
      weights: safetensors file in this library's or a published layout; None draws initial values
        from key 0.
      **overrides: fields of the module, such as `num_classes=10`.

    Returns:
      The Linen module and its parameters (float32), for `model.apply({"params": params}, ...)`.

    Raises:
      RecipeError: unknown name, or weights that do not fit (nothing is half-loaded).
    """
    model = build(slug, preset, **overrides)
    inputs = model.example(1)

    def init(key):
        arrays = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
        return model.init(key, **arrays)["params"]

    if weights is not None:
        raise NotImplementedError("weights")
    return model, jax.jit(init)(jax.random.key(0))


def _hashable(value):
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value
