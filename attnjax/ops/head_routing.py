# SPDX-License-Identifier: Apache-2.0
"""Attention heads as experts: which heads work for a token, and how much they count.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842. Of n heads
the first s are shared, always on; every token chooses K of the e = n - s others. Gates multiply
what the heads give before the output projection, so that

    out = sum_i g_i H_i W_i,    (a_1, a_2) = 2 softmax(W_h x),
    g = (a_1 s softmax(W_s x), a_2 K renormalised(top_K(softmax(W_r x))))

with the factors of the released code, in which gates are 1 on average; the paper prints the plain
softmax. LLaMA's router needs no parameters: the sizes of queries are the scores, gates are 1 or 0.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.typing import Array

EPSILON = 1e-9
"""Least sum of the chosen probabilities that is divided by."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadGates:
    """What heads count for every token.

    Attributes:
      gates: float32 `[b,t,n]`, shared heads first; 0 for heads that were not chosen.
      chosen: bool `[b,t,n]`, heads that work; always True for shared ones.
      balance_loss: float32 scalar, e sum_e(mean probability x share of tokens): K if all heads are
        chosen alike. Means are over all tokens of the batch, also where it is divided over devices
        (the release takes those of every device). 0 if nothing is chosen.
    """

    gates: Array
    chosen: Array
    balance_loss: Array


def check_heads(num_heads: int, shared: int, top_k: int) -> None:
    """Refuse numbers of heads that do not go together.

    Args:
      num_heads: n.
      shared: s, heads that are always on.
      top_k: K, heads that a token chooses among the others.

    Raises:
      ValueError: names the numbers and what is allowed.
    """
    if num_heads < 1 or not 0 <= shared <= num_heads or not 0 <= top_k <= num_heads - shared:
        raise ValueError(
            f"{shared} shared heads and {top_k} chosen ones: of {num_heads} heads at most "
            f"{num_heads} are shared, and at most the other {max(num_heads - shared, 0)} chosen"
        )
    if shared + top_k == 0 or (top_k == 0 and shared < num_heads):
        raise ValueError(
            f"{shared} shared heads and {top_k} chosen ones of {num_heads}: the others never work; "
            "choose at least one of them, or share all"
        )


def choose_heads(scores: Array, top_k: int) -> Array:
    """Return which `top_k` of the last axis are largest, bool; of equal ones the first.

    By comparing all with all: the partitioner would gather whatever goes into a sort.

    Args:
      scores: `[..., e]`.
      top_k: K.
    """
    scores = jax.lax.stop_gradient(scores)
    one, other = scores[..., :, None], scores[..., None, :]
    index = jnp.arange(scores.shape[-1])
    is_before = (other > one) | ((other == one) & (index < index[:, None]))
    return is_before.sum(axis=-1) < top_k


