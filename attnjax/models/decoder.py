# SPDX-License-Identifier: Apache-2.0
"""Decoder backbone: the architecture of LLaMA, Mistral and Qwen, that text systems start from.

Touvron et al., "LLaMA", arXiv 2302.13971; Jiang et al., "Mistral 7B", arXiv 2310.06825; Qwen Team,
"Qwen2", arXiv 2407.10671, and "Qwen3", 2505.09388; with Shazeer's mixture of experts (1701.06538).
Implemented from the equations; hidden states agree with transformers (tests/goldens).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.experts import ExpertOptions
from attnjax.nn.head_mixture import HeadMixture, MixtureAttention
from attnjax.nn.norm import RMSNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.stack import empty_streams
from attnjax.nn.text import HIDDEN, REMATS, Kernel, TokenTable, decoder_stack, head_sizes, starts
from attnjax.ops import efficient
from attnjax.ops.cache import Cache, FullCache, WindowCache
from attnjax.ops.efficient import PatternAttention, Stream
from attnjax.ops.positions import Rotary
from attnjax.parallel.constrain import constrain, gather
from attnjax.registry import nearest
from attnjax.typing import Array, Params
from attnjax.weights.names import rule, stacked

ATTENTIONS = ("causal", "bidirectional")
"""The decoder's own attention: rotary, with grouped queries."""

MIXTURE = "head_mixture"
"""Name of the decoder's own attention with heads that tokens choose."""

PROJECTIONS = ("plain", "biased", "normed")
"""Queries, keys and values without more; with biases (Qwen2); or queries and keys normalised per
head before they are rotated (Qwen3)."""

