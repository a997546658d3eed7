# SPDX-License-Identifier: Apache-2.0
"""PoinTr: the missing part of a cloud of points, translated from point proxies of the seen part.

Yu et al., "PoinTr: Diverse Point Cloud Completion with Geometry-Aware Transformers", arXiv
2108.08839; the backbone of CAB (arXiv 2210.07661) for point cloud completion.

    proxies   graph convolutions over 16 nearest neighbours, thinned out twice
    encoder   layers over proxies + their places
    queries   a coarse cloud from the pooled memory, and a vector for each of its points
    decoder   layers over queries, attending to the memory
    folding   a square of fold x fold points around each coarse point

The first layers join attention with a graph convolution over the nearest 8 proxies. The release
gives those weights to all layers and uses them in the first ones; here only these have them. Its
batch norms over clouds are layer norms over channels here, so that the model is its parameters and
no example depends on its batch. Query, key and value have the biases of CAB's attentions, which the
release of PoinTr has not.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE
from attnjax.nn.blocks import Mlp
from attnjax.nn.initializers import fan_in_uniform
from attnjax.nn.norm import LayerNorm
from attnjax.nn.pattern_attention import Attention, choose_attention
from attnjax.ops import points as clouds
from attnjax.ops.efficient import PatternAttention
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array

PAPER = {
    "title": "PoinTr: Diverse Point Cloud Completion with Geometry-Aware Transformers",
    "id": "arXiv:2108.08839",
    "year": 2021,
    "code": "https://github.com/yuxumin/PoinTr",
    "licence": "MIT",
    "claim": "Completion as translation from proxies to proxies keeps the detail of what is seen.",
}

# pcn: cfgs/PCN_models/PoinTr.yaml of the release. cab: the lengths 1536 and 3584 of CAB's Table 1,
# read as proxies and queries of 4 points each, thinned out from all 2,048 points; its configuration
# was not released.
PRESETS = {
    "pcn": {"groups": (512, 128), "queries": 224, "fold": 8},
    "cab": {"groups": (2048, 1536), "queries": 3584, "fold": 2},
}

REMATS = ("none", "blocks")

EPSILON = 1e-5
"""Of all norms, as in the release."""
GRAPH_NEIGHBOURS = 16
GRAPH_WIDTHS = (8, 32, 64, 64, 128)
"""Width of a point, then after each of the four graph convolutions."""
PLACE_WIDTH = 128
FOLD_WIDTHS = (256, 128)

LINEAR = nn.initializers.truncated_normal(0.02)
POINTWISE = nn.initializers.xavier_normal()

leaky = functools.partial(nn.leaky_relu, negative_slope=0.2)


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      coarse: float32 `[b, queries + min(queries, points), 3]`, the coarse cloud, then a sample of
        the input.
      fine: float32 `[b, queries * fold^2 + points, 3]`, the folded points, then the input.
      aux: `proxies [b, s, 3]`, places of the proxies.
    """

    coarse: Array
    fine: Array
    aux: dict[str, Array]


class EdgeLinear(nn.Module):
    """A linear map of every edge of a graph of neighbours, (x_j - x_i, x_i) W.

    Attributes:
      features: d'.
      use_bias: whether there is a bias.
      kernel_init: draws the kernel `[2, d, d']`; None: uniform by the number of inputs.
      dtype: compute dtype.
    """

    features: int
    use_bias: bool = True
    kernel_init: Any = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, centre: Array, points: Array, neighbours: Array) -> Array:
        """Map edges to vectors.

        Args:
          centre: `[b, t, d]`, x_i.
          points: `[b, s, d]`, among which the x_j are.
          neighbours: int `[b, t, k]`, which they are.

        Returns:
          `[b, t, k, d']`.
        """
        d = centre.shape[-1]
        init = self.kernel_init or fan_in_uniform(2 * d)
        kernel = self.param("kernel", init, (2, d, self.features), jnp.float32)
        # W is linear: it maps points and centres before they become edges, k times cheaper.
        near, own = kernel[0].astype(self.dtype), (kernel[1] - kernel[0]).astype(self.dtype)
        edge_btkf = clouds.gather(points.astype(self.dtype) @ near, neighbours)
        edge_btkf = edge_btkf + (centre.astype(self.dtype) @ own)[:, :, None]
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            edge_btkf = edge_btkf + bias.astype(self.dtype)
        return edge_btkf


