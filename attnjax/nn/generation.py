# SPDX-License-Identifier: Apache-2.0
"""Writing token by token with any model that has a step: greedy, drawn, or by beam search.

`reader` and `rereader` make steps of a decoder with and without a cache; `write` does it all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array, Params, PRNGKey

Step = Callable[[Array, Any], tuple[Array, Any]]
"""(tokens `[b]`, state) -> (logits `[b, v]` of the next tokens, state afterwards)."""

Prefill = Callable[[Array, Array, Any], tuple[Array, Any]]
"""(prompt `[b, p]`, lengths `[b]`, state) -> (logits `[b, v]` after each prompt, state)."""

Reorder = Callable[[Any, Array], Any]
"""(state, rows `[b]`) -> the state whose example i is what example rows[i] was."""


def keep_likeliest(logits: Array, top_k: int = 0, top_p: float = 1.0) -> Array:
    """Rule out unlikely tokens.

    Args:
      logits: `[b, v]` float32.
      top_k: how many of the likeliest stay; 0: all. Ties with the last one stay, too.
      top_p: the fewest likeliest tokens whose probabilities sum to at least this share stay; 1: all
        (Holtzman et al., arXiv 1904.09751).

    Returns:
      `[b, v]`, -inf where a token is ruled out; the likeliest one never is.

    Raises:
      ValueError: an argument is out of range.
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k={top_k}, top_p={top_p}: need top_k >= 0 and 0 < top_p <= 1")
    if top_k and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def generate(
    step: Step,
    state: Any,
    prompt: Array,
    length: int,
    *,
    lengths: Array | None = None,
    prefill: Prefill | None = None,
    shortest: int = 0,
    end: int | None = None,
    padding: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: PRNGKey | None = None,
) -> Array:
    """Read a prompt and write what follows.

    Args:
      step: takes one token of every example.
      state: what the first step starts from.
      prompt: int `[b, p]`, at least one token.
      length: most tokens to write.
      lengths: int `[b]` in 1 to p, how many tokens of each prompt count, the first ones; all if
        None. Without `prefill` an example whose prompt is shorter begins to write earlier, so that
        every state has read as many tokens.
      prefill: reads all prompts at once; else they are read token by token.
      shortest: `end` is not chosen among the first so many.
      end: token after which an example is over; None: there is none.
      padding: token behind the end.
      temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / it).
      top_k, top_p: see `keep_likeliest`, applied at the temperature.
      key: typed key of the draws.

    Returns:
      int32 `[b, length]`, the prompt left out.

    Raises:
      ValueError: an argument is out of range, or a key is missing.
    """
    _check_prompt(prompt, length)
    if not 0 <= shortest <= length:
        raise ValueError(f"length={length}, shortest={shortest}: must be 0 <= shortest <= length")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature}: must be at least 0, and a key above it")
    keep_likeliest(jnp.zeros((1, 1)), top_k, top_p)
    prompt, (b, p) = jnp.asarray(prompt, jnp.int32), prompt.shape
    lengths_b = _check_lengths(lengths, b, p)
    key = jax.random.key(0) if key is None else key

    def choose(logits_bv, at, written_b):
        logits_bv = logits_bv.astype(jnp.float32)
        if end is not None:
            is_end = jnp.arange(logits_bv.shape[-1]) == end
            logits_bv = jnp.where((written_b < shortest)[:, None] & is_end, -jnp.inf, logits_bv)
        if not temperature:
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        kept_bv = keep_likeliest(logits_bv / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, at), kept_bv).astype(jnp.int32)

    def follow(logits_bv, at, written_b, is_over_b):
        next_b = jnp.where(is_over_b, padding, choose(logits_bv, at, written_b))
        if end is not None:
            is_over_b |= (next_b == end) & (written_b >= 0)
        return next_b, is_over_b

    fresh_b = jnp.zeros(b, bool)
    if prefill is not None:
        logits_bv, state = prefill(prompt, lengths_b, state)
        first_b, is_over_b = follow(logits_bv, p - 1, jnp.zeros(b, jnp.int32), fresh_b)

        def extend(carry, count):
            token_b, is_over_b, state = carry
            logits_bv, state = step(token_b, state)
            written_b = jnp.full(b, count, jnp.int32)
            next_b, is_over_b = follow(logits_bv, p - 1 + count, written_b, is_over_b)
            return (next_b, is_over_b, state), next_b

        carry = (first_b, is_over_b, state)
        _, rest_tb = jax.lax.scan(extend, carry, jnp.arange(1, length))
        return jnp.concatenate([first_b[None], rest_tb]).T

    def body(carry, at):
        token_b, is_over_b, state = carry
        token_b = jnp.where(at < lengths_b, prompt[:, jnp.minimum(at, p - 1)], token_b)
        logits_bv, state = step(token_b, state)
        next_b, is_over_b = follow(logits_bv, at, at - (lengths_b - 1), is_over_b)
        return (next_b, is_over_b, state), next_b

    start = (jnp.zeros(b, jnp.int32), fresh_b, state)
    _, written_tb = jax.lax.scan(body, start, jnp.arange(p - 1 + length))
    places_bt = lengths_b[:, None] - 1 + jnp.arange(length)
    return jnp.take_along_axis(written_tb.T, places_bt, axis=1)


