# SPDX-License-Identifier: Apache-2.0
"""MoH-ViT: TransNeXt whose attention heads are experts that tokens choose.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, on Shi,
"TransNeXt", arXiv 2311.17132; sizes, initialisation and gates from the released code. Four stages,
each of which halves the picture; without numbers of heads it is plain TransNeXt. The same heads in
a decoder: presets `moh_s`, `moh_b` and `moh_llama3_8b` of `decoder`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.aggregated_attention import HIDDEN, WINDOW, AggregatedAttention, ConvolutionalGlu
from attnjax.nn.attention import CAPTURE
from attnjax.nn.blocks import drop_branch
from attnjax.nn.head_mixture import HeadMixture
from attnjax.nn.initializers import fan_out_normal
from attnjax.nn.norm import LayerNorm
from attnjax.nn.stack import check_image
from attnjax.nn.text import REMATS
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array
from attnjax.weights.names import conv, linear, norm, output, projections, rule

PAPER = {
    "title": "MoH: Multi-Head Attention as Mixture-of-Head Attention",
    "id": "arXiv:2410.11842",
    "year": 2024,
    "code": "https://github.com/SkyworkAI/MoH",
    "licence": "Apache-2.0",
    "claim": "With half to nine tenths of its heads at work for a token, attention is as good as "
    "with all of them.",
}

_SMALL = {
    "widths": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5),
    "drop_path": 0.45,
}  # fmt: skip
_BASE = {
    "widths": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5),
    "drop_path": 0.6,
}  # fmt: skip
# Table 2 and the reference code's configurations; "dense" is TransNeXt, without gates.
PRESETS = {
    "small_dense": _SMALL,
    "small_80": {**_SMALL, "shared": (3, 6, 3, 8), "chosen": (0, 0, 6, 12)},
    "small_75": {**_SMALL, "shared": (3, 6, 3, 4), "chosen": (0, 0, 6, 12)},
    "base_dense": _BASE,
    "base_75": {**_BASE, "shared": (4, 8, 4, 5), "chosen": (0, 0, 8, 16)},
    "base_50": {**_BASE, "shared": (2, 2, 2, 4), "chosen": (2, 4, 6, 8)},
    "tiny": {
        "num_classes": 10, "image_size": 64, "widths": (16, 16, 32, 32), "num_heads": (2, 2, 4, 4),
        "depths": (1, 1, 1, 1), "ratios": (2, 2, 2, 2), "shared": (2, 1, 1, 2),
        "chosen": (0, 1, 2, 1),
    },
}  # fmt: skip

CHANNELS, STAGES, EPSILON = 3, 4, 1e-6
STEMS = ((7, 4), (3, 2), (3, 2), (3, 2))
"""Side and stride of each stage's convolution."""
POOLS = (8, 4, 2, 1)
"""How much coarser than the grid of a stage its pooled keys are."""

