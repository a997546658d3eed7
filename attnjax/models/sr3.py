# SPDX-License-Identifier: Apache-2.0
"""SR3: a U-Net that denoises a picture beside its enlarged low-resolution version.

Saharia et al., "Image Super-Resolution via Iterative Refinement", arXiv 2104.07636, as the public
code has it that CAB (arXiv 2210.07661) runs its super-resolution on, with any attention between the
pixels: github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement. That code attends with
one head and has no biases on query, key and value; here the shell of all attentions has them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.diffusion import (
    ORTHOGONAL,
    Downsample,
    LevelEmbed,
    PictureAttention,
    ResidualBlock,
    Upsample,
)
from attnjax.nn.norm import GroupNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.ops.efficient import PatternAttention
from attnjax.registry import nearest
from attnjax.typing import Array

PAPER = {
    "title": "Image Super-Resolution via Iterative Refinement",
    "id": "arXiv:2104.07636",
    "year": 2021,
    "code": "https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement",
    "licence": "Apache-2.0",
    "claim": "People take enlarged faces for photographs in nearly half of the cases.",
}

# Faces: the reference code of CAB, tasks/SR/sr_sr3_16_128.json. The others are our own sizes.
PRESETS = {
    "16-128": {"image_size": 128, "width": 64, "multipliers": (1, 2, 4, 8, 8), "depth": 2},
    "16-64": {
        "image_size": 64,
        "width": 32,
        "multipliers": (1, 2, 4),
        "depth": 1,
        "attention_sides": (16, 32),
        "groups": 8,
        "dropout": 0.0,
    },
    "4-8": {
        "image_size": 8,
        "channels": 1,
        "width": 32,
        "multipliers": (1, 2),
        "depth": 1,
        "attention_sides": (8,),
        "groups": 8,
        "dropout": 0.0,
    },
}

ATTENTION_SIDES = (16, 32, 64, 128)
SOFTMAX_SIDES = (16, 32, 64)
"""Sides of pictures whose pixels attend to each other: CAB leaves 128 out for softmax, whose cost
is quadratic."""

REMATS = ("none", "blocks")


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      noise: float32 `[b, y, x, c]`, the noise that it sees in the picture.
      aux: `features`, the middle of the U, `[b, y', x', c']`.
    """

    noise: Array
    aux: dict[str, Array]


class Stage(NamedTuple):
    """One size of the U.

    Attributes:
      side: of its pictures.
      channels: of its blocks.
      attends: whether its blocks end with attention.
    """

    side: int
    channels: int
    attends: bool


