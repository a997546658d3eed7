# SPDX-License-Identifier: Apache-2.0
"""Softmax attention with one principle of it given up at a time.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602. Exact softmax attention
mixes tokens by exp(q_i . k_j / sqrt h), normalised over the j <= i. Here are

    taylor_attention      exp(x) ~ 1 + x + x^2 / 2: linear time and a state of fixed size
    cumulative_softmax    exp(q_j . k_j / sqrt h): no pair of a query and a key interacts
    shared_map_attention  queries and keys of another sequence: one map serves all examples

Queries and keys of the embeddings alone, the fourth, are an ordinary call of the core. Sums and
statistics are float32 whatever the dtype of the inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.ops.attention import AttentionOutput, attention
from attnjax.ops.linear import causal_sums
from attnjax.typing import Array

MIXERS = (
    "standard",
    "mlp",
    "approximate",
    "non_approximate",
    "random_embedding",
    "fixed_sequence",
    "static_embedding",
)
"""The paper's mixers of tokens; "mlp" mixes none."""

NORMS = ("separate", "joint")
"""The orders of a Taylor series have a denominator each, and are added, or have one in common."""

SECONDS = ("diagonal", "full")
"""The second order is sum_i (q_i k_i)^2 / 2, or (q . k)^2 / 2 with a state h times as large."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CumulativeState:
    """What `cumulative_softmax` keeps of the tokens so far.

    Attributes:
      largest: `[b,n]`, their largest logit.
      total: `[b,n]`, sum of exp(logit - largest).
      weighted: `[b,n,h]`, sum of exp(logit - largest) v.
    """

    largest: Array
    total: Array
    weighted: Array

    @classmethod
    def empty(
        cls, batch: int, heads: int, width: int, dtype: Any = jnp.float32
    ) -> "CumulativeState":
        """Return the state before the first token.

        Args:
          batch, heads, width: b, n and h of the values.
          dtype: of the storage; between two calls alone, sums are float32.
        """
        zeros = jnp.zeros((batch, heads), dtype)
        return cls(zeros + _lowest(dtype), zeros, jnp.zeros((batch, heads, width), dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaylorState:
    """What `taylor_attention` keeps of the tokens so far, beside their number: sums over them.

    With k and q scaled by h^(-1/4), and m = h, or h^2 if the second order is full:

    Attributes:
      values: `[b,n,hv]` of v.
      keys: `[b,n,h]` of k.
      first: `[b,n,h,hv]` of k v^T.
      squares: `[b,n,m]` of the features of the second order.
      second: `[b,n,m,hv]` of their products with v^T.
    """

    values: Array
    keys: Array
    first: Array
    squares: Array
    second: Array

    @classmethod
    def empty(
        cls, batch: int, heads: int, width: int, second: str = "diagonal", dtype: Any = jnp.float32
    ) -> "TaylorState":
        """Return the state before the first token, for values as wide as keys.

        Args:
          batch, heads, width: b, n, h.
          second: a member of `SECONDS`.
          dtype: of the storage; between two calls alone, sums are float32.

        Raises:
          ValueError: there is no such second order.
        """
        check_taylor("separate", second)
        features = width if second == "diagonal" else width**2
        zeros = lambda *shape: jnp.zeros((batch, heads, *shape), dtype)
        return cls(
            values=zeros(width),
            keys=zeros(width),
            first=zeros(width, width),
            squares=zeros(features),
            second=zeros(features, width),
        )


def check_taylor(norm: str, second: str) -> None:
    """Raise ValueError for a norm or a second order that does not exist."""
    for name, value, known in (("norm", norm, NORMS), ("second", second, SECONDS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(known)}")


def cumulative_softmax(
    query: Array, key: Array, value: Array, *, segments: Array | None = None
) -> Array:
    """Average values with weights that all later positions share.

    out_i = sum_{j <= i} exp(a_j) v_j / sum_{j <= i} exp(a_j),    a_j = q_j . k_j / sqrt h

    A parallel scan over (largest a, sum, weighted sum), so that no exponential overflows.

    Args:
      query: `[b,t,n,h]` floating.
      key: `[b,t,k,h]`; k divides n, as in `ops.attention`.
      value: `[b,t,k,hv]`.
      segments: int `[b,t]`, equal for neighbours that belong together: sums begin again with each.

    Returns:
      `[b,t,n,hv]` in the dtype of the query.

    Raises:
      ValueError: shapes do not fit.
    """
    _, total_btn, weighted_btnh = _cumulate(query, key, value, segments)
    return (weighted_btnh / total_btn[..., None]).astype(query.dtype)


def extend_cumulative(
    query: Array, key: Array, value: Array, state: CumulativeState
) -> tuple[Array, CumulativeState]:
    """Go on with `cumulative_softmax` from a state: a prompt, or a step of decoding.

    Args:
      query, key, value: as in `cumulative_softmax`, of the new tokens.
      state: of those before.

    Returns:
      `[b,t,n,hv]` in the dtype of the query, and the state after them in the dtypes of the old one.
    """
    old = jax.tree.map(lambda x: x[:, None].astype(jnp.float32), state)
    old = (old.largest, old.total, old.weighted)
    largest_btn, total_btn, weighted_btnh = _join(old, _cumulate(query, key, value, None))
    out_btnh = (weighted_btnh / total_btn[..., None]).astype(query.dtype)
    new = CumulativeState(largest_btn[:, -1], total_btn[:, -1], weighted_btnh[:, -1])
    return out_btnh, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)


def cumulative_map(query: Array, key: Array, *, segments: Array | None = None) -> Array:
    """Return the weights of `cumulative_softmax` as a map `[b,n,t,s]` float32, to look at.

    Args:
      query, key, segments: as in `cumulative_softmax`.
    """
    logits_bns = jnp.moveaxis(cumulative_logits(query, key), 1, 2)
    t = logits_bns.shape[-1]
    seen = jnp.tril(jnp.ones((t, t), bool))[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    return jax.nn.softmax(jnp.where(seen, logits_bns[:, :, None, :], -jnp.inf), axis=-1)


def cumulative_logits(query: Array, key: Array) -> Array:
    """Return a_j = q_j . k_j / sqrt h, `[b,t,n]` float32; arguments as in `cumulative_softmax`.

    Raises:
      ValueError: shapes do not fit.
    """
    query, key = query.astype(jnp.float32), _repeat(query, key.astype(jnp.float32))
    return jnp.sum(query * key, axis=-1) * query.shape[-1] ** -0.5


def _cumulate(query, key, value, segments):
    """Return the largest logit, the sum and the weighted sum `[b,t,n(,hv)]` up to every token."""
    logits_btn = cumulative_logits(query, key)
    value_btnh = _repeat(query, value.astype(jnp.float32))
    # The result does not depend on what is subtracted: no gradient flows through it.
    largest_btn = jax.lax.stop_gradient(logits_btn)
    weight_btn = jnp.exp(logits_btn - largest_btn)
    leaves = (largest_btn, weight_btn, weight_btn[..., None] * value_btnh)
    if segments is None:
        return jax.lax.associative_scan(_join, leaves, axis=1)
    is_first_bt1 = jnp.pad(
        segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )[..., None]

    def join(left, right):
        begins = right[0]
        kept = jax.tree.map(
            lambda new, joined: jnp.where(
                begins if new.ndim == 3 else begins[..., None], new, joined
            ),
            right[1],
            _join(left[1], right[1]),
        )
        return left[0] | begins, kept

    return jax.lax.associative_scan(join, (is_first_bt1, leaves), axis=1)[1]


def _join(left, right):
    """Merge (largest, sum, weighted sum) of two sets of tokens."""
    largest = jnp.maximum(left[0], right[0])
    first, second = jnp.exp(left[0] - largest), jnp.exp(right[0] - largest)
    return (
        largest,
        left[1] * first + right[1] * second,
        left[2] * first[..., None] + right[2] * second[..., None],
    )


def taylor_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    norm: str = "separate",
    second: str = "diagonal",
    epsilon: float = 1e-6,
    segments: Array | None = None,
    chunk: int = 128,
    return_denominators: bool = False,
) -> Any:
    """Attend causally with the second-order series of exp instead of exp itself.

    With x = q . k / sqrt h and the weights w0 = 1, w1 = x, w2 = x^2 / 2 (or its diagonal part):

    separate  out = sum_o (sum_j w_o v_j / sum_j w_o)      joint  out = sum_oj w_o v_j / sum_oj w_o

    Time is linear in t. Separate denominators of the first order have no sign: near zero they are
    replaced by `epsilon` of the same sign, and gradients there are large.

    Args:
      query: `[b,t,n,h]` floating.
      key: `[b,t,k,h]`; k divides n, as in `ops.attention`.
      value: `[b,t,k,hv]`.
      norm: a member of `NORMS`; "separate" is the paper's.
      second: a member of `SECONDS`; "diagonal" is the paper's.
      epsilon: smallest size of a denominator.
      segments: int `[b,t]`, equal for neighbours that belong together: tokens see their own only.
      chunk: tokens handled at once.
      return_denominators: also return the denominators of the three orders.

    Returns:
      `[b,t,n,hv]` in the dtype of the query; with denominators a pair with a tuple of three
      `[b,t,n]` float32.

    Raises:
      ValueError: shapes do not fit, or there is no such norm or second order.
    """
    out, denominators, _ = _taylor(
        query, key, value, (None,) * 3, norm, second, epsilon, segments=segments, chunk=chunk
    )
    return (out, denominators) if return_denominators else out


def extend_taylor(
    query: Array,
    key: Array,
    value: Array,
    state: TaylorState,
    count: Array | int,
    *,
    norm: str = "separate",
    second: str = "diagonal",
    epsilon: float = 1e-6,
) -> tuple[Array, TaylorState]:
    """Go on with `taylor_attention` from a state: a prompt, or a step of decoding.

    Args:
      query, key, value: as in `taylor_attention`, of the new tokens.
      state: of those before.
      count: how many these were, int scalar.
      norm, second, epsilon: as in `taylor_attention`.

    Returns:
      `[b,t,n,hv]` in the dtype of the query, and the state after them in the dtypes of the old one.
    """
    counts_bn1 = jnp.full((*state.keys.shape[:2], 1), count, jnp.float32)
    starts = (
        (state.values[:, :, None], counts_bn1),
        (state.first, state.keys),
        (state.second, state.squares),
    )
    out, _, sums = _taylor(query, key, value, starts, norm, second, epsilon)
    new = TaylorState(sums[0][0][:, :, 0], sums[1][1], sums[1][0], sums[2][1], sums[2][0])
    return out, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)


def _taylor(query, key, value, starts, norm, second, epsilon, **options):
    check_taylor(norm, second)
    key, value = _repeat(query, key), _repeat(query, value)
    shrink = lambda x: x.astype(jnp.float32) * query.shape[-1] ** -0.25
    orders = (_ONES, (lambda x: x, None), _SQUARES[second])
    parts = [
        causal_sums(
            shrink(query),
            shrink(key),
            value,
            features=features,
            products=products,
            start=start,
            **options,
        )
        for (features, products), start in zip(orders, starts, strict=True)
    ]
    sums, denominators, states = zip(*parts, strict=True)
    if norm == "joint":
        out_btnh = sum(sums) / _guard(sum(denominators), epsilon)[..., None]
    else:
        pairs = zip(sums, denominators, strict=True)
        out_btnh = sum(x / _guard(total, epsilon)[..., None] for x, total in pairs)
    return out_btnh.astype(query.dtype), denominators, states


# Features of an order, and their products as a function of q . k where they are one.
_ONES = (lambda x: jnp.ones_like(x[..., :1]), jnp.ones_like)
_SQUARES = {
    "diagonal": (lambda x: jnp.square(x) * 2**-0.5, None),
    "full": (
        lambda x: (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) * 2**-0.5,
        lambda x: jnp.square(x) / 2,
    ),
}


def _guard(x, epsilon):
    """Keep x at least epsilon away from zero, on its side of it."""
    return jnp.where(jnp.abs(x) < epsilon, jnp.where(x < 0, -epsilon, epsilon), x)


def shared_map_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    attend: Callable[..., Any] = attention,
    **options: Any,
) -> Any:
    """Attend with one map for all examples: the queries and keys are those of another sequence.

    The examples lie side by side in the width of the values of one example, so that the map is
    computed once, and neither queries nor keys are replicated.

    Args:
      query: `[1,t,n,h]`.
      key: `[1,s,k,h]`.
      value: `[b,s,k,hv]`.
      attend: the core, called as `ops.attention`.
      **options: of the core.

    Returns:
      What the core returns: `[b,t,n,hv]`, or an `AttentionOutput` whose other arrays have a batch
      of one.

    Raises:
      ValueError: there is more than one example of queries and keys.
    """
    if query.shape[0] != 1 or key.shape[0] != 1:
        raise ValueError(
            f"query {query.shape} and key {key.shape} must be of one sequence, with a batch of 1"
        )
    result = attend(query, key, fold_batch(value), **options)
    if isinstance(result, AttentionOutput):
        return dataclasses.replace(result, out=unfold_batch(result.out, value.shape[0]))
    return unfold_batch(result, value.shape[0])


def fold_batch(x: Array) -> Array:
    """Put the examples `[b,t,n,h]` side by side as one, `[1,t,n,b h]`."""
    return jnp.moveaxis(x, 0, 2).reshape(1, *x.shape[1:3], -1)


def unfold_batch(x: Array, batch: int) -> Array:
    """Undo `fold_batch`: `[1,t,n,b h]` to `[b,t,n,h]`."""
    return jnp.moveaxis(x.reshape(*x.shape[1:3], batch, -1), 2, 0)


def _lowest(dtype):
    """Return a number below all logits that can be subtracted from itself."""
    return float(jnp.finfo(dtype).min) / 2


def _repeat(query, x):
    """Give every query head its own copy of its key/value head."""
    b, t, n = query.shape[:3]
    k = x.shape[2]
    if x.shape[:2] != (b, t) or n % k:
        raise ValueError(
            f"keys and values {x.shape} must be [b,t,k,h] with (b,t)={(b, t)} and k dividing the "
            f"{n} heads of the query"
        )
    return jnp.repeat(x, n // k, axis=2) if k != n else x
