# SPDX-License-Identifier: Apache-2.0
"""Attention of TransNeXt: the near finely, the rest of the picture coarsely, in one softmax.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132,
Sections 3.2 to 3.4; as in the code of MoH (arXiv 2410.11842), with or without a mixture of heads.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.nn.attend import attend
from attnjax.nn.attention import CAPTURE, Projection
from attnjax.nn.head_mixture import HeadMixture, HeadRouter, weigh_heads
from attnjax.nn.initializers import LINEAR, fan_out_normal
from attnjax.nn.norm import LayerNorm
from attnjax.ops.attention import attention
from attnjax.ops.merge import merge_partials
from attnjax.ops.neighbourhood import inside, mix_neighbours, neighbourhood_attention
from attnjax.parallel.constrain import constrain, gather
from attnjax.typing import Array

WINDOW = 3
"""Side of the window that is seen finely."""

HIDDEN = 512
"""Hidden width of the MLP behind position biases."""

TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)
"""Its softplus is 1 / 0.24."""


def unit(x: Array) -> Array:
    """Return `x [..., h]` divided by its length, float32 or wider; 0 stays 0, with gradient 0."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    is_some = square > 0
    return jnp.where(is_some, x * jax.lax.rsqrt(jnp.where(is_some, square, 1)), 0)


