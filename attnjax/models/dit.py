# SPDX-License-Identifier: Apache-2.0
"""DiT: a transformer that denoises patches, told time and class by the scales of its norms.

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748; with heads as
experts as in Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv
2410.11842. Implemented from the equations; parameters are named as in the released codes,
github.com/facebookresearch/DiT and github.com/SkyworkAI/MoH (Apache-2.0).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE, MultiHeadAttention
from attnjax.nn.blocks import Mlp
from attnjax.nn.diffusion import LevelEmbed
from attnjax.nn.embed import PatchEmbed
from attnjax.nn.head_mixture import COMPUTES, HeadMixture, HeadRouter, mix_heads
from attnjax.nn.initializers import TABLE, xavier_uniform
from attnjax.nn.norm import LayerNorm
from attnjax.nn.text import REMATS
from attnjax.ops.positions import sinusoids
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array
from attnjax.weights.names import conv, linear, output, projections, rule

# Dense: Table 1 of arXiv 2212.09748. Heads as experts: models.py of MoH's code (MoH-DiT), which
# states what its Table 2 measures.
PRESETS = {
    "s-2": {"width": 384, "depth": 12, "num_heads": 6},
    "b-2": {"width": 768, "depth": 12, "num_heads": 12},
    "l-2": {"width": 1024, "depth": 24, "num_heads": 16},
    "xl-2": {"width": 1152, "depth": 28, "num_heads": 16},
    "moh-s-90": {"width": 384, "depth": 12, "mixture": ((8, 6, 3, 2), (4, 6, 6, 0))},
    "moh-s-75": {
        "width": 384, "depth": 12,
        "mixture": ((2, 6, 2, 1), (4, 6, 3, 1), (4, 6, 3, 2), (2, 6, 6, 0)),
    },
    "moh-b-90": {
        "width": 768, "depth": 12, "mixture": ((5, 12, 6, 4), (5, 12, 7, 4), (2, 12, 12, 0)),
    },
    "moh-b-75": {
        "width": 768, "depth": 12, "mixture": ((2, 12, 4, 2), (8, 12, 6, 3), (2, 12, 12, 0)),
    },
    "moh-l-90": {
        "width": 1024, "depth": 24, "head_dim": 64,
        "mixture": ((8, 8, 8, 0), (8, 16, 16, 0), (8, 24, 16, 3)),
    },
    "moh-l-75": {
        "width": 1024, "depth": 24, "head_dim": 64,
        "mixture": ((8, 8, 8, 0), (8, 16, 8, 4), (8, 24, 12, 4)),
    },
    "moh-xl-90": {
        "width": 1152, "depth": 28, "head_dim": 72,
        "mixture": ((9, 8, 8, 0), (10, 16, 16, 0), (9, 24, 16, 3)),
    },
    "moh-xl-75": {
        "width": 1152, "depth": 28, "head_dim": 72,
        "mixture": ((9, 8, 8, 0), (10, 16, 10, 2), (9, 24, 14, 2)),
    },
}  # fmt: skip

WAVES = 256
"""Width of the sinusoids of time."""

EPSILON = 1e-6


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      prediction: float32 `[b, y, x, 2 c]`: the noise that it sees, then how wide a step back is
        (`share` of `ops.learned_variance`); `[b, y, x, c]` without a variance.
      aux: `features [b, t, d]` of the last layer; if any heads are chosen, float32 scalars, means
        over the layers that choose: `balance_loss`, K where heads are chosen alike, and `dropped`,
        the share of choices without a place.
    """

    prediction: Array
    aux: dict[str, Array]


class Heads(NamedTuple):
    """The heads of one layer.

    Attributes:
      count: heads n.
      head_dim: h; n h need not be the width of the model.
      mixture: which of them a token uses; None: all, unweighed.
    """

    count: int
    head_dim: int
    mixture: HeadMixture | None

    @property
    def scores(self) -> int:
        """Outputs of the router."""
        if self.mixture is None:
            return 0
        shared, routed = self.mixture.shared, self.count - self.mixture.shared
        return routed + (shared if shared > 1 else 0) + (2 if shared and routed else 0)


