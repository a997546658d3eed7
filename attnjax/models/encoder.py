# SPDX-License-Identifier: Apache-2.0
"""BERT and RoBERTa, the backbones of masked language modelling, with any noncausal attention.

Devlin et al., "BERT", arXiv 1810.04805; Liu et al., "RoBERTa", arXiv 1907.11692: post-norm layers,
learned positions, exact GELU, a head of one more layer around the transposed table of tokens.
Implemented from their descriptions; hidden states agree with transformers (tests/goldens).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.blocks import gelu
from attnjax.nn.initializers import LINEAR
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.stack import (
    TextEmbedding,
    check_length,
    check_tokens,
    hidden_states,
    mean_maps,
    stack_flops,
    token_logits,
    transformer_stack,
)
from attnjax.nn.text import HIDDEN, REMATS
from attnjax.ops.efficient import PatternAttention
from attnjax.registry import nearest
from attnjax.typing import Array, Params
from attnjax.weights.names import norm, rule, stacked, stacked_linear, stacked_norm

HEADS = ("masked", "none")

FAMILIES = {
    "bert": {"padding": 0, "types": 2, "epsilon": 1e-12},
    "roberta": {"padding": 1, "types": 1, "epsilon": 1e-5},
}
"""Id of padding, kinds of tokens, epsilon of the norms. Positions of RoBERTa count what is no
padding, and begin behind its id; those of BERT begin at 0."""

# Section 3 of arXiv 1810.04805 and Section 5 of 1907.11692; vocabularies, lengths and MiniLM's
# sizes from the published configurations.
_BERT = {"family": "bert", "vocab_size": 30_522, "length": 512}
_ROBERTA = {"family": "roberta", "vocab_size": 50_265, "length": 512}
_BASE = {"width": 768, "depth": 12, "num_heads": 12, "hidden": 3072}
_LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "hidden": 4096}
PRESETS = {
    "bert_base": _BERT | _BASE,
    "bert_large": _BERT | _LARGE,
    "minilm_l6": _BERT | {"width": 384, "depth": 6, "num_heads": 12, "hidden": 1536},
    "roberta_base": _ROBERTA | _BASE,
    "roberta_large": _ROBERTA | _LARGE,
    "tiny": {},
}


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, t, v]` float32, of the tokens behind masks; None without a head.
      aux: `pooled [b, d]` with a pooler, else empty.
    """

    logits: Array | None
    aux: dict[str, Array]


