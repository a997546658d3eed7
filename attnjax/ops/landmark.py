# SPDX-License-Identifier: Apache-2.0
"""Landmark attention: every block of keys ends with a landmark that gates it.

Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300, Section 3.1. The definition is that of
`attnjax.ops.grouped`. Block by block it is attention over the normal keys of a query's own block
and one value o_b for each earlier block b, whose logit is the score of its landmark:

    o_b, lse_b = attention over the normal keys of block b
    out        = merge over b of (o_b, lse_b if b is the own block, else landmark score)

so partial attention and `merge_partials` are all it takes.
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.dropout import dropout_factor, dropout_seed
from attnjax.ops.grouped import ContextMiss, Grouped, by_block, check_group_dropout
from attnjax.ops.mask import Mask
from attnjax.ops.merge import merge_partials
from attnjax.ops.normalizer import EMPTY_LSE, softmax
from attnjax.typing import Array, PRNGKey

IMPLEMENTATIONS = ("blocked", "pallas_tpu")


def landmark_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    is_landmark: Array | None = None,
    block: int | None = None,
    mask: Mask | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    group_dropout_rate: float = 0.0,
    group_dropout_key: PRNGKey | None = None,
    miss: ContextMiss | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Attend causally through landmarks; queries are the last t of the s keys.

    Args:
      query: `[b,t,n,h]` floating.
      key: `[b,s,k,h]`, landmarks among the keys; `k` divides `n`.
      value: `[b,s,k,hv]`.
      is_landmark: bool `[b|1, s]`, where the landmarks are, anywhere; holds all weights
        `[b,n,t,s]`. Give this or `block`.
      block: landmarks are the keys block - 1, 2 block - 1, ...; holds the scores of one block at a
        time, `[b,n,t,block]`. At least 2.
      mask: what may be seen besides being in the past, a `Mask` or bool, see `attention`.
      scale: factor of the raw scores; `h ** -0.5` if None.
      softcap: see `attention`.
      group_dropout_rate: probability that a query's gate to an earlier block is dropped, in [0, 1).
      group_dropout_key: typed key, needed when the rate is not 0. Both forms drop the same gates.
      miss: a context-miss token, see `attnjax.ops.grouped`; its score from `miss_score`.
      return_lse: also return the log-sum-exp of the own block's scores and the earlier landmarks',
        float32 `[b,n,t]`, to merge with other blocks; with `block` and without `miss` only.
      implementation: "blocked", plain XLA, or "pallas_tpu", fused kernels, both with `block` only.
        None takes the kernels on a TPU and else "blocked". The kernels need s - t to be a multiple
        of `block`, float32 or bfloat16 inputs and one chip, and serve neither `mask`, `softcap`,
        group dropout nor `miss`: None then falls back to "blocked".

    Returns:
      `[b,t,n,hv]` in the dtype of the query, and the log-sum-exp if asked for. Zero where a query
      sees nothing, as the first landmark of a tape may.

    Raises:
      ValueError: landmarks are given twice or not at all, shapes do not fit, or the named
        implementation is unknown or does not serve this.
    """
    if (is_landmark is None) == (block is None):
        raise ValueError("give either is_landmark or block")
    if return_lse and (block is None or miss is not None):
        raise ValueError("return_lse: only the form with regular blocks and without miss has it")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose from {list(IMPLEMENTATIONS)}"
        )
    if implementation is not None and block is None:
        raise ValueError(f"implementation={implementation!r} needs block, not is_landmark")
    if block is None:
        normalizer = Grouped(
            is_landmark if isinstance(is_landmark, np.ndarray) else jnp.asarray(is_landmark),
            group_dropout_rate,
            group_dropout_key,
            miss,
        )
        return attention(
            query,
            key,
            value,
            mask=_causal(mask),
            scale=scale,
            softcap=softcap,
            normalizer=normalizer,
            implementation="reference",
        )
    if block < 2:
        raise ValueError(f"block={block}: a landmark and what it stands for need at least 2 keys")
    check_group_dropout(group_dropout_rate, group_dropout_key)
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    if t > s or n % k or key.shape[:3] != value.shape[:3] or key.shape[::3] != (b, h):
        raise ValueError(f"query {query.shape}, key {key.shape}, value {value.shape} do not fit")
    if miss is not None and miss.score.shape != (b, n, t):
        raise ValueError(f"miss.score {miss.score.shape} must be [b,n,t] = {(b, n, t)}")
    if implementation != "blocked":
        options = dict(
            mask=mask, softcap=softcap, miss=miss, group_dropout_rate=group_dropout_rate or None
        )
        try:
            found = _by_kernel(query, key, value, block, scale, options)
            return found if return_lse else found[0]
        except NotImplementedError as error:
            if implementation is not None:
                raise ValueError(f"implementation={implementation!r}: {error}") from error
    out, lse = _by_block(
        query,
        key,
        value,
        block=block,
        mask=_causal(mask),
        scale=h**-0.5 if scale is None else scale,
        softcap=softcap,
        rate=group_dropout_rate,
        seed=dropout_seed(group_dropout_key) if group_dropout_rate else None,
        miss=miss,
    )
    return (out, lse) if return_lse else out


def _by_kernel(query, key, value, block, scale, options):
    for name, option in options.items():
        if option is not None:
            raise NotImplementedError(f"{name} is not served, only by 'blocked'")
    # Importing Pallas takes time that only its users should spend.
    from attnjax.ops import landmark_pallas

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(scale, numbers.Real):
        raise NotImplementedError("a scale known only at run time is not served")
    return landmark_pallas.attend(query, key, value, block=block, scale=float(scale))