def mixture_gates(
    routed: Array | None,
    shared: Array | None,
    types: Array | None,
    *,
    top_k: int,
    num_shared: int,
    valid: Array | None = None,
) -> HeadGates:
    """Weigh heads by linear scores of every token (Equations 5 to 8).

    Args:
      routed: `[b,t,e]` floating, W_r x; None: all heads are shared.
      shared: `[b,t,s]`, W_s x; None: with one shared head, or none, nothing is weighed there.
      types: `[b,t,2]`, W_h x, for the shared heads and the chosen ones; None unless there are both.
      top_k: K, heads that a token chooses; 0 without `routed`.
      num_shared: s.
      valid: bool `[b,t]`, tokens that count for the loss; all if None.

    Returns:
      A `HeadGates`.

    Raises:
      ValueError: the arguments do not fit each other.
    """
    given = next((x for x in (routed, shared, types) if x is not None), None)
    if given is None:
        raise ValueError("a single shared head and no others needs no gates")
    lead = given.shape[:2]
    experts = 0 if routed is None else routed.shape[-1]
    check_heads(num_shared + experts, num_shared, top_k)
    needed = {
        "routed": (routed, experts > 0, experts),
        "shared": (shared, num_shared > 1, num_shared),
        "types": (types, num_shared > 0 and experts > 0, 2),
    }
    for name, (array, is_needed, size) in needed.items():
        if (array is not None) != is_needed or (is_needed and array.shape != (*lead, size)):
            shape = None if array is None else array.shape
            expected = (*lead, size) if is_needed else None
            raise ValueError(
                f"{name} must be {expected} with {num_shared} shared heads, got {shape}"
            )
    soft = lambda x: jax.nn.softmax(x.astype(jnp.float32), axis=-1)
    parts, chosen, loss = [], [], jnp.zeros((), jnp.float32)
    weight_bt2 = jnp.ones((*lead, 2), jnp.float32) if types is None else 2 * soft(types)
    if num_shared:
        share = jnp.ones((*lead, 1), jnp.float32) if shared is None else soft(shared)
        parts.append(weight_bt2[..., :1] * num_shared * share)
        chosen.append(jnp.ones((*lead, num_shared), bool))
    if routed is not None:
        probability_bte = soft(routed)
        chosen_bte = choose_heads(probability_bte, top_k)
        kept_bte = jnp.where(chosen_bte, probability_bte, 0)
        total = jnp.maximum(kept_bte.sum(axis=-1, keepdims=True), EPSILON)
        parts.append(weight_bt2[..., 1:] * top_k * kept_bte / total)
        chosen.append(chosen_bte)
        loss = balance_loss(probability_bte, chosen_bte, valid)
    return HeadGates(jnp.concatenate(parts, axis=-1), jnp.concatenate(chosen, axis=-1), loss)


def balance_loss(probability: Array, chosen: Array, valid: Array | None = None) -> Array:
    """Return e sum_e(mean_tokens probability_e x mean_tokens chosen_e), float32 (Equation 9).

    Args:
      probability: `[b,t,e]`.
      chosen: bool `[b,t,e]`.
      valid: bool `[b,t]`, tokens that count; all if None.
    """
    count_bt1 = jnp.ones((*probability.shape[:2], 1)) if valid is None else valid[..., None]
    total = jnp.maximum(count_bt1.sum(), 1).astype(jnp.float32)
    mean = lambda x: jnp.sum(x.astype(jnp.float32) * count_bt1, axis=(0, 1)) / total
    return probability.shape[-1] * jnp.sum(mean(probability) * mean(chosen))


def query_gates(
    query: Array, *, top_k: int, num_shared: int, valid: Array | None = None
) -> HeadGates:
    """Choose heads by the sizes of their queries, without parameters (Section 4.4).

    score = softmax over the routed heads of |q| / std(|q|), the deviation with n - 1. Gates are 1
    or 0; their gradient is that of the scores (straight through).

    Args:
      query: `[b,t,n,h]`, before rotary positions.
      top_k: K.
      num_shared: s, the first heads.
      valid: bool `[b,t]`, tokens that count for the loss; all if None.

    Returns:
      A `HeadGates`.

    Raises:
      ValueError: the numbers do not fit, or fewer than two heads are left to choose from.
    """
    b, t, n, _ = query.shape
    check_heads(n, num_shared, top_k)
    if n - num_shared < 2:
        raise ValueError(f"{n - num_shared} routed heads: their spread needs at least two")
    routed = query[:, :, num_shared:].astype(jnp.float32)
    # The root has no gradient at 0.
    square = jnp.sum(jnp.square(routed), axis=-1)
    size_bte = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    variance = jnp.var(size_bte, axis=-1, ddof=1, keepdims=True)
    is_spread = variance > 0
    spread = jnp.where(is_spread, jnp.sqrt(jnp.where(is_spread, variance, 1)), 1)
    score_bte = jax.nn.softmax(size_bte / spread, axis=-1)
    chosen_bte = choose_heads(score_bte, top_k)
    # Added as a difference, which is exactly 0.
    gate_bte = chosen_bte + (score_bte - jax.lax.stop_gradient(score_bte))
    ones = jnp.ones((b, t, num_shared), jnp.float32)
    return HeadGates(
        jnp.concatenate([ones, gate_bte], axis=-1),
        jnp.concatenate([ones > 0, chosen_bte], axis=-1),
        balance_loss(score_bte, chosen_bte, valid),
    )