class MaskedHead(nn.Module):
    """norm(gelu(x W + b)), and the bias of the logits; their matrix is the table of tokens.

    Attributes:
      width: d.
      vocab_size: v.
      epsilon: of the norm.
      dtype: compute dtype.
    """

    width: int
    vocab_size: int
    epsilon: float
    dtype: str = "float32"

    def setup(self):
        self.dense = nn.Dense(self.width, dtype=self.dtype, kernel_init=LINEAR)
        self.norm = LayerNorm(self.epsilon, self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`."""
        return self.norm(gelu(self.dense(x)))


class Encoder(nn.Module):
    """Tokens, positions and types, norm, post-norm layers with self-attention, head.

    Hidden states of all layers are sown when the collection "hidden" is mutable; see
    `hidden_states`.

    Attributes:
      vocab_size: v.
      length: most tokens of an example.
      width: d.
      depth: layers.
      num_heads: n; divides the width.
      hidden: hidden width of the MLP.
      family: "bert" or "roberta": what `FAMILIES` says.
      padding: id of the token that fills up; the family's if None.
      attention: of all layers, noncausal self-attention; see `choose_attention`.
      head: "masked" scores the tokens behind masks, "none" returns no logits.
      pooler: tanh(x W + b) of the first token, in `Output.aux`.
      dropout: rate on embeddings, branches and probabilities while training.
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
    family: str = "bert"
    padding: int | None = None
    attention: str | Mapping[str, Any] | None = None
    head: str = "masked"
    pooler: bool = False
    dropout: float = 0.1
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("family", FAMILIES), ("head", HEADS), ("remat", REMATS)):
            value = getattr(self, name)
            if value not in choices:
                raise RecipeError(f"model.{name}={value!r}: {nearest(value, choices)}")
        for name in ("vocab_size", "length", "width", "depth", "num_heads", "hidden"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.width % self.num_heads:
            raise RecipeError(f"model.num_heads={self.num_heads} must divide width={self.width}")
        if not 0 <= self.padding_id < self.vocab_size:
            raise RecipeError(
                f"model.padding={self.padding_id}: must be below vocab_size={self.vocab_size}"
            )
        self.make_attention()

    @property
    def padding_id(self) -> int:
        """Id of the token that fills up."""
        return FAMILIES[self.family]["padding"] if self.padding is None else self.padding

    def make_attention(self) -> PatternAttention:
        """Return the attention of all layers.

        Raises:
          RecipeError: there is no such one, or it has no noncausal form.
        """
        return choose_attention(self.attention, field="attention")

    @property
    def _first(self):
        """Position of the first token."""
        return self.padding_id + 1 if self.family == "roberta" else 0

    def setup(self):
        family = FAMILIES[self.family]
        self.embed = TextEmbedding(
            self.vocab_size, self.width, self.length + self._first, types=family["types"],
            epsilon=family["epsilon"], dropout=self.dropout, dtype=self.dtype,
        )  # fmt: skip
        self.layers = transformer_stack(
            self.depth,
            self.remat,
            num_heads=self.num_heads,
            hidden=self.hidden,
            self_attention=self.make_attention(),
            pre_norm=False,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            epsilon=family["epsilon"],
            kernel_init=LINEAR,
            dtype=self.dtype,
            implementation=self.attention_implementation,
        )
        if self.head == "masked":
            self.masked = MaskedHead(self.width, self.vocab_size, family["epsilon"], self.dtype)
        if self.pooler:
            self.pool = nn.Dense(self.width, dtype=self.dtype, kernel_init=LINEAR)

    def __call__(
        self,
        tokens: Array,
        types: Array | None = None,
        valid: Array | None = None,
        *,
        train: bool = False,
    ) -> Output:
        """Encode texts, and score the token at every place.

        Args:
          tokens: int `[b, t]` in [0, v), at most `length` of them.
          types: int `[b, t]`, 0 or 1 (first and second text, BERT only); all 0 if None.
          valid: bool `[b, t]`, False at padding; by default where tokens are not padding.
          train: with dropout and what the attention does in training only.

        Returns:
          An `Output`.

        Raises:
          ValueError: tokens or types are no integers `[b, t]`, there are too many tokens, or types
            where all tokens are of one.
        """
        hidden_btd, aux = self.encode(tokens, types, valid, train=train)
        if self.head == "none":
            return Output(None, aux)
        logits = token_logits(self.masked(hidden_btd), self.embed.kernel(), self.masked.bias)
        return Output(logits, aux)

    def encode(
        self,
        tokens: Array,
        types: Array | None = None,
        valid: Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Return the last hidden states `[b, t, d]`, and `Output.aux`."""
        check_tokens(tokens=tokens, types=types)
        check_length("tokens", tokens, self.length)
        if types is not None and FAMILIES[self.family]["types"] < 2:
            raise ValueError(f"types {types.shape}: all tokens of {self.family} are of one type")
        filled = tokens != self.padding_id
        valid = filled if valid is None else valid
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if self.family == "roberta":
            positions = jnp.cumsum(filled, axis=1, dtype=jnp.int32) * filled + self.padding_id
        x_btd = self.embed(tokens, positions, types, train=train)
        x_btd, _ = self.layers(x_btd, valid, None, None, None, train)
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "last", x_btd)
        return x_btd, {"pooled": jnp.tanh(self.pool(x_btd[:, 0]))} if self.pooler else {}

    def features(
        self, tokens: Array, types: Array | None = None, valid: Array | None = None, *,
        train: bool = False,
    ) -> Array:  # fmt: skip
        """Return `[b, t, d]`: times `head_kernel`, plus `head_bias`, they are the logits."""
        return self.masked(self.encode(tokens, types, valid, train=train)[0])

    @property
    def is_causal(self) -> bool:
        """Whether tokens see no later ones: never."""
        return False

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, v]` float32 that turns `features` into logits."""
        return params["embed"]["tokens"]["embedding"].T

    def head_bias(self, params: Params) -> Array:
        """Return what is added to the logits, `[v]` float32."""
        return params["masked"]["bias"]

    def hidden_states(self, captured: Mapping[str, Any]) -> Array:
        """Return `[depth + 1, b, t, d]`: the input of every layer, and the output of the last."""
        return hidden_states(captured)

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where tokens look; see `nn.stack.mean_maps`."""
        return mean_maps(captured, "mean over tokens")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs that are needed."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two."""
        d, t = self.width, self.length
        head = t * d * (d + self.vocab_size) if self.head == "masked" else 0
        pooler = d * d if self.pooler else 0
        layers = stack_flops(self.depth, t, d, self.hidden, self.num_heads, self.make_attention())
        return layers + 2.0 * (head + pooler)


def _names(prefix, dense, normal, bias):
    layer = f"{prefix}encoder.layer.{{}}"
    yield rule("embed/tokens/embedding", f"{prefix}embeddings.word_embeddings.weight")
    yield rule("embed/positions", f"{prefix}embeddings.position_embeddings.weight")
    yield rule("embed/types", f"{prefix}embeddings.token_type_embeddings.weight")
    yield from norm("embed/norm", f"{prefix}embeddings.LayerNorm")
    for part in ("query", "key", "value"):
        theirs = f"{layer}.attention.self.{part}"
        yield stacked(f"layers/attention/{part}/kernel", f"{theirs}.weight", "in")
        yield stacked(f"layers/attention/{part}/bias", f"{theirs}.bias", "vector")
    for ours, theirs, layout in (
        ("attention/out", "attention.output.dense", "out"),
        ("mlp/up", "intermediate.dense", "in"),
        ("mlp/down", "output.dense", "in"),
    ):
        yield from stacked_linear(f"layers/{ours}", f"{layer}.{theirs}", layout)
    for ours, theirs in (("attention_norm", "attention.output"), ("mlp_norm", "output")):
        yield from stacked_norm(f"layers/{ours}", f"{layer}.{theirs}.LayerNorm")
    for ours, theirs in (("pool", f"{prefix}pooler.dense"), ("masked/dense", dense)):
        yield rule(f"{ours}/kernel", f"{theirs}.weight", "in")
        yield rule(f"{ours}/bias", f"{theirs}.bias")
    yield from norm("masked/norm", normal)
    yield rule("masked/bias", bias)


_BERT_HEAD = (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.bias",
)
_ROBERTA_HEAD = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
TORCH_NAMES = {
    "bert": tuple(_names("bert.", *_BERT_HEAD)),
    "bert_bare": tuple(_names("", *_BERT_HEAD)),
    "roberta": tuple(_names("roberta.", *_ROBERTA_HEAD)),
    "roberta_bare": tuple(_names("", *_ROBERTA_HEAD)),
}
"""Layout -> name table: with the head's class around the model, or without."""

TORCH_IGNORED = (
    r"embeddings\.position_ids$",
    r"^cls\.seq_relationship\.",
    r"^(cls\.predictions|lm_head)\.decoder\.(weight|bias)$",
)
"""Patterns of tensors that files hold beside the weights: an index, the head for pairs of
sentences, copies of the token table and of the head's bias."""

TORCH_RENAMED = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
"""Names that the first files of BERT give to scales and biases of norms."""

INERT = (r"/key/bias$",)
"""Patterns of parameters that cannot change the output: a key bias moves all scores of a query."""
