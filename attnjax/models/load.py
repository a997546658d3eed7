# SPDX-License-Identifier: Apache-2.0
"""Models by name: slug, preset, overrides, and published weights."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import registry
from attnjax.errors import RecipeError
from attnjax.recipe import check_arguments
from attnjax.typing import Params
from attnjax.weights import flatten, import_params, read


def build(slug: str, preset: str | None = None, **overrides: Any) -> Any:
    """Construct a model without parameters.

    Args:
      slug: a registered model.
      preset: a key of its PRESETS; None takes the module's defaults.
      **overrides: fields of the module, such as `num_classes=10`.

    Returns:
      The Linen module.

    Raises:
      RecipeError: unknown slug, preset or field (with the nearest known name), or values that do
        not fit together.
    """
    module_class = registry.resolve("model", slug)
    presets = registry.home(slug).PRESETS
    if preset is not None and preset not in presets:
        raise RecipeError(
            f"unknown preset {preset!r} of {slug}: {registry.nearest(preset, presets)}"
        )
    arguments = {**presets.get(preset, {}), **{k: _hashable(v) for k, v in overrides.items()}}
    check_arguments(module_class, arguments, slug)
    return module_class(**arguments)


def load(
    slug: str,
    preset: str | None = None,
    weights: str | None = None,
    *,
    resize_positions: bool = False,
    **overrides: Any,
) -> tuple[Any, Params]:
    """Construct a model and its parameters.

    Args:
      slug: a registered model.
      preset: a key of its PRESETS; None takes the module's defaults.
      weights: safetensors file in this library's or a published layout; None draws initial values
        from key 0.
      resize_positions: fit position tables of another image size to this model's, bicubically.
      **overrides: fields of the module, such as `num_classes=10`.

    Returns:
      The Linen module and its parameters (float32), for `model.apply({"params": params}, ...)`.

    Raises:
      RecipeError: unknown name, or weights that do not fit (nothing is half-loaded).
    """
    model = build(slug, preset, **overrides)
    if weights is None:
        # Draws parameters without running the model, one small compilation per shape.
        return model, model.lazy_init(jax.random.key(0), **model.example(1))["params"]
    return model, load_params(model, weights, resize_positions=resize_positions)


def load_params(model: Any, weights: str, *, resize_positions: bool = False) -> Params:
    """Read the parameters of a model from a file.

    Args:
      model: the module, of a class whose file defines TORCH_NAMES.
      weights: safetensors file in this library's or one of those layouts.
      resize_positions: as in `load`.

    Returns:
      The parameters (float32).

    Raises:
      RecipeError: the file is refused or does not fit; the message lists every difference.
    """
    home = sys.modules[type(model).__module__]
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    tensors = known_tensors(home, read(weights)[0])
    fit = getattr(home, "fit_parameter", None) if resize_positions else None
    params = import_params(tensors, shapes, home.TORCH_NAMES, source=str(weights), fit=fit)
    return jax.tree.map(jnp.asarray, params)


def known_tensors(home: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what files hold beside a model's weights, and spell old names as today's.

    Args:
      home: the model's file; its TORCH_IGNORED lists patterns (`re.search`) of names to drop, its
        TORCH_RENAMED pairs of a pattern and what `re.sub` puts in its place, its TORCH_TIED names
        of tensors and of those that they repeat, where a file holds these.
      tensors: arrays by name.
    """
    ignored, renamed = (getattr(home, n, ()) for n in ("TORCH_IGNORED", "TORCH_RENAMED"))
    known = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renamed:
            name = re.sub(pattern, replacement, name)
        if not any(re.search(pattern, name) for pattern in ignored):
            known[name] = tensor
    for name, repeated in getattr(home, "TORCH_TIED", {}).items():
        if repeated in known:
            known.pop(name, None)
    return known


def abstract_params(model: Any) -> Params:
    """Return shapes and dtypes of a model's parameters without allocating any."""
    return jax.eval_shape(lambda: model.lazy_init(jax.random.key(0), **model.example(1)))["params"]


def _hashable(value):
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value
