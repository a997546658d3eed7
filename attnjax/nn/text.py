# SPDX-License-Identifier: Apache-2.0
"""Blocks of pre-norm decoders with rotary positions (LLaMA, Mistral, Qwen2), stacked by a scan."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnjax.nn.attend import attend
from attnjax.nn.attention import CAPTURE, Projection
from attnjax.nn.experts import ExpertOptions, Experts
from attnjax.nn.initializers import LINEAR, TABLE
from attnjax.nn.norm import RMSNorm
from attnjax.nn.pattern_attention import Attention
from attnjax.ops import mask as masks
from attnjax.ops.cache import append_and_attend
from attnjax.ops.efficient import PatternAttention
from attnjax.ops.positions import Rotary
from attnjax.ops.relaxed import fold_batch, unfold_batch
from attnjax.parallel.constrain import constrain, gather
from attnjax.typing import Array

HIDDEN = "hidden"
"""Collection that receives hidden states: pass `mutable=["hidden"]` to `apply`."""

LOGITS = "logits"
"""Collection that receives how large scores become: pass `mutable=["logits"]` to `apply`."""

RETRIEVAL = "retrieval"
"""Collection that receives what was retrieved from a cache of blocks, see
`ops.landmark_cache.Retrieval`: pass `mutable=["retrieval"]` to `apply`."""

_FIRST = {"reduce_fn": lambda kept, new: kept or (new,)}
"""Options of `sow` for a module that may be called again, for another stream."""

INPUT = "decoder_layer_input"
"""Name of a layer's input `[b, t, d]` for checkpoint policies."""

REMATS: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What the backward pass finds of a layer: everything, its input, its matrix products too, or its
input in the memory of the host."""


class TokenTable(nn.Module):
    """Vectors of a vocabulary, and their products with hidden states where these are tied.

    Attributes:
      vocab_size: v.
      width: d.
      dtype: compute dtype.
    """

    vocab_size: int
    width: int
    dtype: str = "float32"

    def setup(self):
        self.embedding = self.param("embedding", TABLE, (self.vocab_size, self.width), jnp.float32)

    def __call__(self, tokens: Array) -> Array:
        """Map `tokens [b, t]` in [0, v) to `[b, t, d]`."""
        # Gathered first: tokens may be divided over the axes that divide the width.
        table_vd = gather(self.embedding.astype(self.dtype), "vocab", None)
        return constrain(jnp.take(table_vd, tokens, axis=0), "batch", "sequence", None)


class Kernel(nn.Module):
    """One matrix, float32.

    Attributes:
      shape: its shape.
    """

    shape: tuple

    @nn.compact
    def __call__(self) -> Array:
        """Return the matrix."""
        return self.param("kernel", LINEAR, self.shape, jnp.float32)


def starts(segments: Array) -> Array:
    """Return positions that begin again with every segment, int32 of the shape of segments.

    Args:
      segments: int `[b, t]`; equal neighbours are one segment.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    is_new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(is_new, index, 0), axis=1)


def head_sizes(heads: tuple, width: int) -> tuple[int, int, int]:
    """Return query heads n, key/value heads k and the width h of a head.

    Args:
      heads: (n, k), or (n, k, h).
      width: d, which n divides where h is not given.
    """
    n, k, *rest = heads
    return n, k, rest[0] if rest else width // n


