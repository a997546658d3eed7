# SPDX-License-Identifier: Apache-2.0
"""CrossViT: two branches with different patch sizes that exchange their class tokens.

Chen, Fan and Panda, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image
Classification", ICCV 2021, arXiv 2103.14899. Reference code: IBM/CrossViT (Apache-2.0), also in
timm (Apache-2.0). Implemented from the equations; logits agree with both (tests/parity).
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE, MultiHeadAttention
from attnjax.nn.blocks import EncoderBlock, drop_path, gelu
from attnjax.nn.embed import CONV_STEMS, ConvStem, PatchEmbed, TokenEmbed, TokensToToken
from attnjax.nn.initializers import LINEAR, TABLE
from attnjax.nn.norm import LayerNorm
from attnjax.nn.vision import BANDS, band_filter, fit_positions
from attnjax.ops.sample import bicubic_resize
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array
from attnjax.weights.names import conv, linear, norm, output, projections, rule

PAPER = {
    "title": "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    "id": "arXiv:2103.14899",
    "year": 2021,
    "code": "https://github.com/IBM/CrossViT",
    "licence": "Apache-2.0",
    "claim": "Fusing two patch scales by class-token cross-attention beats DeiT by about 2% top-1 "
    "on ImageNet-1k, at a cost linear in the number of tokens.",
}

BRANCHES = ("fine", "coarse")
STEMS = ("linear", "dagger", "t2t", "performer", "patches")
FUSIONS = ("cross", "cross_keep", "all_attention", "cls", "pairwise", "none", *BRANCHES)
RESIZES = ("bicubic", "crop")
REMATS = ("none", "blocks")


def _preset(dims, coarse_blocks, heads, ratio, **overrides):
    return {
        "dims": dims,
        "depth": ((1, coarse_blocks, 0),) * 3,
        "num_heads": (heads, heads),
        "mlp_ratio": (ratio, ratio),
        **overrides,
    }


_LARGE = {"stem": "dagger", "image_size": (408, 384)}

# Widths, blocks, heads and ratios: Table 1 of the paper; the 384 models: Table 4.
PRESETS = {
    "tiny": _preset((96, 192), 4, 3, 4.0),
    "small": _preset((192, 384), 4, 6, 4.0),
    "base": _preset((384, 768), 4, 12, 4.0),
    "9": _preset((128, 256), 3, 4, 3.0),
    "15": _preset((192, 384), 5, 6, 3.0),
    "18": _preset((224, 448), 6, 7, 3.0),
    "9-dagger": _preset((128, 256), 3, 4, 3.0, stem="dagger"),
    "15-dagger": _preset((192, 384), 5, 6, 3.0, stem="dagger"),
    "18-dagger": _preset((224, 448), 6, 7, 3.0, stem="dagger"),
    "15-dagger-384": _preset((192, 384), 5, 6, 3.0, **_LARGE),
    "18-dagger-384": _preset((224, 448), 6, 7, 3.0, **_LARGE),
}


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, classes]` float32, the mean over the branches.
      aux: `<branch>_logits [b, classes]` and `<branch>_cls [b, d]` of every branch.
    """

    logits: Array
    aux: dict[str, Array]


class Bridge(nn.Module):
    """Norm, GELU, linear: carries tokens from one branch's width to another.

    Attributes:
      features: the new width.
      dtype: compute dtype.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, t, d]` to `[b, t, features]`."""
        x = gelu(LayerNorm(dtype=self.dtype, name="norm")(x))
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=LINEAR, name="linear")(x)


