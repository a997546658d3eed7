# SPDX-License-Identifier: Apache-2.0
"""Writing token by token with any model that has a step: greedy, or drawn at a temperature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.typing import Array, PRNGKey

Step = Callable[[Array, Any], tuple[Array, Any]]
"""(tokens `[b]`, state) -> (logits `[b, v]` of the next tokens, state afterwards)."""


def generate(
    step: Step,
    state: Any,
    prompt: Array,
    length: int,
    *,
    shortest: int = 0,
    end: int | None = None,
    padding: int = 0,
    temperature: float = 0.0,
    key: PRNGKey | None = None,
) -> Array:
    """Read a prompt and write what follows.

    Args:
      step: takes one token of every example.
      state: what the first step starts from.
      prompt: int `[b, p]`, at least one token; all of one length.
      length: most tokens to write.
      shortest: `end` is not chosen among the first so many.
      end: token after which an example is over; None: there is none.
      padding: token behind the end.
      temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / it).
      key: typed key of the draws.

    Returns:
      int32 `[b, length]`, the prompt left out.

    Raises:
      ValueError: an argument is out of range, or a key is missing.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt {prompt.shape}: must be [b, p] with at least one token")
    if length < 1 or not 0 <= shortest <= length:
        raise ValueError(f"length={length}, shortest={shortest}: must be 0 <= shortest <= length")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature}: must be at least 0, and a key above it")
    prompt, read = jnp.asarray(prompt), prompt.shape[1]
    key = jax.random.key(0) if key is None else key

    def choose(logits_bv, at):
        logits_bv = logits_bv.astype(jnp.float32)
        if end is not None:
            is_early = at - (read - 1) < shortest
            is_end = jnp.arange(logits_bv.shape[-1]) == end
            logits_bv = jnp.where(is_early & is_end, -jnp.inf, logits_bv)
        if not temperature:
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        draw_key = jax.random.fold_in(key, at)
        return jax.random.categorical(draw_key, logits_bv / temperature).astype(jnp.int32)

    def body(carry, at):
        token_b, is_over_b, state = carry
        is_read = at < read
        token_b = jnp.where(is_read, prompt[:, jnp.minimum(at, read - 1)], token_b)
        logits_bv, state = step(token_b.astype(jnp.int32), state)
        next_b = jnp.where(is_over_b, padding, choose(logits_bv, at))
        if end is not None:
            is_over_b |= (next_b == end) & (at >= read - 1)
        return (next_b, is_over_b, state), next_b

    b = prompt.shape[0]
    start = (jnp.zeros(b, jnp.int32), jnp.zeros(b, bool), state)
    _, written_tb = jax.lax.scan(body, start, jnp.arange(read - 1 + length))
    return written_tb[read - 1 :].T
