# SPDX-License-Identifier: Apache-2.0
"""launch.convert: files there and back, bit by bit, and one line where they do not fit."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax
from attnjax.errors import RecipeError
from attnjax.models import crossvit
from attnjax.models.convert import convert
from attnjax.models.load import abstract_params, build
from attnjax.weights import export_params, flatten, read, unflatten, write

SMALL = dict(
    num_classes=3, image_size=(48, 48), dims=(8, 16), num_heads=(2, 2), depth=((1, 1, 0),)
)  # fmt: skip
FIELDS = [f"--set={name}={value}" for name, value in SMALL.items()]

compiled = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def published(folder: pathlib.Path, layout: str, seed: int = 0) -> tuple[pathlib.Path, dict]:
    """A file in a published layout, and its tensors."""
    rng = np.random.default_rng(seed)
    shapes = flatten(abstract_params(build("crossvit", **SMALL)))
    leaves = {p: rng.standard_normal(x.shape).astype(np.float32) for p, x in shapes.items()}
    tensors = export_params(unflatten(leaves), crossvit.TORCH_NAMES[layout])
    path = folder / f"{layout}.safetensors"
    write(path, tensors, {"format": "pt", "origin": "a test"})
    return path, tensors


def assert_same(path, tensors):
    found, _ = read(path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32


def refused(done, *parts):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    return line


def test_there_and_back_by_command(launch, tmp_path):
    """timm -> attnjax -> timm keeps every bit; the file in between loads as it is."""
    source, tensors = published(tmp_path, "timm")
    own, back = tmp_path / "own.safetensors", tmp_path / "deep/folder/back.safetensors"
    done = launch("convert", "--system=crossvit", *FIELDS, f"--input={source}", f"--output={own}")
    assert done.returncode == 0, done.stderr
    leaves, metadata = read(own)
    count = sum(x.size for x in leaves.values())
    assert done.stdout == f"{own}: {len(leaves)} tensors, {count:,} parameters, layout attnjax\n"
    assert metadata["source.origin"] == "a test" and metadata["layout"] == "attnjax"
    done = launch(
        "convert", "--system=crossvit", *FIELDS, f"--input={own}", f"--output={back}", "--to=timm"
    )
    assert done.returncode == 0, done.stderr
    assert_same(back, tensors)
    image = np.random.default_rng(1).standard_normal((2, 48, 48, 3)).astype(np.float32)
    logits = []
    for path in (source, own, back):
        model, params = attnjax.load("crossvit", weights=str(path), **SMALL)
        logits.append(compiled(lambda p, x: model.apply({"params": p}, x).logits)(params, image))
    assert np.isfinite(logits[0]).all()
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize("layout", ["timm", "ibm"])
def test_there_and_back(tmp_path, layout):
    source, tensors = published(tmp_path, layout)
    own, back = tmp_path / "own.safetensors", tmp_path / "back.safetensors"
    convert("crossvit", None, SMALL, source=source, target=own)
    convert("crossvit", None, SMALL, source=own, target=back, layout=layout)
    assert_same(back, tensors)


def test_from_one_published_layout_to_another(tmp_path):
    source, _ = published(tmp_path, "ibm")
    _, tensors = published(tmp_path, "timm")
    convert("crossvit", None, SMALL, source=source, target=tmp_path / "x", layout="timm")
    assert_same(tmp_path / "x", tensors)


def test_positions_of_another_size_are_fitted_on_request(tmp_path):
    source, _ = published(tmp_path, "timm")
    fields = {**SMALL, "image_size": (96, 96)}
    with pytest.raises(RecipeError, match=r"pos_embed_0 \[1,17,8\] in the file, \[1,65,8\] here"):
        convert("crossvit", None, fields, source=source, target=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    convert("crossvit", None, fields, source=source, target=tmp_path / "x", resize_positions=True)
    assert read(tmp_path / "x")[0]["positions_fine"].shape == (1, 65, 8)


def test_every_difference_is_on_one_line(launch, tmp_path):
    """The preset of another model: nothing is written, and the line names what does not fit."""
    source, _ = published(tmp_path, "timm")
    target = tmp_path / "out.safetensors"
    line = refused(
        launch(
            "convert", "--system=crossvit", "--preset=9", f"--input={source}", f"--output={target}"
        ),
        "timm.safetensors (layout 'timm') does not fit the model",
        "missing (",
        "blocks.0.blocks.1.1.norm1.weight [256]",
        "wrong shape (",
        "cls_token_0 [1,1,8] in the file, [1,1,128] here",
    )
    assert "Traceback" not in line and "more" in line
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--system=crossvitt", "--output=/tmp/x"), "did you mean 'crossvit'"),
        (("--system=crossvit", "--preset=18dagger", "--output=/tmp/x"), "did you mean '18-dagger'"),
        (("--system=crossvit", "--to=tim", "--output=/tmp/x"), "unknown layout 'tim' of crossvit"),
        (("--system=crossvit", "--set=dims", "--output=/tmp/x"), "--set=dims: expected name=value"),
        (("--system=crossvit",), "--output is missing"),
        (("--system=crossvit", "--output=/proc/none/x"), "cannot be written"),
    ],
)
def test_refusals_take_one_line_and_exit_2(launch, tmp_path, arguments, message):
    source, _ = published(tmp_path, "timm")
    fields = [] if any("preset" in a for a in arguments) else FIELDS
    refused(launch("convert", f"--input={source}", *arguments, *fields), message)


def test_pytorch_checkpoints_need_the_flag(launch, tmp_path):
    torch = pytest.importorskip("torch")
    _, tensors = published(tmp_path, "ibm")
    path, target = tmp_path / "crossvit.pth", tmp_path / "own.safetensors"
    state = {f"module.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"model": state, "epoch": 299}, path)
    arguments = ["--system=crossvit", *FIELDS, f"--input={path}", f"--output={target}"]
    refused(launch("convert", *arguments), "zip archive", "launch.convert")
    assert not target.exists()
    done = launch("convert", *arguments, "--allow_torch_pickle")
    assert done.returncode == 0, done.stderr
    convert("crossvit", None, SMALL, source=target, target=tmp_path / "back", layout="ibm")
    assert_same(tmp_path / "back", tensors)


def test_a_checkpoint_is_refused_without_the_flag_even_without_torch(launch, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"PK\x03\x04\0\0\x08\x08" + b"\0" * 64)  # how torch.save begins
    arguments = ["--system=crossvit", *FIELDS, f"--input={path}", f"--output={tmp_path / 'out'}"]
    refused(launch("convert", *arguments), "zip archive")


def test_provenance_accumulates(tmp_path):
    source, _ = published(tmp_path, "timm")
    convert("crossvit", None, SMALL, source=source, target=tmp_path / "own")
    convert("crossvit", None, SMALL, source=tmp_path / "own", target=tmp_path / "x", layout="ibm")
    _, metadata = read(tmp_path / "x")
    assert metadata["format"] == "pt" and metadata["system"] == "crossvit"
    assert metadata["layout"] == "ibm" and metadata["source.layout"] == "attnjax"
    assert len(metadata["source_sha256"]) == 64
    assert metadata["source_sha256"] != metadata["source.source_sha256"]
    json.dumps(metadata)
    assert jnp.float32 == read(tmp_path / "x")[0]["head.0.bias"].dtype