class CrossAttention(nn.Module):
    """A class token attends once to itself and the other branch's patches (Eq. 3 and 4).

    out = c + attention(query=norm(u)[0], context=norm(u)), u = [c; patches]

    Attributes:
      num_heads: of the branch whose patches are read.
      dropout: rate on probabilities and output while training.
      drop_path: rate of dropping the attention per example while training.
      dtype: compute dtype.
    """

    num_heads: int
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, cls: Array, patches: Array, train: bool = False) -> Array:
        """Map the token `cls [b, 1, d]` to `[b, 1, d]`, given `patches [b, p, d]`."""
        tokens_btd = jnp.concatenate([cls, patches], axis=1)
        tokens_btd = LayerNorm(dtype=self.dtype, name="norm")(tokens_btd)
        attend = MultiHeadAttention(
            self.num_heads, dropout=self.dropout, dtype=self.dtype, name="attention"
        )
        update_btd = attend(tokens_btd[:, :1], tokens_btd, train=train)
        update_btd = nn.Dropout(self.dropout, deterministic=not train)(update_btd)
        if train and self.drop_path:
            update_btd = drop_path(self.make_rng("dropout"), update_btd, self.drop_path)
        return cls + update_btd


class Fusion(nn.Module):
    """Exchange between the branches at the end of a multi-scale block (Figure 3).

    Attributes:
      kind: one of `FUSIONS`.
      dims: widths of the branches.
      num_heads: heads of the branches.
      depth: cross-attention blocks in sequence; 0 means one, named like the reference's.
      is_last: nobody reads the patches any more.
      dropout: rate while training.
      drop_path: rate while training.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    kind: str
    dims: tuple
    num_heads: tuple
    depth: int = 0
    is_last: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, tokens: tuple[Array, Array], train: bool = False) -> tuple[Array, Array]:
        """Map the tokens of both branches, each `[b, 1 + p, d]`, to the same shapes."""
        if self.kind in ("cross", "cross_keep"):
            return self._cross(tokens, train)
        if self.kind == "all_attention":
            return self._all_attention(tokens, train)
        return self._sums(tokens)

    def _cross(self, tokens, train):
        fused = []
        for i, name in enumerate(BRANCHES):
            other = 1 - i
            cls_btd = Bridge(self.dims[other], self.dtype, name=f"project_{name}")(tokens[i][:, :1])
            patches_btd = tokens[other][:, 1:]
            for step in range(max(1, self.depth)):
                block = CrossAttention(
                    self.num_heads[other], self.dropout, self.drop_path, self.dtype,
                    name=f"cross_{name}_{step}" if self.depth else f"cross_{name}",
                )  # fmt: skip
                cls_btd = block(cls_btd, patches_btd, train)
                if self.kind == "cross":
                    # As in the reference: a block returns its class token only, so that any
                    # further block has nothing else to read. "cross_keep" keeps the patches.
                    patches_btd = patches_btd[:, :0]
            cls_btd = Bridge(self.dims[i], self.dtype, name=f"revert_{name}")(cls_btd)
            fused.append(jnp.concatenate([cls_btd, tokens[i][:, 1:]], axis=1))
        return tuple(fused)

    def _all_attention(self, tokens, train):
        wide = self.dims[1]
        parts = [
            Bridge(wide, self.dtype, name=f"project_{name}")(x)
            for name, x in zip(BRANCHES, tokens, strict=True)
        ]
        joint_btd = jnp.concatenate(parts, axis=1)
        attend = MultiHeadAttention(
            self.num_heads[1],
            dropout=self.dropout,
            dtype=self.dtype,
            implementation=self.implementation,
            name="attention",
        )
        update_btd = attend(LayerNorm(dtype=self.dtype, name="norm")(joint_btd), train=train)
        if train and self.drop_path:
            update_btd = drop_path(self.make_rng("dropout"), update_btd, self.drop_path)
        split = jnp.split(joint_btd + update_btd, [parts[0].shape[1]], axis=1)
        return tuple(
            Bridge(self.dims[i], self.dtype, name=f"revert_{name}")(split[i])
            for i, name in enumerate(BRANCHES)
        )

    def _sums(self, tokens):
        wide = self.dims[1]
        cls = [
            Bridge(wide, self.dtype, name=f"project_{name}")(x[:, :1])
            for name, x in zip(BRANCHES, tokens, strict=True)
        ]
        patches = [x[:, 1:] for x in tokens]
        add_patches = self.kind == "pairwise" and not self.is_last
        if add_patches:
            patches = [
                Bridge(wide, self.dtype, name=f"project_patches_{name}")(x)
                for name, x in zip(BRANCHES, patches, strict=True)
            ]
            patches = [
                patches[i] + _resize_grid(patches[1 - i], patches[i].shape[1]) for i in (0, 1)
            ]
        fused = []
        for i, name in enumerate(BRANCHES):
            cls_btd = Bridge(self.dims[i], self.dtype, name=f"revert_{name}")(cls[0] + cls[1])
            patches_btd = patches[i]
            if add_patches:
                bridge = Bridge(self.dims[i], self.dtype, name=f"revert_patches_{name}")
                patches_btd = bridge(patches_btd)
            fused.append(jnp.concatenate([cls_btd, patches_btd], axis=1))
        return tuple(fused)


def _resize_grid(patches_btd, count):
    side, new = math.isqrt(patches_btd.shape[1]), math.isqrt(count)
    grid_byxd = patches_btd.reshape(patches_btd.shape[0], side, side, -1)
    return bicubic_resize(grid_byxd, new, new).reshape(patches_btd.shape[0], count, -1)


class CrossViT(nn.Module):
    """Dual-branch vision transformer; the fine branch has small patches, the coarse one large.

    Tuples hold the fine branch first. Lengths and names are checked on construction.

    Attributes:
      num_classes: width of the heads.
      image_size: side of the square image each branch sees; inputs come in the first size.
      patch_size: side of a patch.
      dims: widths of the branches.
      depth: one (fine blocks, coarse blocks, fusion blocks) per multi-scale block; 0 fusion
        blocks means one.
      num_heads: attention heads.
      mlp_ratio: hidden width / width.
      stem: "linear", "dagger" (three convolutions), "t2t", "performer", or "patches" (the batch
        holds `fine` and `coarse` patches instead of `image`).
      fusion: "cross" (the paper), "cross_keep" (stacked cross-attention that keeps its patches),
        "all_attention", "cls", "pairwise" and "none" (the paper's ablations), or the name of the
        one branch to build.
      drop_path: stochastic depth at the last block, growing linearly from 0.
      dropout: rate on tokens, probabilities and linear maps while training.
      branch_filters: the band of frequencies each branch sees, such as ("highpass", "lowpass");
        empty for all.
      resize: how the coarse image is made: "bicubic" or centre "crop".
      dtype: compute dtype; parameters and logits are float32.
      remat: "none", or "blocks" to recompute encoder blocks in the backward pass.
      attention_implementation: passed to `nn.attend`, except by class-token cross-attention,
        whose one row of scores per head is always materialised.
    """

    num_classes: int = 1000
    image_size: tuple = (240, 224)
    patch_size: tuple = (12, 16)
    dims: tuple = (192, 384)
    depth: tuple = ((1, 4, 0),) * 3
    num_heads: tuple = (6, 6)
    mlp_ratio: tuple = (4.0, 4.0)
    stem: str = "linear"
    fusion: str = "cross"
    drop_path: float = 0.0
    dropout: float = 0.0
    branch_filters: tuple = ()
    resize: str = "bicubic"
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        for field, choices in (
            ("stem", STEMS), ("fusion", FUSIONS), ("resize", RESIZES), ("remat", REMATS),
        ):  # fmt: skip
            if getattr(self, field) not in choices:
                raise RecipeError(
                    f"{field}={getattr(self, field)!r}: {nearest(getattr(self, field), choices)}"
                )
        for field in ("drop_path", "dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)}: must be in [0, 1)")
        for field in ("image_size", "patch_size", "dims", "num_heads", "mlp_ratio"):
            if len(getattr(self, field)) != 2:
                raise RecipeError(f"{field}={getattr(self, field)!r}: needs one entry per branch")
        if any(len(stage) != 3 for stage in self.depth):
            raise RecipeError(f"depth={self.depth!r}: each entry is (fine, coarse, fusion)")
        if self.branch_filters and (
            len(self.branch_filters) != 2 or not set(self.branch_filters) <= set(BANDS)
        ):
            raise RecipeError(f"branch_filters={self.branch_filters!r}: two of {BANDS}, or empty")
        for i, name in enumerate(BRANCHES):
            d, n, p, side = self.dims[i], self.num_heads[i], self.patch_size[i], self.image_size[i]
            if d % n:
                raise RecipeError(f"num_heads={n} of the {name} branch does not divide dims={d}")
            if side % p:
                raise RecipeError(f"patch_size={p} of the {name} branch does not divide {side}")
            if self.stem in ("dagger", "t2t", "performer") and p not in CONV_STEMS:
                raise RecipeError(f"patch_size={p}: stem {self.stem!r} knows only 12 and 16")
        if self.resize == "crop" and self.image_size[1] > self.image_size[0]:
            raise RecipeError(f"image_size={self.image_size!r}: cannot crop to a larger size")
        super().__post_init__()

    @property
    def branches(self) -> tuple[int, ...]:
        """Indices of the branches that are built."""
        return (BRANCHES.index(self.fusion),) if self.fusion in BRANCHES else (0, 1)

    @property
    def grids(self) -> tuple[int, int]:
        """Patches per side of each branch."""
        return tuple(s // p for s, p in zip(self.image_size, self.patch_size, strict=True))

    @nn.compact
    def __call__(
        self,
        image: Array | None = None,
        fine: Array | None = None,
        coarse: Array | None = None,
        *,
        train: bool = False,
    ) -> Output:
        """Classify.

        Args:
          image: `[b, y, x, 3]` of side `image_size[0]` (all stems but "patches").
          fine: `[b, p, values]` patches of the fine branch (stem "patches").
          coarse: `[b, p, values]` patches of the coarse branch (stem "patches").
          train: stochastic depth and dropout, with the "dropout" key.

        Returns:
          An `Output`.

        Raises:
          ValueError: an input is missing or has the wrong shape.
        """
        inputs = {"image": image, "fine": fine, "coarse": coarse}
        self._check(inputs)
        tokens = []
        for i in self.branches:
            name = BRANCHES[i]
            x_bpd = self._embed(i, inputs)
            b, p, d = x_bpd.shape
            cls = self.param(f"cls_{name}", TABLE, (1, 1, d), jnp.float32)
            table = self.param(f"positions_{name}", TABLE, (1, 1 + p, d), jnp.float32)
            cls_btd = jnp.broadcast_to(cls.astype(x_bpd.dtype), (b, 1, d))
            x_btd = jnp.concatenate([cls_btd, x_bpd], axis=1) + table.astype(x_bpd.dtype)
            x_btd = nn.Dropout(self.dropout, deterministic=not train)(x_btd)
            tokens.append(constrain(x_btd, "batch", "sequence", None))

        block = nn.remat(EncoderBlock, static_argnums=(2,)) if self.remat == "blocks" else None
        for stage, rates in enumerate(_drop_path_rates(self.depth, self.drop_path)):
            for slot, i in enumerate(self.branches):
                for k in range(self.depth[stage][i]):
                    tokens[slot] = (block or EncoderBlock)(
                        self.num_heads[i], int(self.dims[i] * self.mlp_ratio[i]),
                        self.dropout, rates[k], dtype=self.dtype,
                        implementation=self.attention_implementation,
                        name=f"{BRANCHES[i]}_{stage}_{k}",
                    )(tokens[slot], train)  # fmt: skip
            if self.fusion not in ("none", *BRANCHES):
                fuse = Fusion(
                    self.fusion, self.dims, self.num_heads, self.depth[stage][2],
                    stage == len(self.depth) - 1, self.dropout, rates[-1], self.dtype,
                    self.attention_implementation, name=f"fusion_{stage}",
                )  # fmt: skip
                tokens = list(fuse(tuple(tokens), train))

        aux = {}
        for slot, i in enumerate(self.branches):
            name = BRANCHES[i]
            cls_bd = LayerNorm(dtype="float32", name=f"norm_{name}")(tokens[slot][:, 0])
            head = nn.Dense(self.num_classes, kernel_init=LINEAR, name=f"head_{name}")
            aux |= {f"{name}_cls": cls_bd, f"{name}_logits": head(cls_bd)}
        logits = [aux[f"{BRANCHES[i]}_logits"] for i in self.branches]
        return Output(logits=sum(logits) / len(logits), aux=aux)

    def _check(self, inputs):
        for name, expected in self.example(1).items():
            array = inputs[name]
            if array is None:
                raise ValueError(f"the batch lacks {name!r} {expected.shape[1:]}")
            if array.shape[1:] != expected.shape[1:]:
                raise ValueError(
                    f"{name} has shape {array.shape}, expected [b, "
                    f"{', '.join(map(str, expected.shape[1:]))}]"
                )

    def _embed(self, i, inputs):
        name, size = BRANCHES[i], self.image_size[i]
        if self.stem == "patches":
            return TokenEmbed(self.dims[i], self.dtype, name=f"stem_{name}")(inputs[name])
        image = inputs["image"]
        if image.shape[1] != size and self.resize == "bicubic":
            image = bicubic_resize(image, size, size)
        elif image.shape[1] != size:
            start = round((image.shape[1] - size) / 2)
            image = image[:, start : start + size, start : start + size]
        if self.branch_filters:
            image = band_filter(image, self.branch_filters[i])
        arguments = (self.dims[i], self.patch_size[i])
        if self.stem in ("t2t", "performer"):
            token_stem = TokensToToken(
                *arguments, self.stem, self.dtype, self.attention_implementation,
                name=f"stem_{name}",
            )  # fmt: skip
            return token_stem(image)
        stem = ConvStem if self.stem == "dagger" else PatchEmbed
        return stem(*arguments, self.dtype, name=f"stem_{name}")(image)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        if self.stem == "patches":
            return {
                BRANCHES[i]: jax.ShapeDtypeStruct(
                    (batch, self.grids[i] ** 2, 3 * self.patch_size[i] ** 2), jnp.float32
                )
                for i in self.branches
            }
        side = self.image_size[0]
        return {"image": jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)}

    def flops(self) -> float:
        """Count the matrix products and convolutions of one example's forward pass.

        A multiply-add counts as two. Resampling of pictures and grids, frequency bands and
        elementwise work are left out: a few percent.
        """
        return 2.0 * sum(self._multiply_adds().values())

    def _multiply_adds(self):
        counts = {"stem": 0, "blocks": 0, "fusion": 0, "head": 0}
        sizes = [1 + grid**2 for grid in self.grids]
        for i in self.branches:
            d, t = self.dims[i], sizes[i]
            f = int(d * self.mlp_ratio[i])
            counts["stem"] += _stem_multiply_adds(
                self.stem, self.image_size[i], self.patch_size[i], d
            )
            blocks = sum(stage[i] for stage in self.depth)
            counts["blocks"] += blocks * (4 * t * d * d + 2 * t * t * d + 2 * t * d * f)
            counts["head"] += d * self.num_classes
        for k, stage in enumerate(self.depth):
            is_last = k == len(self.depth) - 1
            counts["fusion"] += _fusion_multiply_adds(
                self.fusion, self.dims, sizes, self.num_heads, max(1, stage[2]), is_last
            )
        return counts

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the class tokens look, averaged over heads.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, y, x]` on the patch grid of the branch that is looked at: the class token
          in each branch's last encoder block, and in the last cross-attention of each direction.
        """
        captured = captured.get(CAPTURE, captured)
        maps = {}
        for i in self.branches:
            name = BRANCHES[i]
            stage, blocks = max((s, d[i]) for s, d in enumerate(self.depth) if d[i])
            block = captured[f"{name}_{stage}_{blocks - 1}"]["attention"]
            maps[f"{name} class token, own patches"] = self._map(block["probabilities"][0], i)
        if self.fusion in ("cross", "cross_keep"):
            last = captured[f"fusion_{len(self.depth) - 1}"]
            for i, name in enumerate(BRANCHES):
                first = f"cross_{name}_0" if self.depth[-1][2] else f"cross_{name}"
                block = last[first]["attention"]
                title = f"{name} class token, {BRANCHES[1 - i]} patches"
                maps[title] = self._map(block["probabilities"][0], 1 - i)
        return maps

    def _map(self, probabilities_bnts, branch):
        side = self.grids[branch]
        return probabilities_bnts[:, :, 0, 1:].mean(axis=1).reshape(-1, side, side)


def _drop_path_rates(depth, rate):
    """Return the rates of every stage: block k takes entry k, the fusion the last.

    The reference sums the last two entries of each stage for the total, which is the same whenever
    the coarse branch is the deeper one and does not run out of rates when it is not.
    """
    counts = [max(stage[:-1]) + stage[-1] for stage in depth]
    rates = np.linspace(0, rate, max(1, sum(counts))).tolist()
    starts = np.cumsum([0, *counts])
    return [rates[start : start + max(1, n)] for start, n in zip(starts, counts, strict=False)]


def _stem_multiply_adds(stem, side, patch, d):
    p = (side // patch) ** 2
    if stem in ("linear", "patches"):
        return p * patch * patch * 3 * d
    total, width, size = 0, 3, side
    for out, (kernel, stride, padding) in zip((d // 4, d // 2, d), CONV_STEMS[patch], strict=True):
        size = (size + 2 * padding - kernel) // stride + 1
        total += size * size * kernel * kernel * width * out
        width = out
    if stem == "dagger":
        return total
    total, size, h = 9 * 64 * p * d, side // 4, 64
    for width in (3 * 49, 9 * 64):
        t = size * size
        total += 3 * t * width * h + 3 * t * h * h
        total += 2 * t * t * h if stem == "t2t" else t * (4 * h + 1) * (h // 2)
        size //= {12: 3, 16: 2}[patch]
    return total


def _fusion_multiply_adds(kind, dims, sizes, heads, depth, is_last):
    if kind in ("none", *BRANCHES):
        return 0
    (fine, coarse), bridges = dims, 4 * dims[0] * dims[1]
    if kind == "cross" or kind == "cross_keep":
        total = bridges
        for i in (0, 1):
            d, n, t = dims[1 - i], heads[1 - i], sizes[1 - i]
            steps = [t] + [t if kind == "cross_keep" else 1] * (depth - 1)
            total += sum(4 * d * d + 2 * n * s * d for s in steps)
        return total
    both = fine * coarse + coarse * coarse
    if kind == "all_attention":
        t = sum(sizes)
        widths = 2 * (sizes[0] * fine * coarse + sizes[1] * coarse * coarse)
        return widths + 4 * t * coarse * coarse + 2 * t * t * coarse
    patches = 2 * (sizes[0] - 1) * fine * coarse + 2 * (sizes[1] - 1) * coarse * coarse
    return 2 * both + (patches if kind == "pairwise" and not is_last else 0)


def fit_parameter(path: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Fit a position table of another image size, bicubically; leave anything else alone.

    Args:
      path: of the parameter.
      array: its value for the other size.
      shape: the shape this model wants.

    Returns:
      The interpolated table (class token untouched), or the array as it is.
    """
    return fit_positions(array, shape) if path.startswith("positions_") else array


def _stem_names(name, stem):
    for i in range(3):
        yield conv(f"{name}/conv_{i}", f"{stem}.proj.{2 * i}")
    yield conv(name, f"{stem}.proj")
    yield linear(f"{name}/projection", f"{stem}.project")


def _token_names(name, stem, kind):
    for i in (0, 1):
        ours, theirs = f"{name}/token_{i}", f"{stem}.attention{i + 1}"
        yield norm(f"{ours}/attention_norm", f"{theirs}.norm1")
        yield norm(f"{ours}/mlp_norm", f"{theirs}.norm2")
        if kind == "performer":
            yield (rule(f"{ours}/random_projection", f"{theirs}.w"),)
            yield projections(f"{ours}/attention", f"{theirs}.kqv", ("key", "query", "value"))
            yield output(f"{ours}/attention/out", f"{theirs}.proj")
            yield linear(f"{ours}/mlp/up", f"{theirs}.mlp.0")
            yield linear(f"{ours}/mlp/down", f"{theirs}.mlp.2")
        else:
            yield projections(
                f"{ours}/attention", f"{theirs}.attn.qkv", ("query", "key", "value"), bias=False
            )
            yield output(f"{ours}/attention/out", f"{theirs}.attn.proj")
            yield linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
            yield linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")


def _branch_names(i, positions, cls, kind):
    name = BRANCHES[i]
    yield (rule(f"positions_{name}", positions.format(i)), rule(f"cls_{name}", cls.format(i)))
    yield from _stem_names(f"stem_{name}", f"patch_embed.{i}")
    yield from _token_names(f"stem_{name}", f"patch_embed.{i}", kind)
    ours, theirs = f"{name}_{{}}_{{}}", f"blocks.{{}}.blocks.{i}.{{}}"
    yield norm(f"{ours}/attention_norm", f"{theirs}.norm1")
    yield projections(f"{ours}/attention", f"{theirs}.attn.qkv", ("query", "key", "value"))
    yield output(f"{ours}/attention/out", f"{theirs}.attn.proj")
    yield norm(f"{ours}/mlp_norm", f"{theirs}.norm2")
    yield linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
    yield linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    for bridge, other in (("project", "projs"), ("revert", "revert_projs")):
        yield norm(f"fusion_{{}}/{bridge}_{name}/norm", f"blocks.{{}}.{other}.{i}.0")
        yield linear(f"fusion_{{}}/{bridge}_{name}/linear", f"blocks.{{}}.{other}.{i}.2")
    # Stacked cross-attention blocks carry one more number, in both layouts.
    for ours, theirs in (("", ""), ("_{}", ".{}")):
        ours, theirs = f"fusion_{{}}/cross_{name}{ours}", f"blocks.{{}}.fusion.{i}{theirs}"
        yield norm(f"{ours}/norm", f"{theirs}.norm1")
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            yield projections(f"{ours}/attention", f"{theirs}.attn.w{letter}", (part,))
        yield output(f"{ours}/attention/out", f"{theirs}.attn.proj")
    yield norm(f"norm_{name}", f"norm.{i}")
    yield linear(f"head_{name}", f"head.{i}")


def _names(positions, cls, kind="t2t"):
    groups = [g for i in (0, 1) for g in _branch_names(i, positions, cls, kind)]
    return tuple(line for group in groups for line in group)


TORCH_NAMES = {
    "timm": _names("pos_embed_{}", "cls_token_{}"),
    "ibm": _names("pos_embed.{}", "cls_token.{}"),
    "ibm_performer": _names("pos_embed.{}", "cls_token.{}", "performer"),
}
"""Layout -> name table. The ablations' fusions exist in no published layout."""

FROZEN = (r"/random_projection$",)
"""Patterns (`re.search`) of parameters that are not trained and must not decay."""

INERT = (
    r"^(fine|coarse)_\d+_\d+/attention/key/bias$",
    r"^fusion_\d+/(cross_\w+/)?attention/key/bias$",
)
"""Patterns of parameters that cannot change the output: a key bias moves all scores of a query
alike and cancels in the softmax. Their gradient is zero but for rounding, and exactly zero in
class-token cross-attention, which never computes it."""
