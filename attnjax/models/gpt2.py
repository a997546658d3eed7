# SPDX-License-Identifier: Apache-2.0
"""GPT-2, the backbone of language modelling, with any causal attention.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: pre-norm layers,
learned positions, the tanh form of GELU, a head that is the transposed table of tokens.
Implemented from its description; hidden states agree with transformers (tests/goldens).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.initializers import LINEAR
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.stack import (
    TextEmbedding,
    check_length,
    check_tokens,
    empty_streams,
    hidden_states,
    mean_maps,
    stack_flops,
    token_logits,
    transformer_stack,
)
from attnjax.nn.text import HIDDEN, REMATS, starts
from attnjax.ops import mask as masks
from attnjax.ops.efficient import PatternAttention, Stream
from attnjax.registry import nearest
from attnjax.typing import Array, Params
from attnjax.weights.names import norm, rule, stacked, stacked_linear, stacked_norm

# Table 2 of the report; heads and the vocabulary from the published configurations.
_GPT2 = {"vocab_size": 50_257, "length": 1024}
PRESETS = {
    "small": _GPT2 | {"width": 768, "depth": 12, "num_heads": 12, "hidden": 3072},
    "medium": _GPT2 | {"width": 1024, "depth": 24, "num_heads": 16, "hidden": 4096},
    "large": _GPT2 | {"width": 1280, "depth": 36, "num_heads": 20, "hidden": 5120},
    "xl": _GPT2 | {"width": 1600, "depth": 48, "num_heads": 25, "hidden": 6400},
    "tiny": {},
}


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, t, v]` float32.
      aux: empty.
    """

    logits: Array
    aux: dict[str, Array]