def head_capacity(tokens: int, routed: int, top_k: int, factor: float = 1.0) -> int:
    """Return the queries of one routed head that are computed: its even share times a factor."""
    return min(tokens, max(1, math.ceil(factor * top_k * tokens / routed)))


def attend_chosen(
    query: Array,
    key: Array,
    value: Array,
    chosen: Array,
    *,
    capacity: int,
    first: Array | None = None,
    last: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Attend from those queries of every head that chose it; keys and values are all there.

    Queries are gathered head by head into a fixed number of places, in their order; what finds no
    place gives zero, as do queries that chose otherwise.

    Args:
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`; k divides n.
      value: `[b,s,k,hv]`.
      chosen: bool `[b,t,n]`.
      capacity: places of a head.
      first: int `[b|1, t]`, the first key that a query sees; 0 if None.
      last: int `[b|1, t]`, the first key behind those that a query sees, its own place + 1 for
        causal attention; s if None.
      bias: `[n,t,s]` or `[b,n,t,s]`, added to the scores.
      scale: see `attention`.
      implementation: see `attention`.

    Returns:
      `[b,t,n,hv]`, and the share of choices that found no place, float32.

    Raises:
      ValueError: shapes do not fit.
    """
    b, t, n, h = query.shape
    s, k, hv = value.shape[1:]
    if n % k or chosen.shape != (b, t, n) or key.shape != (b, s, k, h):
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape}, chosen {chosen.shape} do "
            "not fit"
        )
    if not 1 <= capacity <= t:
        raise ValueError(f"capacity={capacity}: must be between 1 and the {t} queries")
    chosen_bnt = jnp.swapaxes(chosen, 1, 2)
    # Chosen tokens first, in their order.
    rank = jnp.where(chosen_bnt, t - jnp.arange(t), 0)
    left_bnc, place_bnc = jax.lax.top_k(rank, capacity)
    is_used = left_bnc > 0
    take = lambda x_bnt: jnp.take_along_axis(x_bnt, place_bnc[..., None], axis=2)
    gathered = jnp.swapaxes(take(jnp.swapaxes(query, 1, 2)), 1, 2)
    options = {"scale": scale}
    if bias is not None:
        options["bias"] = take(jnp.broadcast_to(bias, (b, n, t, s)))
    if first is not None or last is not None:
        bounds = []
        for bound, default in ((first, 0), (last, s)):
            bound_bt = jnp.full((1, t), default) if bound is None else jnp.asarray(bound)
            bound_bnt = jnp.broadcast_to(bound_bt[:, None], (b, n, t))
            bounds.append(jnp.take_along_axis(bound_bnt, place_bnc, axis=2)[:, :, None])
        options["mask"] = masks.ranges(*bounds)
    if implementation is not None:
        options["implementation"] = implementation
    out_bcnh = attention(gathered, key, value, **options)
    out_bnch = jnp.where(is_used[..., None], jnp.swapaxes(out_bcnh, 1, 2), 0)
    rows, heads = jnp.arange(b)[:, None, None], jnp.arange(n)[None, :, None]
    out_bnth = jnp.zeros((b, n, t, hv), out_bnch.dtype).at[rows, heads, place_bnc].set(out_bnch)
    total = jnp.maximum(jnp.sum(chosen), 1).astype(jnp.float32)
    return jnp.swapaxes(out_bnth, 1, 2), 1 - jnp.sum(is_used) / total