class ConditionedBlock(nn.Module):
    """x <- x + g attention((1 + s) norm(x) + b);   x <- x + g' mlp((1 + s') norm(x) + b')

    All six vectors are linear in swish(condition) and zero in a new model ("adaLN-Zero").

    Attributes:
      heads: of the attention.
      hidden: width of the MLP.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    heads: Heads
    hidden: int
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[Array, dict[str, Array]]:
        """Map `x [b, t, d]` under `condition [b, d]` to the same shape; and measures of choices."""
        d, measures = x.shape[-1], {}
        vectors_b1d = modulation(condition, 6, self.dtype)
        norm = functools.partial(LayerNorm, EPSILON, self.dtype, use_bias=False, use_scale=False)
        n, h, mixture = self.heads
        router = None
        if mixture is not None:
            router = HeadRouter(n, mixture, nn.initializers.xavier_uniform(), name="router")

        def mix(query, key, value, **options):
            gates = router(normal_btd, query)
            result, dropped = mix_heads(
                query, key, value, gates, mixture, implementation=self.implementation, **options
            )
            if mixture.top_k:
                measures.update(balance_loss=gates.balance_loss, dropped=dropped)
            return result

        attention = MultiHeadAttention(
            n, h, dtype=self.dtype, implementation=self.implementation,
            attend=None if router is None else mix,
            # One matrix in the released code, and drawn as one.
            kernel_init=xavier_uniform(d, 3 * n * h), out_init=xavier_uniform(n * h, d),
            name="attention",
        )  # fmt: skip
        mlp = Mlp(
            self.hidden, dtype=self.dtype, activation="gelu_tanh",
            kernel_init=nn.initializers.xavier_uniform(), name="mlp",
        )  # fmt: skip
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors_b1d
        normal_btd = norm()(x) * (1 + scale) + shift
        x = constrain(x + gate * attention(normal_btd), "batch", "sequence", None)
        branch_btd = mlp(norm()(x) * (1 + mlp_scale) + mlp_shift)
        return constrain(x + mlp_gate * branch_btd, "batch", "sequence", None), measures


def modulation(condition: Array, parts: int, dtype: str) -> list[Array]:
    """Return vectors `[b, 1, d]` from a condition `[b, d]`, inside a compact module."""
    zeros = nn.initializers.zeros
    dense = nn.Dense(parts * condition.shape[-1], dtype=dtype, kernel_init=zeros, name="modulation")
    return jnp.split(dense(jax.nn.swish(condition))[:, None], parts, axis=-1)


class Final(nn.Module):
    """Norm under a condition, then a linear map to the numbers of a patch; zero in a new model.

    Attributes:
      features: numbers of a patch.
      dtype: compute dtype of the norm.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """Map `x [b, t, d]` under `condition [b, d]` to float32 `[b, t, features]`."""
        shift, scale = modulation(condition, 2, self.dtype)
        normal_btd = LayerNorm(EPSILON, self.dtype, use_bias=False, use_scale=False)(x)
        zeros = nn.initializers.zeros
        return nn.Dense(self.features, kernel_init=zeros, name="linear")(
            (normal_btd * (1 + scale) + shift).astype(jnp.float32)
        )


