# SPDX-License-Identifier: Apache-2.0
"""Transformer-TTS: a transformer that reads phonemes and writes a spectrogram, some frames a step.

Li et al., "Neural Speech Synthesis with Transformer Network", arXiv 1809.08895, in the form of
fairseq that CAB (arXiv 2210.07661) trains: pre-norm layers, four frames a step. Implemented from
the equations. GroupNorm takes the place of BatchNorm (see `nn.speech`), and padding is kept out of
convolutions.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.speech import PRENET, ConvolutionStack, ScaledPositions, dense
from attnjax.nn.transformer import TransformerLayer
from attnjax.ops.efficient import PatternAttention, Stream
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array, Params, PRNGKey

PAPER = {
    "title": "Neural Speech Synthesis with Transformer Network",
    "id": "arXiv:1809.08895",
    "year": 2018,
    "code": "https://github.com/facebookresearch/fairseq",
    "licence": "MIT",
    "claim": "Attention in place of recurrence trains faster and sounds as good.",
}

REMATS = ("none", "blocks")

# Sizes of fairseq's reference code with the options of CAB; 74 symbols as in FastSpeech 2.
PRESETS = {
    "cab": {"vocab_size": 74, "length": 256, "frames": 1_200},
    "tiny": {
        "length": 12, "frames": 64, "width": 32, "depths": (1, 1), "num_heads": 2, "hidden": 64,
    },
}  # fmt: skip

PRENET_DROPOUT = 0.5
CONVOLUTIONS, POSTNET_LAYERS, KERNEL = 3, 5, 5


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      coarse: float32 `[b, t, c]`, log-mel frames before the postnet.
      mel: float32 `[b, t, c]`, and after it; both arbitrary beyond `frames`.
      end: float32 `[b, t / r]`, logits of every step being the last one.
      frames: int32 `[b]`, frames of the steps that exist, a multiple of r, at least r.
    """

    coarse: Array
    mel: Array
    end: Array
    frames: Array


