# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer: patches as tokens of a pre-norm transformer, with any attention.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
arXiv 2010.11929; the tiny and small sizes are those of Touvron et al., "Training data-efficient
image transformers & distillation through attention", arXiv 2012.12877. Implemented from the
equations; parameters are named as in timm (Apache-2.0).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.embed import PatchEmbed
from attnjax.nn.initializers import LINEAR, TABLE
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import choose_attention
from attnjax.nn.stack import check_image, stack_flops, transformer_stack
from attnjax.nn.text import REMATS
from attnjax.nn.vision import fit_positions
from attnjax.ops.efficient import PatternAttention
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array
from attnjax.weights.names import conv, linear, norm, rule, stacked, stacked_linear, stacked_norm

POOLS = ("token", "mean")
CHANNELS = 3
EPSILON = 1e-6

# Base and large: Table 1 of arXiv 2010.11929; tiny and small: Table 1 of 2012.12877.
PRESETS = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3, "hidden": 768},
    "small": {"width": 384, "depth": 12, "num_heads": 6, "hidden": 1536},
    "base": {"width": 768, "depth": 12, "num_heads": 12, "hidden": 3072},
    "large": {"width": 1024, "depth": 24, "num_heads": 16, "hidden": 4096},
}


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, classes]` float32.
      aux: `features [b, d]`, what the head reads.
    """

    logits: Array
    aux: dict[str, Array]


class ViT(nn.Module):
    """Patches and positions, pre-norm layers, norm, pooling, head.

    Attributes:
      num_classes: width of the head.
      image_size: side of the square image.
      patch_size: side of a patch; divides that of the image.
      width: d.
      depth: layers.
      num_heads: n; divides the width.
      hidden: hidden width of the MLP.
      attention: of all layers, noncausal self-attention; see `choose_attention`.
      pool: "token", a class token in front of the patches, or "mean" over the patches.
      dropout: rate on embeddings and branches while training.
      attention_dropout: rate on probabilities while training.
      dtype: compute dtype; parameters and logits are float32.
      remat: what the backward pass computes again, a key of `nn.text.REMATS`.
      attention_implementation: passed to `nn.attend`.
    """

    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    attention: str | Mapping[str, Any] | None = None
    pool: str = "token"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("pool", POOLS), ("remat", tuple(REMATS))):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise RecipeError(f"model.{name}={value!r}: {nearest(value, choices)}")
        for name in (
            "num_classes", "image_size", "patch_size", "width", "depth", "num_heads", "hidden",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for divisor, whole in (("num_heads", "width"), ("patch_size", "image_size")):
            if getattr(self, whole) % getattr(self, divisor):
                raise RecipeError(
                    f"model.{divisor}={getattr(self, divisor)} must divide "
                    f"{whole}={getattr(self, whole)}"
                )
        self.make_attention()

    def make_attention(self) -> PatternAttention:
        """Return the attention of all layers.

        Raises:
          RecipeError: there is no such one, or it has no noncausal form.
        """
        return choose_attention(self.attention, field="attention")

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2 + (self.pool == "token")

    def setup(self):
        self.stem = PatchEmbed(self.width, self.patch_size, self.dtype)
        self.positions = self.param("positions", TABLE, (1, self.tokens, self.width), jnp.float32)
        if self.pool == "token":
            self.cls = self.param("cls", TABLE, (1, 1, self.width), jnp.float32)
        self.drop = nn.Dropout(self.dropout)
        self.layers = transformer_stack(
            self.depth,
            self.remat,
            num_heads=self.num_heads,
            hidden=self.hidden,
            self_attention=self.make_attention(),
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            mlp_dropout=self.dropout,
            epsilon=EPSILON,
            kernel_init=LINEAR,
            dtype=self.dtype,
            implementation=self.attention_implementation,
        )
        self.norm = LayerNorm(EPSILON, "float32")
        self.head = nn.Dense(self.num_classes, kernel_init=LINEAR)

    def __call__(self, image: Array, *, train: bool = False) -> Output:
        """Classify.

        Args:
          image: `[b, y, x, 3]` of side `image_size`.
          train: with dropout and what the attention does in training only.

        Returns:
          An `Output`.

        Raises:
          ValueError: the images have another shape.
        """
        check_image(image, self.example(1)["image"])
        x_btd = self.stem(image)
        if self.pool == "token":
            cls_b1d = jnp.broadcast_to(
                self.cls.astype(x_btd.dtype), (x_btd.shape[0], 1, self.width)
            )
            x_btd = jnp.concatenate([cls_b1d, x_btd], axis=1)
        x_btd = self.drop(x_btd + self.positions.astype(x_btd.dtype), deterministic=not train)
        x_btd = constrain(x_btd, "batch", "sequence", None)
        x_btd, _ = self.layers(x_btd, None, None, None, None, train)
        if self.pool == "token":
            features_bd = self.norm(x_btd[:, 0])
        else:
            features_bd = self.norm(x_btd).mean(axis=1)
        return Output(logits=self.head(features_bd), aux={"features": features_bd})

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        side = self.image_size
        return {"image": jax.ShapeDtypeStruct((batch, side, side, CHANNELS), jnp.float32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two."""
        d, patches = self.width, self.grid**2
        stem = 2.0 * patches * CHANNELS * self.patch_size**2 * d
        layers = stack_flops(
            self.depth, self.tokens, d, self.hidden, self.num_heads, self.make_attention()
        )
        return stem + layers + 2.0 * d * self.num_classes

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the class token looks, or all patches on average, in the last layer.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, y, x]` on the grid of patches, the mean over heads; empty where the
          attention has no map.
        """
        captured = captured.get(CAPTURE, captured)
        if "attention" not in captured.get("layers", {}):
            return {}
        weights_bnts = captured["layers"]["attention"]["probabilities"][0][-1]
        if self.pool == "token":
            title, map_bs = "class token, last layer", weights_bnts[:, :, 0, 1:].mean(axis=1)
        else:
            title, map_bs = "mean over patches, last layer", weights_bnts.mean(axis=(1, 2))
        return {title: map_bs.reshape(-1, self.grid, self.grid)}


def fit_parameter(path: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Fit a position table of another image size, bicubically; leave anything else alone.

    Args:
      path: of the parameter.
      array: its value for the other size.
      shape: the shape this model wants.

    Returns:
      The interpolated table (class token untouched), or the array as it is.
    """
    return fit_positions(array, shape) if path == "positions" else array