class DiT(nn.Module):
    """Patches, fixed positions, blocks conditioned on time and class, patches again.

    Attributes:
      num_classes: classes; one more row of the table stands for "no class" if labels are dropped.
      image_size: side of the pictures or latents; those of 256 pixels have 32.
      channels: numbers c of a pixel.
      patch_size: side of a patch; divides that of the picture.
      width: d, a multiple of 4.
      depth: layers.
      num_heads: n of every layer.
      head_dim: h; None: width / heads.
      mlp_ratio: hidden width of the MLP / width.
      mixture: runs of layers (layers, heads, shared, routed) whose heads are experts; empty: plain
        multi-head attention. Replaces `num_heads`.
      compute: of heads that are chosen: "dense", all work, or "sparse", for tokens that chose them
        (`nn.head_mixture.HeadMixture`).
      drop_label: rate of replacing the class by "no class" while training.
      has_variance: say how wide a step back is, too.
      dtype: compute dtype; parameters and the output are float32.
      remat: what the backward pass computes again, a key of `nn.text.REMATS`.
      attention_implementation: passed to `nn.attend`.
    """

    num_classes: int = 1000
    image_size: int = 32
    channels: int = 4
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    head_dim: int | None = None
    mlp_ratio: float = 4.0
    mixture: tuple = ()
    compute: str = "dense"
    drop_label: float = 0.1
    has_variance: bool = True
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "num_classes", "image_size", "channels", "patch_size", "width", "depth", "num_heads",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.drop_label < 1:
            raise RecipeError(f"model.drop_label={self.drop_label}: must be in [0, 1)")
        for name, choices in (("remat", tuple(REMATS)), ("compute", COMPUTES)):
            value = getattr(self, name)
            if value not in choices:
                raise RecipeError(f"model.{name}={value!r}: {nearest(value, choices)}")
        if self.width % 4:
            raise RecipeError(f"model.width={self.width}: must be a multiple of 4 (positions)")
        if self.image_size % self.patch_size:
            raise RecipeError(
                f"model.patch_size={self.patch_size} must divide image_size={self.image_size}"
            )
        self.layers()

    def layers(self) -> tuple[Heads, ...]:
        """Return the heads of every layer.

        Raises:
          RecipeError: runs of layers do not fit the depth, heads the width, or each other.
        """
        if any(len(run) != 4 for run in self.mixture):
            raise RecipeError(
                f"model.mixture={self.mixture}: runs are (layers, heads, shared, routed)"
            )
        runs = self.mixture or ((self.depth, self.num_heads, None, None),)
        if sum(run[0] for run in runs) != self.depth:
            raise RecipeError(
                f"model.mixture={self.mixture}: runs have {sum(run[0] for run in runs)} layers, "
                f"depth={self.depth}"
            )
        heads = []
        for layers, count, shared, routed in runs:
            if count < 1 or (self.head_dim is None and self.width % count):
                raise RecipeError(
                    f"model: {count} heads must divide width={self.width} without a head_dim"
                )
            mixture = None
            if self.mixture:
                options = {"shared": shared, "top_k": routed, "compute": self.compute}
                mixture = HeadMixture.of(options, count)
            heads += layers * [Heads(count, self.head_dim or self.width // count, mixture)]
        return tuple(heads)

    @property
    def grid(self) -> int:
        """Patches along a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def no_class(self) -> int:
        """The label that stands for no class.

        Raises:
          ValueError: the table has no row for it.
        """
        if not self.drop_label:
            raise ValueError("drop_label=0: the model knows no label for 'no class'")
        return self.num_classes

    @nn.compact
    def __call__(self, noisy: Array, time: Array, label: Array, *, train: bool = False) -> Output:
        """See the noise in pictures.

        Args:
          noisy: floating `[b, y, x, c]`.
          time: `[b]`, integer or floating, 0 for the least noise.
          label: integers `[b]` below `num_classes`, or `no_class`; others give NaN.
          train: drop labels, with the "dropout" key.

        Returns:
          An `Output`.

        Raises:
          ValueError: an input has the wrong shape.
        """
        b = noisy.shape[0]
        for name, array in (("noisy", noisy), ("time", time), ("label", label)):
            expected = self.example(b)[name].shape
            if array.shape != expected:
                raise ValueError(f"{name} must be [b, *{expected[1:]}], got {array.shape}")
        if train and self.drop_label:
            is_dropped = jax.random.bernoulli(self.make_rng("dropout"), self.drop_label, (b,))
            label = jnp.where(is_dropped, self.no_class, label)
        rows = self.num_classes + (self.drop_label > 0)
        table = self.param("label_embedding", TABLE, (rows, self.width), jnp.float32)
        condition_bd = LevelEmbed(
            self.width, self.width, TABLE, self.dtype, waves=WAVES, is_cosine_first=True,
            name="time",
        )(time.astype(jnp.float32))  # fmt: skip
        named_bd = jnp.take(table, label, axis=0, mode="fill", fill_value=jnp.nan)
        condition_bd = condition_bd + named_bd.astype(condition_bd.dtype)

        values = self.patch_size**2 * self.channels
        stem = PatchEmbed(
            self.width, self.patch_size, self.dtype, xavier_uniform(values, self.width),
            name="stem",
        )  # fmt: skip
        x_btd = stem(noisy)
        x_btd = x_btd + self._positions().astype(x_btd.dtype)
        x_btd = constrain(x_btd, "batch", "sequence", None)
        block = ConditionedBlock
        if REMATS[self.remat] is not None:
            block = nn.remat(block, policy=REMATS[self.remat])
        found = []
        for i, heads in enumerate(self.layers()):
            x_btd, measures = block(
                heads, int(self.width * self.mlp_ratio), self.dtype,
                self.attention_implementation, name=f"block_{i}",
            )(x_btd, condition_bd)  # fmt: skip
            found += [measures] if measures else []
        numbers = self.patch_size**2 * self.channels * (2 if self.has_variance else 1)
        patches_bpv = Final(numbers, self.dtype, name="final")(x_btd, condition_bd)
        aux = {"features": x_btd}
        if found:
            aux |= jax.tree.map(lambda *values: sum(values) / len(values), *found)
        return Output(prediction=self._join(patches_bpv), aux=aux)

    def _positions(self):
        """Return `[t, d]`: sinusoids of the column, then of the row, on the grid of patches."""
        waves_xd = sinusoids(jnp.arange(self.grid), self.width // 2, layout="half")
        shape = (self.grid, self.grid, self.width // 2)
        column, row = (jnp.broadcast_to(w, shape) for w in (waves_xd[None], waves_xd[:, None]))
        return jnp.concatenate([column, row], axis=-1).reshape(self.grid**2, self.width)

    def _join(self, patches_bpv):
        """Put patches together: `[b, t, p p c]` to `[b, y, x, c]`."""
        b, grid, p = patches_bpv.shape[0], self.grid, self.patch_size
        parts = patches_bpv.reshape(b, grid, grid, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
        return parts.reshape(b, self.image_size, self.image_size, -1)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        shape = (batch, self.image_size, self.image_size, self.channels)
        return {
            "noisy": jax.ShapeDtypeStruct(shape, jnp.float32),
            "time": jax.ShapeDtypeStruct((batch,), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two."""
        d, t = self.width, self.grid**2
        values = self.patch_size**2 * self.channels
        total = t * d * values * (3 if self.has_variance else 2) + WAVES * d + d * d + 2 * d * d
        for heads in self.layers():
            wide = heads.count * heads.head_dim
            total += 4 * t * d * wide + 2 * t * t * wide + 6 * d * d + t * d * heads.scores
            total += 2 * t * d * int(d * self.mlp_ratio)
        return 2.0 * total

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return how much each patch is looked at in the last layer.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, y, x]` on the grid of patches, the mean over heads and queries.
        """
        captured = captured.get(CAPTURE, captured)
        last = captured.get(f"block_{self.depth - 1}", {}).get("attention", {})
        if "probabilities" not in last:
            return {}
        map_bs = last["probabilities"][0].mean(axis=(1, 2))
        return {"last layer": map_bs.reshape(-1, self.grid, self.grid)}


def _names():
    yield from conv("stem", "x_embedder.proj")
    yield from linear("time/up", "t_embedder.mlp.0")
    yield from linear("time/down", "t_embedder.mlp.2")
    yield rule("label_embedding", "y_embedder.embedding_table.weight")
    block, theirs = "block_{}", "blocks.{}"
    yield from projections(f"{block}/attention", f"{theirs}.attn.qkv", ("query", "key", "value"))
    yield from output(f"{block}/attention/out", f"{theirs}.attn.proj")
    yield from linear(f"{block}/mlp/up", f"{theirs}.mlp.fc1")
    yield from linear(f"{block}/mlp/down", f"{theirs}.mlp.fc2")
    yield from linear(f"{block}/modulation", f"{theirs}.adaLN_modulation.1")
    for ours, wg in (("routed", "wg"), ("types", "wg_0"), ("shared", "wg_1")):
        yield rule(f"{block}/router/{ours}/kernel", f"{theirs}.attn.{wg}.weight", "in")
    yield from linear("final/modulation", "final_layer.adaLN_modulation.1")
    yield from linear("final/linear", "final_layer.linear")


TORCH_NAMES = {"dit": tuple(_names())}
"""Layout -> name table: that of the released codes of DiT and MoH."""

TORCH_IGNORED = (r"^pos_embed$",)
"""Fixed positions that files carry: here they are computed."""

PARAM_AXES = ((r"\blabel_embedding$", (None, "embed")),)
"""Classes and "no class" are an odd number, which no mesh divides."""

INERT = (r"/key/bias$",)
"""Patterns of parameters that cannot change the output: a key bias moves all scores of a query."""
