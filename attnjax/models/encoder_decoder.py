# SPDX-License-Identifier: Apache-2.0
"""The Transformer from one sequence to another, with any attention in each of its three places.

Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, in the form that CAB (arXiv
2210.07661) trains for summarisation: learned positions, a norm on the embeddings, post-norm layers,
GELU, no matrix shared. Implemented from the published settings.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.stack import (
    TextEmbedding,
    check_length,
    check_tokens,
    empty_streams,
    mean_maps,
    stack_flops,
    token_logits,
    transformer_stack,
)
from attnjax.nn.text import REMATS, Kernel
from attnjax.ops.efficient import PatternAttention, Stream
from attnjax.registry import nearest
from attnjax.typing import Array, Params
from attnjax.weights.names import norm, rule, stacked, stacked_linear, stacked_norm

EPSILON = 1e-5
PADDING = 0

# "base" is Section 3 of arXiv 1706.03762, which CAB trains on Multi-News with the vocabulary of
# BART and texts of 4,096 and 400 tokens (Table 1 of 2210.07661).
PRESETS = {
    "base": {
        "vocab_size": 50_265, "lengths": (4096, 400), "width": 512, "depth": (6, 6),
        "num_heads": 8, "hidden": 2048,
    },
    "tiny": {},
}  # fmt: skip


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, t, v]` float32, of the token after each of the target.
      aux: empty.
    """

    logits: Array
    aux: dict[str, Array]


@flax.struct.dataclass
class Writing:
    """What `step` keeps between tokens.

    Attributes:
      memory: what cross-attention needs of the source, by layer.
      streams: of the decoder's self-attention, by layer.
    """

    memory: Any
    streams: Stream


