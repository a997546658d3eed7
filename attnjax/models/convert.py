# SPDX-License-Identifier: Apache-2.0
"""Weights of a model from one layout to another, file to file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import attnjax
from attnjax import registry
from attnjax.errors import RecipeError
from attnjax.models.load import abstract_params, build, known_tensors
from attnjax.weights import NATIVE, export_params, flatten, import_params, read, write
from attnjax.weights.files import digest
from attnjax.weights.torch_checkpoint import read_torch


def convert(
    slug: str,
    preset: str | None,
    overrides: Mapping[str, Any],
    *,
    source: str,
    target: str,
    layout: str = NATIVE,
    resize_positions: bool = False,
    allow_torch_pickle: bool = False,
    base: str = "",
) -> str:
    """Read weights, check them against the model, and write them in another layout.

    Args:
      slug: a registered model.
      preset: a key of its PRESETS; None takes the module's defaults.
      overrides: fields of the module.
      source: safetensors file in any layout of the system, or a PyTorch checkpoint.
      target: safetensors file to write.
      layout: "attnjax" or a key of the system's TORCH_NAMES.
      resize_positions: fit position tables of another image size.
      allow_torch_pickle: read the source with `torch.load(weights_only=True)`.
      base: safetensors file to which the source is a difference; "": it is none.

    Returns:
      One line that says what was written.

    Raises:
      RecipeError: unknown name or layout, or a source that is refused or does not fit.
    """
    model = build(slug, preset, **overrides)
    home = registry.home(slug)
    tables = home.TORCH_NAMES or {}
    if layout not in (NATIVE, *tables):
        raise RecipeError(
            f"unknown layout {layout!r} of {slug}: {registry.nearest(layout, (NATIVE, *tables))}"
        )
    if allow_torch_pickle:
        tensors, metadata = read_torch(source), {}
    else:
        tensors, metadata = read(source)
    if base:
        tensors = add_difference(known_tensors(home, read(base)[0]), known_tensors(home, tensors))
    tensors = known_tensors(home, tensors)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    fit = getattr(home, "fit_parameter", None) if resize_positions else None
    params = import_params(tensors, shapes, tables, source=str(source), fit=fit)
    result = export_params(params, None if layout == NATIVE else tables[layout])
    provenance = {
        # Readers of the hub's files look for this key.
        "format": "pt",
        "attnjax_version": attnjax.__version__,
        "layout": layout,
        "system": slug,
        "preset": preset or "",
        "overrides": repr(dict(overrides)) if overrides else "",
        "source_sha256": digest(source),
        **({"base_sha256": digest(base)} if base else {}),
    }
    origin = {f"source.{k}": v for k, v in metadata.items() if not k.startswith("source.")}
    write(target, result, {**origin, **provenance})
    size = sum(x.size for x in result.values())
    return f"{target}: {len(result)} tensors, {size:,} parameters, layout {layout}"


def add_difference(
    base: Mapping[str, np.ndarray], difference: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Recover weights that were published as their difference to others.

    Where the difference has more rows, tables of tokens and heads that grew by some tokens, the
    base's are first filled up with the mean of its rows, as by `llama/weight_diff.py` of
    epfml/landmark-attention.

    Args:
      base: the others, by name.
      difference: by the same names.

    Returns:
      The sums, float32, by name.

    Raises:
      RecipeError: names or shapes do not fit; the message lists every one.
    """
    wrong = [f"{name} is in one of both only" for name in sorted(base.keys() ^ difference.keys())]
    for name in sorted(base.keys() & difference.keys()):
        before, after = np.shape(base[name]), np.shape(difference[name])
        can_grow = len(before) == 2 and before[1:] == after[1:] and before[0] <= after[0]
        if before != after and not can_grow:
            wrong.append(f"{name} is {before} in the base, {after} in the difference")
    if wrong:
        raise RecipeError("base and difference do not fit: " + "; ".join(wrong))
    sums = {}
    for name, change in difference.items():
        rows = np.asarray(base[name], np.float32)
        missing = np.shape(change)[0] - rows.shape[0] if rows.ndim else 0
        if missing:
            mean = rows.mean(axis=0, keepdims=True)
            rows = np.concatenate([rows, np.repeat(mean, missing, axis=0)])
        sums[name] = rows + np.asarray(change, np.float32)
    return sums