class RotaryAttention(nn.Module):
    """Grouped-query self-attention with rotary positions and no output bias.

    When the collection "attention" is mutable, the probabilities `[b,n,t,s]` are sown there; when
    "logits" is, the sizes `[b,n]` of the largest visible scores. Subclasses mix otherwise.

    Attributes:
      heads: query heads n and key/value heads k; head i uses key/value head `i // (n // k)`. A
        third number is their width h; d / n without.
      is_causal: queries see no later tokens; else they see all, and the window does not count.
      window: tokens that a query sees, its own included; None: all before.
      rotary: what the positions are like.
      qkv_bias: biases on query, key and value.
      head_epsilon: of an RMS norm of every query and key before they are rotated, as in Qwen3;
        None: there is none.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    heads: tuple
    is_causal: bool = True
    window: int | None = None
    rotary: Rotary = Rotary()
    qkv_bias: bool = False
    head_epsilon: float | None = None
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array | None = None,
        lengths: Array | None = None,
        cache: Any = None,
        source: Array | None = None,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Attend among tokens, or from new tokens to a cache and themselves.

        Args:
          x: `[b, t, d]`.
          positions: int `[b, t]`, or `[1, t]` where all examples have the same.
          segments: int `[b, t]`; tokens see only those of their own number. Not with a cache.
          lengths: int `[b]`, tokens that count, with a cache; all if None.
          cache: keys and values of earlier tokens; of one example whose values lie side by side,
            see `ops.relaxed.fold_batch`, where the source has a batch of one.
          source: `[b, t, d]` what queries and keys are made of; x if None. With a batch of one, all
            examples have the same map, which is computed once.

        Returns:
          `[b, t, d]`, the cache afterwards, and measures of the mixing by name.
        """
        d = x.shape[-1]
        n, k, h = head_sizes(self.heads, d)
        source = x if source is None else source

        def project(name, x, heads):
            bias_shape = (heads, h) if self.qkv_bias else None
            kernel, bias = Projection((d, heads, h), bias_shape, self.dtype, name=name)()
            kernel_dnh = gather(kernel, None, "heads", None)
            out_btnh = jnp.einsum("btd,dnh->btnh", x, kernel_dnh)
            out_btnh = out_btnh if bias is None else out_btnh + bias
            return constrain(out_btnh, "batch", "sequence", "heads", None)

        query_btnh, key_bskh, value_bskh = (
            project("query", source, n),
            project("key", source, k),
            project("value", x, k),
        )
        if self.head_epsilon is not None:
            normalise = lambda x, name: RMSNorm(self.head_epsilon, self.dtype, name=name)(x)
            query_btnh = normalise(query_btnh, "query_norm")
            key_bskh = normalise(key_bskh, "key_norm")
        out_btnh, cache, measures = self.mix_for(
            x, query_btnh, key_bskh, value_bskh, positions, segments, lengths, cache
        )
        kernel, _ = Projection((n, h, d), None, self.dtype, name="out")()
        kernel_nhd = gather(kernel, "heads", None, None)
        return jnp.einsum("btnh,nhd->btd", out_btnh, kernel_nhd), cache, measures

    def mix_for(
        self,
        x: Array,
        query: Array,
        key: Array,
        value: Array,
        positions: Array,
        segments: Array | None,
        lengths: Array | None,
        cache: Any,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Average values for tokens `x [b,t,d]`; what subclasses replace that look at the tokens.

        Other arguments and results as in `mix`.
        """
        del x
        return self.mix(query, key, value, positions, segments, lengths, cache)

    def mix(
        self,
        query: Array,
        key: Array,
        value: Array,
        positions: Array,
        segments: Array | None,
        lengths: Array | None,
        cache: Any,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Average values; what subclasses replace.

        Args:
          query: `[b,t,n,h]`, or with a batch of one.
          key: `[b,t,k,h]`, likewise.
          value: `[b,t,k,h]`.
          positions, segments, lengths, cache: as in `__call__`.

        Returns:
          `[b,t,n,h]`, the cache afterwards, and measures by name.
        """
        query, key = self.turn(query, positions), self.turn(key, positions)
        b = value.shape[0]
        is_shared = query.shape[0] < b
        value = fold_batch(value) if is_shared else value
        options = {}
        if self.is_captured(CAPTURE):
            options["return_probabilities"] = True
        if self.is_captured(LOGITS):
            options["return_scores"] = True
        if cache is None:
            result = attend(
                query, key, value,
                mask=self._mask(segments), implementation=self.implementation, **options,
            )  # fmt: skip
        else:
            result, cache = append_and_attend(query, key, value, cache, lengths=lengths, **options)
        if options:
            self.capture(result.probabilities, result.scores, b)
        out_btnh = result.out if options else result
        return (unfold_batch(out_btnh, b) if is_shared else out_btnh), cache, {}

    def turn(self, x: Array, positions: Array) -> Array:
        """Rotate `x [b,t,n,h]` by its positions."""
        return self.rotary.turn(x, positions)

    def is_captured(self, collection: str) -> bool:
        """Whether what belongs into a collection is wanted."""
        return self.is_mutable_collection(collection) and not self.is_initializing()

    def capture(self, probabilities: Array | None, scores: Array | None, batch: int) -> None:
        """Sow a map, and the size of the largest of its scores.

        Of a module that is called again, for another stream, only the first call is kept.

        Args:
          probabilities: `[b,n,t,s]`, or with a batch of one; None: they are not wanted.
          scores: likewise, -inf where they are masked.
          batch: b.
        """
        if probabilities is not None:
            shape = (batch, *probabilities.shape[1:])
            self.sow(CAPTURE, "probabilities", jnp.broadcast_to(probabilities, shape), **_FIRST)
        if scores is not None:
            size_bnts = jnp.where(jnp.isfinite(scores), jnp.abs(scores), 0)
            self.sow(LOGITS, "largest", jnp.max(size_bnts, axis=(2, 3)), **_FIRST)

    def _mask(self, segments):
        mask = None
        if self.is_causal:
            window = self.window
            mask = masks.causal() if window is None else masks.sliding_window(window - 1, 0)
        if segments is None:
            return mask
        same = masks.segments(segments, segments)
        return same if mask is None else mask & same


class SwiGlu(nn.Module):
    """out = (silu(x W_gate) * (x W_up)) W_down, without biases.

    Attributes:
      hidden: width f in the middle.
      dtype: compute dtype.
    """

    hidden: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`."""
        d, f = x.shape[-1], self.hidden
        kernel = lambda name, *shape: Kernel(shape, name=name)().astype(self.dtype)
        gate_df = gather(kernel("gate", d, f), None, "mlp")
        up_df = gather(kernel("up", d, f), None, "mlp")
        down_fd = gather(kernel("down", f, d), "mlp", None)
        hidden_btf = jax.nn.silu(x @ gate_df) * (x @ up_df)
        return constrain(hidden_btf, "batch", "sequence", "mlp") @ down_fd


class DecoderLayer(nn.Module):
    """x <- x + attention(norm(x)); x <- x + channels(norm(x)).

    When the collection "hidden" is mutable, the input `[b, t, d]` is sown there.

    Attributes:
      heads, is_causal, window, rotary, qkv_bias, head_epsilon, implementation: see
        `RotaryAttention`.
      hidden: hidden width of the channel stage.
      epsilon: of the norms.
      experts: a mixture of experts instead of one `SwiGlu`.
      pattern: attends instead of `RotaryAttention`, with as many heads as that has query heads.
      mixer: makes the module that attends instead, given its name; called as `RotaryAttention`.
      dtype: compute dtype.
    """

    heads: tuple
    hidden: int
    is_causal: bool = True
    window: int | None = None
    rotary: Rotary = Rotary()
    qkv_bias: bool = False
    head_epsilon: float | None = None
    epsilon: float = 1e-5
    experts: ExpertOptions | None = None
    pattern: PatternAttention | None = None
    mixer: Callable[..., nn.Module] | None = None
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Array,
        segments: Array | None,
        lengths: Array | None,
        cache: Any,
        source: Array | None = None,
    ) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        """Map `x [b, t, d]`; arguments as in `RotaryAttention`, padding is segment 0.

        A pattern counts positions itself and goes on from an `ops.efficient.Stream`. The norm
        before the attention is the source's, too.

        Returns:
          `[b, t, d]`; and the cache afterwards with what mixer and `Experts` measure.
        """
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "input", x, **_FIRST)
        x = checkpoint_name(x, INPUT)
        norm = RMSNorm(self.epsilon, self.dtype, name="attention_norm")
        source = None if source is None else norm(source)
        branch_btd, cache, measures = self._attend(
            norm(x), positions, segments, lengths, cache, source
        )
        x = constrain(x + branch_btd, "batch", "sequence", None)
        normal_btd = RMSNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        if self.experts is None:
            branch_btd = SwiGlu(self.hidden, self.dtype, name="mlp")(normal_btd)
        else:
            valid = None if segments is None else segments > 0
            if lengths is not None:
                valid = jnp.arange(x.shape[1]) < lengths[:, None]
            stage = Experts(self.hidden, self.experts, self.dtype, name="experts")
            branch_btd, more = stage(normal_btd, valid)
            measures = measures | more
        return constrain(x + branch_btd, "batch", "sequence", None), (cache, measures)

    def _attend(self, x_btd, positions, segments, lengths, cache, source):
        if self.pattern is None:
            own = functools.partial(
                RotaryAttention, self.heads, self.is_causal, self.window, self.rotary,
                self.qkv_bias, self.head_epsilon, self.dtype, self.implementation,
            )  # fmt: skip
            mixer = (self.mixer or own)(name="attention")
            return mixer(x_btd, positions, segments, lengths, cache, source)
        attention = Attention(
            self.pattern, self.heads[0], kernel_init=LINEAR, dtype=self.dtype,
            implementation=self.implementation, name="attention",
        )  # fmt: skip
        if cache is not None:
            return *attention.extend(x_btd, cache), {}
        if segments is None:
            return attention(x_btd), None, {}
        mask = masks.segments(segments, segments)
        return attention(x_btd, query_valid=segments > 0, mask=mask), None, {}


def decoder_stack(depth: int, remat: str, **fields) -> nn.Module:
    """Return `depth` layers as one module whose parameters have a leading axis of layers.

    Args:
      depth: number of layers.
      remat: a key of `REMATS`.
      **fields: of `DecoderLayer`.

    Returns:
      A module called like `DecoderLayer`; caches and what it returns beside `x` have a leading
      axis of layers, too.
    """
    layer = DecoderLayer
    if REMATS[remat] is not None:
        layer = nn.remat(layer, policy=REMATS[remat], prevent_cse=False)
    stacked = nn.scan(
        layer,
        variable_axes={"params": 0, CAPTURE: 0, HIDDEN: 0, LOGITS: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
        out_axes=0,
        length=depth,
    )
    return stacked(**fields)
