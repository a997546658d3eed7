# SPDX-License-Identifier: Apache-2.0
"""The interface of the attentions that CAB compares: four patterns, one multi-head shell.

    out = concat_n(attend(x W_query + b, c W_key + b, c W_value + b)_n) W_out + b,   c = context, x

Zhang et al., "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", arXiv
2210.07661, Section 3: attention is noncausal or causal (no output knows of later tokens) and self
or cross. Causal cross attention is what a decoder does that writes token by token: its queries are
revealed one after another, the context is there from the start, so what treats every query by
itself serves it with the formula of noncausal cross attention.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.attention import attention
from attnjax.ops.positions import rotate
from attnjax.typing import Array, Params, PRNGKey

PATTERNS = ("noncausal_self", "causal_self", "noncausal_cross", "causal_cross")
"""NS, CS, NC and CC of the paper."""

Core = Callable[..., Array]
"""Computes exact attention as `ops.attention(query, key, value, mask=...)` does."""

Initializer = Callable[..., Array]

_INNER = jax.nn.initializers.variance_scaling(0.5, "fan_avg", "uniform", in_axis=0, out_axis=1)
_OUTER = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=0, out_axis=1)


def pattern_of(causal: bool, cross: bool) -> str:
    """Return the member of `PATTERNS`."""
    return f"{'causal' if causal else 'noncausal'}_{'cross' if cross else 'self'}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """What a causal attention keeps of the tokens so far.

    Attributes:
      position: int32 scalar, tokens so far.
      state: the attention's own arrays.
    """

    position: Array
    state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatternAttention:
    """One attention in one pattern: pure functions of parameters and tokens.

    Subclasses say which patterns they serve and how heads attend (`attend`); causal ones also how
    they do so token by token (`empty_state`, `attend_step`).

    Attributes:
      causal: no output depends on a later query.
      cross: keys and values come from a context.
      rotary_base: rotate queries and keys by their positions, with wavelengths of this base; None:
        do not.

    Raises:
      ValueError: the attention has no form for the pattern, or an option is out of range.
    """

    patterns: ClassVar[frozenset[str]] = frozenset()
    """Members of `PATTERNS` that the attention serves."""
    is_exact: ClassVar[bool] = False
    """Whether it computes softmax attention; such attentions take a mask and a bias of scores."""
    is_random: ClassVar[bool] = False
    """Whether outputs depend on `rng`."""
    rotates: ClassVar[bool] = True
    """Whether there are queries and keys that positions can rotate."""

    causal: bool = False
    cross: bool = False
    rotary_base: float | None = None

    def __post_init__(self):
        if self.pattern not in self.patterns:
            served = ", ".join(p for p in PATTERNS if p in self.patterns)
            raise ValueError(f"{type(self).__name__} has no {self.pattern} form; it has {served}")
        if self.cross and self.rotary_base is not None:
            raise ValueError(f"rotary_base={self.rotary_base}: a context has positions of its own")
        if not self.rotates and self.rotary_base is not None:
            name = type(self).__name__
            raise ValueError(f"rotary_base={self.rotary_base}: {name} has nothing to rotate")

    @property
    def pattern(self) -> str:
        """The member of `PATTERNS`."""
        return pattern_of(self.causal, self.cross)

    def init(
        self,
        key: PRNGKey,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        kernel_init: Initializer | None = None,
    ) -> Params:
        """Return new parameters.

        Args:
          key: typed random key.
          dim: d, model width.
          heads: n; divides d.
          context_dim: width of the context, if it differs.
          kernel_init: draws the matrices `[inputs, outputs]` of the projections; None: uniform of
            Glorot's variance (half of it for query, key and value), as in the reference code.

        Returns:
          A dict of float32 arrays: `query`, `key`, `value` with `kernel [d,n,h]` and `bias [n,h]`,
          `out` with `kernel [n,h,d]` and `bias [d]`, and the attention's own.

        Raises:
          ValueError: the heads do not divide the width.
        """
        check_heads(dim, heads)
        own_key, *keys = jax.random.split(key, 5)
        params = {}
        for name, k in zip(("query", "key", "value", "out"), keys, strict=True):
            width = dim if name in ("query", "out") else (context_dim or dim)
            draw = kernel_init or (_OUTER if name == "out" else _INNER)
            kernel = draw(k, (width, dim), jnp.float32)
            if name == "out":
                kernel, bias = kernel.reshape(heads, dim // heads, dim), jnp.zeros(dim)
            else:
                kernel = kernel.reshape(width, heads, dim // heads)
                bias = jnp.zeros((heads, dim // heads))
            params[name] = {"kernel": kernel, "bias": bias}
        return params | self.own_params(own_key, dim, heads)

    def own_params(self, key: PRNGKey, dim: int, heads: int) -> Params:
        """Return the parameters besides the shell's; see `init`."""
        del key, dim, heads
        return {}

    def attend(
        self,
        params: Params,
        query: Array,
        key: Array,
        value: Array,
        *,
        query_valid: Array | None = None,
        key_valid: Array | None = None,
        rng: PRNGKey | None = None,
        train: bool = False,
        core: Core = attention,
    ) -> Array:
        """Attend between heads.

        Args:
          params: from `init`.
          query: `[b,t,n,h]`.
          key: `[b,s,n,h]`.
          value: `[b,s,n,h]`.
          query_valid: bool `[b,t]`, False at padding; all valid if None.
          key_valid: bool `[b,s]`, likewise.
          rng: typed key of what is drawn; None: always the same draw.
          train: with what the attention does in training only (noise, new random features).
          core: computes the exact attention to all keys that a mask leaves.

        Returns:
          `[b,t,n,h]` in the dtype of the query; arbitrary but finite at padded queries.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it attends")

    def apply(
        self,
        params: Params,
        x: Array,
        context: Array | None = None,
        *,
        query_valid: Array | None = None,
        key_valid: Array | None = None,
        rng: PRNGKey | None = None,
        train: bool = False,
        core: Core = attention,
    ) -> Array:
        """Attend from tokens to themselves or to a context.

        Args:
          params: from `init`.
          x: `[b,t,d]` floating.
          context: `[b,s,d']` where the pattern is cross, else None.
          query_valid: bool `[b,t]`, False at padding, which then influences nothing.
          key_valid: bool `[b,s]`, padding of the context; of x, if there is none, by default
            `query_valid`.
          rng, train, core: see `attend`.

        Returns:
          `[b,t,d]` in the dtype of x.

        Raises:
          ValueError: the context is missing, or there is one where the pattern is self.
        """
        self._check_context(context)
        options: dict[str, Any] = {"rng": rng, "train": train, "core": core}
        if context is None:
            key_valid = query_valid if key_valid is None else key_valid
            query, key, value = (project(params, p, x) for p in ("query", "key", "value"))
            query, key = self._rotate(query, key, jnp.arange(x.shape[1]))
            out = self.attend(
                params, query, key, value, query_valid=query_valid, key_valid=key_valid, **options
            )
            return finish(params, out).astype(x.dtype)
        query, key, value = (
            project(params, "query", x),
            project(params, "key", context),
            project(params, "value", context),
        )
        out = self.attend(
            params, query, key, value, query_valid=query_valid, key_valid=key_valid, **options
        )
        return finish(params, out).astype(x.dtype)

    def empty_stream(
        self, batch: int, dim: int, heads: int, capacity: int, dtype: Any = jnp.float32
    ) -> Stream:
        """Return what `step` starts from (causal self-attention).

        Args:
          batch: b.
          dim, heads: as in `init`.
          capacity: most tokens; attentions whose state does not grow take any number.
          dtype: of stored keys and values.

        Raises:
          ValueError: the pattern is another.
        """
        self._need("causal_self", "decodes step by step")
        state = self.empty_state(batch, heads, dim // heads, capacity, dtype)
        return Stream(jnp.zeros((), jnp.int32), state)

    def empty_state(self, batch: int, heads: int, width: int, capacity: int, dtype: Any) -> Any:
        """Return the attention's own part of `empty_stream`; `width` is that of a head."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

    def attend_step(
        self, params: Params, query: Array, key: Array, value: Array, state: Any
    ) -> tuple[Array, Any]:
        """Attend from the next token, `[b,1,n,h]` each, to those so far and itself.

        Returns:
          `[b,1,n,h]` and the new state.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it goes on")

    def step(self, params: Params, x: Array, stream: Stream) -> tuple[Array, Stream]:
        """Attend from the next token to those so far and itself; equals a column of `apply`.

        Args:
          params: from `init`.
          x: `[b,1,d]`.
          stream: from `empty_stream`, or from the step before.

        Returns:
          `[b,1,d]` in the dtype of x, and the stream afterwards.
        """
        query, key, value = (project(params, name, x) for name in ("query", "key", "value"))
        query, key = self._rotate(query, key, stream.position[None])
        out, state = self.attend_step(params, query, key, value, stream.state)
        return finish(params, out).astype(x.dtype), Stream(stream.position + 1, state)

    def remember(self, params: Params, context: Array, key_valid: Array | None = None) -> Any:
        """Return what queries that come one by one need of a context (causal cross-attention).

        Args:
          params: from `init`.
          context: `[b,s,d']`.
          key_valid: bool `[b,s]`, False at padding.

        Raises:
          ValueError: the pattern is another.
        """
        self._need("causal_cross", "remembers a context")
        key, value = (project(params, name, context) for name in ("key", "value"))
        return self.summarise(params, key, value, key_valid)

    def summarise(self, params: Params, key: Array, value: Array, key_valid: Array | None) -> Any:
        """Return what `attend_summary` needs of keys and values `[b,s,n,h]`: here themselves."""
        del params
        return key, value, key_valid

    def attend_summary(self, params: Params, query: Array, summary: Any) -> Array:
        """Attend from queries `[b,t,n,h]` to what `summarise` returned."""
        key, value, key_valid = summary
        return self.attend(params, query, key, value, key_valid=key_valid)

    def recall(self, params: Params, x: Array, memory: Any) -> Array:
        """Attend from tokens `[b,t,d]` to a remembered context; equals those of `apply`."""
        out = self.attend_summary(params, project(params, "query", x), memory)
        return finish(params, out).astype(x.dtype)

    def flops(self, length: int, context_length: int, dim: int, heads: int) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two.

        Args:
          length: t, queries.
          context_length: s, keys.
          dim, heads: as in `init`.
        """
        projected = 4.0 * dim * dim * (length + context_length)
        return projected + self.attend_flops(length, context_length, dim, heads)

    def attend_flops(self, length: int, context_length: int, dim: int, heads: int) -> float:
        """Count the operations of `attend`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it costs")

    def _rotate(self, query, key, positions):
        if self.rotary_base is None:
            return query, key
        return tuple(rotate(x, positions, base=self.rotary_base) for x in (query, key))

    def _check_context(self, context):
        if self.cross != (context is not None):
            found = "no context" if context is None else f"a context {context.shape}"
            raise ValueError(f"{type(self).__name__}, {self.pattern}, got {found}")

    def _need(self, pattern, what):
        if self.pattern != pattern:
            raise ValueError(
                f"{type(self).__name__}, {self.pattern}: only the {pattern} form {what}"
            )


def project(params: Params, name: str, x: Array) -> Array:
    """Map `x [b,t,d]` to the heads `[b,t,n,h]` of a projection, in the dtype of x."""
    out = jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"].astype(x.dtype))
    return _shift(out, params[name])


def finish(params: Params, out: Array) -> Array:
    """Map heads `[b,t,n,h]` through the output projection to `[b,t,d]`."""
    out = jnp.einsum("btnh,nhd->btd", out, params["out"]["kernel"].astype(out.dtype))
    return _shift(out, params["out"])


def _shift(x, part):
    """Add the bias of a projection, if it has one."""
    return x + part["bias"].astype(x.dtype) if "bias" in part else x


def check_heads(dim: int, heads: int) -> None:
    """Refuse heads that do not divide the width.

    Raises:
      ValueError: names both.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"heads={heads} must divide dim={dim}")
