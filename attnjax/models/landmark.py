# SPDX-License-Identifier: Apache-2.0
"""A decoder whose blocks of tokens end with a landmark, through which attention retrieves them.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers",
arXiv 2305.16300; sizes, initialisation and rotary positions from the release. The model inserts its
landmarks itself and leaves their positions out of what it returns, so that tasks and data know
nothing of them: the token before a landmark predicts the token behind it.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.nn.attend import attend
from attnjax.nn.attention import CAPTURE, Projection
from attnjax.nn.blocks import Mlp
from attnjax.nn.initializers import residual
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import RANDOM
from attnjax.nn.stack import check_tokens, token_logits
from attnjax.nn.text import HIDDEN, REMATS, TokenTable
from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.grouped import Grouped
from attnjax.ops.landmark import landmark_attention
from attnjax.ops.landmark_cache import RETRIEVALS, BlockCache, read_chunk
from attnjax.ops.landmark_tape import insert, strip, tape_length
from attnjax.ops.positions import rotate
from attnjax.parallel.constrain import constrain, gather
from attnjax.registry import nearest
from attnjax.typing import Array, Params
from attnjax.weights.names import rule, stacked

PAPER = {
    "title": "Landmark Attention: Random-Access Infinite Context Length for Transformers",
    "id": "arXiv:2305.16300",
    "year": 2023,
    "code": "https://github.com/epfml/landmark-attention",
    "licence": "Apache-2.0",
    "claim": "Attention that retrieves blocks through their landmarks reads contexts far longer "
    "than those of training.",
}

ATTENTIONS = ("landmark", "causal", "window")
"""Landmarks; or none, and attention to all tokens before, or to the last ones."""

_PAPER = {
    "vocab_size": 50_257, "table": (50_304, 50_260), "length": 512, "width": 1024, "depth": 12,
    "num_heads": 8, "hidden": 4096, "block": 50,
}  # fmt: skip
# Section 4.1 and the reference code's defaults: GPT-2's tokens, landmark 50,260, 50,304 rows.
PRESETS = {
    "paper": {**_PAPER, "length": 502},
    "baseline_512": {**_PAPER, "attention": "causal"},
    "baseline_360": {**_PAPER, "attention": "causal", "length": 360},
    "tiny": {},
}

EPSILON = 1e-5

SHORT = 256
"""Most slots of a tape whose weights are held whole, which is faster there and gives the same."""


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, t, rows]` float32, of normal tokens only.
      aux: empty.
    """

    logits: Array
    aux: dict[str, Array]


def _interleaved(x: Array, positions: Array) -> Array:
    return rotate(x, positions, layout="interleaved")


