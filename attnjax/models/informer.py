# SPDX-License-Identifier: Apache-2.0
"""Informer: an encoder that halves its length, a decoder that forecasts all steps at once.

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
arXiv 2012.07436, Sections 3.2 and 3.3; the backbone of CAB (arXiv 2210.07661) for long series.

    embedding   x W_3 (circular, width 3) + sinusoid + time features W
    encoder     layer, then ("distilling") pool(elu(norm(x W_3))) of half the length, layer, ...
    decoder     layers over the last known values and zeros for the steps to come

Two things differ from the release. Its distilling normalises with running statistics of batches;
here every position is normalised over its channels (layer norm), so that the model is its
parameters and no example depends on its batch. And it drops hidden units of the MLPs as well; here
the rate holds for attention, branches and embeddings. What the release calls "mix", taking heads
for positions in the decoder's self-attention, is left to the attention.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.initializers import fan_in_uniform
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.transformer import TransformerLayer
from attnjax.ops.positions import sinusoids
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array

PAPER = {
    "title": "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
    "id": "arXiv:2012.07436",
    "year": 2021,
    "code": "https://github.com/zhouhaoyi/Informer2020",
    "licence": "Apache-2.0",
    "claim": "Sparse attention and distilling forecast hundreds of steps at once.",
}


REMATS = ("none", "blocks")

_DEEP = {"depth": (3, 2)}

# tasks/LSTF/scripts of the CAB release: m forecasts all columns, s one from itself.
PRESETS = {
    "etth1_m": {"channels": 7, "lengths": (336, 336, 720)},
    "etth1_s": {"channels": 1, "lengths": (168, 168, 720)},
    "etth2_m": {"channels": 7, "lengths": (720, 336, 720)},
    "etth2_s": {"channels": 1, "lengths": (336, 336, 720)},
    "ettm1_m": {"channels": 7, "lengths": (672, 384, 672)},
    "ettm1_s": {"channels": 1, "lengths": (384, 384, 672)},
    "ecl_m": {"channels": 321, "lengths": (336, 336, 960), **_DEEP},
    "ecl_s": {"channels": 1, "lengths": (336, 336, 960), **_DEEP},
    "weather_m": {"channels": 12, "lengths": (720, 336, 720), **_DEEP},
    "weather_s": {"channels": 1, "lengths": (720, 336, 720), **_DEEP},
}

EPSILON = 1e-5
"""Of all norms, as in the release."""


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      forecast: float32 `[b, horizon, channels]`.
      aux: `memory [b, s, d]`, what the encoder tells the decoder.
    """

    forecast: Array
    aux: dict[str, Array]