# LLaMA-2 and LLaMA-3: Table 1 of arXiv 2307.09288 and Table 3 of 2407.21783; Mistral: Table 1 of
# 2310.06825; Qwen2: Table 1 of 2407.10671; the rest from the published configurations.
PRESETS = {
    "llama2_7b": {
        "vocab_size": 32_000, "width": 4096, "depth": 32, "heads": (32, 32), "hidden": 11_008,
        "length": 4096,
    },
    "llama2_13b": {
        "vocab_size": 32_000, "width": 5120, "depth": 40, "heads": (40, 40), "hidden": 13_824,
        "length": 4096,
    },
    "llama2_70b": {
        "vocab_size": 32_000, "width": 8192, "depth": 80, "heads": (64, 8), "hidden": 28_672,
        "length": 4096,
    },
    "llama3_8b": {
        "vocab_size": 128_256, "width": 4096, "depth": 32, "heads": (32, 8), "hidden": 14_336,
        "length": 8192, "rotary": 500_000.0,
    },
    "llama3_70b": {
        "vocab_size": 128_256, "width": 8192, "depth": 80, "heads": (64, 8), "hidden": 28_672,
        "length": 8192, "rotary": 500_000.0,
    },
    "llama31_8b": {
        "vocab_size": 128_256, "width": 4096, "depth": 32, "heads": (32, 8), "hidden": 14_336,
        "length": 131_072, "rotary": {"base": 500_000.0, "scaling": (8.0, 1.0, 4.0, 8192)},
    },
    "llama32_1b": {
        "vocab_size": 128_256, "width": 2048, "depth": 16, "heads": (32, 8), "hidden": 8192,
        "length": 131_072, "rotary": {"base": 500_000.0, "scaling": (32.0, 1.0, 4.0, 8192)},
        "tied": True,
    },
    "mistral_7b_v01": {
        "vocab_size": 32_000, "width": 4096, "depth": 32, "heads": (32, 8), "hidden": 14_336,
        "length": 8192, "window": 4096,
    },
    "qwen2_05b": {
        "vocab_size": 151_936, "width": 896, "depth": 24, "heads": (14, 2), "hidden": 4864,
        "length": 8192, "rotary": 1_000_000.0, "epsilon": 1e-6,
        "projections": "biased", "tied": True,
    },
    "qwen25_7b": {
        "vocab_size": 152_064, "width": 3584, "depth": 28, "heads": (28, 4), "hidden": 18_944,
        "length": 8192, "rotary": 1_000_000.0, "epsilon": 1e-6, "projections": "biased",
    },
    "qwen3_06b": {
        "vocab_size": 151_936, "width": 1024, "depth": 28, "heads": (16, 8, 128), "hidden": 3072,
        "length": 8192, "rotary": 1_000_000.0, "epsilon": 1e-6,
        "projections": "normed", "tied": True,
    },
    "qwen3_8b": {
        "vocab_size": 151_936, "width": 4096, "depth": 36, "heads": (32, 8, 128), "hidden": 12_288,
        "length": 8192, "rotary": 1_000_000.0, "epsilon": 1e-6, "projections": "normed",
    },
    # MoH, arXiv 2410.11842, Table 3: LLaMA's shape from nothing, three quarters of the heads at
    # work, a quarter shared (which part is not said); and LLaMA 3 trained further, Section 4.4.
    "moh_s": {
        "vocab_size": 65_536, "width": 768, "depth": 12, "heads": (12, 12), "hidden": 2048,
        "length": 2048, "attention": {"name": MIXTURE, "shared": 3, "top_k": 6},
    },
    "moh_b": {
        "vocab_size": 65_536, "width": 1536, "depth": 24, "heads": (16, 16), "hidden": 4096,
        "length": 2048, "attention": {"name": MIXTURE, "shared": 4, "top_k": 8},
    },
    "moh_llama3_8b": {
        "vocab_size": 128_256, "width": 4096, "depth": 32, "heads": (32, 8), "hidden": 14_336,
        "length": 8192, "rotary": 500_000.0,
        "attention": {"name": MIXTURE, "shared": 16, "top_k": 8, "router": "queries"},
    },
    "tiny": {},
}  # fmt: skip


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, t, v]` float32.
      aux: with experts, float32 scalars: `load_loss`, `z_loss` and `dropped`, means over the
        layers, and `penalty`, the sum of the layers' weighted losses; with a mixture of heads
        `balance_loss`, `dropped` and `penalty`, likewise; empty without.
    """

    logits: Array
    aux: dict[str, Array]


class Decoder(nn.Module):
    """Token table, pre-norm layers with rotary grouped-query attention and SwiGLU, norm, head.

    Hidden states of all layers are sown when the collection "hidden" is mutable; see
    `hidden_states`.

    Attributes:
      vocab_size: v.
      length: tokens of an example, for `example` and `flops`; any other number works as well.
      width: d.
      depth: layers.
      heads: query heads, and key/value heads, which divide them; and the width of a head, even,
        without which query heads divide the width.
      hidden: hidden width of the channel stage, or of every expert.
      attention: "causal" (also None), or "bidirectional": everything sees everything, without a
        window; or `{"name": "head_mixture", ...}` with fields of `nn.head_mixture.HeadMixture`:
        causal, with heads that tokens choose; or another causal self-attention, see
        `choose_attention`, which has as many key/value heads as query heads, biases of its own and,
        where it rotates, `rotary`'s base.
      window: tokens that a query sees, its own included; None: all before.
      rotary: base of the rotary wavelengths, or fields of `ops.positions.Rotary`.
      epsilon: of the norms.
      projections: of queries, keys and values, a member of `PROJECTIONS`.
      tied: the head is the transposed token table.
      experts: fields of `nn.experts.ExpertOptions`; None: one dense channel stage.
      dtype: compute dtype; logits are float32.
      remat: what the backward pass computes again: "none", "full", all but matrix products,
        "dots", or "full" with the layers' inputs waiting in pinned memory of the host, "offload".
      attention_implementation: passed to `nn.attend`.
    """

    vocab_size: int = 256
    length: int = 128
    width: int = 64
    depth: int = 2
    heads: tuple = (4, 2)
    hidden: int = 128
    attention: str | Mapping[str, Any] | None = "causal"
    window: int | None = None
    rotary: float | Mapping[str, Any] = 10_000.0
    epsilon: float = 1e-5
    projections: str = "plain"
    tied: bool = False
    experts: Any = None
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("remat", REMATS), ("projections", PROJECTIONS)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise RecipeError(f"model.{name}={found!r}: {nearest(found, known)}")
        for name in ("vocab_size", "length", "width", "depth", "hidden"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.window is not None and self.window < 1:
            raise RecipeError(f"model.window={self.window}: must be at least 1, or None")
        heads = tuple(self.heads)
        if len(heads) not in (2, 3) or min(heads) < 1 or heads[0] % heads[1]:
            raise RecipeError(
                f"model.heads={heads}: must be query heads and a divisor of their number, the "
                "key/value heads; and, if it is not width / query heads, the width of a head"
            )
        if len(heads) == 3 and heads[2] % 2:
            raise RecipeError(f"model.heads={heads}: heads that rotate need an even width")
        if len(heads) == 2 and self.width % (2 * heads[0]):
            raise RecipeError(
                f"model.width={self.width}: must be an even multiple of the {self.heads[0]} heads"
            )
        try:
            Rotary.of(self.rotary)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"model.rotary={self.rotary}: {error}") from error
        ExpertOptions.of(self.experts)
        self.make_attention()

    def head_mixture(self) -> HeadMixture | None:
        """Return how heads are chosen; None if all of them work for all tokens.

        Raises:
          RecipeError: fields are unknown or out of range.
        """
        if not isinstance(self.attention, Mapping) or self.attention.get("name") != MIXTURE:
            return None
        fields = {name: value for name, value in self.attention.items() if name != "name"}
        return HeadMixture.of(fields, self.heads[0])

    def make_attention(self) -> PatternAttention | None:
        """Return the attention that replaces the decoder's own; None if that stays.

        Raises:
          RecipeError: there is no such one, it has no causal form, draws at random, or does not go
            together with other fields.
        """
        if self.attention is None or self.attention in ATTENTIONS or self.head_mixture():
            return None
        if isinstance(self.attention, str) and self.attention not in efficient.ATTENTIONS:
            known = nearest(self.attention, (*ATTENTIONS, *efficient.ATTENTIONS))
            raise RecipeError(f"model.attention={self.attention!r}: {known}")
        attention = choose_attention(self.attention, field="attention", causal=True)
        (n, k), name = self.heads[:2], type(attention).__name__
        for field, is_default, meaning in (
            ("heads", n == k, "as many key/value heads as query heads"),
            ("window", self.window is None, "its own windows only"),
            ("heads", len(self.heads) == 2, "heads of width d / n"),
            ("projections", self.projections == "plain", "biases of its own"),
        ):
            if not is_default:
                raise RecipeError(f"model.{field}={getattr(self, field)}: {name} has {meaning}")
        if attention.is_random:
            raise RecipeError(f"model.attention={self.attention!r}: the decoder draws nothing")
        is_set = isinstance(self.attention, Mapping) and "rotary_base" in self.attention
        if attention.rotates and not is_set:
            rotary = Rotary.of(self.rotary)
            if rotary != Rotary(rotary.base):
                raise RecipeError(f"model.rotary={self.rotary}: {name} takes a base only")
            attention = dataclasses.replace(attention, rotary_base=rotary.base)
        return attention

    def setup(self):
        self.embed = TokenTable(self.vocab_size, self.width, self.dtype)
        self.layers = decoder_stack(
            self.depth,
            self.remat,
            heads=tuple(self.heads),
            hidden=self.hidden,
            is_causal=self.is_causal,
            window=self.window,
            rotary=Rotary.of(self.rotary),
            qkv_bias=self.projections == "biased",
            head_epsilon=self.epsilon if self.projections == "normed" else None,
            epsilon=self.epsilon,
            experts=ExpertOptions.of(self.experts),
            pattern=self.make_attention(),
            mixer=self._mixer(),
            dtype=self.dtype,
            implementation=self.attention_implementation,
        )
        self.norm = RMSNorm(self.epsilon, self.dtype)
        if not self.tied:
            self.head = Kernel((self.width, self.vocab_size))

    def _mixer(self):
        mixture = self.head_mixture()
        if mixture is None:
            return None
        return functools.partial(
            MixtureAttention, tuple(self.heads), True, self.window, Rotary.of(self.rotary),
            self.projections == "biased", self.epsilon if self.projections == "normed" else None,
            self.dtype, self.attention_implementation, mixture, self.depth,
        )  # fmt: skip

    def __call__(
        self,
        tokens: Array,
        segments: Array | None = None,
        positions: Array | None = None,
        *,
        train: bool = False,
    ) -> Output:
        """Score the next token at every place.

        Args:
          tokens: int `[b, t]` in [0, v).
          segments: int `[b, t]`, documents packed into one example: tokens see those of their own
            number only. 0 is padding, on either side.
          positions: int `[b, t]`; by default they count from 0 within every segment.
          train: without effect: there is no dropout.

        Returns:
          An `Output`.

        Raises:
          NotImplementedError: positions with another attention than the decoder's own, or segments
            with one that has no map of scores.
        """
        del train
        normal_btd, aux = self.encode(tokens, segments, positions)
        return Output(logits=self._logits(normal_btd), aux=aux)

    @property
    def is_causal(self) -> bool:
        """Whether tokens see no later ones."""
        return self.attention != "bidirectional"

    def encode(
        self,
        tokens: Array,
        segments: Array | None = None,
        positions: Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the normalised last hidden states `[b, t, d]`, and `Output.aux`.

        Arguments as in `__call__`.
        """
        del train
        self._check(tokens, segments, positions)
        if positions is not None and self.make_attention() is not None:
            raise NotImplementedError(
                f"attention={self.attention!r} counts positions itself: leave positions out"
            )
        if positions is None and segments is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        elif positions is None:
            positions = starts(segments)
        out_btd, (_, measures) = self.layers(self.embed(tokens), positions, segments, None, None)
        return self._finish(out_btd), _summary(measures)

    def extend(
        self, tokens: Array, cache: Cache | Stream, lengths: Array | None = None
    ) -> tuple[Output, Cache | Stream]:
        """Score the next token after each of some new ones: a prompt, or a step of decoding.

        Other attentions than the decoder's own read the tokens one by one.

        Args:
          tokens: int `[b, c]`, the new ones.
          cache: from `empty_cache`, or from the call before.
          lengths: int `[b]`, how many of them count, the first ones; all if None.

        Returns:
          The output for the new tokens, arbitrary beyond the lengths, and the cache afterwards.

        Raises:
          ValueError: the attention is bidirectional, or the cache is for another model.
          NotImplementedError: lengths with another attention than the decoder's own.
        """
        if not self.is_causal:
            raise ValueError(f"attention={self.attention!r}: only causal decoders have a cache")
        self._check(tokens, None, None)
        if self.make_attention() is not None:
            return self._extend_streams(tokens, cache, lengths)
        if cache.length.shape != (self.depth, tokens.shape[0]):
            raise ValueError(
                f"the cache is for {cache.length.shape} layers and examples, not "
                f"{(self.depth, tokens.shape[0])}: make it with empty_cache"
            )
        positions = cache.length[0][:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        out_btd, (cache, measures) = self.layers(
            self.embed(tokens), positions, None, lengths, cache
        )
        return Output(self._logits(self._finish(out_btd)), _summary(measures)), cache

    def _extend_streams(self, tokens, streams, lengths):
        if lengths is not None:
            raise NotImplementedError(
                f"attention={self.attention!r}: all examples of a batch grow alike; leave lengths "
                "out"
            )
        if not isinstance(streams, Stream) or streams.position.shape != (self.depth,):
            raise ValueError("the cache is for another model: make it with empty_cache")
        out_btd, (streams, measures) = self.layers(self.embed(tokens), None, None, None, streams)
        return Output(self._logits(self._finish(out_btd)), _summary(measures)), streams

    def empty_cache(
        self, batch: int, capacity: int, chunk: int = 1, dtype: Any = None
    ) -> Cache | Stream:
        """Return a cache without tokens for `extend`, with a leading axis of layers.

        Args:
          batch: number of examples.
          capacity: most tokens of an example; with a window any number fits.
          chunk: with a window, tokens that attend at once; longer prompts are taken in pieces.
          dtype: of the storage; the compute dtype by default.
        """
        n, k, h = head_sizes(self.heads, self.width)
        attention = self.make_attention()
        if attention is not None:
            return empty_streams(
                attention, self.depth, batch, self.width, n,
                capacity=capacity, dtype=dtype or self.dtype,
            )  # fmt: skip
        sizes = {"batch": batch, "heads": k, "width": h, "dtype": dtype or self.dtype}
        if self.window is not None and self.window < capacity:
            cache: Cache = WindowCache.empty(**sizes, window=self.window, chunk=chunk)
        else:
            cache = FullCache.empty(**sizes, capacity=capacity)
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.depth, axis=0), cache)

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, v]` float32 that turns hidden states into logits."""
        return params["embed"]["embedding"].T if self.tied else params["head"]["kernel"]

    def hidden_states(self, captured: Mapping[str, Any]) -> Array:
        """Return `[depth + 1, b, t, d]`: the input of every layer, and the normalised output.

        Args:
          captured: what `apply(..., mutable=["hidden"])` returned beside the output.
        """
        captured = captured.get(HIDDEN, captured)
        (inputs_lbtd,), (last_btd,) = captured["layers"]["input"], captured["last"]
        return jnp.concatenate([inputs_lbtd, last_btd[None]])

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the last token looks, averaged over heads.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, 1, s]` for the first and the last layer; empty where the attention has no
          map.
        """
        captured = captured.get(CAPTURE, captured)
        if "attention" not in captured.get("layers", {}):
            return {}
        (weights_lbnts,) = captured["layers"]["attention"]["probabilities"]
        last_lbs = weights_lbnts[:, :, :, -1].mean(axis=2)
        return {
            f"last token, layer {layer}": last_lbs[layer - 1][:, None]
            for layer in sorted({1, self.depth})
        }

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two.

        Pairs of tokens that a mask hides are not counted, nor is what moves tokens to experts.
        """
        d, t = self.width, self.length
        n, k, h = head_sizes(self.heads, d)
        experts, attention = ExpertOptions.of(self.experts), self.make_attention()
        channels = 3 * d * self.hidden
        if experts is not None:
            channels = experts.top_k * channels + d * experts.count
        rest = 2.0 * t * (self.depth * channels + d * self.vocab_size)
        if attention is not None:
            return rest + self.depth * attention.flops(t, t, d, n)
        reach = min(t, self.window or t)
        pairs = reach * (reach + 1) // 2 + (t - reach) * reach if self.is_causal else t * t
        return rest + 2.0 * self.depth * (2 * t * d * h * (n + k) + 2 * n * h * pairs)

    def _check(self, tokens, segments, positions):
        arrays = {"tokens": tokens, "segments": segments, "positions": positions}
        for name, array in arrays.items():
            if array is None:
                continue
            is_fine = array.ndim == 2 and jnp.issubdtype(array.dtype, jnp.integer)
            if not is_fine or array.shape[1] != tokens.shape[1]:
                raise ValueError(
                    f"{name} must be integers [b, t], like tokens {tokens.shape}, got "
                    f"{array.dtype} {array.shape}"
                )

    def _finish(self, x_btd):
        normal_btd = self.norm(x_btd)
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "last", normal_btd)
        return normal_btd

    def _logits(self, normal_btd):
        kernel_dv = self.embed.embedding.T if self.tied else self.head()
        kernel_dv = gather(kernel_dv.astype(self.dtype), None, "vocab")
        logits = jnp.einsum(
            "btd,dv->btv", normal_btd, kernel_dv, preferred_element_type=jnp.float32
        )
        return constrain(logits, "batch", "sequence", "vocab")


def _summary(measures):
    """Reduce what experts measured, `[l]`, over the layers."""
    means = {name: jnp.mean(x) for name, x in measures.items() if name != "penalty"}
    return means | {name: jnp.sum(x) for name, x in measures.items() if name == "penalty"}


def _names():
    ours, theirs = "layers/attention", "model.layers.{}.self_attn"
    yield rule("embed/embedding", "model.embed_tokens.weight")
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        yield stacked(f"{ours}/{part}/kernel", f"{theirs}.{letter}_proj.weight", "in")
        yield stacked(f"{ours}/{part}/bias", f"{theirs}.{letter}_proj.bias", "vector")
    for part, letter in (("query", "q"), ("key", "k")):
        yield stacked(f"{ours}/{part}_norm/scale", f"{theirs}.{letter}_norm.weight")
    # Of decoders there is no release; these are the names in that of the vision models.
    for part, name in (("routed", "wg"), ("types", "wg_0"), ("shared", "wg_1")):
        yield stacked(f"{ours}/router/{part}/kernel", f"{theirs}.{name}.weight", "in")
    yield stacked(f"{ours}/out/kernel", f"{theirs}.o_proj.weight", "out")
    for part in ("gate", "up", "down"):
        tensor = f"model.layers.{{}}.mlp.{part}_proj.weight"
        yield stacked(f"layers/mlp/{part}/kernel", tensor, "in")
    yield stacked("layers/attention_norm/scale", "model.layers.{}.input_layernorm.weight")
    yield stacked("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight")
    yield rule("norm/scale", "model.norm.weight")
    yield rule("head/kernel", "lm_head.weight", "in")


TORCH_NAMES = {"hf": tuple(_names())}
"""Layout -> name table. Experts and other attentions exist in no layout of these families."""