class GraphConv(nn.Module):
    """The largest of normalised maps of the edges to the 16 nearest points.

    Attributes:
      features: d'.
      dtype: compute dtype.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, centre: Array, points: Array, neighbours: Array) -> Array:
        """Map `centre [b, t, d]` and `points [b, s, d]` to `[b, t, d']`, see `EdgeLinear`."""
        edge = EdgeLinear(self.features, use_bias=False, dtype=self.dtype, name="edge")
        norm = nn.GroupNorm(num_groups=4, epsilon=EPSILON, dtype=self.dtype, name="norm")
        return jnp.max(leaky(norm(edge(centre, points, neighbours))), axis=2)


class PointProxies(nn.Module):
    """Few points of a cloud, each with a vector about its surroundings (DGCNN).

    Attributes:
      groups: points left after the second and after the fourth graph convolution.
      dtype: compute dtype.
    """

    groups: tuple[int, int]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, points: Array, order: Array) -> tuple[Array, Array]:
        """Summarise a cloud.

        Args:
          points: `[b, n, 3]` float32.
          order: int `[b, groups[0]]`, the furthest points, in their order.

        Returns:
          Places `[b, groups[1], 3]` and vectors `[b, groups[1], 128]`.
        """
        start, *widths = GRAPH_WIDTHS
        stages = [GraphConv(width, self.dtype, name=f"graph_{i}") for i, width in enumerate(widths)]
        near = functools.partial(clouds.nearest_neighbours, count=GRAPH_NEIGHBOURS)
        init = fan_in_uniform(3)
        stem = nn.Dense(start, dtype=self.dtype, kernel_init=init, bias_init=init, name="stem")
        x_bnc = stem(points)
        x_bnc = stages[0](x_bnc, x_bnc, near(points, points))
        some = clouds.gather(points, order)
        x_bsc = stages[1](clouds.gather(x_bnc, order), x_bnc, near(some, points))
        x_bsc = stages[2](x_bsc, x_bsc, near(some, some))
        # The furthest of the furthest points are the first of them.
        few = some[:, : self.groups[1]]
        return few, stages[3](x_bsc[:, : self.groups[1]], x_bsc, near(few, some))


class PointwiseMlp(nn.Module):
    """Linear, layer norm if wanted, nonlinearity, linear, of every point.

    Attributes:
      hidden: width in the middle.
      features: width of the result.
      has_norm: whether there is a norm.
      activation: the nonlinearity.
      kernel_init: draws both matrices.
      dtype: compute dtype.
    """

    hidden: int
    features: int
    has_norm: bool = True
    activation: Any = leaky
    kernel_init: Any = POINTWISE
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[..., c]` to `[..., features]`."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        x = dense(self.hidden, name="up")(x)
        if self.has_norm:
            x = LayerNorm(EPSILON, self.dtype, name="norm")(x)
        return dense(self.features, name="down")(self.activation(x))


class GeometricLayer(nn.Module):
    """A pre-norm transformer layer whose attentions may be joined by a graph of neighbours.

    Attributes:
      num_heads: attention heads.
      self_attention: attends among the layer's points.
      cross_attention: attends to a context; None: there is none.
      is_geometric: whether branches are joined by the graph.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    num_heads: int
    self_attention: PatternAttention
    cross_attention: PatternAttention | None = None
    is_geometric: bool = False
    dtype: str = "float32"
    implementation: str | None = None

    def _join(self, name, branch_btd, x_btd, points_bsd, neighbours_btk):
        """Merge what attention found with the largest map of the edges to neighbours."""
        if not self.is_geometric:
            return branch_btd
        d = x_btd.shape[-1]
        edge = EdgeLinear(d, kernel_init=_edges(LINEAR), dtype=self.dtype, name=f"{name}near")
        # A leaky ReLU grows, so that it can follow the maximum.
        near_btd = leaky(jnp.max(edge(x_btd, points_bsd, neighbours_btk), axis=2))
        merge = nn.Dense(d, dtype=self.dtype, kernel_init=LINEAR, name=f"{name}merge")
        return merge(jnp.concatenate([branch_btd, near_btd], axis=-1))

    @nn.compact
    def __call__(
        self,
        x: Array,
        neighbours: Array,
        context: Array | None = None,
        context_neighbours: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Map `x [b, t, d]` to `[b, t, d]`.

        Args:
          x: points' vectors.
          neighbours: int `[b, t, k]`, nearest among themselves.
          context: `[b, s, d]`, where there is cross-attention.
          context_neighbours: int `[b, t, k]`, nearest in the context.
          train: passed to the attentions.
        """
        norm = lambda name: LayerNorm(EPSILON, self.dtype, name=name)
        attend = lambda attention, name: Attention(
            attention,
            self.num_heads,
            dtype=self.dtype,
            implementation=self.implementation,
            name=name,
        )
        y = norm("attention_norm")(x)
        branch = attend(self.self_attention, "attention")(y, train=train)
        x = x + self._join("", branch, y, y, neighbours)
        if self.cross_attention is not None:
            y, memory = norm("cross_norm")(x), norm("context_norm")(context)
            branch = attend(self.cross_attention, "cross")(y, memory, train=train)
            x = x + self._join("cross_", branch, y, memory, context_neighbours)
        x = constrain(x, "batch", "sequence", None)
        mlp = Mlp(2 * x.shape[-1], dtype=self.dtype, kernel_init=LINEAR, name="mlp")
        return constrain(x + mlp(norm("mlp_norm")(x), train=train), "batch", "sequence", None)


class Folding(nn.Module):
    """Bend a square of points into a patch around each query, twice (FoldingNet).

    Attributes:
      fold: points of a side.
      dtype: compute dtype; offsets are float32.
    """

    fold: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, q, d]` to offsets `[b, q, fold^2, 3]`."""
        side = jnp.linspace(-1.0, 1.0, self.fold)
        rows, columns = jnp.meshgrid(side, side, indexing="ij")
        patch_bqpc = jnp.stack([columns, rows], axis=-1).reshape(1, 1, -1, 2)
        for i in range(2):
            init = fan_in_uniform(x.shape[-1] + patch_bqpc.shape[-1])
            dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=init, bias_init=init)
            # One linear map of both, the queries' part once for all points of a patch.
            own = dense(FOLD_WIDTHS[0], use_bias=False, name=f"query_{i}")(x)[:, :, None]
            y_bqpc = own + dense(FOLD_WIDTHS[0], name=f"point_{i}")(patch_bqpc)
            y_bqpc = nn.relu(LayerNorm(EPSILON, self.dtype, name=f"norm_{i}")(y_bqpc))
            y_bqpc = dense(FOLD_WIDTHS[1], name=f"hidden_{i}")(y_bqpc)
            y_bqpc = nn.relu(LayerNorm(EPSILON, self.dtype, name=f"hidden_norm_{i}")(y_bqpc))
            patch_bqpc = nn.Dense(3, kernel_init=init, bias_init=init, name=f"offset_{i}")(y_bqpc)
        return patch_bqpc


