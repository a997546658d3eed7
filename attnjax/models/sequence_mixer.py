# SPDX-License-Identifier: Apache-2.0
"""A plain sequence model around any token mixer: what the long-sequence benchmark compares.

He and Kabic, "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
arXiv 2302.06218. That tokens pass through bias, mixing and a nonlinearity is how its nomenclature
reads; the block (norm, mixer, residual, channel MLP, residual), sizes and heads are our design: no
reference code was found, and only the abstract and the nomenclature could be read.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.blocks import Mlp
from attnjax.nn.initializers import LINEAR, TABLE, fan_in_uniform
from attnjax.nn.norm import LayerNorm
from attnjax.ops import mixers
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array

PAPER = {
    "title": "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
    "id": "arXiv:2302.06218",
    "year": 2023,
    "code": "no repository found",
    "licence": "none stated",
    "claim": "Longer context improves performance, depending on the application.",
}

POOLS = ("mean", "last", "none", "pair")
REMATS = ("none", "blocks")

# Our own sizes: no table of the paper was available, and there is no reference code.
PRESETS = {
    "small": {"dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0},
    "big": {"dim": 512, "depth": 6, "num_heads": 8, "mlp_ratio": 4.0},
}


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: float32 `[b, classes]`, or `[b, t, classes]` (pool "none").
      aux: `features`, what the head read, `[b, d']` or `[b, t, d]`.
    """

    logits: Array
    aux: dict[str, Array]


