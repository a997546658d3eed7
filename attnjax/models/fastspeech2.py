# SPDX-License-Identifier: Apache-2.0
"""FastSpeech 2: speech in one pass, from phonemes whose length, pitch and energy are predicted.

Ren et al., "FastSpeech 2: Fast and High-Quality End-to-End Text to Speech", arXiv 2006.04558, in
the form of fairseq that CAB (arXiv 2210.07661) trains: pitch and energy of whole phonemes on a
logarithmic scale, post-norm blocks, no postnet. Implemented from the equations. Padding is kept out
of convolutions, which fairseq does not do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import Attention, choose_attention
from attnjax.nn.speech import Convolution, ScaledPositions, dense, regulate_lengths
from attnjax.ops.efficient import PatternAttention
from attnjax.parallel.constrain import constrain
from attnjax.recipe import check_arguments
from attnjax.registry import nearest
from attnjax.typing import Array
from attnjax.weights.names import conv1d, linear, norm, output, projections, rule

PAPER = {
    "title": "FastSpeech 2: Fast and High-Quality End-to-End Text to Speech",
    "id": "arXiv:2006.04558",
    "year": 2020,
    "code": "https://github.com/facebookresearch/fairseq",
    "licence": "MIT",
    "claim": "Speech made in one pass is as good as that of autoregressive models.",
}

REMATS = ("none", "blocks")

# Sizes of fairseq's reference code, with CAB's dropout; 74 symbols: the 69 phonemes of English with
# stress, silence, and the special ones.
PRESETS = {
    "cab": {"vocab_size": 74, "length": 256, "frames": 1_200},
    "tiny": {
        "length": 12, "frames": 64, "width": 32, "depths": (1, 1), "hidden": 64, "kernel": 3,
        "variance": {"width": 32},
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VarianceOptions:
    """How duration, pitch and energy are predicted and enter.

    Attributes:
      width: channels of the predictors.
      kernel: places that one of their convolutions sees, odd.
      dropout: rate in them while training.
      bins: vectors that stand for a range of pitch, and of energy.
      pitch: ends of the range of log(hertz + 1) that is divided into bins.
      energy: ends of the range of log(norm + 1), likewise.
    """

    width: int = 256
    kernel: int = 3
    dropout: float = 0.5
    bins: int = 256
    pitch: tuple = (0.0, 6.7)
    energy: tuple = (0.0, 6.0)

    def __post_init__(self):
        for name, fine in (
            ("width", self.width >= 1),
            ("kernel", self.kernel % 2 == 1),
            ("dropout", 0 <= self.dropout < 1),
            ("bins", self.bins >= 3),
            ("pitch", len(self.pitch) == 2 and self.pitch[0] < self.pitch[1]),
            ("energy", len(self.energy) == 2 and self.energy[0] < self.energy[1]),
        ):
            if not fine:
                raise RecipeError(f"model.variance.{name}={getattr(self, name)!r} is out of range")

    @classmethod
    def of(cls, values: "Mapping[str, Any] | VarianceOptions | None") -> "VarianceOptions":
        """Return options from a recipe's dict; None means the defaults.

        Raises:
          RecipeError: a name is unknown, or a value is out of range.
        """
        if isinstance(values, cls):
            return values
        check_arguments(cls, values or {}, "model.variance")
        return cls(**(values or {}))


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      mel: float32 `[b, t, c]`, log-mel frames; arbitrary beyond `frames`.
      frames: int32 `[b]`, how many there are, at least 1.
      log_duration: float32 `[b, s]`, predicted log(frames of a phoneme + 1).
      pitch, energy: float32 `[b, s]`, predicted.
    """

    mel: Array
    frames: Array
    log_duration: Array
    pitch: Array
    energy: Array


class FeedForwardBlock(nn.Module):
    """x <- norm(x + attention(x)); x <- norm(x + conv(relu(conv(x)))).

    Attributes:
      attention: attends among all places.
      num_heads: its heads.
      hidden: channels between the convolutions.
      kernel: places that a convolution sees.
      dropout: rate after the convolutions while training.
      attention_dropout: rate on probabilities while training.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    attention: PatternAttention
    num_heads: int
    hidden: int
    kernel: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array, valid: Array, train: bool = False) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`; `valid [b, t]` is False at padding."""
        attend = Attention(
            self.attention, self.num_heads, self.attention_dropout, dtype=self.dtype,
            implementation=self.implementation, name="self_attention",
        )  # fmt: skip
        x = x + attend(x, query_valid=valid, train=train)
        x = LayerNorm(1e-5, self.dtype, name="attention_norm")(x)
        up = Convolution(self.hidden, self.kernel, dtype=self.dtype, name="up")
        down = Convolution(x.shape[-1], self.kernel, dtype=self.dtype, name="down")
        hidden_btf = constrain(jax.nn.relu(up(x, valid)), "batch", "sequence", "mlp")
        branch_btd = nn.Dropout(self.dropout, deterministic=not train)(down(hidden_btf, valid))
        x = LayerNorm(1e-5, self.dtype, name="mlp_norm")(x + branch_btd)
        return constrain(x, "batch", "sequence", None)


