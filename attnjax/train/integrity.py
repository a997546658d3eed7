# SPDX-License-Identifier: Apache-2.0
"""What a saved state must look like: names, shapes, dtypes and checksums of every array.

Storage layers notice truncated or missing chunks but restore a flipped bit without complaint. Each
array therefore gets a 32-bit checksum that does not depend on how it is sharded, and each JSON text
a SHA-256 of itself.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.parallel.rules import leaf_path
from attnjax.typing import Array

_GOLDEN, _MIX_A, _MIX_B = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
_BLOCK = 1 << 16
"""Words hashed at a time on the host, so that the temporaries stay in cache."""


class Damaged(Exception):
    """Something that was saved reads back differently, or not at all."""


def is_key(leaf: Any) -> bool:
    """Tell whether an array or its description holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, such as "params/block_0/query/kernel"."""
    return {leaf_path(key_path): leaf for key_path, leaf in jax.tree.leaves_with_path(tree)}


def describe(leaf: Any) -> str:
    """Return dtype and shape of an array as "float32[3,4]"."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def compare(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """List the paths whose descriptions differ, as "path: saved X, wanted Y".

    Args:
      saved: description by path, from the checkpoint.
      wanted: description by path, from the program that restores.
    """
    return [
        f"{path}: saved {saved.get(path, 'nothing')}, wanted {wanted.get(path, 'nothing')}"
        for path in sorted({*saved, *wanted})
        if saved.get(path) != wanted.get(path)
    ]


def seal(body: Mapping[str, Any]) -> dict[str, Any]:
    """Wrap JSON values together with a hash of their text."""
    text = json.dumps(body, sort_keys=True)
    return {"body": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unseal(text: str | bytes) -> dict[str, Any]:
    """Parse what `seal` wrapped.

    Raises:
      Damaged: the text is no JSON, or its hash does not fit.
    """
    try:
        sealed = json.loads(text)
        body, digest = sealed["body"], sealed["sha256"]
        if not isinstance(body, dict):
            raise Damaged("is no JSON object")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"is not the JSON that was written ({error})") from error
    if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != digest:
        raise Damaged("fails its SHA-256 check")
    return body


def checksums(leaves: Mapping[str, Array]) -> dict[str, int]:
    """Return a 32-bit checksum of every array, equal for equal contents on any mesh.

    Every word is mixed with its position and the results are added modulo 2^32: a change of a
    single element is always seen, any other one with probability 1 - 2^-32.

    Args:
      leaves: arrays by path; typed keys are hashed by their key data.

    Returns:
      Unsigned integers by path. With several processes all of them must call this together.
    """
    # Several collective programs in flight can starve one another on virtual CPU devices.
    jax.block_until_ready(list(leaves.values()))
    sums = {path: _checksum(leaf) for path, leaf in leaves.items()}
    return {path: int(value) for path, value in sums.items()}


def not_finite(leaves: Mapping[str, Array]) -> list[str]:
    """Return the paths of arrays that hold NaN or infinity.

    Args:
      leaves: arrays by path; integers and keys are always fine.

    Returns:
      Paths in the order given. With several processes all of them must call this together.
    """
    reals = {path: x for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    if all(_is_on_host(leaf) for leaf in reals.values()):
        finite = {path: np.isfinite(np.asarray(leaf)).all() for path, leaf in reals.items()}
    else:
        finite = jax.device_get(_all_finite(reals))
    return [path for path in reals if not finite[path]]


@jax.jit
def _all_finite(arrays: dict[str, Array]) -> dict[str, Array]:
    return {path: jnp.all(jnp.isfinite(x)) for path, x in arrays.items()}


def _is_on_host(leaf: Array) -> bool:
    on_cpu = next(iter(leaf.sharding.device_set)).platform == "cpu"
    return on_cpu and leaf.is_fully_addressable


def _checksum(leaf: Array) -> Any:
    data = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if _is_on_host(data):
        return _host_checksum(np.asarray(data))
    total = _device_checksum(data)
    on_cpu = next(iter(data.sharding.device_set)).platform == "cpu"
    return total.block_until_ready() if on_cpu else total


@jax.jit
def _device_checksum(data: Array) -> Array:
    if data.dtype == jnp.bool_:
        data = data.astype(jnp.uint8)
    words = {1: jnp.uint8, 2: jnp.uint16}.get(data.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(data, words).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * jnp.uint32(stride) if size > 1 else jnp.uint32(0)
    return jnp.sum(_mix(words ^ _mix(position + jnp.uint32(_GOLDEN))), dtype=jnp.uint32)


def _host_checksum(data: np.ndarray) -> int:
    if data.dtype == np.bool_:
        data = data.astype(np.uint8)
    words = {1: np.uint8, 2: np.uint16}.get(data.dtype.itemsize, np.uint32)
    words = np.ascontiguousarray(data).reshape(-1).view(words)
    total = 0
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        position = np.arange(start + _GOLDEN, start + _GOLDEN + block.size, dtype=np.uint64)
        block ^= _mix(position.astype(np.uint32))
        total += int(np.sum(_mix(block), dtype=np.uint64))
    return total % 2**32


def _mix(word: Any) -> Any:
    """Scramble 32-bit words one to one (the finaliser of MurmurHash3)."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(_MIX_A)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(_MIX_B)
    return word ^ (word >> np.uint32(16))
