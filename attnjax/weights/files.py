# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: header checked against a budget before anything is read; never a pickle."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import struct
import tempfile
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np

from attnjax.errors import RecipeError

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes of parameters and their sizes in bytes."""

DTYPES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Accepted dtypes: published files hold masks and indices beside their parameters."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a file that is not trusted.

    Attributes:
      file_bytes: size of the whole file.
      header_bytes: size of its JSON header.
      tensors: number of tensors.
      rank: axes of a tensor.
    """

    file_bytes: int = 8 << 30
    header_bytes: int = 16 << 20
    tensors: int = 100_000
    rank: int = 8


def read(
    path: str | os.PathLike, budget: Budget | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file.

    Args:
      path: the file.
      budget: its limits; None takes the defaults.

    Returns:
      Arrays by name, and the file's metadata.

    Raises:
      RecipeError: there is no such file, it is another format (pickles, archives and numpy files
        are refused by what they contain, not by their suffix), it is malformed, or it exceeds the
        budget.
    """
    from safetensors import SafetensorError, safe_open

    path = pathlib.Path(path)
    names, metadata = _check(path, budget or Budget())
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"weights {path}: {error}") from error


def write(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
      path: the file; it is replaced when it exists.
      tensors: arrays by name.
      metadata: provenance, text by name.

    Raises:
      RecipeError: the file cannot be written.
    """
    from safetensors.numpy import save

    path = pathlib.Path(path)
    content = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, dict(metadata))
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = pathlib.Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RecipeError(f"weights {path} cannot be written: {error}") from error


def digest(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: pathlib.Path, budget: Budget) -> tuple[list[str], dict[str, str]]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if kind := _foreign(start):
                raise RecipeError(
                    f"weights {path}: this is {kind}, not a safetensors file; such files can run "
                    "code or expand without limit and are not read here (launch.convert turns a "
                    "PyTorch checkpoint into safetensors)"
                )
            if size > budget.file_bytes:
                raise RecipeError(f"weights {path}: {size} bytes exceed {budget.file_bytes}")
            if not 2 <= length <= min(size - 8, budget.header_bytes):
                raise RecipeError(
                    f"weights {path}: no safetensors file (a header of {length} bytes in a file of "
                    f"{size}; at most {budget.header_bytes})"
                )
            text = file.read(length)
    except OSError as error:
        raise RecipeError(f"weights {path} cannot be read: {error}") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        _check_layout(header, metadata, size - 8 - length, budget)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RecipeError(f"weights {path}: malformed header: {error}") from error
    return list(header), metadata


def _check_layout(header, metadata, data_bytes, budget):
    if not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata is not text")
    if len(header) > budget.tensors:
        raise ValueError(f"{len(header)} tensors exceed {budget.tensors}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        if len(shape) > budget.rank or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} has shape {shape}")
        if first != end or last - first != math.prod(shape) * DTYPES[entry["dtype"]]:
            raise ValueError(f"{name} {shape} does not fill its bytes {first} to {last}")
        end = last
    if end != data_bytes:
        raise ValueError(f"tensors end at byte {end}, the data at {data_bytes}")


def _unique(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _foreign(start: bytes) -> str | None:
    for prefix, kind in (
        (b"PK", "a zip archive (PyTorch checkpoint or npz)"),
        (b"\x93NUMPY", "a numpy array"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"BZh", "a bzip2 archive"),
        (b"\xfd7zXZ", "an xz archive"),
        (b"\x80\x02", "a pickle"),
        (b"\x80\x03", "a pickle"),
        (b"\x80\x04", "a pickle"),
        (b"\x80\x05", "a pickle"),
        (b"\x89HDF", "an HDF5 file"),
    ):
        # A safetensors header whose length starts with these bytes would be far longer than any
        # budget, except for pickles: those are told apart by the zero bytes that follow.
        if start.startswith(prefix) and start[4:] != b"\0\0\0\0":
            return kind
    return None