def beam_search(
    step: Step,
    state: Any,
    prompt: Array,
    length: int,
    *,
    beams: int,
    reorder: Reorder,
    end: int | None = None,
    padding: int = 0,
    length_penalty: float = 0.0,
) -> tuple[Array, Array]:
    """Write the likeliest continuations that a search of limited width finds.

    Args:
      step: takes one token of each of `b * beams` examples.
      state: what the first step starts from, for `b * beams` examples; those of a prompt lie side
        by side.
      prompt: int `[b, p]`, at least one token; all of one length.
      length: most tokens to write.
      beams: continuations that are followed, at least 1.
      reorder: picks examples of a state.
      end: token after which a continuation is over; None: there is none.
      padding: token behind the end.
      length_penalty: continuations are compared by log-likelihood / tokens ** it.

    Returns:
      int32 `[b, beams, length]` and float32 `[b, beams]`, what they were compared by; best first.

    Raises:
      ValueError: an argument is out of range.
    """
    _check_prompt(prompt, length)
    if beams < 1:
        raise ValueError(f"beams={beams}: must be at least 1")
    prompt, b = jnp.asarray(prompt, jnp.int32), len(prompt)
    many = jnp.repeat(prompt, beams, axis=0)
    read = lambda state, token_b: (step(token_b, state)[1], None)
    state, _ = jax.lax.scan(read, state, many[:, :-1].T)
    first_row = jnp.arange(b)[:, None] * beams

    def body(carry, at):
        token_bk, score_bk, count_bk, is_over_bk, written_bkt, state = carry
        logits_nv, state = step(token_bk.reshape(-1), state)
        v = logits_nv.shape[-1]
        log_bkv = jax.nn.log_softmax(logits_nv.astype(jnp.float32)).reshape(b, beams, v)
        # What is over goes on in one way, with a token that costs nothing.
        rest_v = jnp.where(jnp.arange(v) == padding, 0.0, -jnp.inf)
        log_bkv = jnp.where(is_over_bk[..., None], rest_v, log_bkv)
        score_bkv = score_bk[..., None] + log_bkv
        count_bkv = (count_bk + ~is_over_bk)[..., None].astype(jnp.float32)
        ranked_bn = (score_bkv / count_bkv**length_penalty).reshape(b, -1)
        _, chosen_bk = jax.lax.top_k(ranked_bn, beams)
        parent_bk, token_bk = chosen_bk // v, (chosen_bk % v).astype(jnp.int32)
        take = lambda x: jnp.take_along_axis(x, parent_bk, axis=1)
        score_bk = jnp.take_along_axis(score_bkv.reshape(b, -1), chosen_bk, axis=1)
        count_bk, was_over_bk = take(count_bk + ~is_over_bk), take(is_over_bk)
        written_bkt = jnp.take_along_axis(written_bkt, parent_bk[..., None], axis=1)
        written_bkt = written_bkt.at[:, :, at].set(jnp.where(was_over_bk, padding, token_bk))
        is_over_bk = was_over_bk | (token_bk == end) if end is not None else was_over_bk
        state = reorder(state, (first_row + parent_bk).reshape(-1))
        return (token_bk, score_bk, count_bk, is_over_bk, written_bkt, state), None

    # All beams of a prompt are equal at first: only one of them may be continued.
    score_bk = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) * jnp.ones((b, 1))
    carry = (
        many[:, -1].reshape(b, beams), score_bk, jnp.zeros((b, beams), jnp.int32),
        jnp.zeros((b, beams), bool), jnp.full((b, beams, length), padding, jnp.int32), state,
    )  # fmt: skip
    carry, _ = jax.lax.scan(body, carry, jnp.arange(length))
    _, score_bk, count_bk, _, written_bkt, _ = carry
    return written_bkt, score_bk / jnp.maximum(count_bk, 1).astype(jnp.float32) ** length_penalty


