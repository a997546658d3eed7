# SPDX-License-Identifier: Apache-2.0
"""Calls of `attention` by name, for tests, benchmarks and tuning alike.

`CASES` are small and cover every argument; an implementation is right when it serves each of them
as the reference does, or refuses it. `WORKLOADS` have the sizes of real models.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import bias as biases
from attnjax.ops import mask as masks
from attnjax.ops import normalizers as norms
from attnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Case:
    """One call by its sizes and the kinds of its arguments; nothing is allocated.

    Attributes:
      name: unique within its list.
      b, t, s, n, k, h, hv: sizes of the axes `[b,t,n,h]`, `[b,s,k,h]` and `[b,s,k,hv]`.
      mask: a name in `MASKS`, or None.
      bias: a name in `BIASES`, or None.
      normalizer: a name in `attnjax.ops.NORMALIZERS`.
      scale, softcap, dropout_rate: passed on.
      is_extreme: scaled scores are exactly -10,000, 1 or 10,000, with many ties.
    """

    name: str
    b: int = 2
    t: int = 6
    s: int = 9
    n: int = 4
    k: int = 2
    h: int = 4
    hv: int = 4
    mask: str | None = None
    bias: str | None = None
    normalizer: str = "softmax"
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
            query, key = arrays[:2]
            query[:], key[:] = 0, 0
            query[..., 0] = rng.choice([-100, 100], query.shape[:-1])
            query[..., 1] = 1
            kind = rng.choice(3, key.shape[:-1])
            key[..., 0] = np.array([-100, 100, 0])[kind]
            key[..., 1] = kind == 2
        return tuple(jnp.asarray(array, dtype) for array in arrays)

    def options(self, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Draw the keyword arguments of `attention` that this case uses."""
        options: dict[str, Any] = {}
        if self.mask:
            options["mask"] = _lookup("mask", MASKS, self.mask)(
                self, np.random.default_rng((seed, 1))
            )
        if self.bias:
            bias = _lookup("bias", BIASES, self.bias)(self, np.random.default_rng((seed, 2)))
            options["bias"] = jax.tree.map(lambda x: jnp.asarray(x, dtype), bias)
        if self.normalizer == "grouped":
            options["normalizer"] = norms.Grouped(np.arange(self.s)[None] % 4 == 3)
        elif self.normalizer != "softmax":
            rng = np.random.default_rng((seed, 3))
            options["normalizer"] = draw_normalizer(self.normalizer, rng, self.n, self.h, self.hv)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.dropout_rate:
            key = jax.random.fold_in(jax.random.key(3), seed)
            options |= {"dropout_rate": self.dropout_rate, "dropout_key": key}
        return options