class LandmarkAttention(nn.Module):
    """Multi-head attention on a tape, without biases.

    Attributes:
      num_heads: n.
      attention: member of `ATTENTIONS`.
      block: slots of a block with its landmark.
      window: tokens that a query sees with "window".
      group_dropout: rate at which gates to earlier blocks are dropped while training.
      depth: layers of the model, for the size of the output's initial values.
      dtype: compute dtype.
      implementation: passed to `nn.attend` where there are no landmarks.
    """

    num_heads: int
    attention: str
    block: int
    window: int | None
    group_dropout: float
    depth: int
    dtype: str
    implementation: str | None

    @nn.compact
    def __call__(
        self, x: Array, cache: BlockCache | None, top_k: int, retrieval: str, train: bool
    ) -> tuple[Array, BlockCache | None]:
        """Map `x [b, m, d]`, slots of a tape, and what is remembered of those before."""
        n, d = self.num_heads, x.shape[-1]
        h = d // n

        def project(name):
            kernel, _ = Projection((d, n, h), None, self.dtype, name=name)()
            out_btnh = jnp.einsum("btd,dnh->btnh", x, gather(kernel, None, "heads", None))
            return constrain(out_btnh, "batch", "sequence", "heads", None)

        query, key, value = (project(name) for name in ("query", "key", "value"))
        if cache is not None:
            out_btnh, cache = read_chunk(
                query, key, value, cache, top_k=top_k, retrieval=retrieval, rotate=_interleaved
            )
        else:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            query, key = _interleaved(query, positions), _interleaved(key, positions)
            out_btnh = self._attend(query, key, value, train)
        kernel, _ = Projection((n, h, d), None, self.dtype, residual(self.depth), name="out")()
        return jnp.einsum("btnh,nhd->btd", out_btnh, gather(kernel, "heads", None, None)), cache

    def _attend(self, query, key, value, train):
        capture = self.is_mutable_collection(CAPTURE) and not self.is_initializing()
        if capture:
            self.sow(CAPTURE, "probabilities", self._weights(query, key, value))
        if self.attention == "landmark":
            rate, slots = self.group_dropout if train else 0.0, query.shape[1]
            is_landmark = self._is_landmark(slots)
            is_short = slots <= SHORT
            return landmark_attention(
                query, key, value,
                block=None if is_short else self.block,
                is_landmark=is_landmark if is_short else None,
                group_dropout_rate=rate,
                group_dropout_key=self.make_rng(RANDOM) if rate else None,
            )  # fmt: skip
        return attend(query, key, value, mask=self._mask(), implementation=self.implementation)

    def _mask(self):
        is_windowed = self.attention == "window"
        return masks.sliding_window(self.window - 1, 0) if is_windowed else masks.causal()

    def _weights(self, query, key, value):
        """Return `[b,n,m,m]`, those of landmarks being zero."""
        normalizer: str | Grouped = "softmax"
        if self.attention == "landmark":
            normalizer = Grouped(self._is_landmark(query.shape[1]))
        return attention(
            query, key, value, mask=self._mask(), normalizer=normalizer,
            implementation="reference", return_probabilities=True,
        ).probabilities  # fmt: skip

    def _is_landmark(self, slots):
        return (np.arange(slots) % self.block == self.block - 1)[None]


