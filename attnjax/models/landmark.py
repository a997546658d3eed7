# SPDX-License-Identifier: Apache-2.0
"""A decoder whose blocks of tokens end with a landmark, through which attention retrieves them.

Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers",
arXiv 2305.16300; sizes, initialisation and rotary positions from the release. The model inserts its
landmarks itself and leaves their positions out of what it returns, so that tasks and data know
nothing of them: the token before a landmark predicts the token behind it.

A context-miss token (Appendix; `landmark_with_cmt` in the release) is a stream of its own: no token
sees its values, it sees none; its keys, at position -1, say how little is to be found near by.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.models import decoder
from attnjax.nn.attend import attend
from attnjax.nn.attention import CAPTURE, Projection
from attnjax.nn.blocks import Mlp
from attnjax.nn.initializers import residual
from attnjax.nn.norm import LayerNorm, RMSNorm
from attnjax.nn.pattern_attention import RANDOM
from attnjax.nn.stack import check_tokens, token_logits
from attnjax.nn.text import HIDDEN, REMATS, RETRIEVAL, Kernel, SwiGlu, TokenTable
from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.grouped import ContextMiss, Grouped
from attnjax.ops.landmark import landmark_attention, miss_score
from attnjax.ops.landmark_cache import RETRIEVALS, BlockCache, read_chunk
from attnjax.ops.landmark_tape import insert, jump, strip, tape_length
from attnjax.ops.merge import merge_partials
from attnjax.ops.positions import Rotary
from attnjax.parallel.constrain import constrain, gather
from attnjax.recipe import check_arguments
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

ATTENTIONS = ("landmark", "causal", "window", "recurrent")
"""Landmarks; or none, and attention to all tokens before; to the last ones; or to those of the own
part of the text and the part before, to which no gradient goes (Transformer-XL, 1901.02860)."""

STYLES = {"gpt": Rotary(layout="interleaved"), "llama": Rotary()}
"""Layer norms, GELU and a tied head, interleaved rotation; or RMS norms, SwiGLU and a head of its
own, half-split rotation as in Hugging Face's layout."""

_PAPER = {
    "vocab_size": 50_257, "table": (50_304, 50_260), "length": 512, "width": 1024, "depth": 12,
    "num_heads": 8, "hidden": 4096, "block": 50,
}  # fmt: skip
# Section 4.1 and the reference code's defaults: GPT-2's tokens, landmark 50,260, 50,304 rows.
PRESETS = {
    "paper": {**_PAPER, "length": 502},
    "baseline_512": {**_PAPER, "attention": "causal"},
    "baseline_360": {**_PAPER, "attention": "causal", "length": 360},
    "baseline_xl": {**_PAPER, "attention": "recurrent", "window": 256, "length": 2048},
    # LLaMA 7B with two more rows; 502 tokens are 512 slots.
    "llama_7b": {
        "vocab_size": 32_000, "table": (32_002, 32_001), "length": 502, "width": 4096, "depth": 32,
        "num_heads": 32, "hidden": 11_008, "block": 50, "style": "llama",
    },
    "tiny": {},
}  # fmt: skip

EPSILONS = {"gpt": 1e-5, "llama": 1e-6}

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