def _names():
    yield rule("positions", "pos_embed")
    yield rule("cls", "cls_token")
    yield from conv("stem", "patch_embed.proj")
    attention = [f"layers/attention/{part}" for part in ("query", "key", "value")]
    yield stacked([f"{path}/kernel" for path in attention], "blocks.{}.attn.qkv.weight", "in")
    yield stacked([f"{path}/bias" for path in attention], "blocks.{}.attn.qkv.bias", "vector")
    for ours, theirs, layout in (
        ("attention/out", "attn.proj", "out"),
        ("mlp/up", "mlp.fc1", "in"),
        ("mlp/down", "mlp.fc2", "in"),
    ):
        yield from stacked_linear(f"layers/{ours}", f"blocks.{{}}.{theirs}", layout)
    for ours, theirs in (("attention_norm", "norm1"), ("mlp_norm", "norm2")):
        yield from stacked_norm(f"layers/{ours}", f"blocks.{{}}.{theirs}")
    yield from norm("norm", "norm")
    yield from linear("head", "head")


TORCH_NAMES = {"timm": tuple(_names())}
"""Layout -> name table. Only softmax attention and the class token are in it."""

INERT = (r"/key/bias$",)
"""Patterns of parameters that cannot change the output: a key bias moves all scores of a query."""