TRUNCATED = nn.initializers.truncated_normal(0.02)


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, num_classes]` float32.
      aux: `features [b, d]` of the last stage; with a mixture of heads float32 scalars
        `balance_loss`, the mean over layers that choose heads, and `penalty`, its weighted value.
    """

    logits: Array
    aux: dict[str, Array]


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + glu(norm(x)), branches dropped per example in training.

    Attributes:
      hidden: hidden width of the gated convolution.
      rate: of dropping a branch.
      attention: fields of `AggregatedAttention`, as pairs.
    """

    hidden: int
    rate: float
    attention: tuple

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Map `x [b, t, d]`; returns the same, and measures of the mixture of heads."""
        fields = dict(self.attention)
        normal = lambda name, x: LayerNorm(EPSILON, fields["dtype"], name=name)(x)
        branch, measures = AggregatedAttention(**fields, name="attention")(
            normal("attention_norm", x)
        )
        drop = lambda branch: drop_branch(self, branch, self.rate, train)
        x = constrain(x + drop(branch), "batch", "sequence", None)
        glu = ConvolutionalGlu(self.hidden, fields["grid"], fields["dtype"], TRUNCATED, name="mlp")
        branch = glu(normal("mlp_norm", x))
        return constrain(x + drop(branch), "batch", "sequence", None), measures


class MixtureOfHeadViT(nn.Module):
    """Four stages of overlapping patches and blocks, mean over the places, head.

    Attributes:
      num_classes: width of the head.
      image_size: side of the square image, a multiple of 32.
      widths: d of every stage.
      num_heads: n of every stage; divides its width.
      depths: blocks of every stage.
      ratios: hidden over model width, before the two thirds of a gated unit.
      shared: heads of every stage that are always on; None: all heads without gates.
      chosen: heads of every stage that a token chooses among the others; none where all are shared.
      balance: weight of the balance loss.
      drop_path: rate of dropping a residual branch in the last block, rising linearly from 0.
      dtype: compute dtype; parameters and logits are float32.
      remat: what the backward pass computes again, a key of `nn.text.REMATS`.
      attention_implementation: passed to `nn.attend`.
    """

    num_classes: int = 1000
    image_size: int = 224
    widths: tuple = (72, 144, 288, 576)
    num_heads: tuple = (3, 6, 12, 24)
    depths: tuple = (5, 5, 22, 5)
    ratios: tuple = (8, 8, 4, 4)
    shared: tuple | None = None
    chosen: tuple | None = None
    balance: float = 0.01
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.remat not in REMATS:
            raise RecipeError(f"model.remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        for name in ("widths", "num_heads", "depths", "ratios"):
            values = getattr(self, name)
            if len(values) != STAGES or min(values) < 1:
                raise RecipeError(f"model.{name}={values}: must be {STAGES} numbers of at least 1")
        if self.num_classes < 1:
            raise RecipeError(f"model.num_classes={self.num_classes}: must be at least 1")
        if self.image_size < 32 or self.image_size % 32:
            raise RecipeError(f"model.image_size={self.image_size}: must be a multiple of 32")
        if not 0 <= self.drop_path < 1:
            raise RecipeError(f"model.drop_path={self.drop_path}: must be in [0, 1)")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise RecipeError(
                    f"model.widths={self.widths}: must be multiples of num_heads={self.num_heads}"
                )
        if (self.shared is None) != (self.chosen is None):
            raise RecipeError(
                f"model.shared={self.shared}, chosen={self.chosen}: give both or neither"
            )
        for name in ("shared", "chosen"):
            values = getattr(self, name)
            if values is not None and len(values) != STAGES:
                raise RecipeError(f"model.{name}={values}: must be {STAGES} numbers")
        self.mixtures()

    def mixtures(self) -> list[HeadMixture | None]:
        """Return how the heads of every stage are chosen.

        Raises:
          RecipeError: the numbers of heads do not go together.
        """
        if self.shared is None:
            return [None] * STAGES
        fields = zip(self.shared, self.chosen, self.num_heads, strict=True)
        return [
            HeadMixture.of({"shared": s, "top_k": k, "balance": self.balance}, n)
            for s, k, n in fields
        ]

    def grid(self, stage: int) -> int:
        """Return the places along a side of a stage's grid."""
        return self.image_size // 4 // 2**stage

    def pool(self, stage: int) -> int:
        """Return the places along a side of a stage's pooled keys."""
        return max(self.grid(stage) // POOLS[stage], 1)

    def hidden(self, stage: int) -> int:
        """Return the hidden width of a stage's gated convolutions."""
        return 2 * self.widths[stage] * self.ratios[stage] // 3

    def activated(self) -> float:
        """Return the share of heads that work for a token, over all layers."""
        working = self.num_heads
        if self.shared is not None:
            working = [s + k for s, k in zip(self.shared, self.chosen, strict=True)]
        total = lambda heads: sum(d * n for d, n in zip(self.depths, heads, strict=True))
        return total(working) / total(self.num_heads)

    def setup(self):
        mixtures, block = self.mixtures(), Block
        if REMATS[self.remat] is not None:
            block = nn.remat(Block, policy=REMATS[self.remat], static_argnums=(2,))
        routing = sum(d for d, m in zip(self.depths, mixtures, strict=True) if m and m.top_k)
        total, number = sum(self.depths), 0
        stems, blocks, norms, stem_norms = [], [], [], []
        for stage, ((side, stride), width) in enumerate(zip(STEMS, self.widths, strict=True)):
            stems.append(
                nn.Conv(
                    width, (side, side), (stride, stride), padding=side // 2, dtype=self.dtype,
                    kernel_init=fan_out_normal(side * side * width),
                )
            )  # fmt: skip
            stem_norms.append(LayerNorm(1e-5, self.dtype))
            grid, pool = self.grid(stage), self.pool(stage)
            fields = {
                "num_heads": self.num_heads[stage], "grid": (grid, grid), "pool": (pool, pool),
                "mixture": mixtures[stage], "depth": max(routing, 1), "dtype": self.dtype,
                "implementation": self.attention_implementation, "kernel_init": TRUNCATED,
            }  # fmt: skip
            layers = []
            for _ in range(self.depths[stage]):
                rate = self.drop_path * number / max(total - 1, 1)
                layers.append(block(self.hidden(stage), rate, tuple(fields.items())))
                number += 1
            blocks.append(layers)
            norms.append(LayerNorm(EPSILON, self.dtype))
        self.stems, self.stem_norms, self.blocks, self.norms = stems, stem_norms, blocks, norms
        self.head = nn.Dense(self.num_classes, kernel_init=TRUNCATED)

    def __call__(self, image: Array, *, train: bool = False) -> Output:
        """Classify.

        Args:
          image: `[b, y, x, 3]` of side `image_size`.
          train: drop branches, with the "dropout" key.

        Returns:
          An `Output`.

        Raises:
          ValueError: the images have another shape.
        """
        check_image(image, self.example(1)["image"])
        x, losses, penalty = image.astype(self.dtype), [], jnp.zeros((), jnp.float32)
        for stage, mixture in enumerate(self.mixtures()):
            x = self.stems[stage](x)
            b, side, _, d = x.shape
            x = self.stem_norms[stage](x.reshape(b, side * side, d))
            for block in self.blocks[stage]:
                x, measures = block(x, train)
                if mixture is not None and mixture.top_k:
                    losses.append(measures["balance_loss"])
                    penalty = penalty + measures["penalty"]
            x = self.norms[stage](x)
            if stage < STAGES - 1:
                x = x.reshape(b, side, side, d)
        features_bd = x.astype(jnp.float32).mean(axis=1)
        aux = {"features": features_bd}
        if losses:
            aux |= {"balance_loss": jnp.mean(jnp.stack(losses)), "penalty": penalty}
        return Output(logits=self.head(features_bd), aux=aux)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        side = self.image_size
        return {"image": jax.ShapeDtypeStruct((batch, side, side, CHANNELS), jnp.float32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two.

        All heads are counted for all tokens, as they are computed.
        """
        total, channels = 2.0 * self.widths[-1] * self.num_classes, CHANNELS
        for stage, ((side, _), d) in enumerate(zip(STEMS, self.widths, strict=True)):
            t, pool, hidden = self.grid(stage) ** 2, self.pool(stage) ** 2, self.hidden(stage)
            total += 2.0 * t * side * side * channels * d
            block = t * (4 * d * d + 3 * d * hidden + 9 * hidden) + 2 * t * pool * d
            if pool != t:
                # The pooled branch, the window's scores and values, and its learnt tokens.
                block += t * d * d + 2 * pool * d * d + 4 * t * WINDOW**2 * d
            block += HIDDEN * self.num_heads[stage] * t
            total += 2.0 * self.depths[stage] * block
            channels = d
        return total

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where all places look on average, in the last block.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, y, x]` on the last stage's grid, the mean over heads.
        """
        captured = captured.get(CAPTURE, captured)
        last = f"blocks_{STAGES - 1}_{self.depths[-1] - 1}"
        (weights_bnts,) = captured[last]["attention"]["probabilities"]
        side = self.grid(STAGES - 1)
        map_bs = weights_bnts.mean(axis=(1, 2))
        return {"mean over places, last block": map_bs.reshape(-1, side, side)}


INERT = (r"^blocks_3_\d+/attention/position_bias/down/bias$",)
"""Patterns of parameters that cannot change the output: among keys of one kind only, a constant."""


def _names():
    for stage in range(STAGES):
        yield from conv(f"stems_{stage}", f"patch_embed{stage + 1}.proj")
        yield from norm(f"stem_norms_{stage}", f"patch_embed{stage + 1}.norm")
        yield from norm(f"norms_{stage}", f"norm{stage + 1}")
        ours, theirs = f"blocks_{stage}_{{}}", f"block{stage + 1}.{{}}"
        attention, other = f"{ours}/attention", f"{theirs}.attn"
        yield from norm(f"{ours}/attention_norm", f"{theirs}.norm1")
        yield from norm(f"{ours}/mlp_norm", f"{theirs}.norm2")
        if POOLS[stage] == 1:
            yield from projections(attention, f"{other}.qkv", ("query", "key", "value"))
        else:
            yield from projections(attention, f"{other}.q", ("query",))
            yield from projections(attention, f"{other}.kv", ("key", "value"))
            yield rule(f"{attention}/reduce/kernel", f"{other}.sr.weight", "conv_1x1")
            yield rule(f"{attention}/reduce/bias", f"{other}.sr.bias")
            yield from norm(f"{attention}/reduce_norm", f"{other}.norm")
            yield rule(f"{attention}/near_bias", f"{other}.relative_pos_bias_local")
            yield rule(f"{attention}/near_tokens", f"{other}.learnable_tokens")
            yield rule(f"{attention}/near_offset", f"{other}.learnable_bias", "middle")
        yield from output(f"{attention}/out", f"{other}.proj")
        yield rule(f"{attention}/temperature", f"{other}.temperature", "last")
        yield rule(f"{attention}/query_embedding", f"{other}.query_embedding", "middle")
        for part, name in (("up", "cpb_fc1"), ("down", "cpb_fc2")):
            yield from linear(f"{attention}/position_bias/{part}", f"{other}.{name}")
        for part, name in (("routed", "wg"), ("types", "wg_0"), ("shared", "wg_1")):
            yield rule(f"{attention}/router/{part}/kernel", f"{other}.{name}.weight", "in")
        parts = [f"{ours}/mlp/{part}" for part in ("gate", "value")]
        yield rule([f"{part}/kernel" for part in parts], f"{theirs}.mlp.fc1.weight", "in")
        yield rule([f"{part}/bias" for part in parts], f"{theirs}.mlp.fc1.bias", "vector")
        yield from conv(f"{ours}/mlp/depthwise", f"{theirs}.mlp.dwconv.dwconv")
        yield from linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    yield from linear("head", "head")


TORCH_NAMES = {"release": tuple(_names())}
"""Layout -> name table of the authors' code."""