class PoinTr(nn.Module):
    """Complete a cloud of points.

    Attributes:
      points: of the partial cloud.
      groups: points left after the second and after the last graph convolution; the latter are the
        proxies.
      queries: points of the coarse cloud.
      fold: side of the square of points around each of them.
      width: d, model width.
      num_heads: heads of all attentions.
      global_width: of the vectors that are pooled over the cloud.
      depth: layers of the encoder and of the decoder.
      neighbours: nearest points that geometric layers look at.
      geometric_layers: how many first layers of encoder and decoder are geometric.
      encoder_attention: noncausal self-attention of the encoder, see `choose_attention`.
      decoder_attention: noncausal self-attention of the decoder.
      cross_attention: noncausal cross-attention of the decoder.
      dtype: compute dtype; parameters and points are float32.
      remat: "none", or "blocks" to recompute layers in the backward pass.
      attention_implementation: passed to `nn.attend` by softmax and local attention.
    """

    points: int = 2048
    groups: tuple[int, int] = (512, 128)
    queries: int = 224
    fold: int = 8
    width: int = 384
    num_heads: int = 6
    global_width: int = 1024
    depth: tuple[int, int] = (6, 8)
    neighbours: int = 8
    geometric_layers: int = 1
    encoder_attention: str | Mapping[str, Any] | None = None
    decoder_attention: str | Mapping[str, Any] | None = None
    cross_attention: str | Mapping[str, Any] | None = None
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        for field in ("fold", "global_width", "neighbours", "num_heads"):
            if getattr(self, field) < 1:
                raise RecipeError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.geometric_layers < 0:
            raise RecipeError(f"geometric_layers={self.geometric_layers}: must be at least 0")
        if len(self.groups) != 2 or not self.points >= self.groups[0] >= self.groups[1]:
            raise RecipeError(
                f"groups={self.groups}: must be two numbers that fall from points={self.points}"
            )
        fewest = max(GRAPH_NEIGHBOURS, self.neighbours)
        for name, count, least in (
            ("groups", self.groups[1], fewest), ("queries", self.queries, self.neighbours),
        ):  # fmt: skip
            if count < least:
                raise RecipeError(f"{name}={getattr(self, name)}: fewer than {least} neighbours")
        if len(self.depth) != 2 or min(self.depth) < 1:
            raise RecipeError(f"depth={self.depth}: must be two numbers of layers of at least 1")
        if self.remat not in REMATS:
            raise RecipeError(f"remat={self.remat!r}: {nearest(self.remat, REMATS)}")
        if self.width % self.num_heads:
            raise RecipeError(f"num_heads={self.num_heads} does not divide width={self.width}")
        self.attentions()
        super().__post_init__()

    def attentions(self) -> tuple[PatternAttention, PatternAttention, PatternAttention]:
        """Return the attentions of encoder, decoder and between them.

        Raises:
          RecipeError: one is unknown or has no form for its place.
        """
        return (
            choose_attention(self.encoder_attention, field="encoder_attention"),
            choose_attention(self.decoder_attention, field="decoder_attention"),
            choose_attention(self.cross_attention, field="cross_attention", cross=True),
        )

    @nn.compact
    def __call__(self, partial: Array, *, train: bool = False) -> Output:
        """Complete clouds.

        Args:
          partial: `[b, points, 3]` floating.
          train: passed to the attentions; nothing else is random.

        Returns:
          An `Output`.

        Raises:
          ValueError: the input has the wrong shape.
        """
        if partial.shape[1:] != (self.points, 3):
            raise ValueError(f"partial must be [b, {self.points}, 3], got {partial.shape}")
        points_bnc = partial.astype(jnp.float32)
        sampled = min(self.queries, self.points)
        order = clouds.furthest_point_sampling(points_bnc, max(self.groups[0], sampled))
        proxies_bsc, memory_bsd = self._encode(points_bnc, order[:, : self.groups[0]], train)
        pooled_bg = self._pool("pool", memory_bsd)
        coarse_head = PointwiseMlp(
            self.global_width, 3 * self.queries, False, nn.relu, LINEAR, name="coarse"
        )
        coarse_bqc = coarse_head(pooled_bg.astype(jnp.float32)).reshape(-1, self.queries, 3)
        q_bqd = self._decode(pooled_bg, coarse_bqc, proxies_bsc, memory_bsd, train)

        linear = functools.partial(nn.Dense, self.width, dtype=self.dtype, kernel_init=LINEAR)
        vector_bqd = (
            linear(use_bias=False, name="rebuild_pooled")(self._pool("rebuild", q_bqd))[:, None]
            + linear(use_bias=False, name="rebuild_query")(q_bqd)
            + linear(name="rebuild_point")(coarse_bqc)
        )
        offset_bqpc = Folding(self.fold, self.dtype, name="folding")(vector_bqd)
        fine_bmc = (coarse_bqc[:, :, None] + offset_bqpc).reshape(len(partial), -1, 3)
        seen_bnc = clouds.gather(points_bnc, order[:, :sampled])
        return Output(
            coarse=jnp.concatenate([coarse_bqc, seen_bnc], axis=1),
            fine=jnp.concatenate([fine_bmc, points_bnc], axis=1),
            aux={"proxies": proxies_bsc},
        )

    def _encode(self, points_bnc, order_bs, train):
        """Return places `[b,s,3]` and vectors `[b,s,d]` of the proxies."""
        proxies = PointProxies(self.groups, self.dtype, name="proxies")
        place_bsc, x_bsc = proxies(points_bnc, order_bs)
        pointwise = lambda hidden, name: PointwiseMlp(
            hidden, self.width, dtype=self.dtype, name=name
        )
        place_bsd = pointwise(PLACE_WIDTH, "place")(place_bsc)
        x_bsd = pointwise(self.width, "input")(x_bsc)
        near_bsk = clouds.nearest_neighbours(place_bsc, place_bsc, self.neighbours)
        encode, _, _ = self.attentions()
        for i in range(self.depth[0]):
            layer = self._layer(f"encoder_{i}", encode, None, i)
            x_bsd = layer(x_bsd + place_bsd, near_bsk, None, None, train)
        return place_bsc, x_bsd

    def _decode(self, pooled_bg, coarse_bqc, proxies_bsc, memory_bsd, train):
        """Return a vector for every coarse point, `[b,q,d]`."""
        wide = functools.partial(
            nn.Dense, self.global_width, dtype=self.dtype, kernel_init=POINTWISE
        )
        q_bqd = wide(use_bias=False, name="query_pooled")(pooled_bg)[:, None]
        q_bqd = leaky(q_bqd + wide(name="query_point")(coarse_bqc))
        # Two more linear maps with a nonlinearity between them.
        q_bqd = PointwiseMlp(
            self.global_width, self.width, has_norm=False, dtype=self.dtype, name="query"
        )(q_bqd)
        near_bqk = clouds.nearest_neighbours(coarse_bqc, coarse_bqc, self.neighbours)
        near_memory_bqk = clouds.nearest_neighbours(coarse_bqc, proxies_bsc, self.neighbours)
        _, decode, cross = self.attentions()
        for i in range(self.depth[1]):
            layer = self._layer(f"decoder_{i}", decode, cross, i)
            q_bqd = layer(q_bqd, near_bqk, memory_bsd, near_memory_bqk, train)
        return q_bqd

    def _layer(self, name, attention, cross_attention, number):
        block = GeometricLayer
        if self.remat == "blocks":
            block = nn.remat(GeometricLayer, static_argnums=(5,))
        return block(
            self.num_heads, attention, cross_attention, number < self.geometric_layers, self.dtype,
            self.attention_implementation, name=name,
        )  # fmt: skip

    def _pool(self, name, x_btd):
        """Return one vector `[b,g]` for a cloud of vectors."""
        widen = PointwiseMlp(self.global_width, self.global_width, dtype=self.dtype, name=name)
        return jnp.max(widen(x_btd), axis=1)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {"partial": jax.ShapeDtypeStruct((batch, self.points, 3), jnp.float32)}

    @property
    def completed(self) -> int:
        """Number of points of the fine cloud."""
        return self.queries * self.fold**2 + self.points

    def flops(self) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two.

        Products and attention count, distances between points do not.
        """
        encode, decode, cross = self.attentions()
        d, g, n = self.width, self.global_width, self.num_heads
        s, q = self.groups[1], self.queries
        a, b, c, e, f = GRAPH_WIDTHS
        graph = 2 * a * b * self.points * 2 + b * c * (self.points + self.groups[0])
        graph += (2 * c * e + e * f) * self.groups[0] + e * f * s
        embed = s * (3 * PLACE_WIDTH + PLACE_WIDTH * d + f * d + d * d)
        pool = (s + q) * (d * g + g * g)
        queries = g * (g + 3 * q) + g * g + q * (3 * g + g * g + g * d)
        rebuild = g * d + q * d * (d + 3)
        first, second = FOLD_WIDTHS
        folding = 2 * q * d * first + 2 * q * self.fold**2 * (
            first * second + 3 * second + 3 * first
        )
        mlp = 4 * d * d
        layers = self.depth[0] * s * mlp + self.depth[1] * q * mlp
        geometric = min(self.geometric_layers, self.depth[0]) * s
        geometric += 2 * min(self.geometric_layers, self.depth[1]) * q
        layers += geometric * 4 * d * d
        attention = self.depth[0] * encode.flops(s, s, d, n)
        attention += self.depth[1] * (decode.flops(q, q, d, n) + cross.flops(q, s, d, n))
        products = graph + embed + pool + queries + rebuild + folding + layers
        return 2.0 * products + attention

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return how much each proxy is looked at, if the attention has weights.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, 1, s]`, the mean over heads and queries in the last layer.
        """
        captured = captured.get(CAPTURE, captured)
        layer = captured.get(f"decoder_{self.depth[1] - 1}", {})
        if "cross" not in layer:
            return {}
        weights_bnts = layer["cross"]["probabilities"][0]
        return {"queries to proxies, last layer": weights_bnts.mean(axis=(1, 2))[:, None]}


def _edges(init):
    """Draw a kernel `[2, d, d']` of edges as one matrix `[2 d, d']`."""
    return lambda key, shape, dtype: init(key, (2 * shape[1], shape[2]), dtype).reshape(shape)


TORCH_NAMES = None
"""Published weights rest on running statistics of batch norms."""