class VariancePredictor(nn.Module):
    """Two convolutions, each with ReLU, norm and dropout, and one number for every place.

    Attributes:
      options: width, kernel and dropout.
      dtype: compute dtype.
    """

    options: VarianceOptions
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array, train: bool = False) -> Array:
        """Map `x [b, s, d]` to float32 `[b, s]`; `valid [b, s]` is False at padding."""
        width = self.options.width
        for i in range(2):
            conv = Convolution(width, self.options.kernel, dtype=self.dtype, name=f"conv_{i}")
            x = LayerNorm(1e-5, self.dtype, name=f"norm_{i}")(jax.nn.relu(conv(x, valid)))
            x = nn.Dropout(self.options.dropout, deterministic=not train)(x)
        return dense(1, "float32", "head", width)(x)[..., 0]


class BinEmbedding(nn.Module):
    """A vector for the bin in which a number lies; the outer bins have no end.

    Attributes:
      features: d.
      bins: how many there are.
      ends: of the range that the inner bins divide evenly.
      dtype: compute dtype.
    """

    features: int
    bins: int
    ends: tuple
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, s]` to `[b, s, d]`."""
        init = nn.initializers.normal(self.features**-0.5)
        table_ed = self.param("embedding", init, (self.bins, self.features), jnp.float32)
        edges = jnp.linspace(*self.ends, self.bins - 1)
        return table_ed.astype(self.dtype)[jnp.searchsorted(edges, x)]


class FastSpeech2(nn.Module):
    """Phoneme blocks, predicted variances, as many frames as the durations say, frame blocks.

    Attributes:
      vocab_size: v; token 0 is padding.
      length: s, phonemes of an example.
      frames: t, most frames of an example; what does not fit is cut off.
      mels: c, bands of a frame.
      width: d.
      depths: blocks of phonemes and blocks of frames.
      num_heads: attention heads.
      hidden: channels between the convolutions of a block.
      kernel: places that they see, odd.
      variance: fields of `VarianceOptions`; None: the defaults.
      dropout: rate after embedding and convolutions while training.
      attention_dropout: rate on probabilities while training.
      attention: of all blocks; see `nn.pattern_attention.choose_attention`.
      dtype: compute dtype.
      remat: "none", or "blocks" to compute blocks again in the backward pass.
      attention_implementation: passed to `nn.attend`.
    """

    vocab_size: int = 74
    length: int = 256
    frames: int = 1_200
    mels: int = 80
    width: int = 256
    depths: tuple = (4, 4)
    num_heads: int = 2
    hidden: int = 1_024
    kernel: int = 9
    variance: Any = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    attention: Any = None
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        if self.remat not in REMATS:
            raise RecipeError(f"model.remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        for name in ("vocab_size", "length", "frames", "mels", "width", "num_heads", "hidden"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.width % self.num_heads or self.width % 2:
            raise RecipeError(
                f"model.width={self.width}: must be even, and a multiple of the {self.num_heads} "
                "heads"
            )
        if self.kernel % 2 == 0:
            raise RecipeError(f"model.kernel={self.kernel}: must be odd")
        if len(self.depths) != 2 or min(self.depths) < 0:
            raise RecipeError(f"model.depths={self.depths!r}: must be two numbers of blocks")
        VarianceOptions.of(self.variance)
        self.build_attention()
        super().__post_init__()

    def build_attention(self) -> PatternAttention:
        """Return the attention of all blocks, or raise RecipeError."""
        return choose_attention(self.attention, field="attention")

    @nn.compact
    def __call__(
        self,
        phonemes: Array,
        duration: Array | None = None,
        pitch: Array | None = None,
        energy: Array | None = None,
        *,
        train: bool = False,
    ) -> Output:
        """Speak, with given variances (training) or predicted ones.

        Args:
          phonemes: int `[b, s]`; 0 is padding.
          duration: int `[b, s]`, frames of every phoneme; None: predicted, none at padding.
          pitch: float `[b, s]`, log(hertz + 1); None: predicted.
          energy: float `[b, s]`, log(norm of the magnitudes + 1); None: predicted.
          train: dropout, with the "dropout" key.

        Returns:
          An `Output`.
        """
        options, valid_bs = VarianceOptions.of(self.variance), phonemes != 0
        init = nn.initializers.normal(self.width**-0.5)
        table_vd = self.param("embedding", init, (self.vocab_size, self.width), jnp.float32)
        x_bsd = table_vd.astype(self.dtype)[phonemes]
        x_bsd = ScaledPositions(self.dtype, name="phoneme_positions")(x_bsd)
        x_bsd = nn.Dropout(self.dropout, deterministic=not train)(x_bsd)
        for i in range(self.depths[0]):
            x_bsd = self._block(f"phoneme_block_{i}")(x_bsd, valid_bs, train)

        predictor = lambda name: VariancePredictor(options, self.dtype, name=f"{name}_predictor")
        bins = lambda name, ends: BinEmbedding(
            self.width, options.bins, tuple(ends), self.dtype, name=f"{name}_bins"
        )
        log_duration_bs = predictor("duration")(x_bsd, valid_bs, train)
        if duration is None:
            # No phoneme is longer than the result: far too long ones would overflow integers.
            frames_bs = jnp.clip(jnp.round(jnp.expm1(log_duration_bs)), 0, self.frames)
            duration = jnp.where(valid_bs, frames_bs, 0).astype(jnp.int32)
        pitch_bs = predictor("pitch")(x_bsd, valid_bs, train)
        x_bsd = x_bsd + bins("pitch", options.pitch)(pitch_bs if pitch is None else pitch)
        energy_bs = predictor("energy")(x_bsd, valid_bs, train)
        x_bsd = x_bsd + bins("energy", options.energy)(energy_bs if energy is None else energy)

        x_btd, frames_b = regulate_lengths(x_bsd, duration, self.frames)
        x_btd = constrain(x_btd, "batch", "sequence", None)
        valid_bt = jnp.arange(self.frames) < frames_b[:, None]
        x_btd = ScaledPositions(self.dtype, name="frame_positions")(x_btd)
        for i in range(self.depths[1]):
            x_btd = self._block(f"frame_block_{i}")(x_btd, valid_bt, train)
        mel_btc = dense(self.mels, self.dtype, "head", self.width)(x_btd).astype(jnp.float32)
        return Output(mel_btc, frames_b, log_duration_bs, pitch_bs, energy_bs)

    def _block(self, name):
        block = FeedForwardBlock
        if self.remat == "blocks":
            block = nn.remat(FeedForwardBlock, static_argnums=(3,))
        return block(
            self.build_attention(), self.num_heads, self.hidden, self.kernel, self.dropout,
            self.attention_dropout, self.dtype, self.attention_implementation, name=name,
        )  # fmt: skip

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        shape = (batch, self.length)
        types = {"phonemes": jnp.int32, "duration": jnp.int32} | dict.fromkeys(
            ("pitch", "energy"), jnp.float32
        )
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}

    def flops(self) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two."""
        options, d = VarianceOptions.of(self.variance), self.width
        attention, total = self.build_attention(), 0.0
        for count, length in zip(self.depths, (self.length, self.frames), strict=True):
            block = attention.flops(length, length, d, self.num_heads)
            block += 4.0 * length * self.kernel * d * self.hidden
            total += count * block
        predictor = options.kernel * options.width * (d + options.width) + options.width
        return total + 2.0 * (3 * self.length * predictor + self.frames * d * self.mels)

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the frames look in the last block, if the attention has probabilities.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, t, t]`, the mean over heads.
        """
        captured = captured.get(CAPTURE, captured)
        last = f"frame_block_{self.depths[1] - 1}"
        if last not in captured:
            return {}
        (weights_bntt,) = captured[last]["self_attention"]["probabilities"]
        return {"frames, last block": weights_bntt.mean(axis=1)}


def _names():
    yield rule("embedding", "encoder.embed_tokens.weight")
    for ours, theirs in (("phoneme", ""), ("frame", "dec_")):
        yield rule(f"{ours}_positions/alpha", f"encoder.{theirs}pos_emb_alpha", "vector")
    for ours, theirs in (("phoneme", "encoder"), ("frame", "decoder")):
        block, layer = f"{ours}_block_{{}}", f"encoder.{theirs}_fft_layers.{{}}"
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            name = f"{layer}.self_attn.{letter}_proj"
            yield from projections(f"{block}/self_attention", name, [part])
        yield from output(f"{block}/self_attention/out", f"{layer}.self_attn.out_proj")
        yield from norm(f"{block}/attention_norm", f"{layer}.layer_norm")
        yield from conv1d(f"{block}/up/conv", f"{layer}.ffn.ffn.0")
        yield from conv1d(f"{block}/down/conv", f"{layer}.ffn.ffn.2")
        yield from norm(f"{block}/mlp_norm", f"{layer}.ffn.layer_norm")
    adaptor = "encoder.var_adaptor"
    for name in ("duration", "pitch", "energy"):
        ours, theirs = f"{name}_predictor", f"{adaptor}.{name}_predictor"
        for i in (0, 1):
            yield from conv1d(f"{ours}/conv_{i}/conv", f"{theirs}.conv{i + 1}.0")
            yield from norm(f"{ours}/norm_{i}", f"{theirs}.ln{i + 1}")
        yield from linear(f"{ours}/head", f"{theirs}.proj")
    for name in ("pitch", "energy"):
        yield rule(f"{name}_bins/embedding", f"{adaptor}.embed_{name}.weight")
    yield from linear("head", "encoder.out_proj")


TORCH_NAMES = {"fairseq": tuple(_names())}
"""Layout -> name table: fairseq without a postnet."""