def _causal(mask):
    return masks.causal() if mask is None else masks.causal() & masks.as_mask(mask)


def _by_block(query, key, value, *, block, mask, scale, softcap, rate, seed, miss):
    b, t, n, h = query.shape
    s, k, hv = value.shape[1:]
    count = math.ceil(s / block)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query_btkgh = query.reshape(b, t, k, n // k, h)
    widths = ((0, 0), (0, count * block - s), (0, 0), (0, 0))
    key_bskh, value_bskh = jnp.pad(key, widths), jnp.pad(value, widths)
    visibility = mask.visibility(t, s).pad(t, s, t, count * block)
    own_block_t = (np.arange(t) + s - t) // block
    controlled_bc = None if miss is None else by_block(miss.controlled, block, count)

    # The scores of a block are worth less than the memory they would take until the way back.
    @jax.checkpoint
    def step(merged, index):
        start = index * block
        key_part, value_part = (
            jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (key_bskh, value_bskh)
        )
        scores_bnts = scale * jnp.einsum(
            "btkgh,bskh->bkgts", query_btkgh, key_part, preferred_element_type=wide
        ).reshape(b, n, t, block)
        if softcap is not None:
            scores_bnts = softcap * jnp.tanh(scores_bnts / softcap)
        scores_bnts = jnp.where(visibility.tile(0, start, t, block), scores_bnts, -jnp.inf)
        weights_bnts, lse_bnt = softmax(scores_bnts[..., :-1])
        out_btkgh = jnp.einsum(
            "bkgts,bskh->btkgh",
            weights_bnts.astype(value.dtype).reshape(b, k, n // k, t, block - 1),
            value_part[:, :-1],
            preferred_element_type=wide,
        )
        out_btnh = out_btkgh.reshape(b, t, n, hv)
        is_own = own_block_t == index
        if rate:
            head = jnp.arange(b * n, dtype=jnp.uint32).reshape(b, 1, n)
            position = jnp.arange(t, dtype=jnp.uint32).reshape(1, t, 1)
            landmark = jnp.uint32(start + block - 1)
            factor = dropout_factor(seed, rate, head, position, landmark).astype(wide)
            out_btnh = out_btnh * jnp.where(is_own[:, None], 1, factor)[..., None]
        logit_bnt = jnp.where(is_own, lse_bnt, scores_bnts[..., -1])
        if miss is None:
            return merge_partials([merged, (out_btnh, logit_bnt)]), None
        main, far = merged
        is_far = ~is_own & jnp.take(controlled_bc, index, axis=1)[:, None, None]
        only = lambda where: (out_btnh, jnp.where(where, logit_bnt, EMPTY_LSE))
        return (merge_partials([main, only(~is_far)]), merge_partials([far, only(is_far)])), None

    start = (jnp.zeros((b, t, n, hv), wide), jnp.full((b, n, t), EMPTY_LSE, wide))
    merged = start if miss is None else (start, start)
    merged, _ = jax.lax.scan(step, merged, jnp.arange(count))
    if miss is not None:
        out_btnh, _ = merge_missed(*merged, miss.score, miss.cutoff)
        return out_btnh.astype(query.dtype), None
    return merged[0].astype(query.dtype), merged[1]


def miss_score(query: Array, key: Array, scale: float | None = None) -> Array:
    """Return a context-miss token's scores `[b,n,t]`, float32.

    Args:
      query: `[b,t,n,h]`, rotated.
      key: `[b|1, 1, k, h]`, the token's, rotated to position -1; k divides n.
      scale: factor of the scores; `h ** -0.5` if None.
    """
    b, t, n, h = query.shape
    scale = h**-0.5 if scale is None else scale
    key = jnp.broadcast_to(key, (b, *key.shape[1:]))
    query = query.reshape(b, t, key.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    return scale * scores.reshape(b, n, t)


def merge_missed(
    main: tuple[Array, Array], far: tuple[Array, Array], score: Array, cutoff: float = 0.0
) -> tuple[Array, Array]:
    """Merge what is at hand with what a context-miss token decides on.

    out = (1 - share) main + cut(share) far,  share = exp(score) / (exp(score) + exp(lse_main))

    Args:
      main: `out [b,t,n,hv]` and `lse [b,n,t]` of what competes with the token.
      far: the same of the controlled blocks; only its output counts.
      score: `[b,n,t]`, the token's.
      cutoff: a share below this counts as 0.

    Returns:
      `out` in the dtype of main's, and the share `[b,n,t]` before the cutoff, float32.
    """
    (out_btnh, lse_bnt), (far_btnh, far_lse_bnt) = main, far
    wide = jnp.promote_types(out_btnh.dtype, jnp.float32)
    shares, _ = softmax(jnp.stack([lse_bnt.astype(wide), score.astype(wide)], axis=-1))
    own_bnt, share_bnt = shares[..., 0], shares[..., 1]
    # Where there is nothing to look into, the share is lost, as in the release.
    counts = (share_bnt >= cutoff) & (far_lse_bnt > EMPTY_LSE / 2)
    gate_bnt = jnp.where(counts, share_bnt, 0)
    weigh = lambda x, y: jnp.swapaxes(x, 1, 2)[..., None] * y.astype(wide)
    out = weigh(own_bnt, out_btnh) + weigh(gate_bnt, far_btnh)
    return out.astype(out_btnh.dtype), share_bnt
