# SPDX-License-Identifier: Apache-2.0
"""PyTorch checkpoints, for conversion only: nothing runs, nothing unpacks beyond a budget."""

import os
import pathlib
import tarfile
import zipfile
from collections.abc import Mapping

import numpy as np

from attnjax.errors import RecipeError
from attnjax.weights.files import Budget

WRAPPERS = ("model", "state_dict", "module")
"""Keys under which training scripts store a state dict, and a prefix of parallel wrappers."""


def read_torch(path: str | os.PathLike, budget: Budget | None = None) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch checkpoint with `torch.load(weights_only=True)`.

    Args:
      path: a file that the user chose to trust as far as `weights_only` goes.
      budget: limits; archives may not hold more than `file_bytes` when unpacked.

    Returns:
      Float arrays by name.

    Raises:
      RecipeError: torch is not installed, the file is not such a checkpoint, or it exceeds the
        budget.
    """
    path, budget = pathlib.Path(path), budget or Budget()
    _check(path, budget)
    try:
        import torch
    except ImportError as error:
        raise RecipeError(
            "reading a PyTorch checkpoint needs torch: pip install 'attnjax[parity]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises many types here; none of them may reach the user as a traceback.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"weights {path}: refused by torch.load: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise RecipeError(f"weights {path}: holds {type(content).__name__}, not a state dict")
    tensors = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise RecipeError(f"weights {path}: {name!r} is no tensor of floating numbers")
        tensors[str(name).removeprefix("module.")] = value.detach().float().numpy()
    return tensors


def _check(path, budget):
    try:
        size = path.stat().st_size
        if size > budget.file_bytes:
            raise RecipeError(f"weights {path}: {size} bytes exceed {budget.file_bytes}")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or unpacked > budget.file_bytes or len(entries) > budget.tensors:
                raise RecipeError(
                    f"weights {path}: an archive of {len(entries)} files and {unpacked} bytes, "
                    "compressed or beyond the budget; PyTorch stores tensors uncompressed"
                )
        elif tarfile.is_tarfile(path):
            raise RecipeError(f"weights {path}: tar archives are not read")
    except (OSError, zipfile.BadZipFile) as error:
        raise RecipeError(f"weights {path} cannot be read: {error}") from error