def draw_normalizer(
    name: str, rng: np.random.Generator, n: int, h: int, hv: int
) -> norms.Normalizer:
    """Make any normalizer but "grouped", with random parameters for n heads of width h and hv."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    made: dict[str, Callable[[], norms.Normalizer]] = {
        "sink_logit": lambda: norms.SinkLogit(normal(n)),
        "kv_bias": lambda: norms.KeyValueBias(normal(n, h), normal(n, hv)),
        "k_bias": lambda: norms.KeyBias(normal(n, h)),
        "v_bias": lambda: norms.ValueBias(normal(1, hv)),
        "ca_bias": lambda: norms.ContextBias(normal(n, h), normal(n, hv)),
        "clipped": lambda: norms.Clipped(-0.03, 1.1),
        "softpick_survey": lambda: norms.SoftpickSurvey(0.1 * abs(normal(n))),
        "elastic": lambda: norms.Elastic(0.3 * normal(n)),
        "elastic_survey": lambda: norms.ElasticSurvey(1.7),
        "sigmoid": lambda: norms.Sigmoid(is_normalized=True, has_length_bias=True),
    }
    return made[name]() if name in made else norms.NORMALIZERS[name]()


def _lookup(field, table, name):
    if name not in table:
        raise ValueError(f"{field} {name!r} is unknown; choose from {list(table)}")
    return table[name]


def _lengths(case, rng):
    lengths = []
    while sum(lengths) < case.s:
        lengths.append(int(min(rng.integers(1, case.s // 2 + 2), case.s - sum(lengths))))
    return lengths


def _dense(case, rng):
    visible = rng.random((case.b, case.n, case.t, case.s)) < 0.6
    visible[0, 0, 0] = False
    return masks.array(visible)


def _segments(case, rng):
    marks = np.sort(rng.integers(0, 3, (case.b, max(case.t, case.s))), axis=-1)
    return masks.segments(jnp.asarray(marks[:, : case.t]), jnp.asarray(marks[:, : case.s]))


def _blocks(case, rng):
    rows, columns = -(-case.t // 3), -(-case.s // 4)
    sizes = lambda count, size, whole: [size] * (count - 1) + [whole - size * (count - 1)]
    kept = rng.random((case.n, rows, columns)) < 0.5
    kept[0, 0] = False
    return masks.blocks(kept, sizes(rows, 3, case.t), sizes(columns, 4, case.s))


def _ragged(case, rng):
    keys, queries = (rng.integers(1, size + 1, case.b) for size in (case.s, case.t))
    return masks.padding(jnp.asarray(keys), jnp.asarray(queries))


def _ranges(case, rng):
    lower = rng.integers(0, case.s, (case.b, 1, 2, case.t))
    return masks.ranges(jnp.asarray(lower), jnp.asarray(lower + rng.integers(-1, 4, lower.shape)))


MASKS: dict[str, Callable[[Case, np.random.Generator], masks.Mask]] = {
    "causal": lambda case, rng: masks.causal(),
    "window": lambda case, rng: masks.sliding_window(2, 1),
    "window_causal": lambda case, rng: masks.sliding_window(max(1, case.s // 4), 0),
    "documents": lambda case, rng: masks.documents(_lengths(case, rng), causal=True),
    "documents_full": lambda case, rng: masks.documents(_lengths(case, rng), causal=False),
    "share_question": lambda case, rng: masks.share_question(_lengths(case, rng)),
    "causal_blockwise": lambda case, rng: masks.causal_blockwise(_lengths(case, rng)),
    "prefix": lambda case, rng: masks.prefix_lm(max(1, case.s // 3)),
    "prefix_documents": lambda case, rng: masks.prefix_lm_documents(_lengths(case, rng), 2),
    "global_window": lambda case, rng: masks.global_sliding_window(2, 1),
    "block_causal": lambda case, rng: masks.block_causal_document(_lengths(case, rng), 2),
    "blocks": _blocks,
    "segments": _segments,
    "causal_segments": lambda case, rng: masks.causal() & _segments(case, rng),
    "padding": lambda case, rng: masks.padding(jnp.asarray(rng.integers(1, case.s + 1, case.b))),
    "ragged": _ragged,
    "ranges": _ranges,
    "empty_example": lambda case, rng: masks.padding(np.arange(case.b) * case.s),
    "empty_rows": lambda case, rng: masks.array((np.arange(case.t) % 2 == 0)[:, None]),
    "nothing": lambda case, rng: masks.array(np.zeros((1, 1), bool)),
    "dense": _dense,
    "predicate": lambda case, rng: masks.predicate(_third),
    "columns": lambda case, rng: masks.from_columns(
        masks.share_question(_lengths(case, rng)).columns(case.t, case.s)
    ),
    "heads": lambda case, rng: masks.per_head(
        [(masks.causal(), masks.sliding_window(1, 1))[i % 2] for i in range(case.n)]
    ),
    "either": lambda case, rng: masks.sliding_window(1, 0) | _segments(case, rng),
}
"""Masks by name; those of documents need as many queries as keys."""

SQUARE = (
    "documents", "documents_full", "share_question", "causal_blockwise", "prefix_documents",
    "global_window", "block_causal", "columns",
)  # fmt: skip
"""Masks that need as many queries as keys."""


def _third(query, key):
    return (query + key) % 3 != 0


def _blocked_bias(case, rng):
    bias = rng.standard_normal((case.b, case.n, case.t, case.s))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[-1, -1, -1] = -np.inf
    return bias


BIASES: dict[str, Callable[[Case, np.random.Generator], Any]] = {
    "full": lambda case, rng: rng.standard_normal((case.b, case.n, case.t, case.s)),
    "heads": lambda case, rng: rng.standard_normal((case.n, case.t, case.s)),
    "keys": lambda case, rng: rng.standard_normal((case.b, 1, 1, case.s)),
    "queries": lambda case, rng: rng.standard_normal((1, case.n, case.t, 1)),
    "blocked": _blocked_bias,
    "alibi": lambda case, rng: biases.Alibi(biases.alibi_slopes(case.n)),
    "relative": lambda case, rng: biases.RelativePosition(rng.standard_normal((case.n, 5))),
    "buckets": lambda case, rng: biases.RelativeBuckets(
        rng.standard_normal((case.n, 8)), max_distance=6
    ),
}
"""Biases by name: arrays, and functions of position."""

_SQUARE = dict(t=9, s=9)
# Longer than a tile in every direction, on CPU too.
_TILED = dict(t=380, s=1100, n=8, k=2, h=4, hv=6)

CASES = (
    Case("plain"),
    Case("value_wide", hv=6),
    Case("ungrouped", k=4),
    Case("multi_query", k=1),
    Case("more_queries_than_keys", t=9, s=4),
    Case("one_query", t=1),
    Case("one_key", s=1),
    Case("single", t=1, s=1, n=1, k=1),
    *(Case(f"mask_{mask}", mask=mask, **(_SQUARE if mask in SQUARE else {})) for mask in MASKS),
    *(Case(f"bias_{bias}", bias=bias, mask="causal") for bias in BIASES),
    Case("scale", scale=0.3),
    Case("softcap", softcap=1.5, scale=1.0),
    Case("extreme", scale=1.0, is_extreme=True),
    Case("extreme_capped", scale=1.0, softcap=30.0, is_extreme=True),
    *(
        Case(f"normalizer_{name}", normalizer=name, mask="dense", bias="heads", softcap=3.0, hv=6)
        for name in norms.NORMALIZERS
    ),
    *(
        Case(f"extreme_{name}", normalizer=name, mask="dense", scale=1.0, is_extreme=True)
        for name in norms.NORMALIZERS
    ),
    *(Case(f"single_{name}", t=1, s=1, n=1, k=1, normalizer=name) for name in norms.NORMALIZERS),
    *(
        Case(f"one_query_{name}", t=1, normalizer=name, mask="padding", bias="keys")
        for name in norms.NORMALIZERS
    ),
    Case("length_200", b=1, t=200, s=200, n=2, k=1, h=8, hv=8, mask="documents"),
    Case("empty_tiles", t=200, s=200, n=2, k=1, h=8, hv=8, mask="ragged"),
    Case("dropout", dropout_rate=0.3),
    Case("everything", hv=6, mask="dense", bias="heads", softcap=2.0, dropout_rate=0.2),
    Case("tiled", **_TILED, mask="causal", bias="keys", softcap=2.0),
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
