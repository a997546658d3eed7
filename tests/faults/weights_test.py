# SPDX-License-Identifier: Apache-2.0
"""Faults 17 and 19: hostile and ill-fitting weight files are refused, whole."""

import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models import crossvit
from attnjax.models.load import abstract_params, build, load_params
from attnjax.weights import export_params, flatten, import_params, read, unflatten, write
from attnjax.weights.files import Budget
from attnjax.weights.torch_checkpoint import read_torch

# A refusal may allocate no more than this, whatever the file claims.
MEMORY = 8 << 20

SMALL = dict(
    num_classes=3, image_size=(48, 48), dims=(8, 16), num_heads=(2, 2), depth=((1, 1, 0),)
)  # fmt: skip


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bare_pickle(folder, canary):
    path = folder / "weights.bin"
    path.write_bytes(pickle.dumps({"head.0.weight": Canary(canary)}))
    return path


def torch_archive(folder, canary):
    path = folder / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary), protocol=2))
        archive.writestr("archive/version", "3\n")
    return path


def object_array(folder, canary):
    path = folder / "weights.npy"
    np.save(path, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return path


def object_archive(folder, canary):
    path = folder / "weights.npz"
    np.savez(path, weight=np.array([Canary(canary)], dtype=object))
    return path


def climbing_tar(folder, canary):
    path, member = folder / "weights.tar", folder / "member"
    member.write_text("x")
    with tarfile.open(path, "w") as archive:
        archive.add(member, arcname=f"../{canary.name}")
    return path


def zip_bomb(folder, canary):
    path = folder / "weights.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/0", "w") as file:
            for _ in range(64):
                file.write(b"\0" * (1 << 20))
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    return path


def _header(folder, text, data=b""):
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def overlapping_tensors(folder, canary):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return _header(folder, json.dumps({"a": entry, "b": entry}).encode(), b"\0" * 8)


def offsets_past_the_end(folder, canary):
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    return _header(folder, json.dumps({"a": entry}).encode(), b"\0" * 8)


def huge_header(folder, canary):
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return path


def truncated_header(folder, canary):
    return _header(folder, b'{"a": {"dtype": "F32", "shape": [2')


HOSTILE = [
    bare_pickle, torch_archive, object_array, object_archive, climbing_tar, zip_bomb,
    overlapping_tensors, offsets_past_the_end, huge_header, truncated_header,
]  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_file_is_refused(tmp_path, make):
    canary = tmp_path / "canary"
    (tmp_path / "inside").mkdir()
    path = make(tmp_path / "inside", canary)
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match="weights"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert not canary.exists()


@pytest.mark.parametrize(
    "make", [bare_pickle, torch_archive, zip_bomb, climbing_tar], ids=lambda make: make.__name__
)
def test_even_when_pickles_are_allowed_no_code_runs(tmp_path, make):
    pytest.importorskip("torch")
    canary = tmp_path / "canary"
    (tmp_path / "inside").mkdir()
    with pytest.raises(RecipeError, match="weights"):
        read_torch(make(tmp_path / "inside", canary), Budget(file_bytes=32 << 20))
    assert not canary.exists()


@pytest.fixture(scope="module")
def published():
    model = build("crossvit", **SMALL)
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flatten(abstract_params(model)).items()
    }
    return model, leaves, export_params(unflatten(leaves), crossvit.TORCH_NAMES["timm"])


def test_a_matching_file_loads(tmp_path, published):
    model, leaves, tensors = published
    path = tmp_path / "timm.safetensors"
    write(path, tensors, {"format": "pt"})
    for name, value in flatten(load_params(model, str(path))).items():
        np.testing.assert_array_equal(value, leaves[name])


def test_every_difference_is_listed_with_both_shapes(tmp_path, published):
    model, _, tensors = published
    tensors = dict(tensors)
    del tensors["norm.0.weight"], tensors["blocks.0.fusion.1.attn.wk.bias"]
    tensors["head_dist.weight"] = np.zeros((3, 8), np.float32)
    tensors["head.1.weight"] = tensors["head.1.weight"].T
    tensors["pos_embed_0"] = tensors["pos_embed_0"][:, :-1]
    tensors["head.0.bias"] = np.full(3, np.nan, np.float32)
    path = tmp_path / "timm.safetensors"
    write(path, tensors, {})
    with pytest.raises(RecipeError) as caught:
        load_params(model, str(path))
    message = str(caught.value)
    for part in (
        "timm.safetensors (layout 'timm')",
        "missing (2): ",
        "norm.0.weight [8]",
        "blocks.0.fusion.1.attn.wk.bias [8]",
        "not expected (1): head_dist.weight [3,8]",
        "wrong shape (2): ",
        "head.1.weight [16,3] in the file, [3,16] here (transposed?)",
        "pos_embed_0 [1,16,8] in the file, [1,17,8] here",
        "not finite (1): head.0.bias",
    ):
        assert part in message
    assert "\n" not in message


def test_a_long_list_is_cut(published):
    _, leaves, _ = published
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    with pytest.raises(RecipeError, match=r"missing \(\d+\): .* and \d+ more"):
        import_params({}, shapes, crossvit.TORCH_NAMES)
