# SPDX-License-Identifier: Apache-2.0
"""Tables of tile sizes: what they serve, what they change, what is no table."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, chunked, mask, tuning
from attnjax.ops.pallas_tpu_tile import Chip
from attnjax.ops.pallas_tpu_tile import choose_tiles as choose_tpu_tiles
from attnjax.ops.tuning import Entry, Tuning

ENTRY = Entry(
    "chunked", tuning.device_name(), "float32", False, 4, 2, 64, 64, 8, 8,
    (("queries", 16), ("keys", 24), ("heads", 1)), 1.5,
)  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """Tiles that `chunked` has chosen."""
    found, choose = [], chunked.choose_tiles

    def recorded(*arguments, **options):
        found.append(choose(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(chunked, "choose_tiles", recorded)
    return found


def arrays(t, dtype="float32", k=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, t, x, 8)), dtype) for x in (4, k, k)]


def attend(inputs, table, **options):
    options = dict(mask=mask.causal()) | options
    return attention(*inputs, implementation="chunked", tuning=table, **options)


def test_an_entry_changes_tiles_and_nothing_else(seen):
    inputs = arrays(64)
    ruled, tuned = (attend(inputs, table) for table in (Tuning(), Tuning((ENTRY,))))
    np.testing.assert_allclose(tuned, ruled, atol=1e-6)
    sizes = [(x.queries, x.keys, x.heads) for x in seen]
    # 64 keys in parts of at most 24 are three of 22.
    assert sizes == [(64, 64, 2), (16, 22, 1)]


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (arrays(200), {}),
        (arrays(64, k=4), {}),
        (arrays(64, "bfloat16"), {}),
        (arrays(64), {"mask": None}),
    ],
)
def test_entries_serve_their_own_kind(seen, inputs, options):
    for table in (Tuning(), Tuning((ENTRY,))):
        attend(inputs, table, **options)
    assert seen[0] == seen[1]


def test_the_closest_lengths_serve(seen):
    far = dataclasses.replace(ENTRY, t=128, s=128, tiles=(("queries", 8), *ENTRY.tiles[1:]))
    table = Tuning((ENTRY, far))
    attend(arrays(70), table)
    assert seen[-1].queries == 14
    attend(arrays(120), table)
    assert seen[-1].queries == 8


def test_tables_are_values():
    assert hash(Tuning((ENTRY,))) == hash(Tuning((dataclasses.replace(ENTRY),)))
    other = dataclasses.replace(ENTRY, milliseconds=1.0)
    longer = dataclasses.replace(ENTRY, t=128, s=128)
    assert set(Tuning((ENTRY, longer)).merged([other]).entries) == {other, longer}


def test_tiles_of_kernels():
    shape, chip = (4096, 4096, 128, 128), Chip(5, 2**27, 2**20)
    found = choose_tpu_tiles(shape, jnp.bfloat16, chip, found={"queries": 256, "keys": 512})
    assert (found.queries, found.keys) == (256, 512)
    # What does not fit into the chip's memory is not believed.
    huge = {"queries": 2**16, "keys": 2**16}
    assert choose_tpu_tiles(shape, jnp.bfloat16, chip, found=huge) == choose_tpu_tiles(
        shape, jnp.bfloat16, chip
    )


def test_files(tmp_path):
    path = tmp_path / "tuning.json"
    kernel = dataclasses.replace(
        ENTRY, implementation="pallas_gpu", device="NVIDIA H100",
        tiles=(("forward", (64, 32)), ("backward", (32, 32)), ("forward_warps", 4),
               ("backward_warps", 8), ("stages", 2)),
    )  # fmt: skip
    table = Tuning((ENTRY, kernel))
    tuning.save(table, path)
    assert tuning.load(path) == table
    tuning.save(Tuning(), path)
    assert tuning.load(path) == Tuning()
    assert isinstance(tuning.DEFAULT, Tuning)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "reference"}, "reference.*has no tiles.*chunked"),
        ({"n": 0}, "n must be positive, got 0"),
        ({"t": "64"}, "t must be of type int, got '64'"),
        ({"is_full": 1}, "is_full must be of type bool"),
        ({"colour": 1}, "must have the keys"),
        ({"tiles": {"queries": 16}}, r"tiles must have the keys \['queries', 'keys', 'heads'\]"),
        ({"tiles": {"queries": 16, "keys": -1, "heads": 1}}, "keys must be a positive integer"),
        ({"tiles": {"queries": 16, "keys": 16, "heads": 3}}, "heads must divide k = 2, got 3"),
        (
            {"implementation": "pallas_tpu", "tiles": {"queries": 100, "keys": 128}},
            "queries must be a multiple of 128, got 100",
        ),
    ],
)
def test_what_is_no_table(tmp_path, change, message):
    path = tmp_path / "tuning.json"
    item = {**dataclasses.asdict(ENTRY), "tiles": dict(ENTRY.tiles), **change}
    path.write_text(json.dumps({"format": 1, "entries": [item]}))
    with pytest.raises(ValueError, match=message) as error:
        tuning.load(path)
    assert f"{path}: entry 0" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "entries": []}', "\0"])
def test_what_is_no_file_of_this_format(tmp_path, text):
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuning.json is no table of tiles"):
        tuning.load(path)


def test_a_named_file_is_the_default(tmp_path):
    path = tmp_path / "mine.json"
    tuning.save(Tuning((ENTRY,)), path)
    code = "from attnjax.ops import tuning; print(tuning.DEFAULT.entries[0].milliseconds)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "ATTNJAX_TUNING": str(path)},
    )  # fmt: skip
    assert run.stdout.strip() == "1.5"


def test_gradients_with_an_entry():
    inputs = arrays(64)
    loss = lambda table: lambda *x: (attend(x, table) ** 2).sum()
    ruled, tuned = (
        jax.jit(jax.grad(loss(table), (0, 1, 2)))(*inputs) for table in (Tuning(), Tuning((ENTRY,)))
    )
    for a, b in zip(ruled, tuned, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)