class GPT2(nn.Module):
    """Tokens and positions, pre-norm layers with causal self-attention, norm, tied head.

    Hidden states of all layers are sown when the collection "hidden" is mutable; see
    `hidden_states`.

    Attributes:
      vocab_size: v.
      length: rows of the table of positions, the most tokens of an example.
      width: d.
      depth: layers.
      num_heads: n; divides the width.
      hidden: hidden width of the MLP.
      attention: of all layers, causal self-attention; see `choose_attention`.
      dropout: rate on embeddings and branches while training.
      attention_dropout: rate on probabilities while training.
      epsilon: of the norms.
      dtype: compute dtype; logits are float32.
      remat: what the backward pass computes again, a key of `nn.text.REMATS`.
      attention_implementation: passed to `nn.attend`.
    """

    vocab_size: int = 256
    length: int = 128
    width: int = 64
    depth: int = 2
    num_heads: int = 4
    hidden: int = 256
    attention: str | Mapping[str, Any] | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    epsilon: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "length", "width", "depth", "num_heads", "hidden"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.width % self.num_heads:
            raise RecipeError(f"model.num_heads={self.num_heads} must divide width={self.width}")
        if self.remat not in REMATS:
            raise RecipeError(f"model.remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        self.make_attention()

    def make_attention(self) -> PatternAttention:
        """Return the attention of all layers.

        Raises:
          RecipeError: there is no such one, or it has no causal form.
        """
        return choose_attention(self.attention, field="attention", causal=True)

    def setup(self):
        self.embed = TextEmbedding(
            self.vocab_size, self.width, self.length, dropout=self.dropout, dtype=self.dtype
        )
        self.layers = transformer_stack(
            self.depth,
            self.remat,
            num_heads=self.num_heads,
            hidden=self.hidden,
            self_attention=self.make_attention(),
            activation="gelu_tanh",
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            epsilon=self.epsilon,
            kernel_init=LINEAR,
            dtype=self.dtype,
            implementation=self.attention_implementation,
        )
        self.norm = LayerNorm(self.epsilon, self.dtype)

    def __call__(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> Output:
        """Score the next token at every place.

        Args:
          tokens: int `[b, t]` in [0, v), at most `length` of them.
          segments: int `[b, t]`, documents packed into one example: tokens see those of their own
            number only, positions begin again, 0 is padding. Softmax attention only.
          train: with dropout and what the attention does in training only.

        Returns:
          An `Output`.

        Raises:
          ValueError: the tokens are no integers `[b, t]`, or too many.
          NotImplementedError: segments with an attention that takes no mask.
        """
        hidden_btd, aux = self.encode(tokens, segments, train=train)
        return Output(token_logits(hidden_btd, self.embed.kernel()), aux)

    def encode(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Return the normalised last hidden states `[b, t, d]`, and `Output.aux`."""
        check_tokens(tokens=tokens, segments=segments)
        check_length("tokens", tokens, self.length)
        positions, mask = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], None
        if segments is not None:
            positions, mask = starts(segments), masks.segments(segments, segments)
        x_btd = self.embed(tokens, positions, train=train)
        x_btd, _ = self.layers(x_btd, None, None, None, mask, train)
        normal_btd = self.norm(x_btd)
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "last", normal_btd)
        return normal_btd, {}

    def step(self, tokens: Array, streams: Stream) -> tuple[Array, Stream]:
        """Score the token after the next one of a stream; equals a column of the call.

        Args:
          tokens: int `[b]`.
          streams: from `empty_streams`, or from the step before.

        Returns:
          Logits `[b, v]` float32, and the streams afterwards.
        """
        x_b1d = self.embed(tokens[:, None], streams.position[:1, None])
        x_b1d, streams = self.layers.step(x_b1d, streams, None)
        return token_logits(self.norm(x_b1d), self.embed.kernel())[:, 0], streams

    def empty_streams(self, batch: int, capacity: int | None = None) -> Stream:
        """Return what `step` starts from.

        Args:
          batch: number of examples.
          capacity: most tokens of an example; `length` if None.
        """
        return empty_streams(
            self.make_attention(), self.depth, batch, self.width, self.num_heads,
            capacity=capacity or self.length, dtype=self.dtype,
        )  # fmt: skip

    @property
    def is_causal(self) -> bool:
        """Whether tokens see no later ones: always."""
        return True

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, v]` float32 that turns hidden states into logits."""
        return params["embed"]["tokens"]["embedding"].T

    def hidden_states(self, captured: Mapping[str, Any]) -> Array:
        """Return `[depth + 1, b, t, d]`: the input of every layer, and the normalised output."""
        return hidden_states(captured)

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where tokens look; see `nn.stack.mean_maps`."""
        return mean_maps(captured, "mean over tokens")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two."""
        d, t = self.width, self.length
        layers = stack_flops(
            self.depth, t, d, self.hidden, self.num_heads, self.make_attention()
        )  # fmt: skip
        return layers + 2.0 * t * d * self.vocab_size


def _names(prefix):
    layer = f"{prefix}h.{{}}"
    attention = [f"layers/attention/{part}" for part in ("query", "key", "value")]
    yield rule("embed/tokens/embedding", f"{prefix}wte.weight")
    yield rule("embed/positions", f"{prefix}wpe.weight")
    fused = f"{layer}.attn.c_attn"
    yield stacked([f"{path}/kernel" for path in attention], f"{fused}.weight", "in_plain")
    yield stacked([f"{path}/bias" for path in attention], f"{fused}.bias", "vector")
    for ours, theirs, layout in (
        ("attention/out", "attn.c_proj", "out_plain"),
        ("mlp/up", "mlp.c_fc", "same"),
        ("mlp/down", "mlp.c_proj", "same"),
    ):
        yield from stacked_linear(f"layers/{ours}", f"{layer}.{theirs}", layout)
    for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        yield from stacked_norm(f"layers/{ours}", f"{layer}.{theirs}")
    yield from norm("norm", f"{prefix}ln_f")


TORCH_NAMES = {"hf": tuple(_names("transformer.")), "hf_bare": tuple(_names(""))}
"""Layout -> name table: with the head's class around the model, or without, as published."""

TORCH_IGNORED = (r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$")
"""Patterns of tensors that files hold beside the weights: masks, and a copy of the token table."""

INERT = (r"/key/bias$",)
"""Patterns of parameters that cannot change the output: a key bias moves all scores of a query."""
