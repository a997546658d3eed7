# SPDX-License-Identifier: Apache-2.0
"""Checksums agree on every path and mesh and see every single change."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.parallel import make_mesh
from attnjax.train import integrity

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"]


def random_array(dtype, shape=(6, 8), seed=0):
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape)
    return values.astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (6, 8), (3, 1, 7)])
def test_host_and_device_checksums_agree(dtype, shape):
    data = random_array(dtype, shape)
    assert int(integrity._device_checksum(jnp.asarray(data))) == integrity._host_checksum(data)


def test_checksum_does_not_depend_on_sharding():
    data = random_array("float32", (8, 16))
    sums = set()
    for sizes, spec in (({"data": 8}, P("data")), ({"data": 2, "fsdp": 4}, P("fsdp", "data"))):
        sharded = jax.device_put(data, NamedSharding(make_mesh(sizes), spec))
        sums.add(int(integrity._device_checksum(sharded)))
        sums.update(integrity.checksums({"x": sharded}).values())
    assert sums == {integrity._host_checksum(data)}


def test_every_single_bit_counts():
    data = random_array("float32", (4, 3))
    sums = {integrity._host_checksum(data)}
    for byte in range(data.nbytes):
        for bit in range(8):
            damaged = bytearray(data.tobytes())
            damaged[byte] ^= 1 << bit
            sums.add(integrity._host_checksum(np.frombuffer(damaged, np.float32).reshape(4, 3)))
    assert len(sums) == data.nbytes * 8 + 1


def test_lost_and_swapped_parts_count():
    ones = np.ones(4096, np.float32)
    lost = ones.copy()
    lost[512:1024] = 0
    assert integrity._host_checksum(lost) != integrity._host_checksum(ones)
    ramp = np.arange(4096, dtype=np.float32)
    swapped = np.concatenate([ramp[2048:], ramp[:2048]])
    assert integrity._host_checksum(swapped) != integrity._host_checksum(ramp)


def test_blocks_do_not_change_the_sum():
    data = np.arange(3 * integrity._BLOCK + 5, dtype=np.uint32)
    assert integrity._host_checksum(data) == int(integrity._device_checksum(jnp.asarray(data)))


def test_keys_are_hashed_by_their_data():
    key = jax.device_put(jax.random.key(3), NamedSharding(make_mesh({"data": 8}), P()))
    expected = integrity._host_checksum(np.asarray(jax.random.key_data(key)))
    assert integrity.checksums({"key": key}) == {"key": expected}


def test_unseal_refuses_every_flipped_bit():
    text = json.dumps(integrity.seal({"step": 3, "data": {"next": 24}, "loss": 0.1})).encode()
    assert integrity.unseal(text) == {"step": 3, "data": {"next": 24}, "loss": 0.1}
    for byte in range(len(text)):
        for bit in range(8):
            damaged = bytearray(text)
            damaged[byte] ^= 1 << bit
            with pytest.raises(integrity.Damaged):
                integrity.unseal(bytes(damaged))


def test_compare_names_both_sides():
    saved = {"a": "float32[2]", "b": "int32[]"}
    wanted = {"a": "bfloat16[2]", "c": "int32[]"}
    assert integrity.compare(saved, wanted) == [
        "a: saved float32[2], wanted bfloat16[2]",
        "b: saved int32[], wanted nothing",
        "c: saved nothing, wanted int32[]",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_host", [True, False])
def test_not_finite_names_the_arrays(monkeypatch, dtype, value, on_host):
    monkeypatch.setattr(integrity, "_is_on_host", lambda leaf: on_host)
    sharding = NamedSharding(make_mesh({"data": 8}), P("data"))
    fine = jnp.ones((8, 3), dtype)
    leaves = {
        "z": jax.device_put(fine.at[7, 2].set(value), sharding),
        "key": jax.random.key(0),
        "count": jnp.int32(3),
        "fine": jax.device_put(fine, sharding),
        "a": fine.at[0, 0].set(value),
    }
    assert integrity.not_finite(leaves) == ["z", "a"]
    assert integrity.not_finite({"fine": leaves["fine"], "count": leaves["count"]}) == []