class MixerBlock(nn.Module):
    """x <- x + mixer(norm(x)); x <- x + mlp(norm(x)).

    Attributes:
      mixer: the token mixer.
      num_heads: its heads.
      hidden: hidden width of the MLP.
      dropout: rate on both branches while training.
      dtype: compute dtype.
    """

    mixer: mixers.Mixer
    num_heads: int
    hidden: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None, train: bool = False) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`; `valid [b, t]` is False at padding."""
        _, t, d = x.shape
        params = self.param("mixer", self.mixer.init, t, d, self.num_heads)
        normal_btd = LayerNorm(dtype=self.dtype, name="mixer_norm")(x)
        is_shown = self.is_mutable_collection(CAPTURE) and not self.is_initializing()
        if is_shown and isinstance(self.mixer, mixers.Attention):
            matrix_bnts = self.mixer.dense_matrix(params, normal_btd, valid)
            self.sow(CAPTURE, "probabilities", matrix_bnts.astype(jnp.float32))
        branch_btd = self.mixer.apply(params, normal_btd, valid)
        branch_btd = nn.Dropout(self.dropout, deterministic=not train)(branch_btd)
        x = constrain(x + branch_btd, "batch", "sequence", None)
        normal_btd = LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        mlp = Mlp(self.hidden, self.dropout, self.dtype, name="mlp")
        return constrain(x + mlp(normal_btd, train=train), "batch", "sequence", None)


class SequenceMixer(nn.Module):
    """Embedding, positions, blocks of one mixer, pooling, head.

    Attributes:
      length: tokens of a sequence.
      vocab: number of tokens, 0 being padding; 0 reads `values` instead of `tokens`.
      channels: numbers at a position of `values`.
      num_classes: width of the head.
      dim: model width.
      depth: number of blocks.
      num_heads: heads of the mixer.
      mlp_ratio: hidden width of the channel MLP / width.
      mixer: a name in `ops.mixers.MIXERS`.
      mixer_options: fields of that mixer.
      bias: how positions enter, one of `ops.mixers.BIASES`.
      pool: "mean" over what is no padding, the "last" position, "none" for an answer at every
        position, or "pair": `tokens [b, 2, t]` are two sequences, compared.
      dropout: rate on branches and hidden units while training.
      dtype: compute dtype; parameters and logits are float32.
      remat: "none", or "blocks" to recompute blocks in the backward pass.
      attention_implementation: passed to `ops.attention` by mixers that take it.
    """

    length: int = 1024
    vocab: int = 0
    channels: int = 1
    num_classes: int = 10
    dim: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    mixer: str = "softmax"
    mixer_options: dict | None = None
    bias: str = "sinusoid"
    pool: str = "mean"
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        for field, choices in (("bias", mixers.BIASES), ("pool", POOLS), ("remat", REMATS)):
            if getattr(self, field) not in choices:
                raise RecipeError(
                    f"{field}={getattr(self, field)!r}: {nearest(getattr(self, field), choices)}"
                )
        for field in ("length", "num_classes", "dim", "depth", "num_heads"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.dim % self.num_heads:
            raise RecipeError(f"num_heads={self.num_heads} does not divide dim={self.dim}")
        if self.vocab < 0 or (self.vocab == 0 and self.channels < 1):
            raise RecipeError(f"vocab={self.vocab}, channels={self.channels}: nothing to read")
        if self.pool == "pair" and not self.vocab:
            raise RecipeError("pool='pair' compares two sequences of tokens: vocab must not be 0")
        self.build_mixer()
        super().__post_init__()

    def build_mixer(self) -> mixers.Mixer:
        """Return the mixer of all blocks.

        Raises:
          RecipeError: unknown name or options, or rotary positions for one without queries.
        """
        options = dict(self.mixer_options or {})
        family = mixers.MIXERS.get(self.mixer)
        fields = getattr(family, "__dataclass_fields__", {})
        if self.bias == "rotary":
            if family is not None and "rotary" not in fields:
                raise RecipeError(
                    f"bias='rotary': mixer {self.mixer!r} has no queries to rotate; choose from "
                    f"{', '.join(b for b in mixers.BIASES if b != 'rotary')}"
                )
            options["rotary"] = True
        if self.attention_implementation is not None and "implementation" in fields:
            options.setdefault("implementation", self.attention_implementation)
        try:
            return mixers.make(self.mixer, **options)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"mixer={self.mixer!r}: {error}") from error

    @nn.compact
    def __call__(
        self, tokens: Array | None = None, values: Array | None = None, *, train: bool = False
    ) -> Output:
        """Answer about sequences.

        Args:
          tokens: int `[b, t]`, or `[b, 2, t]` (pool "pair"); padding (0) is left out by the pools
            "mean" and "pair", and a token like any other for the rest.
          values: `[b, t, channels]` floating, when `vocab` is 0.
          train: dropout, with the "dropout" key.

        Returns:
          An `Output`.

        Raises:
          ValueError: the input is missing or has the wrong shape.
        """
        ((name, expected),) = self.example(1).items()
        array = {"tokens": tokens, "values": values}[name]
        if array is None or array.shape[1:] != expected.shape[1:]:
            found = "nothing" if array is None else array.shape
            raise ValueError(f"{name} must be [b, *{expected.shape[1:]}], got {found}")
        x_btd, valid_bt = self._embed(array)
        table = None
        if self.bias == "learnt":
            table = self.param("positions", TABLE, (self.length, self.dim), jnp.float32)
        x_btd = mixers.inductive_bias(self.bias, x_btd, table)
        x_btd = constrain(x_btd, "batch", "sequence", None)
        block = nn.remat(MixerBlock, static_argnums=(3,)) if self.remat == "blocks" else MixerBlock
        for i in range(self.depth):
            x_btd = block(
                self.build_mixer(), self.num_heads, int(self.dim * self.mlp_ratio), self.dropout,
                self.dtype, name=f"block_{i}",
            )(x_btd, valid_bt, train)  # fmt: skip
        x_btd = LayerNorm(dtype="float32", name="norm")(x_btd)
        features = self._pool(x_btd, valid_bt)
        head = nn.Dense(self.num_classes, kernel_init=LINEAR, name="head")
        return Output(logits=head(features), aux={"features": features})

    def _embed(self, array):
        if not self.vocab:
            init = fan_in_uniform(self.channels)
            stem = nn.Dense(
                self.dim, dtype=self.dtype, kernel_init=init, bias_init=init, name="stem"
            )
            return stem(array), None
        tokens_bt = array.reshape(-1, self.length)
        table = self.param("embedding", nn.initializers.normal(1.0), (self.vocab, self.dim))
        valid_bt = tokens_bt != 0 if self.pool in ("mean", "pair") else None
        return table.astype(self.dtype)[tokens_bt], valid_bt

    def _pool(self, x_btd, valid_bt):
        if self.pool == "none":
            return x_btd
        if self.pool == "last":
            return x_btd[:, -1]
        if valid_bt is None:
            return x_btd.mean(axis=1)
        weight_bt1 = valid_bt[..., None].astype(x_btd.dtype)
        mean_bd = (x_btd * weight_bt1).sum(axis=1) / jnp.maximum(weight_bt1.sum(axis=1), 1)
        if self.pool == "mean":
            return mean_bd
        first_bd, second_bd = mean_bd[::2], mean_bd[1::2]
        parts = [first_bd, second_bd, first_bd * second_bd, first_bd - second_bd]
        return jnp.concatenate(parts, axis=-1)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        if not self.vocab:
            shape = (batch, self.length, self.channels)
            return {"values": jax.ShapeDtypeStruct(shape, jnp.float32)}
        pair = (2,) if self.pool == "pair" else ()
        return {"tokens": jax.ShapeDtypeStruct((batch, *pair, self.length), jnp.int32)}

    def flops(self) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two."""
        t, d, ways = self.length, self.dim, 2 if self.pool == "pair" else 1
        mlp = 4.0 * t * d * int(d * self.mlp_ratio)
        blocks = self.depth * (self.build_mixer().flops(t, d, self.num_heads) + mlp)
        stem = 0.0 if self.vocab else 2.0 * t * self.channels * d
        width = {"none": t * d, "pair": 4 * d}.get(self.pool, d)
        return ways * (blocks + stem) + 2.0 * width * self.num_classes

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return how much each position is looked at in the last block, if the mixer has weights.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, 1, t]`, the mean over heads and queries; empty without attention.
        """
        captured = captured.get(CAPTURE, captured)
        last = f"block_{self.depth - 1}"
        if last not in captured:
            return {}
        return {
            f"{self.mixer}, last block": captured[last]["probabilities"][0].mean(axis=(1, 2))[
                :, None
            ]
        }


TORCH_NAMES = None
"""There are no published weights."""

FROZEN = (r"/random_projection$",)
"""Patterns (`re.search`) of parameters that are not trained and must not decay."""
