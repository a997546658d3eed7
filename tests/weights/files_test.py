# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: round trips, budgets and malformed headers."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.weights import Budget, read, write
from attnjax.weights.files import digest


def save(path, header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_round_trip_keeps_values_dtypes_and_metadata(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.ones((2, 2), ml_dtypes.bfloat16),
        "c": np.float64(3.5).reshape(()),
        "empty": np.zeros((0, 3), np.float16),
        "index": np.arange(3),
    }
    path = tmp_path / "folder" / "x.safetensors"
    write(path, tensors, {"preset": "9"})
    again, metadata = read(path)
    assert metadata == {"preset": "9"} and set(again) == set(tensors)
    for name, value in tensors.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    assert len(digest(path)) == 64


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.safetensors"
    path.mkdir()
    with pytest.raises(RecipeError, match="cannot be written"):
        write(path, {"a": np.ones(1, np.float32)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(file_bytes=50), "exceed 50"),
        (Budget(header_bytes=8), "at most 8"),
        (Budget(tensors=1), "2 tensors exceed 1"),
        (Budget(rank=1), "has shape"),
    ],
)
def test_budget(tmp_path, budget, message):
    path = tmp_path / "x.safetensors"
    write(path, {"a": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}, {})
    with pytest.raises(RecipeError, match=message):
        read(path, budget)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": ENTRY}, b"\0" * 4),
        ({"a": ENTRY}, b"\0" * 12),
        ({"a": ENTRY | {"shape": [3]}}, b"\0" * 8),
        ({"a": ENTRY | {"shape": [-2]}}, b"\0" * 8),
        ({"a": ENTRY | {"shape": [2**62, 2**62]}}, b"\0" * 8),
        ({"a": ENTRY | {"dtype": "I64"}}, b"\0" * 8),
        ({"a": ENTRY | {"dtype": "OBJECT"}}, b"\0" * 8),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 8),
        ({"a": {"dtype": "F32"}}, b""),
        ({"a": 3}, b""),
        ({"__metadata__": {"x": 3}, "a": ENTRY}, b"\0" * 8),
        (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', b""),
        (b"not json at all", b""),
        (b"[" * 5000, b""),
    ],
)
def test_malformed_headers(tmp_path, header, data):
    with pytest.raises(RecipeError, match=r"malformed header|x\.safetensors"):
        read(save(tmp_path / "x.safetensors", header, data))