class LandmarkLayer(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x)), norms and maps without biases.

    Attributes:
      hidden: hidden width of the MLP.
      attention: fields of `LandmarkAttention`, as pairs.
    """

    hidden: int
    attention: tuple

    @nn.compact
    def __call__(
        self, x: Array, cache: BlockCache | None, top_k: int, retrieval: str, train: bool
    ) -> tuple[Array, BlockCache | None]:
        """Map `x [b, m, d]`; arguments as in `LandmarkAttention`."""
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "input", x)
        fields = dict(self.attention)
        norm = lambda name: LayerNorm(EPSILON, fields["dtype"], use_bias=False, name=name)
        mixer = LandmarkAttention(**fields, name="attention")
        branch_bmd, cache = mixer(norm("attention_norm")(x), cache, top_k, retrieval, train)
        x = constrain(x + branch_bmd, "batch", "sequence", None)
        mlp = Mlp(
            self.hidden, dtype=fields["dtype"], use_bias=False,
            output_init=residual(fields["depth"]), name="mlp",
        )  # fmt: skip
        x = x + mlp(norm("mlp_norm")(x), train=train)
        return constrain(x, "batch", "sequence", None), cache


class Landmark(nn.Module):
    """Tokens with landmarks, pre-norm layers, norm, the transposed table of tokens.

    Attributes:
      vocab_size: v, tokens of texts.
      table: rows of the table of tokens, and the landmark among them, which no text may hold; None:
        the landmark is v, and the last row.
      length: tokens of an example of training.
      width: d.
      depth: layers.
      num_heads: n; divides the width.
      hidden: hidden width of the MLP.
      block: l, tokens of a block, its landmark not among them.
      attention: member of `ATTENTIONS`.
      window: with "window", tokens that a query sees, its own included.
      group_dropout: rate at which a query's gates to earlier blocks are dropped while training.
      dtype: compute dtype; logits are float32.
      remat: what the backward pass computes again, a key of `nn.text.REMATS`.
      attention_implementation: passed to `nn.attend` where there are no landmarks.
    """

    vocab_size: int = 256
    table: tuple | None = None
    length: int = 128
    width: int = 64
    depth: int = 2
    num_heads: int = 4
    hidden: int = 256
    block: int = 15
    attention: str = "landmark"
    window: int | None = None
    group_dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "length", "width", "depth", "num_heads", "hidden", "block"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name, known in (("attention", ATTENTIONS), ("remat", REMATS)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise RecipeError(f"model.{name}={found!r}: {nearest(found, known)}")
        if self.width % (2 * self.num_heads):
            raise RecipeError(
                f"model.width={self.width}: must be an even multiple of num_heads={self.num_heads}"
            )
        if (self.attention == "window") != (self.window is not None and self.window >= 1):
            raise RecipeError(
                f"model.window={self.window}: attention 'window' needs one of at least 1, "
                "others none"
            )
        if not 0 <= self.group_dropout < 1:
            raise RecipeError(f"model.group_dropout={self.group_dropout}: must be in [0, 1)")
        table = self.table
        if table is not None and (len(table) != 2 or not self.vocab_size <= table[1] < table[0]):
            raise RecipeError(
                f"model.table={table}: must be rows and a landmark below them, from "
                f"vocab_size={self.vocab_size} on"
            )

    @property
    def rows(self) -> int:
        """Rows of the table of tokens."""
        return self.vocab_size + 1 if self.table is None else self.table[0]

    @property
    def landmark(self) -> int:
        """The landmark's token."""
        return self.vocab_size if self.table is None else self.table[1]

    @property
    def is_causal(self) -> bool:
        """Whether tokens see no later ones: always."""
        return True

    @property
    def has_landmarks(self) -> bool:
        """Whether texts get landmarks."""
        return self.attention == "landmark"

    def setup(self):
        self.embed = TokenTable(self.rows, self.width, self.dtype)
        fields = {
            "num_heads": self.num_heads, "attention": self.attention, "block": self.block + 1,
            "window": self.window, "group_dropout": self.group_dropout,
            "depth": self.depth, "dtype": self.dtype,
            "implementation": self.attention_implementation,
        }  # fmt: skip
        layer = LandmarkLayer
        if REMATS[self.remat] is not None:
            layer = nn.remat(
                layer, policy=REMATS[self.remat], prevent_cse=False, static_argnums=(3, 4, 5)
            )
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, CAPTURE: 0, HIDDEN: 0},
            split_rngs={"params": True, RANDOM: True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.hidden, tuple(fields.items()))
        self.norm = LayerNorm(EPSILON, self.dtype, use_bias=False)

    def __call__(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> Output:
        """Score the next token at every place.

        Args:
          tokens: int `[b, t]` in [0, v), without landmarks.
          segments: must be None.
          train: group dropout, with the "attention" key.

        Returns:
          An `Output`.

        Raises:
          NotImplementedError: segments are given.
        """
        hidden_btd, aux = self.encode(tokens, segments, train=train)
        return Output(token_logits(hidden_btd, self.embed.embedding.T), aux)

    def encode(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Return the normalised last hidden states `[b, t, d]` of normal tokens, and no values.

        Arguments as in `__call__`.
        """
        check_tokens(tokens=tokens)
        if segments is not None:
            raise NotImplementedError(
                "landmarks: documents of one text see each other; no segments"
            )
        tape_bm = insert(tokens, self.block, self.landmark) if self.has_landmarks else tokens
        x_bmd, _ = self.layers(self.embed(tape_bm), None, 0, RETRIEVALS[0], train)
        hidden_bmd = self.norm(x_bmd)
        return (strip(hidden_bmd, self.block) if self.has_landmarks else hidden_bmd), {}

    def empty_cache(self, batch: int, blocks: int, dtype: Any = None) -> BlockCache:
        """Return a cache without tokens for `read`, with a leading axis of layers.

        Args:
          batch: number of examples.
          blocks: most blocks that are kept.
          dtype: of the storage; the compute dtype by default.

        Raises:
          ValueError: the model has no landmarks, or a size is below 1.
        """
        if not self.has_landmarks:
            raise ValueError(f"attention={self.attention!r}: only landmarks have a cache of blocks")
        cache = BlockCache.empty(
            batch, blocks, self.block + 1, self.num_heads, self.width // self.num_heads,
            dtype=dtype or self.dtype,
        )  # fmt: skip
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.depth, axis=0), cache)

    def read(
        self, tokens: Array, cache: BlockCache, *, top_k: int = 2, retrieval: str = RETRIEVALS[0]
    ) -> tuple[Array, BlockCache]:
        """Read a chunk behind what the cache holds.

        Args:
          tokens: int `[b, c]`, without landmarks.
          cache: from `empty_cache`, or from the call before.
          top_k: blocks that a query retrieves.
          retrieval: a member of `ops.landmark_cache.RETRIEVALS`.

        Returns:
          The normalised last hidden states `[b, c, d]` of the tokens, and the cache afterwards.

        Raises:
          ValueError: the chunk and the blocks in front of it need more positions than there were
            in training, or an argument is wrong.
        """
        check_tokens(tokens=tokens)
        if retrieval not in RETRIEVALS:
            raise ValueError(f"retrieval={retrieval!r}: must be one of {', '.join(RETRIEVALS)}")
        phase = cache.tail_key.shape[2]
        tape_bm = insert(tokens, self.block, self.landmark, phase)
        needed = (top_k + 1) * (self.block + 1) + phase + tape_bm.shape[1]
        known = tape_length(self.length, self.block)
        if needed > known:
            raise ValueError(
                f"{tokens.shape[1]} tokens behind {top_k + 1} blocks of {self.block} need {needed} "
                f"positions with their landmarks, training had {known}: read shorter chunks"
            )
        x_bmd, cache = self.layers(self.embed(tape_bm), cache, top_k, retrieval, False)
        return strip(self.norm(x_bmd), self.block, phase), cache

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, rows]` float32 that turns hidden states into logits."""
        return params["embed"]["embedding"].T

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the last slot of the tape looks, averaged over heads.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, 1, m]` over slots of the tape, for the first and the last layer.
        """
        captured = captured.get(CAPTURE, captured)
        (weights_lbnmm,) = captured["layers"]["attention"]["probabilities"]
        last_lbm = weights_lbnmm[:, :, :, -1].mean(axis=2)
        return {
            f"last slot, layer {layer}": last_lbm[layer - 1][:, None]
            for layer in sorted({1, self.depth})
        }

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two.

        Pairs of tokens that a mask hides are not counted.
        """
        t, d = self.length, self.width
        m = tape_length(t, self.block) if self.has_landmarks else t
        reach = min(m, self.window or m)
        pairs = reach * (reach + 1) // 2 + (m - reach) * reach
        layer = m * (4 * d * d + 2 * d * self.hidden) + 2 * d * pairs
        return 2.0 * (self.depth * layer + t * d * self.rows)


def _names():
    ours, theirs = "layers", "transformer.h.{}"
    yield rule("embed/embedding", "transformer.wte.weight")
    yield stacked(f"{ours}/attention_norm/scale", f"{theirs}.ln_1.weight")
    fused = [f"{ours}/attention/{part}/kernel" for part in ("query", "key", "value")]
    yield stacked(fused, f"{theirs}.attn.c_attn.weight", "in")
    yield stacked(f"{ours}/attention/out/kernel", f"{theirs}.attn.c_proj.weight", "out")
    yield stacked(f"{ours}/mlp_norm/scale", f"{theirs}.ln_2.weight")
    yield stacked(f"{ours}/mlp/up/kernel", f"{theirs}.mlp.c_fc.weight", "in")
    yield stacked(f"{ours}/mlp/down/kernel", f"{theirs}.mlp.c_proj.weight", "in")
    yield rule("norm/scale", "transformer.ln_f.weight")


TORCH_NAMES = {"release": tuple(_names())}
"""Layout -> name table of the release's model that is trained from nothing."""

TORCH_IGNORED = (r"lm_head\.weight$", r"\.attn\.bias$", r"(^|\.)(freqs|cos|sin)")
"""Tensors of the release that are no parameters of their own: the tied head, masks, angles."""