class EncoderDecoder(nn.Module):
    """Post-norm encoder of a source, post-norm decoder of a target that looks at it.

    Attributes:
      vocab_size: v, of source and target; 0 is padding.
      lengths: most tokens of a source and of a target.
      width: d.
      depth: layers of the encoder and of the decoder.
      num_heads: n; divides the width.
      hidden: hidden width of the MLP.
      encoder_attention: noncausal self-attention of the encoder; see `choose_attention`.
      decoder_attention: causal self-attention of the decoder.
      cross_attention: causal cross-attention of the decoder.
      dropout: rate on embeddings and branches while training.
      dtype: compute dtype; logits are float32.
      remat: what the backward pass computes again, a key of `nn.text.REMATS`.
      attention_implementation: passed to `nn.attend`.
    """

    vocab_size: int = 256
    lengths: tuple = (64, 32)
    width: int = 64
    depth: tuple = (2, 2)
    num_heads: int = 4
    hidden: int = 256
    encoder_attention: str | Mapping[str, Any] | None = None
    decoder_attention: str | Mapping[str, Any] | None = None
    cross_attention: str | Mapping[str, Any] | None = None
    dropout: float = 0.1
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("lengths", "depth"):
            value = tuple(getattr(self, name))
            if len(value) != 2 or min(value) < 1:
                raise RecipeError(f"model.{name}={value}: must be two numbers of at least 1")
        for name in ("vocab_size", "width", "num_heads", "hidden"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.width % self.num_heads:
            raise RecipeError(f"model.num_heads={self.num_heads} must divide width={self.width}")
        if self.remat not in REMATS:
            raise RecipeError(f"model.remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        self.make_attentions()

    def make_attentions(self) -> tuple[PatternAttention, PatternAttention, PatternAttention]:
        """Return the attentions of encoder and decoder, and the one between them.

        Raises:
          RecipeError: there is no such one, or it has no form for its place.
        """
        return (
            choose_attention(self.encoder_attention, field="encoder_attention"),
            choose_attention(self.decoder_attention, field="decoder_attention", causal=True),
            choose_attention(
                self.cross_attention, field="cross_attention", causal=True, cross=True
            ),
        )

    def setup(self):
        among_source, among_target, between = self.make_attentions()
        embedding = lambda rows: TextEmbedding(
            self.vocab_size, self.width, rows, scale=math.sqrt(self.width), epsilon=EPSILON,
            dropout=self.dropout, dtype=self.dtype,
        )  # fmt: skip
        stack = lambda depth, **attentions: transformer_stack(
            depth,
            self.remat,
            num_heads=self.num_heads,
            hidden=self.hidden,
            pre_norm=False,
            dropout=self.dropout,
            epsilon=EPSILON,
            dtype=self.dtype,
            implementation=self.attention_implementation,
            **attentions,
        )
        self.source_embed = embedding(self.lengths[0])
        self.encoder = stack(self.depth[0], self_attention=among_source)
        self.target_embed = embedding(self.lengths[1])
        self.decoder = stack(self.depth[1], self_attention=among_target, cross_attention=between)
        self.head = Kernel((self.width, self.vocab_size))

    def __call__(self, source: Array, target: Array, *, train: bool = False) -> Output:
        """Score the next token at every place of a target.

        Args:
          source: int `[b, s]`, 0 is padding.
          target: int `[b, t]`, what the decoder has read: its first token begins every text.
          train: with dropout and what attentions do in training only.

        Returns:
          An `Output`.

        Raises:
          ValueError: an input is no integers `[b, t]`, or too long.
        """
        hidden_btd, aux = self.encode(source, target, train=train)
        return Output(token_logits(hidden_btd, self.head()), aux)

    def encode(
        self, source: Array, target: Array, *, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Return the decoder's last hidden states `[b, t, d]`, and `Output.aux`."""
        context_bsd, context_valid = self.read(source, train=train)
        check_tokens(target=target)
        check_length("target", target, self.lengths[1])
        positions = jnp.arange(target.shape[1], dtype=jnp.int32)[None]
        x_btd = self.target_embed(target, positions, train=train)
        # Padding follows the end of a target: what comes before does not see it.
        x_btd, _ = self.decoder(x_btd, None, context_bsd, context_valid, None, train)
        return x_btd, {}

    def read(self, source: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Return the encoded source `[b, s, d]` and where it is no padding, `[b, s]`."""
        check_tokens(source=source)
        check_length("source", source, self.lengths[0])
        positions = jnp.arange(source.shape[1], dtype=jnp.int32)[None]
        valid = source != PADDING
        x_bsd = self.source_embed(source, positions, train=train)
        x_bsd, _ = self.encoder(x_bsd, valid, None, None, None, train)
        return x_bsd, valid

    def begin(self, source: Array, streams: Stream) -> Writing:
        """Return what `step` starts from.

        Args:
          source: int `[b, s]`, 0 is padding.
          streams: from `empty_streams`.
        """
        context_bsd, context_valid = self.read(source)
        _, memory = self.decoder.remember(context_bsd, context_valid)
        return Writing(memory, streams)

    def step(self, tokens: Array, state: Writing) -> tuple[Array, Writing]:
        """Score what follows the next token of a target; equals a column of the call.

        Args:
          tokens: int `[b]`.
          state: from `begin`, or from the step before.

        Returns:
          Logits `[b, v]` float32, and the state afterwards.
        """
        x_b1d = self.target_embed(tokens[:, None], state.streams.position[:1, None])
        x_b1d, streams = self.decoder.step(x_b1d, state.streams, state.memory)
        return token_logits(x_b1d, self.head())[:, 0], state.replace(streams=streams)

    def empty_streams(self, batch: int, capacity: int | None = None) -> Stream:
        """Return the decoder's streams without tokens.

        Args:
          batch: number of examples.
          capacity: most tokens of a target; as many as there are positions if None.
        """
        return empty_streams(
            self.make_attentions()[1], self.depth[1], batch, self.width, self.num_heads,
            capacity=capacity or self.lengths[1], dtype=self.dtype,
        )  # fmt: skip

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, v]` float32 that turns hidden states into logits."""
        return params["head"]["kernel"]

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the target looks in the source; see `nn.stack.mean_maps`."""
        return mean_maps(captured, "source, mean over the target", "decoder", "cross")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        names = zip(("source", "target"), self.lengths, strict=True)
        return {n: jax.ShapeDtypeStruct((batch, length), jnp.int32) for n, length in names}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two."""
        (s, t), d, n = self.lengths, self.width, self.num_heads
        among_source, among_target, between = self.make_attentions()
        layers = stack_flops(self.depth[0], s, d, self.hidden, n, among_source)
        layers += stack_flops(self.depth[1], t, d, self.hidden, n, among_target)
        layers += self.depth[1] * between.flops(t, s, d, n)
        return layers + 2.0 * t * d * self.vocab_size


def _names():
    for side in ("source", "target"):
        yield rule(f"{side}_embed/tokens/embedding", f"{side}_embed.tokens.weight")
        yield rule(f"{side}_embed/positions", f"{side}_embed.positions.weight")
        yield from norm(f"{side}_embed/norm", f"{side}_embed.norm")
    places = {
        "encoder": (("attention", "self_attn"),),
        "decoder": (("attention", "self_attn"), ("cross", "multihead_attn")),
    }
    for stack, attentions in places.items():
        layer = f"{stack}.layers.{{}}"
        for ours, theirs in attentions:
            parts = [f"{stack}/{ours}/{part}" for part in ("query", "key", "value")]
            fused = f"{layer}.{theirs}.in_proj"
            yield stacked([f"{part}/kernel" for part in parts], f"{fused}_weight", "in")
            yield stacked([f"{part}/bias" for part in parts], f"{fused}_bias", "vector")
        linear = [(f"{ours}/out", f"{theirs}.out_proj", "out") for ours, theirs in attentions]
        linear += [("mlp/up", "linear1", "in"), ("mlp/down", "linear2", "in")]
        for ours, theirs, layout in linear:
            yield from stacked_linear(f"{stack}/{ours}", f"{layer}.{theirs}", layout)
        normal = [f"{ours}_norm" for ours, _ in attentions] + ["mlp_norm"]
        for number, ours in enumerate(normal, 1):
            yield from stacked_norm(f"{stack}/{ours}", f"{layer}.norm{number}")
    yield rule("head/kernel", "head.weight", "in")


TORCH_NAMES = {"torch": tuple(_names())}
"""Layout -> name table: PyTorch's `nn.TransformerEncoder` and `nn.TransformerDecoder` without their
last norms, as `encoder` and `decoder` beside embeddings and a head. CAB published no weights."""

INERT = (r"/key/bias$",)
"""Patterns of parameters that cannot change the output: a key bias moves all scores of a query."""