def reader(model: Any, params: Params) -> tuple[Prefill, Step, Reorder]:
    """Return how a decoder with a cache reads: prompts at once, then token by token.

    Args:
      model: Linen module with `extend(tokens, cache, lengths)`, such as `models.decoder.Decoder`;
        axes of its caches are layers, examples, and so on.
      params: its parameters.
    """
    apply = lambda *args: model.apply({"params": params}, *args, method="extend")

    def prefill(prompt, lengths, cache):
        output, cache = apply(prompt, cache, lengths)
        last = jnp.take_along_axis(output.logits, (lengths - 1)[:, None, None], axis=1)
        return last[:, 0], cache

    def step(tokens, cache):
        output, cache = apply(tokens[:, None], cache)
        return output.logits[:, 0], cache

    reorder = lambda cache, rows: jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache)
    return prefill, step, reorder


def rereader(model: Any, params: Params, batch: int, capacity: int) -> tuple[Step, Any]:
    """Return a step that keeps tokens instead of a cache and reads all of them again.

    Args:
      model: Linen module whose call maps tokens `[b, t]` to an output with `logits [b, t, v]`.
      params: its parameters.
      batch: examples.
      capacity: most tokens of an example.

    Returns:
      The step, and the state that it starts from.
    """

    def step(tokens, state):
        kept_bt, at = state
        kept_bt = kept_bt.at[:, at].set(tokens)
        logits_btv = model.apply({"params": params}, kept_bt).logits
        return jax.lax.dynamic_index_in_dim(logits_btv, at, axis=1, keepdims=False), (
            kept_bt,
            at + 1,
        )

    return step, (jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((), jnp.int32))


def write(
    model: Any, params: Params, prompt: Array, length: int, *, lengths: Array | None = None,
    **options: Any,
) -> Array:  # fmt: skip
    """Continue prompts with a decoder and its cache.

    Args:
      model: Linen module with `extend` and `empty_cache(batch, capacity, chunk)`.
      params: its parameters.
      prompt: int `[b, p]`.
      length: tokens to write.
      lengths: int `[b]`, tokens of each prompt that count; all if None.
      **options: of `generate`, such as `temperature` and `key`.

    Returns:
      int32 `[b, length]`.
    """
    _check_prompt(prompt, length)
    b, p = prompt.shape
    prefill, step, _ = reader(model, params)
    cache = model.empty_cache(b, p + length, chunk=p)
    return generate(step, cache, prompt, length, lengths=lengths, prefill=prefill, **options)


def _check_prompt(prompt, length):
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt {prompt.shape}: must be [b, p] with at least one token")
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1")


def _check_lengths(lengths, b, p):
    if lengths is None:
        return jnp.full(b, p, jnp.int32)
    if lengths.shape != (b,):
        raise ValueError(f"lengths {lengths.shape}: must be [{b}], one for each prompt")
    if isinstance(lengths, np.ndarray) and not ((lengths >= 1) & (lengths <= p)).all():
        raise ValueError(f"lengths={lengths.tolist()}: must be from 1 to {p}")
    return jnp.asarray(lengths, jnp.int32)
