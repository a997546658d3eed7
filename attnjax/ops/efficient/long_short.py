# SPDX-License-Identifier: Apache-2.0
"""Long-short attention: one softmax over a window and over a compressed view of everything.

Zhu et al., "Long-Short Transformer: Efficient Transformers for Language and Vision", arXiv
2107.02192, as CAB (arXiv 2210.07661) uses it. Keys and values are normalised over the whole width,
with norms of their own for the window and for what is compressed (their Section 3.3).

Noncausal: P = softmax_over_positions(x W_pool), [t, r] for each head; K_c = norm(P^T K),
V_c = norm(P^T V); a block of w queries sees the r compressed keys, its own block and w // 2 keys on
both sides of it.

Causal: every chunk of c tokens is compressed to rank vectors by a softmax inside it. Query i sees
the last w keys, its own among them, and the vectors of all chunks before its own:

    window:  s (q_i . k_j) + u . k_j + (s q_i + v) . R sin(i - j)        s = h^-0.5
    chunks:  s (q_i . k_m) + s q_i . (R' sin(distance in vectors) + b)

Before the first token lie `memory` zeros, in the window as in chunks: their keys and values are the
biases of the norms. Costs grow linearly with the length, but for the pairs of tokens and chunks,
which are t^2 rank / (2 c); memory grows linearly.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention, Stream, check_heads, finish, project
from attnjax.ops.mixers.chunks import split
from attnjax.ops.mixers.convolution import convolve
from attnjax.ops.mixers.template import check_positive, masked, without_padding
from attnjax.ops.positions import sinusoids

WINDOWS = {False: 15, True: 256}
"""Window of the noncausal and of the causal form, if none is given."""

_EPSILON = 1e-5
_HIDDEN = -1e30
_LINEAR = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=1)
_XAVIER = jax.nn.initializers.glorot_normal(in_axis=0, out_axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongShort(PatternAttention):
    """Long-short attention; the causal form has relative positions of its own.

    The causal form calls `ops.attention` for one tile of queries after another, not the `core` that
    it is given: its relative terms depend on the query, which a mask cannot say, and exist for one
    tile at a time. Neither dropout of weights nor their capture reaches it.

    Attributes:
      window: w, see the module; None: one of `WINDOWS`.
      landmarks: r, compressed keys (noncausal).
      conv: length of a convolution of the values over positions, added to the output; 0: none
        (noncausal).
      chunk: c, tokens that are compressed together (causal).
      rank: vectors of a chunk (causal).
      memory: zeros before the first token, a multiple of the chunk (causal).
      compat: as released: the causal form reads padding like any other token.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self", "causal_self"})
    rotates: ClassVar[bool] = False

    window: int | None = None
    landmarks: int = 16
    conv: int = 0
    chunk: int = 32
    rank: int = 1
    memory: int = 1024
    compat: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "landmarks", "chunk", "rank")
        if self.window is not None:
            check_positive(self, "window")
        if self.conv < 0:
            raise ValueError(f"conv={self.conv}: must be at least 1, or 0 for none")
        if self.causal and self.conv:
            raise ValueError(f"conv={self.conv}: only the noncausal form has one")
        if self.memory < 0 or self.memory % self.chunk:
            raise ValueError(f"memory={self.memory}: must be a multiple of chunk={self.chunk}")

    @property
    def reach(self) -> int:
        """Size of the window w."""
        return WINDOWS[self.causal] if self.window is None else self.window

    def init(self, key, dim, heads, *, context_dim=None, kernel_init=None):
        """Return new parameters; see `PatternAttention.init`.

        Returns:
          The shell's (without biases if causal) and `pool` with `kernel [d,n,r]` and `bias [n,r]`.
          Noncausal: `norm_window` and `norm_pool` with `scale` and `bias` `[d]`; `conv [n,k]`.
          Causal: the same norms, r the rank, `window_position` with `kernel [d,n,h]`,
          `chunk_position` with `kernel [d,n,h]` and `bias [n,h]`, `content_bias [n,h]` (u) and
          `position_bias [n,h]` (v).
        """
        del context_dim
        check_heads(dim, heads)
        if self.causal and dim % 2:
            raise ValueError(f"dim={dim}: relative positions need an even width")
        width, pooled = dim // heads, self.rank if self.causal else self.landmarks
        shell = kernel_init or (_XAVIER if self.causal else _LINEAR)
        keys = iter(jax.random.split(key, 7))

        def part(draw, *shape, has_bias=True):
            kernel = draw(next(keys), (dim, shape[0] * shape[1]), jnp.float32)
            kernel = kernel.reshape(dim, *shape)
            return {"kernel": kernel} | ({"bias": jnp.zeros(shape)} if has_bias else {})

        params = {
            name: part(shell, heads, width, has_bias=not self.causal)
            for name in ("query", "key", "value")
        }
        out = shell(next(keys), (dim, dim), jnp.float32).reshape(heads, width, dim)
        params["out"] = {"kernel": out} | ({} if self.causal else {"bias": jnp.zeros(dim)})
        params["pool"] = part(_LINEAR, heads, pooled)
        for name in ("norm_window", "norm_pool"):
            params[name] = {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}
        if self.causal:
            params["window_position"] = part(_LINEAR, heads, width, has_bias=False)
            params["chunk_position"] = part(_LINEAR, heads, width)
            for name in ("content_bias", "position_bias"):
                params[name] = jnp.zeros((heads, width))
        elif self.conv:
            params["conv"] = jnp.zeros((heads, self.conv))
        return params

    def apply(
        self, params, x, context=None, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        self._check_context(context)
        del rng, train
        valid = query_valid if key_valid is None else key_valid
        if not self.causal:
            return self._apply_both_ways(params, x, valid, core)
        return self._apply_causally(params, x, None if self.compat else valid)

    # Noncausal form.

    def _apply_both_ways(self, params, x, valid, core):
        b, t, _ = x.shape
        query, key, value = (project(params, name, x) for name in ("query", "key", "value"))
        key, value = (_normalise(params["norm_window"], part) for part in (key, value))
        logits_btnr = _pool_logits(params, x)
        if valid is not None:
            logits_btnr = jnp.where(valid[..., None, None], logits_btnr, _HIDDEN)
        weights_btnr = jax.nn.softmax(logits_btnr, axis=1)
        pooled = lambda part: _normalise(
            params["norm_pool"], jnp.einsum("btnr,btnh->brnh", weights_btnr.astype(x.dtype), part)
        )
        r = self.landmarks
        if valid is not None:
            valid = jnp.concatenate([jnp.ones((b, r), bool), valid], axis=1)
        out = core(
            query,
            jnp.concatenate([pooled(key), key], axis=1),
            jnp.concatenate([pooled(value), value], axis=1),
            mask=without_padding(self._blocks(t), valid),
        )
        if self.conv:
            inside = masked(value, None if valid is None else valid[:, r:])
            out = out + convolve(inside, params["conv"], first=-(self.conv // 2))
        return finish(params, out).astype(x.dtype)

    def _blocks(self, length):
        """Let queries see the landmarks and the neighbourhood of their block."""
        r, w, beside = self.landmarks, self.reach, max(self.reach // 2, 1)
        start = np.arange(length) // w * w
        lower = np.stack([np.zeros_like(start), r + np.maximum(start - beside, 0)])
        upper = np.stack([np.full_like(start, r), r + np.minimum(start + w + beside, length)])
        return masks.ranges(lower[None, None], upper[None, None])

    # Causal form: tiles of queries, one after another.

    def _apply_causally(self, params, x, valid):
        b, t, _ = x.shape
        w, chunk = self.reach, self.chunk
        tile, length = self._tiles(t)
        arrays = [project(params, name, x) for name in ("query", "key", "value")]
        arrays += [_pool_logits(params, x), jnp.ones((b, t), bool) if valid is None else valid]
        query, key, value, logits, valid = (
            jnp.pad(array, ((0, 0), (0, length - t)) + ((0, 0),) * (array.ndim - 2))
            for array in arrays
        )
        far, is_far = self._compress(params, key, value, logits, valid)
        memory = _zeros(params["norm_window"], b, w, key)
        normal = (_normalise(params["norm_window"], part) for part in (key, value))
        near = [jnp.concatenate([memory, part], axis=1) for part in normal]
        is_memory = jnp.broadcast_to(jnp.arange(w) >= w - self.memory, (b, w))
        is_near = jnp.concatenate([is_memory, valid], axis=1)
        # From the farthest distance to 0. Below lie distances that only hidden vectors have.
        distances = jnp.arange(far[0].shape[1])[::-1]
        chunk_table = _positions(params["chunk_position"], distances, query.dtype)
        below = length // chunk * self.rank
        tables = (
            _positions(params["window_position"], jnp.arange(w)[::-1], query.dtype),
            jnp.pad(chunk_table, ((0, below), (0, 0), (0, 0))),
        )

        @jax.checkpoint
        def attend(arguments):
            first, *own = arguments
            chunks = first + jnp.arange(tile // chunk)
            # How much later in the table the distances of these queries begin.
            return self._attend_tile(
                params, own, far, is_far, tables, chunks, length // chunk - chunks
            )

        own = (_overlapping(part, tile, w) for part in (*near, is_near))
        queries = jnp.moveaxis(split(query, tile), 1, 0)
        firsts = jnp.arange(0, length // chunk, tile // chunk)
        out = jax.lax.map(attend, (firsts, queries, *own))
        out_btnh = jnp.moveaxis(out, 0, 1).reshape(b, length, *out.shape[3:])
        return finish(params, out_btnh[:, :t]).astype(x.dtype)

    def _attend_tile(self, params, own, far, is_far, tables, chunks, starts):
        """Attend from the queries of some chunks to their windows and to vectors: `[b,t,n,h]`."""
        query, key, value, is_near = own
        t, w, vectors = query.shape[1], self.reach, far[0].shape[1]
        near_bnts = self._near_scores(params, query, key, tables[0])
        far_bntv = self._far_scores(query, tables[1], starts, vectors)
        seen_t1 = self._visible(jnp.repeat(chunks, self.chunk))[:, None]
        behind_ts = jnp.arange(t + w) - jnp.arange(t)[:, None]
        is_inside_ts = (behind_ts >= 1) & (behind_ts <= w)
        mask = [
            (jnp.arange(vectors) < seen_t1) & is_far[:, None],
            is_inside_ts & is_near[:, None],
        ]
        return attention(
            query,
            jnp.concatenate([far[0], key], axis=1),
            jnp.concatenate([far[1], value], axis=1),
            mask=jnp.concatenate(mask, axis=-1)[:, None],
            bias=jnp.concatenate([far_bntv, near_bnts], axis=-1),
        )

    def _tiles(self, length):
        """Return how many queries attend at once, whole chunks, and the padded length."""
        chunk = self.chunk
        tile = min(-(-self.reach // chunk), -(-length // chunk)) * chunk
        return tile, -(-length // tile) * tile

    def _visible(self, chunk_index):
        """How many vectors a query of a chunk sees: those of memory and of the chunks before."""
        return (self.memory // self.chunk + chunk_index) * self.rank

    def _compress(self, params, key, value, logits, valid):
        """Return keys and values `[b,v,n,h]` of memory and chunks, and which exist `[b,v]`."""
        b, c = key.shape[0], self.chunk
        valid_bgc, logits_bgcnr = split(valid, c), split(logits, c)
        logits_bgcnr = jnp.where(valid_bgc[..., None, None], logits_bgcnr, _HIDDEN)
        weights_bgcnr = jax.nn.softmax(logits_bgcnr, axis=2).astype(key.dtype)
        vectors = self.memory // c * self.rank

        def compressed(part):
            pooled = jnp.einsum("bgcnr,bgcnh->bgrnh", weights_bgcnr, split(part, c))
            pooled = _normalise(params["norm_pool"], pooled.reshape(b, -1, *part.shape[2:]))
            return jnp.concatenate([_zeros(params["norm_pool"], b, vectors, part), pooled], axis=1)

        exists_bv = jnp.repeat(valid_bgc.any(axis=2), self.rank, axis=1)
        exists_bv = jnp.concatenate([jnp.ones((b, vectors), bool), exists_bv], axis=1)
        return (compressed(key), compressed(value)), exists_bv

    def _near_scores(self, params, query, key, table):
        """Return what is added to the scores of the window, `[b,n,t,t+w]`; keys begin w before."""
        t, w = query.shape[1], self.reach
        moved = query * query.shape[-1] ** -0.5 + params["position_bias"].astype(query.dtype)
        # [b,n,t,w], from the farthest key to the query itself. Row i begins at column i + 1.
        scores = _dot("btnh,wnh->bntw", moved, table)
        scores = jnp.pad(scores, ((0, 0),) * 3 + ((1, t),))
        scores = scores.reshape(*scores.shape[:2], -1)[..., : t * (t + w)]
        scores = scores.reshape(*scores.shape[:2], t, t + w)
        content = _dot("nh,bsnh->bns", params["content_bias"].astype(key.dtype), key)
        return scores + content[:, :, None]

    def _far_scores(self, query, table, starts, vectors):
        """Return what is added to the scores of vectors, `[b,n,t,v]`.

        Queries of one chunk see all vectors at the same distances: a slice of the table, which
        begins as many chunks later as the chunk lies before the end.
        """
        b, t, n, h = query.shape
        slices = jax.vmap(
            lambda start: jax.lax.dynamic_slice_in_dim(table, start * self.rank, vectors)
        )(starts)
        query = split(query * h**-0.5, self.chunk)
        return _dot("bgcnh,gvnh->bngcv", query, slices).reshape(b, n, t, vectors)

    # Causal form: token by token.

    def empty_state(self, batch, heads, width, capacity, dtype):
        """Return the last w keys and values, those of chunks, and the sums of the running chunk."""
        stored = lambda rows: jnp.zeros((batch, rows, heads, width), dtype)
        vectors = -(-capacity // self.chunk) * self.rank
        return {
            "near": (stored(self.reach), stored(self.reach)),
            "far": (stored(vectors), stored(vectors)),
            "top": jnp.zeros((batch, self.rank, heads), jnp.float32),
            "total": jnp.zeros((batch, self.rank, heads), jnp.float32),
            "sums": (jnp.zeros((batch, self.rank, heads, width), jnp.float32),) * 2,
        }

    def step(self, params, x, stream):
        self._need("causal_self", "decodes step by step")
        position, state = stream.position, dict(stream.state)
        b, w, chunk_index = x.shape[0], self.reach, stream.position // self.chunk
        query, key, value = (project(params, name, x) for name in ("query", "key", "value"))
        state |= self._extend_chunk(params, x, key, value, state, position % self.chunk == 0)
        # The running chunk is written, too, but seen only when it is complete.
        far = []
        for stored, sums in zip(state["far"], state["sums"], strict=True):
            vectors = _normalise(params["norm_pool"], sums / state["total"][..., None])
            vectors = vectors.astype(stored.dtype)
            start = (0, chunk_index * self.rank, 0, 0)
            far.append(jax.lax.dynamic_update_slice(stored, vectors, start))
        state["far"] = tuple(far)
        state["near"] = tuple(
            jnp.concatenate(
                [stored[:, 1:], _normalise(params["norm_window"], part).astype(stored.dtype)],
                axis=1,
            )
            for stored, part in zip(state["near"], (key, value), strict=True)
        )
        places = position - w + 1 + jnp.arange(w)
        in_memory = (places < 0)[None, :, None, None]
        near = [
            jnp.where(in_memory, _zeros(params["norm_window"], b, w, query), x.astype(query.dtype))
            for x in state["near"]
        ]
        far = [
            jnp.concatenate(
                [_zeros(params["norm_pool"], b, self._visible(0), query), x.astype(query.dtype)],
                axis=1,
            )
            for x in state["far"]
        ]
        vectors, seen = far[0].shape[1], self._visible(chunk_index)
        scaled = query * query.shape[-1] ** -0.5
        moved = scaled + params["position_bias"].astype(query.dtype)
        shares = self._step_scores(params["window_position"], moved, jnp.arange(w)[::-1])
        content = params["content_bias"].astype(query.dtype)
        shares += _dot("nh,bsnh->bns", content, near[0])[:, :, None]
        wide = self._step_scores(params["chunk_position"], scaled, seen - 1 - jnp.arange(vectors))
        mask = jnp.concatenate([jnp.arange(vectors) < seen, places >= -self.memory])
        out = attention(
            query,
            jnp.concatenate([far[0], near[0]], axis=1),
            jnp.concatenate([far[1], near[1]], axis=1),
            mask=mask[None, None, None],
            bias=jnp.concatenate([wide, shares], axis=-1),
        )
        return finish(params, out).astype(x.dtype), Stream(position + 1, state)

    def _extend_chunk(self, params, x, key, value, state, is_first):
        """Return the running softmax of a chunk, `top`, `total` and `sums`, with one token more."""
        logits_brn = jnp.swapaxes(_pool_logits(params, x)[:, 0], 1, 2)
        top_brn = jnp.where(is_first, _HIDDEN, state["top"])
        new_brn = jnp.maximum(top_brn, logits_brn)
        kept_brn, share_brn = jnp.exp(top_brn - new_brn), jnp.exp(logits_brn - new_brn)
        return {
            "top": new_brn,
            "total": kept_brn * state["total"] + share_brn,
            "sums": tuple(
                kept_brn[..., None] * total + share_brn[..., None] * part.astype(jnp.float32)
                for total, part in zip(state["sums"], (key, value), strict=True)
            ),
        }

    def _step_scores(self, part, query, distances):
        """Return one query's scores of positions `[b,n,1,s]` without projecting all of them."""
        kernel_dnh = part["kernel"].astype(query.dtype)
        back_btnd = jnp.einsum("btnh,dnh->btnd", query, kernel_dnh)
        waves_sd = sinusoids(distances, kernel_dnh.shape[0], layout="half").astype(query.dtype)
        scores = _dot("btnd,sd->bnts", back_btnd, waves_sd)
        if "bias" in part:
            bias_nh = part["bias"].astype(query.dtype)
            scores += _dot("btnh,nh->bnt", query, bias_nh)[..., None]
        return scores

    def flops(self, length, context_length, dim, heads):
        del context_length
        projected = 8.0 * length * dim * dim
        if not self.causal:
            r, span = self.landmarks, self.reach + 2 * max(self.reach // 2, 1)
            pooled = 2.0 * length * dim * heads * r + 4.0 * length * r * dim
            return projected + pooled + 4.0 * length * (r + min(span, length)) * dim
        tile, padded = self._tiles(length)
        vectors = (self.memory + padded) // self.chunk * self.rank
        pooled = 2.0 * length * dim * heads * self.rank + 4.0 * padded * self.rank * dim
        tables = 2.0 * (self.reach + vectors) * dim * dim
        positions = 2.0 * padded * (self.reach + vectors) * dim
        span = tile + self.reach
        content = 2.0 * (padded // tile) * span * dim
        attended = 4.0 * padded * (vectors + span) * dim
        return projected + pooled + tables + positions + content + attended


def _normalise(part, x):
    """Normalise `x [b,t,n,h]` over its whole width, with float32 statistics."""
    b, t, n, h = x.shape
    wide = x.reshape(b, t, n * h).astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + _EPSILON) * part["scale"] + part["bias"]
    return normal.astype(x.dtype).reshape(b, t, n, h)


def _zeros(part, batch, rows, like):
    """Return what a norm makes of zeros, `[b,rows,n,h]` like an array `[...,n,h]`."""
    n, h = like.shape[-2:]
    bias_nh = part["bias"].astype(like.dtype).reshape(n, h)
    return jnp.broadcast_to(bias_nh, (batch, rows, n, h))


def _pool_logits(params, x):
    """Return the logits of compression, `[b,t,n,r]`, float32 or wider."""
    logits = project(params, "pool", x)
    return logits.astype(jnp.promote_types(x.dtype, jnp.float32))


def _positions(part, distances, dtype):
    """Return projected sinusoids `[s,n,h]` of distances `[s]`."""
    kernel_dnh = part["kernel"].astype(dtype)
    waves_sd = sinusoids(distances, kernel_dnh.shape[0], layout="half").astype(dtype)
    out_snh = jnp.einsum("sd,dnh->snh", waves_sd, kernel_dnh)
    return out_snh + part["bias"].astype(dtype) if "bias" in part else out_snh


def _overlapping(x, tile, before):
    """Cut `x [b,before+t,...]` into tiles `[t/tile,b,before+tile,...]` that share rows."""
    if x.shape[1] == before + tile:
        return x[None]
    tails = split(x[:, :-before], tile)[:, :, :before]
    parts = jnp.concatenate([tails, split(x[:, before:], tile)], axis=2)
    return jnp.moveaxis(parts, 1, 0)


def _dot(equation, *arrays):
    """Contract to float32 or wider."""
    wide = jnp.promote_types(arrays[0].dtype, jnp.float32)
    return jnp.einsum(equation, *arrays, preferred_element_type=wide)