class CircularConv(nn.Module):
    """Convolution of width 3 over time, whose ends meet.

    Attributes:
      features: d.
      kernel_init: draws the kernel `[3, c, d]`; None: uniform by the number of inputs.
      dtype: compute dtype.
    """

    features: int
    kernel_init: Any = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, t, c]` to `[b, t, d]`: step t reads t - 1, t and t + 1."""
        c = x.shape[-1]
        uniform = fan_in_uniform(3 * c)
        shape = (3, c, self.features)
        kernel = self.param("kernel", self.kernel_init or uniform, shape, jnp.float32)
        bias = self.param("bias", uniform, (self.features,), jnp.float32)
        x = x.astype(self.dtype)
        # One product; XLA's convolutions are slow on CPU.
        near = jnp.concatenate([jnp.roll(x, 1, axis=1), x, jnp.roll(x, -1, axis=1)], axis=-1)
        kernel_cd = kernel.reshape(3 * c, self.features).astype(self.dtype)
        return near @ kernel_cd + bias.astype(self.dtype)


class SeriesEmbedding(nn.Module):
    """Values by a convolution, their places by sinusoids, their times by a linear map: the sum.

    Attributes:
      features: d.
      dropout: rate on the sum while training.
      dtype: compute dtype.
    """

    features: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, values: Array, time: Array, train: bool = False) -> Array:
        """Map `values [b, t, c]` and `time [b, t, f]` to `[b, t, d]`."""
        # Kaiming's gain for a leaky ReLU of slope 0.01, over all inputs of the convolution.
        kaiming = nn.initializers.variance_scaling(
            2 / (1 + 0.01**2), "fan_in", "normal", in_axis=(0, 1), out_axis=2
        )
        init = fan_in_uniform(time.shape[-1])
        place = nn.Dense(
            self.features, dtype=self.dtype, kernel_init=init, bias_init=init, name="time"
        )
        x_btd = CircularConv(self.features, kaiming, self.dtype, name="value")(values)
        positions_td = sinusoids(jnp.arange(values.shape[1]), self.features)
        x_btd = x_btd + positions_td.astype(self.dtype)[None] + place(time)
        return nn.Dropout(self.dropout, deterministic=not train)(x_btd)


class Distil(nn.Module):
    """Halve the length: convolution, norm, ELU, the largest of three neighbours at every other.

    Attributes:
      dtype: compute dtype.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, t, d]` to `[b, (t + 1) // 2, d]`."""
        x = CircularConv(x.shape[-1], dtype=self.dtype, name="conv")(x)
        x = nn.elu(LayerNorm(EPSILON, self.dtype, name="norm")(x))
        return nn.max_pool(x, (3,), strides=(2,), padding=((1, 1),))


class Informer(nn.Module):
    """Forecast the next steps of a series from known ones.

    Attributes:
      lengths: known steps; how many of them, the last ones, the decoder begins with; steps to
        forecast.
      channels: numbers of a step.
      time_features: numbers that tell the time of a step.
      width: d, model width.
      num_heads: heads of all attentions.
      hidden: hidden width of the MLPs.
      depth: layers of the encoder and of the decoder; between two of the encoder the length is
        halved.
      encoder_attention: noncausal self-attention of the encoder, see `choose_attention`.
      decoder_attention: self-attention of the decoder.
      cross_attention: noncausal cross-attention of the decoder.
      decoder_causal: whether the decoder's self-attention is causal, as in the release; nothing
        needs it to be, since all steps are forecast at once.
      dropout: rate on attention, branches and embeddings while training.
      dtype: compute dtype; parameters and forecasts are float32.
      remat: "none", or "blocks" to recompute layers in the backward pass.
      attention_implementation: passed to `nn.attend` by softmax and local attention.
    """

    lengths: tuple[int, int, int] = (336, 336, 720)
    channels: int = 7
    time_features: int = 4
    width: int = 512
    num_heads: int = 8
    hidden: int = 2048
    depth: tuple[int, int] = (2, 1)
    encoder_attention: str | Mapping[str, Any] | None = None
    decoder_attention: str | Mapping[str, Any] | None = None
    cross_attention: str | Mapping[str, Any] | None = None
    decoder_causal: bool = True
    dropout: float = 0.05
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        for field in ("channels", "time_features", "num_heads", "hidden"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)}: must be at least 1")
        lengths, depth = self.lengths, self.depth
        if (
            len(lengths) != 3
            or min(lengths[0], lengths[2]) < 1
            or not (0 <= lengths[1] <= lengths[0])
        ):
            raise RecipeError(
                f"lengths={lengths}: must be known steps, from 0 to as many that the decoder "
                "begins with, and steps to forecast"
            )
        if len(depth) != 2 or min(depth) < 1:
            raise RecipeError(f"depth={depth}: must be two numbers of layers of at least 1")
        if self.width % 2 or self.width % self.num_heads:
            raise RecipeError(
                f"width={self.width}: must be even and divisible by num_heads={self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.remat not in REMATS:
            raise RecipeError(f"remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        self.attentions()
        super().__post_init__()

    @property
    def length(self) -> int:
        """Known steps."""
        return self.lengths[0]

    @property
    def label_length(self) -> int:
        """The last known steps that the decoder begins with."""
        return self.lengths[1]

    @property
    def horizon(self) -> int:
        """Steps to forecast."""
        return self.lengths[2]

    def attentions(self):
        """Return the attentions of encoder, decoder and between them.

        Raises:
          RecipeError: one is unknown or has no form for its place.
        """
        return (
            choose_attention(self.encoder_attention, field="encoder_attention"),
            choose_attention(
                self.decoder_attention, field="decoder_attention", causal=self.decoder_causal
            ),
            choose_attention(self.cross_attention, field="cross_attention", cross=True),
        )

    @nn.compact
    def __call__(
        self, past: Array, past_time: Array, future_time: Array, *, train: bool = False
    ) -> Output:
        """Forecast.

        Args:
          past: `[b, lengths[0], channels]` floating, standardised values.
          past_time: `[b, lengths[0], time_features]` floating.
          future_time: `[b, lengths[2], time_features]` floating.
          train: dropout, with the "dropout" key.

        Returns:
          An `Output`.

        Raises:
          ValueError: an input has the wrong shape.
        """
        given = {"past": past, "past_time": past_time, "future_time": future_time}
        for name, expected in self.example(1).items():
            if given[name].shape[1:] != expected.shape[1:]:
                raise ValueError(
                    f"{name} must be [b, *{expected.shape[1:]}], got {given[name].shape}"
                )
        encode, decode, cross = self.attentions()
        block = TransformerLayer
        if self.remat == "blocks":
            block = nn.remat(TransformerLayer, static_argnums=(6,))
        layer = lambda name, attention, other=None: block(
            self.num_heads, self.hidden, attention, other, pre_norm=False, dropout=self.dropout,
            attention_dropout=self.dropout, epsilon=EPSILON, dtype=self.dtype,
            implementation=self.attention_implementation, name=name,
        )  # fmt: skip
        embed = lambda name: SeriesEmbedding(self.width, self.dropout, self.dtype, name=name)
        x_bsd = embed("encoder_embedding")(past, past_time, train)
        for i in range(self.depth[0]):
            if i:
                x_bsd = Distil(self.dtype, name=f"distil_{i - 1}")(x_bsd)
            x_bsd = constrain(x_bsd, "batch", "sequence", None)
            x_bsd = layer(f"encoder_{i}", encode)(x_bsd, None, None, None, None, train)
        memory_bsd = LayerNorm(EPSILON, self.dtype, name="encoder_norm")(x_bsd)

        known = self.length - self.label_length
        unknown = jnp.zeros((past.shape[0], self.horizon, self.channels), past.dtype)
        start = jnp.concatenate([past[:, known:], unknown], axis=1)
        time = jnp.concatenate([past_time[:, known:], future_time], axis=1)
        y_btd = embed("decoder_embedding")(start, time, train)
        for i in range(self.depth[1]):
            y_btd = constrain(y_btd, "batch", "sequence", None)
            attend = layer(f"decoder_{i}", decode, cross)
            y_btd = attend(y_btd, None, memory_bsd, None, None, train)
        y_btd = LayerNorm(EPSILON, "float32", name="decoder_norm")(y_btd[:, self.label_length :])
        init = fan_in_uniform(self.width)
        head = nn.Dense(self.channels, kernel_init=init, bias_init=init, name="head")
        return Output(forecast=head(y_btd), aux={"memory": memory_bsd})

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        array = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
        return {
            "past": array(self.length, self.channels),
            "past_time": array(self.length, self.time_features),
            "future_time": array(self.horizon, self.time_features),
        }

    def encoder_lengths(self) -> list[int]:
        """Return the number of steps that each layer of the encoder sees."""
        lengths = [self.length]
        for _ in range(self.depth[0] - 1):
            lengths.append((lengths[-1] + 1) // 2)
        return lengths

    def flops(self) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two."""
        encode, decode, cross = self.attentions()
        d, n, lengths = self.width, self.num_heads, self.encoder_lengths()
        steps = self.label_length + self.horizon
        mlp = 4.0 * d * self.hidden
        embedding = 2.0 * d * (3 * self.channels + self.time_features)
        encoder = sum(encode.flops(s, s, d, n) + mlp * s for s in lengths)
        distil = sum(6.0 * d * d * s for s in lengths[:-1])
        layer = decode.flops(steps, steps, d, n) + cross.flops(steps, lengths[-1], d, n)
        decoder = self.depth[1] * (layer + mlp * steps)
        head = 2.0 * self.horizon * d * self.channels
        return embedding * (self.length + steps) + encoder + distil + decoder + head

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the forecast looks in the encoder's memory, if the attention has weights.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, 1, s]`, the mean over heads and forecast steps in the last layer.
        """
        captured = captured.get(CAPTURE, captured)
        layer = captured.get(f"decoder_{self.depth[1] - 1}", {})
        if "cross" not in layer:
            return {}
        weights_bnts = layer["cross"]["probabilities"][0][:, :, self.label_length :]
        return {"forecast to past, last layer": weights_bnts.mean(axis=(1, 2))[:, None]}


TORCH_NAMES = None
"""There are no published weights."""
