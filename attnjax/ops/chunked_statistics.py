# SPDX-License-Identifier: Apache-2.0
"""Streaming statistics of `chunked`: a light pass over the tiles once the log-sum-exp is known.

    p = exp(scores - lse)     entropy = sum_s p (lse - scores)     key_mass = sum_t p

The pass forms the scores again and never the product with the values. Sets of tokens are columns of
one small matrix, so that all of them cost one product of the tile with it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnjax.ops.bias import Bias
from attnjax.ops.chunked import Plan, einsum, loop, pad, take_keys
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.statistics import TokenMass, name_of
from attnjax.typing import Array


def measure(
    plan: Plan, query: Array, key: Array, lse: Array, bias, mask, extra_logit, statistics: Sequence
) -> dict[str, Array]:
    """Compute statistics without the `[t, s]` matrix.

    Args:
      plan: of the forward pass.
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`.
      lse: `[b,n,t]` of the forward pass.
      bias: as in `Call`.
      mask: the `TiledMask` of the forward pass, or None.
      extra_logit: joins the denominator, or None.
      statistics: names and `TokenMass`es.

    Returns:
      Arrays by name, see `attnjax.ops.statistics`.
    """
    b, n, _, s = plan.scores_shape
    i_count, j_count, m_count = plan.counts
    wide = lse.dtype
    if extra_logit is not None:
        lse = jnp.where(lse > EMPTY_LSE, jnp.logaddexp(lse, extra_logit.astype(wide)), lse)
    sets = _token_sets(statistics, s)
    sets_all = None
    if sets:
        columns_bsc = jnp.stack(
            [jnp.broadcast_to(x.astype(wide), (b, s)) for x in sets.values()], axis=-1
        )
        columns_bsc = pad(columns_bsc, 1, m_count * plan.tiles.keys)
        sets_all = columns_bsc.reshape(b // i_count, i_count, -1, len(sets)).swapaxes(0, 1)
    query_all, key_all = plan.split_query(query), plan.split_key(key)
    # Queries that pad the last tile get weights of zero.
    rows = ((0, 0), (0, 0), (0, j_count * plan.tiles.queries - lse.shape[2]))
    lse = jnp.pad(lse, rows, constant_values=-EMPTY_LSE)
    lse_all = plan.split_query(lse.swapaxes(1, 2)[..., None])
    bias_all = bias if bias is None or isinstance(bias, Bias) else plan.split_scores(bias)
    wants_mass = "key_mass" in statistics

    def example_step(_, rows):
        i, query_b, lse_b, key_b, sets_b = rows

        def query_step(mass, row):
            j, query_bkgth, lse_bkgt1 = row

            def key_step(state, m, is_partial):
                entropy, top, members, mass = state
                scores, _ = plan.scores(
                    query_bkgth, take_keys(key_b, m, plan), bias_all,
                    mask if is_partial else None, (i, j, m),
                )  # fmt: skip
                # Formed once: each of the sums below would otherwise take its own exponentials.
                p, scores = jax.lax.optimization_barrier((jnp.exp(scores - lse_bkgt1), scores))
                # A sum of finished products is several times as fast as a sum that forms them.
                parts = jax.lax.optimization_barrier(p * jnp.where(p > 0, lse_bkgt1 - scores, 0))
                entropy = entropy + parts.sum(axis=-1)
                top = jnp.maximum(top, p.max(axis=-1))
                if sets_b is not None:
                    chosen = jax.lax.dynamic_slice_in_dim(
                        sets_b, m * plan.tiles.keys, plan.tiles.keys, axis=1
                    )
                    members = members + einsum("bkgts,bsc->bkgtc", p, chosen)
                if mass is not None:
                    start = m * plan.tiles.keys
                    old = jax.lax.dynamic_slice_in_dim(mass, start, plan.tiles.keys, axis=3)
                    ones = jnp.ones(p.shape[:-1], wide)
                    new = old + einsum("bkgt,bkgts->bkgs", ones, p)
                    mass = jax.lax.dynamic_update_slice_in_dim(mass, new, start, axis=3)
                return entropy, top, members, mass

            shape = query_bkgth.shape[:-1]
            zero = jnp.zeros(shape, wide)
            members = None if sets_b is None else jnp.zeros((*shape, len(sets)), wide)
            *found, mass = plan.visit(mask, i, j, key_step, (zero, zero, members, mass))
            return mass, [x if x is None or x.ndim > 4 else x[..., None] for x in found]

        bt, k, size, _ = key_b.shape
        mass = jnp.zeros((bt, k, plan.groups, size), wide) if wants_mass else None
        mass, found = loop(query_step, mass, (jnp.arange(j_count), query_b, lse_b))
        return None, (mass, found)

    rows = (jnp.arange(i_count), query_all, lse_all, key_all, sets_all)
    _, (mass, (entropy, top, members)) = loop(example_step, None, rows)
    results = {}
    by_row = lambda x: plan.join_query(x).swapaxes(1, 2)
    if wants_mass:
        mass_bns = jnp.einsum("ibkgs->bikgs", mass).reshape(b, n, -1)[..., :s]
        results["key_mass"] = mass_bns
    if "entropy" in statistics:
        results["entropy"] = by_row(entropy)[..., 0]
    if "max_probability" in statistics:
        results["max_probability"] = by_row(top)[..., 0]
    for c, name in enumerate(sets):
        results[name] = by_row(members)[..., c]
    return {name: results[name].astype(jnp.float32) for name in map(name_of, statistics)}


def _token_sets(statistics, s):
    """Name -> indicator `[b|1, s]` of everything that is the mass of a set of tokens."""
    sets = {}
    for statistic in statistics:
        if isinstance(statistic, TokenMass):
            sets[statistic.name] = statistic.indicator
        elif statistic == "first_token_mass":
            sets[statistic] = (jnp.arange(s) == 0)[None]
    return sets
