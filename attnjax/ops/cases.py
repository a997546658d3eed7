# SPDX-License-Identifier: Apache-2.0
"""Calls of `attention` by name, for tests, benchmarks and tuning alike.

`CASES` are small and cover every argument; an implementation is right when it serves each of them
as the reference does, or refuses it. `WORKLOADS` have the sizes of real models.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array

MASKS = (
    "causal", "causal_end", "window", "padding", "empty_example", "segments", "dense",
    "empty_rows", "heads",
)  # fmt: skip
BIASES = ("full", "heads", "keys", "blocked")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call by its sizes and the kinds of its arguments; nothing is allocated.

    Attributes:
      name: unique within its list.
      b, t, s, n, k, h, hv: sizes of the axes `[b,t,n,h]`, `[b,s,k,h]` and `[b,s,k,hv]`.
      mask: one of `MASKS`, or None.
      bias: one of `BIASES`, or None.
      scale, softcap, dropout_rate: passed on.
      is_extreme: scores are exactly -10,000, 0 or 10,000, with many ties.
    """

    name: str
    b: int = 2
    t: int = 5
    s: int = 5
    n: int = 2
    k: int = 2
    h: int = 4
    hv: int = 4
    mask: str | None = None
    bias: str | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_rate: float = 0.0
    is_extreme: bool = False

    def shapes(self, dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return shapes and dtypes of query, key and value."""
        sizes = (
            (self.b, self.t, self.n, self.h),
            (self.b, self.s, self.k, self.h),
            (self.b, self.s, self.k, self.hv),
        )
        return tuple(jax.ShapeDtypeStruct(size, dtype) for size in sizes)

    def arrays(self, seed: int = 0, dtype: Any = jnp.float32) -> tuple[Array, Array, Array]:
        """Draw query, key and value."""
        rng = np.random.default_rng((seed, 0))
        arrays = [rng.standard_normal(x.shape) for x in self.shapes()]
        if self.is_extreme:
            for array in arrays[:2]:
                rows = np.where(rng.random(array.shape[:-1]) < 0.5, -100.0, 100.0)
                axis = rng.integers(0, self.h, array.shape[:-1])
                array[:] = rows[..., None] * (np.arange(self.h) == axis[..., None])
        return tuple(jnp.asarray(array, dtype) for array in arrays)

    def options(self, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Draw the keyword arguments of `attention` that this case uses."""
        options: dict[str, Any] = {}
        if self.mask:
            options["mask"] = jnp.asarray(self._mask(np.random.default_rng((seed, 1))))
        if self.bias:
            options["bias"] = jnp.asarray(self._bias(np.random.default_rng((seed, 2))), dtype)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.dropout_rate:
            key = jax.random.fold_in(jax.random.key(3), seed)
            options |= {"dropout_rate": self.dropout_rate, "dropout_key": key}
        return options

    def _mask(self, rng):
        b, t, s, n = self.b, self.t, self.s, self.n
        rows, columns = np.arange(t)[:, None], np.arange(s)[None]
        match self.mask:
            case "causal":
                return columns <= rows
            case "causal_end":
                return columns <= rows + s - t
            case "window":
                return np.abs(columns - rows) <= max(1, s // 4)
            case "padding":
                lengths = rng.integers(1, s + 1, (b, 1, 1, 1))
                return columns < lengths
            case "empty_example":
                return np.broadcast_to(np.arange(b)[:, None, None, None] > 0, (b, 1, 1, s))
            case "segments":
                marks = np.sort(rng.integers(0, 3, (b, 1, max(t, s))), axis=-1)
                return marks[..., :t, None] == marks[..., None, :s]
            case "dense":
                mask = rng.random((b, n, t, s)) < 0.6
                mask[0, 0, 0] = False
                return mask
            case "empty_rows":
                return (np.arange(t) % 2 == 0).reshape(1, 1, t, 1)
            case "heads":
                mask = rng.random((1, n, 1, s)) < 0.6
                mask[..., 0] = True
                return mask
        raise ValueError(f"mask {self.mask!r} is unknown; choose from {MASKS}")

    def _bias(self, rng):
        b, t, s, n = self.b, self.t, self.s, self.n
        match self.bias:
            case "full":
                return rng.standard_normal((b, n, t, s))
            case "heads":
                return rng.standard_normal((n, t, s))
            case "keys":
                return rng.standard_normal((b, 1, 1, s))
            case "blocked":
                bias = rng.standard_normal((b, n, t, s))
                bias[rng.random(bias.shape) < 0.3] = -np.inf
                bias[-1, -1, -1] = -np.inf
                return bias
        raise ValueError(f"bias {self.bias!r} is unknown; choose from {BIASES}")


_MIXED = dict(t=6, s=9, n=4, k=2, h=4, hv=6)
# Longer than a tile in every direction, on CPU too.
_TILED = dict(t=380, s=1100, n=8, k=2, h=4, hv=6)

CASES = (
    Case("plain"),
    Case("lengths", t=3, s=9),
    Case("value_width", hv=6),
    Case("grouped", n=4, k=2),
    Case("multi_query", n=4, k=1),
    Case("one_query", t=1, s=9),
    Case("one_key", t=3, s=1),
    *(Case(f"mask_{mask}", mask=mask) for mask in MASKS if mask != "causal_end"),
    Case("mask_causal_end", t=3, s=9, mask="causal_end"),
    *(Case(f"bias_{bias}", bias=bias) for bias in BIASES),
    Case("scale", scale=0.3),
    Case("softcap", softcap=1.5, scale=1.0),
    Case("extreme", t=8, s=12, scale=1.0, is_extreme=True),
    Case("extreme_capped", t=8, s=12, scale=1.0, softcap=30.0, is_extreme=True),
    Case("dropout", **_MIXED, dropout_rate=0.3),
    Case("everything", **_MIXED, mask="dense", bias="heads", softcap=2.0, dropout_rate=0.2),
    Case("tiled", **_TILED, mask="causal_end", bias="keys", softcap=2.0),
    Case("tiled_dropout", **_TILED, mask="padding", bias="heads", dropout_rate=0.2),
)
"""Small calls that together use every argument."""

_WIDE = dict(h=64, hv=64)

WORKLOADS = (
    Case("crossvit_fine", b=32, t=401, s=401, n=7, k=7, h=32, hv=32),
    Case("crossvit_coarse", b=32, t=197, s=197, n=7, k=7, **_WIDE),
    Case("crossvit_fine_384", b=8, t=1157, s=1157, n=7, k=7, h=32, hv=32),
    Case("causal_4k", b=1, t=4096, s=4096, n=16, k=4, **_WIDE, mask="causal"),
    Case("decoding_8k", b=8, t=1, s=8192, n=16, k=4, **_WIDE, mask="padding"),
)
"""Calls of the size of real models."""