@dataclasses.dataclass(frozen=True)
class LandmarkOptions:
    """What is done to landmarks in training.

    Attributes:
      group_dropout: rate at which a query's gates to earlier blocks are dropped.
      context_miss: rate at which a context-miss token controls a landmark; None: there is none.
      jump: positions skip 1 to so many places behind every landmark (Appendix E); 0: none.
    """

    group_dropout: float = 0.0
    context_miss: float | None = None
    jump: int = 0

    def __post_init__(self):
        for name, fine, meaning in (
            ("group_dropout", 0 <= self.group_dropout < 1, "in [0, 1)"),
            ("context_miss", self.context_miss is None or 0 <= self.context_miss <= 1, "in [0, 1]"),
            ("jump", self.jump >= 0, "at least 0"),
        ):
            if not fine:
                raise RecipeError(
                    f"model.landmarks.{name}={getattr(self, name)}: must be {meaning}"
                )

    @classmethod
    def of(cls, values: "Mapping[str, Any] | LandmarkOptions | None") -> "LandmarkOptions":
        """Return options from a recipe's dict, or the default ones.

        Raises:
          RecipeError: a name is unknown or a value out of range.
        """
        if isinstance(values, cls):
            return values
        check_arguments(cls, values or {}, "model.landmarks")
        return cls(**(values or {}))


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a chunk is read behind a cache: arguments of `ops.landmark_cache.read_chunk`."""

    top_k: int = 0
    retrieval: str = RETRIEVALS[0]
    miss_cutoff: float = 0.0


class LandmarkAttention(nn.Module):
    """Multi-head attention on a tape, without biases.

    Attributes:
      num_heads: n.
      attention: member of `ATTENTIONS`.
      block: slots of a block with its landmark.
      window: tokens that a query sees with "window", tokens of a part with "recurrent".
      style: key of `STYLES`.
      options: what is done to landmarks in training.
      depth: layers of the model, for the size of the output's initial values.
      dtype: compute dtype.
      implementation: passed to `nn.attend` where there are no landmarks.
    """

    num_heads: int
    attention: str
    block: int
    window: int | None
    style: str
    options: LandmarkOptions
    depth: int
    dtype: str
    implementation: str | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        miss: Array | None,
        cache: BlockCache | None,
        positions: Array | None,
        reading: Reading,
        train: bool,
    ) -> tuple[Array, BlockCache | None]:
        """Map `x [b, m, d]`, slots of a tape.

        Args:
          x: `[b, m, d]`.
          miss: `[1, 1, d]`, the context-miss token; None without one.
          cache: what is remembered of the slots before; None: there are none.
          positions: int `[b, m]`; None: they count from 0. Not with a cache.
          reading: with a cache.
          train: group dropout and control by the context-miss token, with the "attention" key.
        """
        n, d = self.num_heads, x.shape[-1]
        h, turn = d // n, STYLES[self.style].turn

        def kernel(name):
            kernel, _ = Projection((d, n, h), None, self.dtype, name=name)()
            return gather(kernel, None, "heads", None)

        kernels = {name: kernel(name) for name in ("query", "key", "value")}
        query, key, value = (
            constrain(jnp.einsum("btd,dnh->btnh", x, k), "batch", "sequence", "heads", None)
            for k in kernels.values()
        )
        miss_key = None
        if miss is not None:
            miss_key = jnp.einsum("btd,dnh->btnh", miss, kernels["key"])
        if cache is not None:
            out_btnh, cache, seen = read_chunk(
                query, key, value, cache, top_k=reading.top_k, retrieval=reading.retrieval,
                rotate=turn, miss_key=miss_key, miss_cutoff=reading.miss_cutoff,
            )  # fmt: skip
            if self.is_mutable_collection(RETRIEVAL) and not self.is_initializing():
                self.sow(RETRIEVAL, "seen", seen)
        else:
            if positions is None:
                positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            query, key = turn(query, positions), turn(key, positions)
            token = None
            if miss_key is not None:
                score = miss_score(query, turn(miss_key, jnp.full((1, 1), -1, jnp.int32)))
                token = ContextMiss(score, self._controlled(*x.shape[:2], train))
            out_btnh = self._attend(query, key, value, token, train)
        out, _ = Projection((n, h, d), None, self.dtype, residual(self.depth), name="out")()
        return jnp.einsum("btnh,nhd->btd", out_btnh, gather(out, "heads", None, None)), cache

    def _controlled(self, b, slots, train):
        rate = self.options.context_miss if train else 0.0
        if not rate:
            return jnp.zeros((1, slots), bool)
        return jax.random.bernoulli(self.make_rng(RANDOM), rate, (b, slots))

    def _attend(self, query, key, value, miss, train):
        capture = self.is_mutable_collection(CAPTURE) and not self.is_initializing()
        if capture:
            self.sow(CAPTURE, "probabilities", self._weights(query, key, value, miss))
        if self.attention == "landmark":
            rate, slots = self.options.group_dropout if train else 0.0, query.shape[1]
            is_landmark = self._is_landmark(slots)
            is_short = slots <= SHORT
            return landmark_attention(
                query, key, value,
                block=None if is_short else self.block,
                is_landmark=is_landmark if is_short else None,
                group_dropout_rate=rate,
                group_dropout_key=self.make_rng(RANDOM) if rate else None,
                miss=miss,
            )  # fmt: skip
        if self.attention != "recurrent":
            mask = self._masks(query.shape[1])[0]
            return attend(query, key, value, mask=mask, implementation=self.implementation)
        parts = []
        for mask in self._masks(query.shape[1]):
            parts.append(
                attend(
                    query, key, value, mask=mask, implementation=self.implementation,
                    return_lse=True,
                )
            )  # fmt: skip
            key, value = jax.lax.stop_gradient((key, value))
        return merge_partials([(part.out, part.lse) for part in parts])[0]

    def _masks(self, slots):
        """Return masks of disjoint sets of keys; no gradient goes to any but the first."""
        if self.attention == "window":
            return [masks.sliding_window(self.window - 1, 0)]
        if self.attention != "recurrent":
            return [masks.causal()]
        part = np.arange(slots, dtype=np.int32)[None] // self.window + 1
        return [masks.causal() & masks.segments(part, part), masks.segments(part, part + 1)]

    def _weights(self, query, key, value, miss):
        """Return `[b,n,m,m]`, those of landmarks being zero."""
        normalizer: str | Grouped = "softmax"
        if self.attention == "landmark":
            normalizer = Grouped(self._is_landmark(query.shape[1]), miss=miss)
        first, *others = self._masks(query.shape[1])
        mask = first | others[0] if others else first
        return attention(
            query, key, value, mask=mask, normalizer=normalizer,
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
        self,
        streams: tuple[Array, Array | None],
        cache: BlockCache | None,
        positions: Array | None,
        reading: Reading,
        train: bool,
    ) -> tuple[tuple[Array, Array | None], BlockCache | None]:
        """Map slots `[b, m, d]` and the context-miss token; see `LandmarkAttention`."""
        x, miss = streams
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "input", x)
        fields = dict(self.attention)
        on_miss = lambda function: None if miss is None else function(miss)
        mixer = LandmarkAttention(**fields, name="attention")
        norm = _norm(fields["style"], fields["dtype"], "attention_norm")
        branch_bmd, cache = mixer(norm(x), on_miss(norm), cache, positions, reading, train)
        x = constrain(x + branch_bmd, "batch", "sequence", None)
        norm, mlp = _norm(fields["style"], fields["dtype"], "mlp_norm"), self._mlp(fields)
        x = constrain(x + mlp(norm(x)), "batch", "sequence", None)
        return (x, on_miss(lambda miss: miss + mlp(norm(miss)))), cache

    def _mlp(self, fields):
        if fields["style"] == "llama":
            return SwiGlu(self.hidden, fields["dtype"], name="mlp")
        return Mlp(
            self.hidden, dtype=fields["dtype"], use_bias=False,
            output_init=residual(fields["depth"]), name="mlp",
        )  # fmt: skip


def _norm(style, dtype, name=None):
    if style == "llama":
        return RMSNorm(EPSILONS[style], dtype, name=name)
    return LayerNorm(EPSILONS[style], dtype, use_bias=False, name=name)


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
      window: with "window", tokens that a query sees, its own included; with "recurrent", tokens of
        a part, which sees itself and the part before.
      style: key of `STYLES`.
      landmarks: fields of `LandmarkOptions`.
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
    style: str = "gpt"
    landmarks: Any = None
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "length", "width", "depth", "num_heads", "hidden", "block"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name, known in (("attention", ATTENTIONS), ("remat", REMATS), ("style", STYLES)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise RecipeError(f"model.{name}={found!r}: {nearest(found, known)}")
        if self.width % (2 * self.num_heads):
            raise RecipeError(
                f"model.width={self.width}: must be an even multiple of num_heads={self.num_heads}"
            )
        is_windowed = self.attention in ("window", "recurrent")
        if is_windowed != (self.window is not None and self.window >= 1):
            raise RecipeError(
                f"model.window={self.window}: attention 'window' and 'recurrent' need one of at "
                "least 1, others none"
            )
        if self.options != LandmarkOptions() and not self.has_landmarks:
            raise RecipeError(
                f"model.landmarks={self.landmarks}: attention={self.attention!r} has no landmarks"
            )
        table = self.table
        if table is not None and (len(table) != 2 or not self.vocab_size <= table[1] < table[0]):
            raise RecipeError(
                f"model.table={table}: must be rows and a landmark below them, from "
                f"vocab_size={self.vocab_size} on"
            )

    @property
    def options(self) -> LandmarkOptions:
        """What is done to landmarks in training."""
        return LandmarkOptions.of(self.landmarks)

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
        if self.options.context_miss is not None:
            self.miss = TokenTable(1, self.width, self.dtype)
        fields = {
            "num_heads": self.num_heads, "attention": self.attention, "block": self.block + 1,
            "window": self.window, "style": self.style, "options": self.options,
            "depth": self.depth, "dtype": self.dtype,
            "implementation": self.attention_implementation,
        }  # fmt: skip
        layer = LandmarkLayer
        if REMATS[self.remat] is not None:
            layer = nn.remat(
                layer, policy=REMATS[self.remat], prevent_cse=False, static_argnums=(4, 5)
            )
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, CAPTURE: 0, HIDDEN: 0, RETRIEVAL: 0},
            split_rngs={"params": True, RANDOM: True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.hidden, tuple(fields.items()))
        self.norm = _norm(self.style, self.dtype)
        if self.style == "llama":
            self.head = Kernel((self.width, self.rows))

    def _streams(self, tape):
        has_miss = self.options.context_miss is not None
        return self.embed(tape), self.miss(jnp.zeros((1, 1), jnp.int32)) if has_miss else None

    def __call__(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> Output:
        """Score the next token at every place.

        Args:
          tokens: int `[b, t]` in [0, v), without landmarks.
          segments: must be None.
          train: what `LandmarkOptions` says, with the "attention" key.

        Returns:
          An `Output`.

        Raises:
          NotImplementedError: segments are given.
        """
        hidden_btd, aux = self.encode(tokens, segments, train=train)
        kernel = self.head() if self.style == "llama" else self.embed.embedding.T
        return Output(token_logits(hidden_btd, kernel), aux)

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
        positions = None
        if self.options.jump and train:
            key = self.make_rng(RANDOM)
            positions = jump(key, tape_bm.shape, self.block, self.options.jump)
        (x_bmd, _), _ = self.layers(self._streams(tape_bm), None, positions, Reading(), train)
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
        self,
        tokens: Array,
        cache: BlockCache,
        *,
        top_k: int = 2,
        retrieval: str = RETRIEVALS[0],
        miss_cutoff: float = 0.0,
    ) -> tuple[Array, BlockCache]:
        """Read a chunk behind what the cache holds; see `nn.text.RETRIEVAL`.

        Args:
          tokens: int `[b, c]`, without landmarks.
          cache: from `empty_cache`, or from the call before.
          top_k: blocks that a query retrieves.
          retrieval: a member of `ops.landmark_cache.RETRIEVALS`.
          miss_cutoff: where the context-miss token has a smaller share, nothing is retrieved.

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
        reading = Reading(top_k, retrieval, miss_cutoff)
        (x_bmd, _), cache = self.layers(self._streams(tape_bm), cache, None, reading, False)
        return strip(self.norm(x_bmd), self.block, phase), cache

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, rows]` float32 that turns hidden states into logits."""
        is_tied = self.style != "llama"
        return params["embed"]["embedding"].T if is_tied else params["head"]["kernel"]

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
        if self.attention == "recurrent":
            parts, rest = divmod(m, self.window)
            pairs = parts * reach * (reach + 1) // 2 + rest * (rest + 1) // 2
            pairs += max(m - self.window, 0) * self.window
        maps = 3 if self.style == "llama" else 2
        layer = m * (4 * d * d + maps * d * self.hidden) + 2 * d * pairs
        return 2.0 * (self.depth * layer + t * d * self.rows)


def _names():
    ours, theirs = "layers", "transformer.h.{}"
    yield rule("embed/embedding", "transformer.wte.weight")
    yield rule("miss/embedding", "rem_token_embedding.weight")
    yield stacked(f"{ours}/attention_norm/scale", f"{theirs}.ln_1.weight")
    fused = [f"{ours}/attention/{part}/kernel" for part in ("query", "key", "value")]
    yield stacked(fused, f"{theirs}.attn.c_attn.weight", "in")
    yield stacked(f"{ours}/attention/out/kernel", f"{theirs}.attn.c_proj.weight", "out")
    yield stacked(f"{ours}/mlp_norm/scale", f"{theirs}.ln_2.weight")
    yield stacked(f"{ours}/mlp/up/kernel", f"{theirs}.mlp.c_fc.weight", "in")
    yield stacked(f"{ours}/mlp/down/kernel", f"{theirs}.mlp.c_proj.weight", "in")
    yield rule("norm/scale", "transformer.ln_f.weight")


TORCH_NAMES = {"release": tuple(_names()), "hf": decoder.TORCH_NAMES["hf"]}
"""Layout -> name table: the release's model that is trained from nothing, and its LLaMA, whose
parameters are named here as in the decoder."""

TORCH_IGNORED = (r"\.attn\.bias$", r"(^|\.)(freqs|cos|sin|inv_freq)")
"""Tensors of the release that are no parameters: masks, angles."""

TORCH_TIED = {"lm_head.weight": "transformer.wte.weight"}
"""Tensor -> the one that it repeats: the head of the model that is trained from nothing."""
