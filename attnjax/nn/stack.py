# SPDX-License-Identifier: Apache-2.0
"""Transformer layers stacked by a scan, and the tokens that go in: shared by all text backbones."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnjax.nn.attention import CAPTURE
from attnjax.nn.initializers import TABLE
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import RANDOM
from attnjax.nn.text import HIDDEN, INPUT, REMATS, TokenTable
from attnjax.nn.transformer import TransformerLayer
from attnjax.ops.efficient import PatternAttention, Stream
from attnjax.ops.mask import Mask
from attnjax.parallel.constrain import constrain, gather
from attnjax.typing import Array


class StackedLayer(TransformerLayer):
    """A `TransformerLayer` as the body of a scan.

    When the collection "hidden" is mutable, the input `[b, t, d]` is sown there.
    """

    def __call__(
        self,
        x: Array,
        valid: Array | None,
        context: Array | None,
        context_valid: Array | None,
        mask: Mask | Array | None,
        train: bool,
    ) -> tuple[Array, None]:
        """Map `x [b, t, d]`; arguments as in `TransformerLayer`."""
        if self.is_mutable_collection(HIDDEN) and not self.is_initializing():
            self.sow(HIDDEN, "input", x)
        x = checkpoint_name(x, INPUT)
        return super().__call__(x, valid, context, context_valid, mask, train), None

    def step(self, x: Array, stream: Stream, memory: Any) -> tuple[Array, Stream]:
        return super().step(x, stream, memory)

    def remember(self, context: Array, context_valid: Array | None) -> tuple[Array, Any]:
        """Return the context and what `step` needs of it; it is as wide as the layer."""
        return context, super().remember(context, context.shape[-1], context_valid)


def transformer_stack(depth: int, remat: str = "none", **fields: Any) -> nn.Module:
    """Return `depth` layers as one module whose parameters have a leading axis of layers.

    Args:
      depth: number of layers.
      remat: a key of `nn.text.REMATS`: what the backward pass computes again.
      **fields: of `TransformerLayer`.

    Returns:
      A module with the methods of `StackedLayer`; streams and memories have a leading axis of
      layers, too.
    """
    layer = StackedLayer
    if REMATS[remat] is not None:
        layer = nn.remat(layer, policy=REMATS[remat], prevent_cse=False, static_argnums=(6,))
    scan = {
        "variable_axes": {"params": 0, CAPTURE: 0, HIDDEN: 0},
        "split_rngs": {"params": True, "dropout": True, RANDOM: True},
        "length": depth,
    }
    methods = {
        "__call__": scan | {"in_axes": (nn.broadcast,) * 5},
        "step": scan | {"in_axes": (0, 0)},
        "remember": scan | {"in_axes": nn.broadcast},
    }
    return nn.scan(layer, methods=methods)(**fields)


def empty_streams(
    attention: PatternAttention, depth: int, batch: int, dim: int, heads: int, *,
    capacity: int, dtype: Any = jnp.float32,
) -> Stream:  # fmt: skip
    """Return what `step` of a stack starts from: `PatternAttention.empty_stream` of every layer.

    Args:
      attention: of all layers, causal.
      depth: number of layers, the leading axis of all arrays.
      batch, dim, heads: as in `PatternAttention.empty_stream`.
      capacity: most tokens of an example.
      dtype: of stored keys and values.
    """
    stream = attention.empty_stream(batch, dim, heads, capacity, dtype)
    return jax.tree.map(lambda x: jnp.repeat(x[None], depth, axis=0), stream)


def stack_flops(
    depth: int, length: int, dim: int, hidden: int, heads: int, attention: PatternAttention
) -> float:
    """Count the operations of one example's pass through layers of self-attention and MLP.

    Args:
      depth: number of layers.
      length: tokens.
      dim, hidden: widths of tokens and of the MLP.
      heads: of the attention.
      attention: of all layers.
    """
    return depth * (attention.flops(length, length, dim, heads) + 4.0 * length * dim * hidden)


def hidden_states(captured: Mapping[str, Any], stack: str = "layers") -> Array:
    """Return `[depth + 1, b, t, d]`: the input of every layer of a stack, and the output.

    Args:
      captured: what `apply(..., mutable=["hidden"])` returned beside the output; the model sows its
        output there as "last".
      stack: name of the stack.
    """
    captured = captured.get(HIDDEN, captured)
    (inputs_lbtd,), (last_btd,) = captured[stack]["input"], captured["last"]
    return jnp.concatenate([inputs_lbtd, last_btd[None]])


def mean_maps(
    captured: Mapping[str, Any], title: str, stack: str = "layers", part: str = "attention"
) -> dict[str, Array]:
    """Return how much each key is looked at in the first and the last layer of a stack.

    Args:
      captured: what `apply(..., mutable=["attention"])` returned beside the output.
      title: what the maps are called.
      stack, part: names of the stack and of the attention in its layers.

    Returns:
      Title -> `[b, 1, s]`, the mean over heads and queries; empty where the attention has no map.
    """
    captured = captured.get(CAPTURE, captured)
    if part not in captured.get(stack, {}):
        return {}
    (weights_lbnts,) = captured[stack][part]["probabilities"]
    mean_lbs = weights_lbnts.mean(axis=(2, 3))
    layers = sorted({1, len(mean_lbs)})
    return {f"{title}, layer {layer}": mean_lbs[layer - 1][:, None] for layer in layers}


class TextEmbedding(nn.Module):
    """x = norm(scale * table[token] + positions[position] + types[type]), with what there is.

    Attributes:
      vocab_size: v.
      width: d.
      rows: of the table of positions.
      types: kinds of tokens; 0: they have none.
      scale: factor on the vectors of tokens.
      epsilon: of the norm; None: there is none.
      dropout: rate on the result while training.
      dtype: compute dtype.
    """

    vocab_size: int
    width: int
    rows: int
    types: int = 0
    scale: float = 1.0
    epsilon: float | None = None
    dropout: float = 0.0
    dtype: str = "float32"

    def setup(self):
        self.tokens = TokenTable(self.vocab_size, self.width, self.dtype)
        table = lambda name, rows: self.param(name, TABLE, (rows, self.width), jnp.float32)
        self.position_table = table("positions", self.rows)
        if self.types:
            self.type_table = table("types", self.types)
        if self.epsilon is not None:
            self.norm = LayerNorm(self.epsilon, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, tokens: Array, positions: Array, types: Array | None = None, train: bool = False
    ) -> Array:
        """Map tokens to vectors.

        Args:
          tokens: int `[b, t]` in [0, v).
          positions: int `[b, t]` or `[1, t]` below the number of rows.
          types: int `[b, t]`; all 0 if None.
          train: with dropout.

        Returns:
          `[b, t, d]` in the compute dtype.
        """
        look_up = lambda table, ids: jnp.take(gather(table, None, None), ids, axis=0)
        x_btd = self.tokens(tokens).astype(jnp.float32) * self.scale
        x_btd = x_btd + look_up(self.position_table, positions)
        if self.types:
            ids = jnp.zeros((1, 1), jnp.int32) if types is None else types
            x_btd = x_btd + look_up(self.type_table, ids)
        x_btd = x_btd.astype(self.dtype)
        x_btd = x_btd if self.epsilon is None else self.norm(x_btd)
        x_btd = self.drop(x_btd, deterministic=not train)
        return constrain(x_btd, "batch", "sequence", None)

    def kernel(self) -> Array:
        """Return the transposed table of tokens `[d, v]`, for heads that are tied to it."""
        return self.tokens.embedding.T


def token_logits(hidden: Array, kernel: Array, bias: Array | None = None) -> Array:
    """Return float32 logits `[b, t, v]`, divided over the vocabulary.

    Args:
      hidden: `[b, t, d]`.
      kernel: `[d, v]`.
      bias: `[v]`.
    """
    kernel_dv = gather(kernel.astype(hidden.dtype), None, "vocab")
    logits = jnp.einsum("btd,dv->btv", hidden, kernel_dv, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias
    return constrain(logits, "batch", "sequence", "vocab")


def check_tokens(**arrays: Array | None) -> None:
    """Refuse arrays that are no integers `[b, t]` of one shape; None is left out.

    Raises:
      ValueError: names the first that does not fit, its type and its shape.
    """
    present = {name: array for name, array in arrays.items() if array is not None}
    first = next(iter(present.values()))
    for name, array in present.items():
        is_integer = jnp.issubdtype(array.dtype, jnp.integer)
        if array.ndim != 2 or not is_integer or array.shape != first.shape:
            raise ValueError(
                f"{name} must be integers [b, t] of shape {first.shape}, got {array.dtype} "
                f"{array.shape}"
            )


def check_image(image: Array, expected: Array | jax.ShapeDtypeStruct) -> None:
    """Refuse images of other sizes than an example's; their number does not matter.

    Raises:
      ValueError: names both shapes.
    """
    sizes = expected.shape[1:]
    if image.shape[1:] != sizes:
        raise ValueError(f"image {image.shape}: must be [b, {', '.join(map(str, sizes))}]")


def check_length(name: str, tokens: Array, length: int) -> None:
    """Refuse tokens `[b, t]` for which there are too few positions.

    Raises:
      ValueError: names both numbers.
    """
    if tokens.shape[1] > length:
        raise ValueError(f"{name} {tokens.shape}: there are positions for {length} tokens only")
