# SPDX-License-Identifier: Apache-2.0
"""Statistics that `chunked` collects on its way through the tiles.

Weights p of a tile are relative to the maximum m of their row at that time, so that they become
final only at the end of the row, by a factor r = exp(m - m_end) / l. Nothing is computed twice:

    max_probability = exp(m_end - lse)
    entropy = log l - u / l      u' = exp(m - m') (u + (m - m') l) + sum_s p (scores - m')

What goes down the columns (`key_mass`) or along sets of tokens needs final weights. The tiles of
one tile of queries are therefore kept until its rows are finished, a number of scores that is
linear in the keys, and then summed by products with r or with the sets.

An `Elementwise` normalizer has all of its statistics computed from kept tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp

from attnjax.ops.attention import Call
from attnjax.ops.chunked_tiles import Plan, einsum
from attnjax.ops.normalizer import EMPTY_LSE, Elementwise
from attnjax.ops.reference import first_token_scores
from attnjax.ops.statistics import TokenMass, name_of
from attnjax.typing import Array


def collected_names(call: Call) -> tuple[str, ...]:
    """Return what the passes over the tiles collect for a call, besides the sums that they need."""
    wanted = {item for item in call.statistics if isinstance(item, str)}
    names = wanted & {"entropy", "key_mass"}
    if isinstance(call.normalizer, Elementwise):
        names |= wanted & {"max_probability"}
    if _sets(call):
        names.add("sets")
    return tuple(sorted(names))


def needs_tiles(collects: tuple[str, ...], is_elementwise: bool) -> bool:
    """Whether tiles have to be kept until their rows are finished."""
    return bool(collects) if is_elementwise else bool({"key_mass", "sets"} & set(collects))


def collected_operands(call: Call) -> dict[str, Any]:
    """Return the arrays that collecting needs.

    Args:
      call: the checked arguments.

    Returns:
      "extra_logit" `[b,t,n,1]` or None, which joins the denominators; "sets" `[b,s,k,c]` or None,
      the indicators of all sets of tokens, for every key/value head.
    """
    b, n, t, s = call.scores_shape
    wide, names = call.statistics_dtype, collected_names(call)
    found: dict[str, Any] = {"extra_logit": None, "sets": None}
    if call.extra_logit is not None and needs_tiles(names, False):
        logit = jnp.broadcast_to(call.extra_logit.astype(wide), (b, n, t))
        found["extra_logit"] = logit.swapaxes(1, 2)[..., None]
    if "sets" in names:
        sets = [jnp.broadcast_to(x.astype(wide), (b, s)) for x in _sets(call).values()]
        sets_bs1c = jnp.stack(sets, axis=-1)[:, :, None]
        found["sets"] = jnp.broadcast_to(sets_bs1c, (b, s, call.key.shape[2], len(sets)))
    return found


class Collector:
    """Collects statistics along the passes of one plan; without any to collect, does nothing."""

    def __init__(self, plan: Plan):
        """Decide what to collect.

        Args:
          plan: of the forward pass.
        """
        self.plan = plan
        self.names = set(plan.collects)
        self.keeps = needs_tiles(plan.collects, bool(plan.rule))

    def begin(self, wide: Any) -> dict[str, Array]:
        """Return what goes along the tiles of queries of one group: key mass and kept tiles."""
        plan, kept = self.plan, {}
        _, _, count = plan.counts
        heads = (plan.tiles.examples, plan.heads, plan.members)
        if "key_mass" in self.names:
            kept["key_mass"] = plan.full((*heads, count * plan.tiles.keys), 0, wide)
        if self.keeps:
            shape = (count, *heads, plan.tiles.queries, plan.tiles.keys)
            kept["weights"] = plan.full(shape, 0, wide)
            if plan.shift == "max":
                kept["top"] = plan.full((*shape[:-1], 1), 0, wide)
        return kept

    def start(self, kept: dict[str, Array], rows: tuple[int, ...], wide: Any) -> dict[str, Array]:
        """Return what goes along the tiles of keys of one tile of queries."""
        seen = {name: kept[name] for name in ("weights", "top") if name in kept}
        if "entropy" in self.names and not self.plan.rule:
            seen["moment"] = self.plan.full((*rows, 1), 0, wide)
        return seen

    def shrink(self, seen, step, shrink, total):
        """Move the sums to a new maximum: `step` is the old one minus it, `total` the old l."""
        if "moment" not in seen:
            return seen
        return {**seen, "moment": shrink * (seen["moment"] + step * total)}

    def see(self, seen, m, scores, top, weights):
        """Take in tile m: scores and weights `[bt,kt,g,tq,ts]`, relative to `top`."""
        seen = dict(seen)
        if "moment" in seen:
            parts = weights * jnp.maximum(scores - top, EMPTY_LSE)
            seen["moment"] = seen["moment"] + row_sums(parts)
        for name, array in (("weights", weights), ("top", top)):
            if name in seen:
                seen[name] = jax.lax.dynamic_update_index_in_dim(seen[name], array, m, 0)
        return seen

    def finish(self, visit, kept, seen, sums, sets, rows):
        """Compute the statistics of finished rows.

        Args:
          visit: folds a step over the tiles of keys that were seen, see `Plan.visit`.
          kept: from `begin`.
          seen: from the last `see`.
          sums: the rows' maximum, log l, divisor, and extra logit of the denominator (or None).
          sets: `[bt,kt,m*ts,c]` indicators, or None.
          rows: bool `[tq]`, which rows are there.

        Returns:
          `kept`, with these rows added; and the statistics of the rows by name, `[bt,kt,g,tq,x]`.
        """
        top, log_total, divisor, extra_logit = sums
        found = {}
        if "moment" in seen:
            found["entropy"] = log_total - seen["moment"] / divisor
        if not self.keeps:
            return kept, found
        factor = rows[:, None] / divisor
        if extra_logit is not None:
            factor = factor * jax.nn.sigmoid(top + log_total - extra_logit)
        kept = {**kept, **{name: seen[name] for name in ("weights", "top") if name in seen}}

        def step(state, m, is_partial):
            del is_partial
            state = dict(state)
            pick = lambda name: jax.lax.dynamic_index_in_dim(kept[name], m, 0, keepdims=False)
            weights = pick("weights")
            scale = jnp.exp(pick("top") - top) * factor if "top" in kept else factor
            if "key_mass" in state:
                mass = einsum("bkgt,bkgts->bkgs", scale[..., 0], weights)
                at, size = m * self.plan.tiles.keys, self.plan.tiles.keys
                mass = mass + jax.lax.dynamic_slice_in_dim(state["key_mass"], at, size, 3)
                state["key_mass"] = jax.lax.dynamic_update_slice_in_dim(
                    state["key_mass"], mass, at, 3
                )
            if sets is not None:
                chosen = self.plan.take_keys(sets, m)[:, 0]
                state["sets"] = state["sets"] + scale * einsum("bkgts,bsc->bkgtc", weights, chosen)
            if self.plan.rule:
                final = scale * weights
                if "entropy" in state:
                    parts = jax.scipy.special.entr(final)
                    state["entropy"] = state["entropy"] + parts.sum(axis=-1, keepdims=True)
                if "max_probability" in state:
                    largest = final.max(axis=-1, keepdims=True)
                    state["max_probability"] = jnp.maximum(state["max_probability"], largest)
            return state

        state = {}
        if "key_mass" in kept:
            state["key_mass"] = kept["key_mass"]
        shape, wide = divisor.shape[:-1], divisor.dtype
        if sets is not None:
            state["sets"] = self.plan.full((*shape, sets.shape[-1]), 0, wide)
        if self.plan.rule:
            for name in self.names & {"entropy", "max_probability"}:
                state[name] = self.plan.full((*shape, 1), 0, wide)
        state = visit(step, state)
        if "key_mass" in kept:
            kept["key_mass"] = state.pop("key_mass")
        return kept, found | state


def row_sums(parts_bkgts: Array) -> Array:
    """Sum over keys, `[bt,kt,g,tq,1]`."""
    # As a product: XLA's sum over keys that forms its terms on the way is slow on CPU.
    ones = jnp.ones((parts_bkgts.shape[-1],), parts_bkgts.dtype)
    return einsum("bkgts,s->bkgt", parts_bkgts, ones)[..., None]


def name_statistics(call: Call, plan: Plan, lse, sums, collected) -> dict[str, Array]:
    """Return the statistics that a call asks for, by name.

    Args:
      call: the checked arguments.
      plan: of the forward pass.
      lse: `[b,n,t]`, or None for an `Elementwise` normalizer.
      sums: of the forward pass.
      collected: by the `Collector`: rows `[b,t,n,x]`, and "key_mass" `[u,bt,kt,g,m*ts]`.
    """
    by_row = {
        name: jnp.swapaxes(value, 1, 2) for name, value in collected.items() if name != "key_mass"
    }
    found = {name: value[..., 0] for name, value in by_row.items() if name != "sets"}
    if "sets" in by_row:
        found |= {name: by_row["sets"][..., c] for c, name in enumerate(_sets(call))}
    if "key_mass" in collected:
        found["key_mass"] = plan.join_mass(collected["key_mass"])
    if not plan.rule:
        found |= _softmax_rows(call, lse, sums, found)
    shown = {name_of(item): found[name_of(item)] for item in call.statistics}
    return {name: value.astype(jnp.float32) for name, value in shown.items()}


def _softmax_rows(call, lse, sums, found):
    """Return the statistics that follow from log-sum-exps; an extra logit takes its share."""
    top, log_total, _ = sums
    has_keys = lse > EMPTY_LSE
    log_share = jnp.zeros_like(lse)
    if call.extra_logit is not None:
        log_share = -jax.nn.softplus(call.extra_logit.astype(lse.dtype) - lse)
    share, rows = jnp.exp(log_share), {}
    if "max_probability" in call.statistics:
        largest = jnp.exp(-log_total[..., 0].swapaxes(1, 2))
        rows["max_probability"] = jnp.where(has_keys, share * largest, 0)
    if "first_token_mass" in call.statistics:
        # Relative to the maximum, because a large log-sum-exp is rounded too far.
        first = first_token_scores(call) - top[..., 0].swapaxes(1, 2)
        mass = jnp.exp(first - log_total[..., 0].swapaxes(1, 2))
        rows["first_token_mass"] = jnp.where(has_keys, share * mass, 0)
    if "entropy" in found:
        own = share * found["entropy"] - jnp.where(share > 0, share * log_share, 0)
        rows["entropy"] = jnp.where(has_keys, own, 0)
    return rows


def _sets(call):
    """Name -> indicator `[b|1, s]` of every set of tokens whose mass is collected."""
    sets = {}
    for item in call.statistics:
        if isinstance(item, TokenMass):
            sets[item.name] = item.indicator
        elif item == "first_token_mass" and isinstance(call.normalizer, Elementwise):
            sets[item] = (jnp.arange(call.scores_shape[3]) == 0)[None]
    return sets