class SR3(nn.Module):
    """Down through the stages, the middle, and up again beside what was kept on the way down.

    Attributes:
      image_size: side of the pictures; divisible by 2^(stages - 1).
      channels: colours c of a picture.
      width: channels of the first stage and of the noise-level vector.
      multipliers: channels of every stage / width.
      depth: residual blocks per stage on the way down; one more on the way up.
      attention: name or mapping of the attention; see `nn.pattern_attention.choose_attention`.
      attention_sides: sides of stages that attend; None: `ATTENTION_SIDES`, of softmax
        `SOFTMAX_SIDES`. The middle always attends.
      num_heads: heads; divides the channels of stages that attend.
      groups: of the norms; divides all channels.
      dropout: rate inside residual blocks while training.
      dtype: compute dtype; parameters, norms' statistics and the output are float32.
      remat: "none", or "blocks" to recompute blocks in the backward pass.
      attention_implementation: passed to `nn.attend`.
    """

    image_size: int = 128
    channels: int = 3
    width: int = 64
    multipliers: tuple = (1, 2, 4, 8, 8)
    depth: int = 2
    attention: str | Mapping[str, Any] | None = None
    attention_sides: tuple | None = None
    num_heads: int = 1
    groups: int = 32
    dropout: float = 0.2
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        for field in ("image_size", "channels", "width", "depth", "num_heads", "groups"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)}: must be at least 1")
        if not self.multipliers or any(m < 1 for m in self.multipliers):
            raise RecipeError(f"multipliers={self.multipliers}: must be positive, at least one")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.remat not in REMATS:
            raise RecipeError(f"remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        halvings = 2 ** (len(self.multipliers) - 1)
        if self.image_size % halvings:
            raise RecipeError(
                f"image_size={self.image_size}: must be a multiple of {halvings} to be halved "
                f"{len(self.multipliers) - 1} times"
            )
        for multiplier in self.multipliers:
            channels = self.width * multiplier
            if self.width % self.groups or channels % self.num_heads:
                raise RecipeError(
                    f"groups={self.groups} must divide width={self.width}, and "
                    f"num_heads={self.num_heads} the {channels} channels of a stage"
                )
        if self.width % 2:
            raise RecipeError(f"width={self.width}: must be even, for sines and cosines")
        self.choose()
        sides = [stage.side for stage in self.stages()]
        for side in self.attention_sides or ():
            if side not in sides:
                raise RecipeError(f"attention_sides: no stage has side {side}; sides are {sides}")
        super().__post_init__()

    def choose(self) -> PatternAttention:
        """Return what attends; RecipeError if it has no form for noncausal self-attention."""
        return choose_attention(self.attention, field="attention")

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages from the largest pictures to the smallest."""
        sides = self.attention_sides
        if sides is None:
            sides = SOFTMAX_SIDES if self.choose().is_exact else ATTENTION_SIDES
        halved = [self.image_size // 2**i for i in range(len(self.multipliers))]
        return tuple(
            Stage(side, self.width * multiplier, side in sides)
            for side, multiplier in zip(halved, self.multipliers, strict=True)
        )

    @nn.compact
    def __call__(
        self, noisy: Array, low: Array, noise_level: Array, *, train: bool = False
    ) -> Output:
        """See the noise in pictures.

        Args:
          noisy: floating `[b, y, x, c]`, with noise.
          low: the low-resolution pictures, enlarged to the same shape, in [-1, 1].
          noise_level: `[b]`, signal level of the noisy pictures (`ops.diffusion`).
          train: with dropout, and with what the attention does in training only.

        Returns:
          An `Output`.

        Raises:
          ValueError: an input has the wrong shape.
        """
        for name, array in (("noisy", noisy), ("low", low), ("noise_level", noise_level)):
            expected = self.example(array.shape[0])[name].shape
            if array.shape != expected or array.shape[0] != noisy.shape[0]:
                raise ValueError(f"{name} must be [b, *{expected[1:]}], got {array.shape}")
        vector_bd = LevelEmbed(self.width, 4 * self.width, dtype=self.dtype, name="level")(
            noise_level
        )
        conv = lambda features, dtype, name: nn.Conv(
            features, (3, 3), padding=1, dtype=dtype, kernel_init=ORTHOGONAL, name=name
        )
        x_byxc = jnp.concatenate([low, noisy], axis=-1)
        x_byxc = conv(self.width, self.dtype, "stem")(x_byxc)
        kept, stages = [x_byxc], self.stages()
        for i, stage in enumerate(stages):
            for j in range(self.depth):
                x_byxc = self._block(f"down_{i}_{j}", stage, x_byxc, vector_bd, train)
                kept.append(x_byxc)
            if i < len(stages) - 1:
                x_byxc = Downsample(dtype=self.dtype, name=f"shrink_{i}")(x_byxc)
                kept.append(x_byxc)
        for j in range(2):
            middle = stages[-1]._replace(attends=j == 0)
            x_byxc = self._block(f"middle_{j}", middle, x_byxc, vector_bd, train)
        features_byxc = x_byxc
        for i, stage in reversed(list(enumerate(stages))):
            for j in range(self.depth + 1):
                x_byxc = jnp.concatenate([x_byxc, kept.pop()], axis=-1)
                x_byxc = self._block(f"up_{i}_{j}", stage, x_byxc, vector_bd, train)
            if i:
                x_byxc = Upsample(dtype=self.dtype, name=f"grow_{i}")(x_byxc)
        x_byxc = jax.nn.swish(GroupNorm(self.groups, name="final_norm")(x_byxc))
        noise_byxc = conv(self.channels, "float32", "final")(x_byxc)
        return Output(noise=noise_byxc, aux={"features": features_byxc})

    def _block(self, name, stage, x_byxc, vector_bd, train):
        """One residual block and, where the stage attends, attention."""
        is_remat = self.remat == "blocks"
        residual = nn.remat(ResidualBlock, static_argnums=(3,)) if is_remat else ResidualBlock
        x_byxc = residual(
            stage.channels, self.groups, self.dropout, dtype=self.dtype, name=name
        )(x_byxc, vector_bd, train)  # fmt: skip
        if not stage.attends:
            return x_byxc
        attend = nn.remat(PictureAttention, static_argnums=(2,)) if is_remat else PictureAttention
        return attend(
            self.choose(), self.num_heads, self.groups, dtype=self.dtype,
            implementation=self.attention_implementation, name=f"{name}_attention",
        )(x_byxc, train)  # fmt: skip

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        shape = (batch, self.image_size, self.image_size, self.channels)
        picture = jax.ShapeDtypeStruct(shape, jnp.float32)
        level = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return {"noisy": picture, "low": picture, "noise_level": level}

    def flops(self) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two."""
        conv = lambda side, inputs, outputs: 18.0 * side * side * inputs * outputs
        stages, size = self.stages(), self.image_size

        def block(stage, inputs):
            residual = ResidualBlock(stage.channels, parent=None)
            total = residual.flops(stage.side, inputs, self.width)
            if stage.attends:
                tokens = stage.side**2
                total += self.choose().flops(tokens, tokens, stage.channels, self.num_heads)
            return total

        total = 2.0 * 8 * self.width**2 + conv(size, 2 * self.channels, self.width)
        x, kept = self.width, [self.width]
        for i, stage in enumerate(stages):
            for _ in range(self.depth):
                total += block(stage, x)
                x = stage.channels
                kept.append(x)
            if i < len(stages) - 1:
                total += conv(stage.side // 2, x, x)
                kept.append(x)
        total += sum(block(stages[-1]._replace(attends=a), x) for a in (True, False))
        for i, stage in reversed(list(enumerate(stages))):
            for _ in range(self.depth + 1):
                total += block(stage, x + kept.pop())
                x = stage.channels
            if i:
                total += conv(2 * stage.side, x, x)
        return total + conv(size, x, self.channels)

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return how much each pixel of the middle is looked at, if the attention has a map.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, y, x]`, the mean over heads and queries; empty where there is no map.
        """
        captured = captured.get(CAPTURE, captured)
        if "middle_0_attention" not in captured:
            return {}
        side = self.stages()[-1].side
        map_bnts = captured["middle_0_attention"]["attention"]["probabilities"][0]
        return {"attention in the middle": map_bnts.mean(axis=(1, 2)).reshape(-1, side, side)}


TORCH_NAMES = None
"""CAB has published no weights, and those of SR3 lack the biases of query, key and value."""

PARAM_AXES = (
    (r"\bfirst/kernel$", ("embed", "mlp")),
    (r"\bsecond/kernel$", ("mlp", "embed")),
    (r"\bfinal/kernel$", ("embed", None)),
)
"""The two convolutions of a block are divided as the two matrices of an MLP."""