class TransformerTTS(nn.Module):
    """Convolutions and layers read; layers with cross-attention write r frames at every step.

    Attributes:
      vocab_size: v; token 0 is padding.
      length: s, phonemes of an example.
      frames: t, most frames of an example; a multiple of r.
      mels: c, bands of a frame.
      frames_per_step: r.
      width: d, also of the convolutions; the decoder's prenet has half of it.
      depths: layers of the encoder and of the decoder.
      num_heads: attention heads.
      hidden: hidden width of the MLPs.
      dropout: rate after embeddings, on branches, inside MLPs and on probabilities while training;
        convolutions and prenet have 0.5.
      encoder_attention, decoder_attention, cross_attention: see
        `nn.pattern_attention.choose_attention`.
      dtype: compute dtype.
      remat: "none", or "blocks" to compute layers again in the backward pass.
      attention_implementation: passed to `nn.attend`.
    """

    vocab_size: int = 74
    length: int = 256
    frames: int = 1_200
    mels: int = 80
    frames_per_step: int = 4
    width: int = 512
    depths: tuple = (6, 6)
    num_heads: int = 4
    hidden: int = 2_048
    dropout: float = 0.1
    encoder_attention: Any = None
    decoder_attention: Any = None
    cross_attention: Any = None
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        if self.remat not in REMATS:
            raise RecipeError(f"model.remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        for name in ("vocab_size", "length", "frames", "mels", "frames_per_step", "width",
                     "num_heads", "hidden"):  # fmt: skip
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.frames % self.frames_per_step:
            raise RecipeError(
                f"model.frames={self.frames}: must be a multiple of frames_per_step="
                f"{self.frames_per_step}"
            )
        if self.width % self.num_heads or self.width % 2:
            raise RecipeError(
                f"model.width={self.width}: must be even, and a multiple of the {self.num_heads} "
                "heads"
            )
        if len(self.depths) != 2 or min(self.depths) < 1:
            raise RecipeError(f"model.depths={self.depths!r}: must be two numbers of layers")
        self.build_attentions()
        super().__post_init__()

    def build_attentions(self) -> tuple[PatternAttention, PatternAttention, PatternAttention]:
        """Return those of the encoder, of the decoder and across, or raise RecipeError."""
        return (
            choose_attention(self.encoder_attention, field="encoder_attention"),
            choose_attention(self.decoder_attention, field="decoder_attention", causal=True),
            choose_attention(
                self.cross_attention, field="cross_attention", causal=True, cross=True
            ),
        )

    def setup(self):
        encoder, decoder, cross = self.build_attentions()
        layer_class = TransformerLayer
        if self.remat == "blocks":
            layer_class = nn.remat(TransformerLayer, static_argnums=(6,))
        layer = lambda attention, cross=None: layer_class(
            self.num_heads, self.hidden, attention, cross, activation="relu", dropout=self.dropout,
            attention_dropout=self.dropout, mlp_dropout=self.dropout, dtype=self.dtype,
            implementation=self.attention_implementation,
        )  # fmt: skip
        d, prenet, out = self.width, self.width // 2, self.mels * self.frames_per_step
        linear = lambda features, fan_in, dtype=self.dtype: dense(features, dtype, None, fan_in)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (self.vocab_size, d), jnp.float32
        )
        self.encoder_prenet = ConvolutionStack((d,) * CONVOLUTIONS, KERNEL, dtype=self.dtype)
        self.encoder_projection = linear(d, d)
        self.encoder_positions = ScaledPositions(self.dtype)
        self.encoder = [layer(encoder) for _ in range(self.depths[0])]
        self.encoder_norm = LayerNorm(1e-5, self.dtype)
        self.prenet = [linear(prenet, out), linear(prenet, prenet)]
        self.prenet_projection = linear(d, prenet)
        self.decoder_positions = ScaledPositions(self.dtype)
        self.decoder = [layer(decoder, cross) for _ in range(self.depths[1])]
        self.decoder_norm = LayerNorm(1e-5, self.dtype)
        self.mel_head, self.end_head = linear(out, d, "float32"), linear(1, d, "float32")
        widths = (d,) * (POSTNET_LAYERS - 1) + (out,)
        self.postnet = ConvolutionStack(widths, KERNEL, "tanh", True, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)
        self.prenet_drop = nn.Dropout(PRENET_DROPOUT, rng_collection=PRENET)

    def __call__(
        self, phonemes: Array, mel: Array, frames: Array, *, train: bool = False
    ) -> Output:
        """Predict every step from those before it, as they are given.

        Args:
          phonemes: int `[b, s]`; 0 is padding.
          mel: `[b, t, c]` log-mel frames, where t is a multiple of r.
          frames: int `[b]`, how many exist; an incomplete last step is left out.
          train: dropout, with the key "dropout". The decoder's prenet has dropout in training, and
            wherever there is a key "prenet".

        Returns:
          An `Output`.

        Raises:
          ValueError: t is no multiple of r.
        """
        b, t, c = mel.shape
        if t % self.frames_per_step:
            raise ValueError(f"{t} frames are no multiple of {self.frames_per_step} a step")
        memory_bsd, memory_valid_bs = self.encode(phonemes, train), phonemes != 0
        steps_b = jnp.maximum(frames // self.frames_per_step, 1)
        valid_bt = jnp.arange(t // self.frames_per_step) < steps_b[:, None]
        groups_btc = mel.reshape(b, -1, c * self.frames_per_step)
        before_btc = jnp.pad(groups_btc[:, :-1], ((0, 0), (1, 0), (0, 0)))
        x_btd = self.decoder_positions(self._read(before_btc, train))
        x_btd = constrain(self.drop(x_btd, deterministic=not train), "batch", "sequence", None)
        for layer in self.decoder:
            x_btd = layer(x_btd, valid_bt, memory_bsd, memory_valid_bs, None, train)
        coarse_btc, end_bt = self._heads(x_btd)
        return self._finish(coarse_btc, end_bt, steps_b, train)

    def encode(self, phonemes: Array, train: bool = False) -> Array:
        """Return what the decoder attends to, `[b, s, d]`, of phonemes int `[b, s]`."""
        valid_bs = phonemes != 0
        x_bsd = self.encoder_prenet(self.embedding.astype(self.dtype)[phonemes], valid_bs, train)
        x_bsd = self.encoder_positions(self.encoder_projection(x_bsd))
        x_bsd = constrain(self.drop(x_bsd, deterministic=not train), "batch", "sequence", None)
        for layer in self.encoder:
            x_bsd = layer(x_bsd, valid_bs, None, None, None, train)
        return self.encoder_norm(x_bsd)

    def _read(self, before_btc, train=False):
        """Apply the prenet; its dropout is what keeps the decoder from copying the last frames."""
        is_dropping = train or self.has_rng(PRENET)
        x_btd = before_btc.astype(self.dtype)
        for linear in self.prenet:
            x_btd = self.prenet_drop(jax.nn.relu(linear(x_btd)), deterministic=not is_dropping)
        return self.prenet_projection(x_btd)

    def _heads(self, x_btd):
        x_btd = self.decoder_norm(x_btd).astype(jnp.float32)
        return self.mel_head(x_btd), self.end_head(x_btd)[..., 0]

    def _finish(self, coarse_btc, end_bt, steps_b, train=False):
        """Apply the postnet to the steps that exist, and take steps apart."""
        b, t, r = *end_bt.shape, self.frames_per_step
        valid_bt = jnp.arange(t) < steps_b[:, None]
        mel_btc = coarse_btc + self.postnet(coarse_btc, valid_bt, train).astype(jnp.float32)
        apart = lambda x: x.reshape(b, t * r, self.mels)
        return Output(apart(coarse_btc), apart(mel_btc), end_bt, (r * steps_b).astype(jnp.int32))

    def begin(self, phonemes: Array) -> tuple[list[Any], list[Stream]]:
        """Read phonemes `[b, s]`; return what `step` needs of them, and streams without frames."""
        memory_bsd, valid_bs = self.encode(phonemes), phonemes != 0
        memories = [layer.remember(memory_bsd, self.width, valid_bs) for layer in self.decoder]
        capacity = self.frames // self.frames_per_step
        streams = [
            layer.self_attention.empty_stream(
                len(phonemes), self.width, self.num_heads, capacity, self.dtype
            )
            for layer in self.decoder
        ]
        return memories, streams

    def step(
        self, before: Array, number: Array, memories: list[Any], streams: list[Stream]
    ) -> tuple[Array, Array, list[Stream]]:
        """Write the next frames; equals a column of the call.

        Args:
          before: `[b, 1, r c]`, the coarse frames of the step before; 0 at first.
          number: int, of this step, from 0 on.
          memories, streams: from `begin`, and the streams of the step before.

        Returns:
          Coarse frames `[b, 1, r c]`, logits of the end `[b]`, and the streams afterwards.
        """
        x = self.decoder_positions(self._read(before), number)
        after = []
        for layer, memory, stream in zip(self.decoder, memories, streams, strict=True):
            x, stream = layer.step(x, stream, memory)
            after.append(stream)
        coarse, end = self._heads(x)
        return coarse, end[:, 0], after

    def synthesise(
        self, params: Params, phonemes: Array, key: PRNGKey | None = None, threshold: float = 0.5
    ) -> Output:
        """Write frames step by step until the end is likely, or there is no more room.

        Args:
          params: parameters.
          phonemes: int `[b, s]`; 0 is padding.
          key: of the prenet's dropout, which published models have here, too; None: without.
          threshold: probability above which a step is the last one.

        Returns:
          An `Output` of `frames` frames, and how many of them come before the end.
        """
        variables, steps = {"params": params}, self.frames // self.frames_per_step
        memories, streams = self.apply(variables, phonemes, method="begin")

        def advance(carry, number):
            before, streams = carry
            rngs = {} if key is None else {PRENET: jax.random.fold_in(key, number)}
            coarse, end_b, streams = self.apply(
                variables, before, number, memories, streams, method="step", rngs=rngs
            )
            return (coarse, streams), (coarse[:, 0], end_b)

        empty = jnp.zeros((len(phonemes), 1, self.mels * self.frames_per_step), jnp.float32)
        _, (coarse_tbc, end_tb) = jax.lax.scan(advance, (empty, streams), jnp.arange(steps))
        is_end_tb = jax.nn.sigmoid(end_tb) > threshold
        steps_b = jnp.where(is_end_tb.any(axis=0), 1 + jnp.argmax(is_end_tb, axis=0), steps)
        coarse_btc, end_bt = coarse_tbc.swapaxes(0, 1), end_tb.T
        return self.apply(variables, coarse_btc, end_bt, steps_b, method="_finish")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {
            "phonemes": jax.ShapeDtypeStruct((batch, self.length), jnp.int32),
            "mel": jax.ShapeDtypeStruct((batch, self.frames, self.mels), jnp.float32),
            "frames": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def flops(self) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two."""
        encoder, decoder, cross = self.build_attentions()
        d, n, s, t = self.width, self.num_heads, self.length, self.frames // self.frames_per_step
        out, prenet = self.mels * self.frames_per_step, self.width // 2
        reader = encoder.flops(s, s, d, n) + 4.0 * s * d * self.hidden
        writer = decoder.flops(t, t, d, n) + cross.flops(t, s, d, n) + 4.0 * t * d * self.hidden
        convolutions = CONVOLUTIONS * KERNEL * d * d + d * d
        nets = prenet * (out + prenet + d) + d * (out + 1)
        nets += KERNEL * d * (2 * out + (POSTNET_LAYERS - 2) * d)
        layers = self.depths[0] * reader + self.depths[1] * writer
        return layers + 2.0 * (s * convolutions + t * nets)

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return the alignment in the last layer, if cross-attention has probabilities.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, t / r, s]`, the mean over heads.
        """
        captured = captured.get(CAPTURE, captured)
        last = captured.get(f"decoder_{self.depths[1] - 1}", {})
        if "cross" not in last:
            return {}
        (weights_bnts,) = last["cross"]["probabilities"]
        return {"alignment, last layer": weights_bnts.mean(axis=1)}


TORCH_NAMES = None
"""Published weights are of models with BatchNorm."""