def pooled_axis(size: int, parts: int) -> np.ndarray:
    """Return the matrix `[parts, size]` of an adaptive mean along one axis."""
    starts = np.arange(parts) * size // parts
    ends = -(-(np.arange(parts) + 1) * size // parts)
    place = np.arange(size)
    member = (place >= starts[:, None]) & (place < ends[:, None])
    return (member / member.sum(axis=1, keepdims=True)).astype(np.float32)


def log_offsets(grid: tuple[int, int], pool: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the different offsets from places to pooled places, on a logarithmic scale.

    sign(8 o) log2(1 + |8 o|) / log2(8) of offsets o in sides of the grid (Section 3.4).

    Args:
      grid: places of the queries, (y, x).
      pool: places of the keys.

    Returns:
      float32 `[u, 2]`, and int `[t, s]`, which of them belongs to each pair.
    """
    axes = []
    for size, parts in zip(grid, pool, strict=True):
        place = np.arange(size, dtype=np.float32)
        offset = place[:, None] - (pooled_axis(size, parts) @ place)[None]
        axes.append(offset / max(size - 1, 1) * 8)
    rows, columns = axes
    shape = (grid[0], grid[1], pool[0], pool[1])
    pairs = np.stack(
        [
            np.broadcast_to(rows[:, None, :, None], shape),
            np.broadcast_to(columns[None, :, None, :], shape),
        ],
        axis=-1,
    ).reshape(-1, 2)
    offsets, index = np.unique(pairs, axis=0, return_inverse=True)
    scaled = np.sign(offsets) * np.log2(np.abs(offsets) + 1) / np.log2(8)
    return scaled.astype(np.float32), index.reshape(math.prod(grid), math.prod(pool))


class PositionBias(nn.Module):
    """A bias for every head and pair of places: an MLP of their offset.

    Attributes:
      num_heads: n.
    """

    num_heads: int

    @nn.compact
    def __call__(self, grid: tuple[int, int], pool: tuple[int, int]) -> Array:
        """Return `[n,t,s]` float32 for queries on a grid and keys on a pooled one."""
        offsets, index = log_offsets(grid, pool)
        hidden = nn.relu(nn.Dense(HIDDEN, kernel_init=LINEAR, name="up")(offsets))
        bias_un = nn.Dense(self.num_heads, kernel_init=LINEAR, name="down")(hidden)
        return jnp.moveaxis(bias_un[index], -1, 0)


class AggregatedAttention(nn.Module):
    """Cosine attention to the window around a place and to the picture in pooled form.

        q = (unit(W_q x) + embedding) softplus(temperature) log(keys),  k = unit(W_k .)
        out = softmax over both kinds of keys of q k + bias, times v;
              and (unit(W_q x) tokens + offset) times v of the window

    With a pool as fine as the grid it is attention to all places and nothing else.

    Attributes:
      num_heads: n; divides the width.
      grid: places (y, x).
      pool: places of the pooled keys.
      mixture: heads that tokens choose; None: all work for all.
      depth: layers over which the balance loss is averaged.
      epsilon: of the norm of pooled tokens.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
      kernel_init: draws all matrices.
    """

    num_heads: int
    grid: tuple[int, int]
    pool: tuple[int, int]
    mixture: HeadMixture | None = None
    depth: int = 1
    epsilon: float = 1e-5
    dtype: str = "float32"
    implementation: str | None = None
    kernel_init: Callable[..., Array] = LINEAR

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """Map `x [b, y * x, d]`; returns the same, and measures of the mixture of heads."""
        (b, t, d), x = x.shape, x.astype(self.dtype)
        n, is_full = self.num_heads, self.pool == self.grid
        h, (height, width) = d // n, self.grid
        kernels = {name: self._projection(name, d, n, h) for name in ("query", "key", "value")}

        def project(name, tokens):
            kernel, bias = kernels[name]
            return jnp.einsum("btd,dnh->btnh", tokens, gather(kernel, None, "heads", None)) + bias

        project_all = lambda name, tokens: constrain(
            project(name, tokens), "batch", "sequence", "heads", None
        )
        raw = project_all("query", x)
        query, embedding = unit(raw), self._vector("query_embedding", 0.02, (n, h))
        temperature = self.param(
            "temperature", nn.initializers.constant(TEMPERATURE), (n, 1), jnp.float32
        )
        seen = math.prod(self.pool) * np.ones((t, 1, 1), np.float32)
        if not is_full:
            seen = seen + inside(*self.grid, WINDOW).sum(axis=-1).reshape(t, 1, 1)
        sharp = (query + embedding) * jax.nn.softplus(temperature) * np.log(seen)
        bias_nts = PositionBias(n, name="position_bias")(self.grid, self.pool)
        pooled = x if is_full else self._pool(x)
        key, value = unit(project_all("key", pooled)), project_all("value", pooled)
        cast = lambda x: x.astype(self.dtype)
        arguments = (cast(sharp), cast(key), value)
        options = {"bias": bias_nts, "scale": 1.0}
        if is_full:
            if self.is_mutable_collection(CAPTURE) and not self.is_initializing():
                maps = attention(
                    *arguments, **options, implementation="reference", return_probabilities=True
                )
                self.sow(CAPTURE, "probabilities", maps.probabilities)
            out = attend(*arguments, **options, implementation=self.implementation)
        else:
            part = attend(
                *arguments, **options, implementation=self.implementation, return_lse=True
            )
            on_grid = lambda x: x.reshape(b, height, width, n, -1)
            near_value = on_grid(project_all("value", x))
            near = neighbourhood_attention(
                on_grid(sharp), on_grid(unit(project_all("key", x))), near_value,
                window=WINDOW, bias=self._vector("near_bias", 0.0004, (n, WINDOW**2)), scale=1.0,
            )  # fmt: skip
            out, _ = merge_partials([(near[0].astype(self.dtype), near[1]), (part.out, part.lse)])
            tokens = self._vector("near_tokens", 0.02, (n, h, WINDOW**2))
            offset = self.param("near_offset", nn.initializers.zeros, (n, WINDOW**2), jnp.float32)
            more = jnp.einsum("byxnh,nhw->byxnw", on_grid(query), tokens) + offset
            out = out + mix_neighbours(cast(more), near_value, WINDOW)
        out, measures = self._weigh(x, raw, out)
        kernel, bias = Projection((n, h, d), (d,), self.dtype, self.kernel_init, name="out")()
        return jnp.einsum(
            "btnh,nhd->btd", out, gather(kernel, "heads", None, None)
        ) + bias, measures

    def _projection(self, name, d, n, h):
        return Projection((d, n, h), (n, h), self.dtype, self.kernel_init, name=name)()

    def _vector(self, name, deviation, shape):
        init = nn.initializers.truncated_normal(deviation)
        return self.param(name, init, shape, jnp.float32)

    def _pool(self, x):
        (b, _, d), (height, width) = x.shape, self.grid
        mixed = nn.Dense(d, dtype=self.dtype, kernel_init=fan_out_normal(d), name="reduce")(x)
        mixed = nn.gelu(mixed, approximate=False).reshape(b, height, width, d)
        rows, columns = (pooled_axis(s, p) for s, p in zip(self.grid, self.pool, strict=True))
        pooled = jnp.einsum("byxd,py,qx->bpqd", mixed, rows, columns)
        norm = LayerNorm(self.epsilon, self.dtype, name="reduce_norm")
        return norm(pooled.reshape(b, -1, d))

    def _weigh(self, x, query, out):
        if self.mixture is None:
            return out, {}
        gates = HeadRouter(self.num_heads, self.mixture, self.kernel_init, name="router")(x, query)
        loss = gates.balance_loss
        measures = {"balance_loss": loss, "penalty": self.mixture.balance * loss / self.depth}
        return weigh_heads(out, gates), measures


class DepthwiseConv(nn.Module):
    """A 3 x 3 convolution of every channel by itself, zero beyond the border.

    Written as shifted products: XLA's partitioner doubles the kernel's gradient of a grouped
    convolution whose pictures and channels are divided (seen with jaxlib 0.10.2).

    Attributes:
      dtype: compute dtype.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, y, x, f]` to the same shape."""
        f, (height, width) = x.shape[-1], x.shape[1:3]
        init, shape = fan_out_normal(WINDOW**2), (WINDOW, WINDOW, 1, f)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (f,), jnp.float32)
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = kernel.astype(self.dtype)
        taps = [
            padded[:, i : i + height, j : j + width] * kernel[i, j, 0]
            for i in range(WINDOW)
            for j in range(WINDOW)
        ]
        return sum(taps) + bias.astype(self.dtype)


class ConvolutionalGlu(nn.Module):
    """out = W_2 (gelu(depthwise 3 x 3 of W_g x) * W_v x) (Section 3.3).

    Attributes:
      hidden: width f in the middle.
      grid: places (y, x).
      dtype: compute dtype.
      kernel_init: draws the matrices.
    """

    hidden: int
    grid: tuple[int, int]
    dtype: str = "float32"
    kernel_init: Callable[..., Array] = LINEAR

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, y * x, d]` to the same shape."""
        b, t, d = x.shape
        dense = lambda width, name: nn.Dense(
            width, dtype=self.dtype, kernel_init=self.kernel_init, name=name
        )
        gate, value = dense(self.hidden, "gate")(x), dense(self.hidden, "value")(x)
        gate = gate.reshape(b, *self.grid, self.hidden)
        gate = DepthwiseConv(self.dtype, name="depthwise")(gate).reshape(b, t, self.hidden)
        hidden = constrain(nn.gelu(gate, approximate=False) * value, "batch", "sequence", "mlp")
        return dense(d, "down")(hidden)
