# SPDX-License-Identifier: Apache-2.0
"""One layer of multi-head attention from a query to the examples of a linear regression.

He et al., "In-Context Linear Regression Demystified", arXiv 2503.12734, Section 2; sizes and
initialisations from the release. No residual, norm, position or bias; every head is as wide as a
token; the query does not see itself. Any number of independent networks train side by side.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.initializers import fan_in_uniform
from attnjax.ops.attention import attention
from attnjax.ops.linear import feature_attention
from attnjax.parallel.constrain import constrain
from attnjax.registry import nearest
from attnjax.typing import Array

PAPER = {
    "title": "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic "
    "Interpretability of Multi-Head Softmax Attention",
    "id": "arXiv:2503.12734",
    "year": 2025,
    "code": "XintianPan/ICL_linear",
    "licence": "none stated",
    "claim": "Pairs of opposite heads learn one debiased step of gradient descent.",
}

KERNELS = ("softmax", "linear_mean", "linear_sum")
"""Weights of examples: softmax of scores; scores over the number of examples; over `length`."""

REMATS = ("none", "full")
INITIALS = ("random", "small_id", "small_id_qk", "oppo_small_id")

# arXiv 2503.12734, Sections 3 and 6, and the notebooks of the release.
PRESETS = {
    "single_task": {"dim": 5, "outputs": 1, "heads": 2, "length": 40},
    "multi_task": {"dim": 6, "outputs": 2, "heads": 4, "length": 48},
}


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      prediction: `[b, p, r, o]` float32.
      aux: empty.
    """

    prediction: Array
    aux: dict[str, Array]


def _identity(shape, factor, signs=None):
    """Identity `[r, d, n, d]` in every head, times a factor and a sign per head."""
    r, d, n, h = shape
    signs_n = jnp.ones(n) if signs is None else signs
    eye_dnh = factor * jnp.eye(d, h)[:, None] * signs_n[:, None]
    return jnp.broadcast_to(eye_dnh, (r, d, n, h)).astype(jnp.float32)


class RegressionAttention(nn.Module):
    """Predict the answers to a query from examples.

    Attributes:
      dim: d, coordinates of x.
      outputs: o, answers.
      heads: n.
      length: s, examples of a prompt, for `example` and `flops`, and what "linear_sum" divides by;
        any other number works as well.
      prompts: p, prompts of an example, for `example` and `flops`.
      replicas: r, networks with initialisations of their own.
      kernel: member of `KERNELS`.
      initial: "random", uniform between +- fan_in^-1/2; "small_id", query, key and value 1e-6 times
        the identity; "small_id_qk", query and key 1e-4 times it; "oppo_small_id", query and key
        1e-6 times it with a negative sign in the query of the second half of the heads. What is
        not named is random.
      dtype: compute dtype of projections and attention; heads that nearly cancel need float32.
      remat: "none", or "full": the backward pass attends again.
      attention_implementation: passed to `ops.attention`.
    """

    dim: int = 5
    outputs: int = 1
    heads: int = 2
    length: int = 40
    prompts: int = 64
    replicas: int = 1
    kernel: str = "softmax"
    initial: str = "random"
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        for name in ("dim", "outputs", "heads", "length", "prompts", "replicas"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name, choices in (("kernel", KERNELS), ("initial", INITIALS), ("remat", REMATS)):
            if getattr(self, name) not in choices:
                found = getattr(self, name)
                raise RecipeError(f"model.{name}={found!r}: {nearest(found, choices)}")
        if self.initial == "oppo_small_id" and self.heads % 2:
            raise RecipeError(f"model.heads={self.heads}: oppo_small_id needs an even number")
        super().__post_init__()

    @nn.compact
    def __call__(self, examples: Array, query: Array, *, train: bool = False) -> Output:
        """Predict.

        Args:
          examples: `[b, p, s, d + o]` floating; s may differ from `length`.
          query: `[b, p, d + o]` floating, zero where the answers would stand.
          train: without effect.

        Returns:
          An `Output`.

        Raises:
          ValueError: the shapes do not fit.
        """
        del train
        width = self.dim + self.outputs
        if examples.ndim != 4 or query.shape != (*examples.shape[:2], examples.shape[3]):
            raise ValueError(
                f"examples {examples.shape} and query {query.shape} must be [b, p, s, d + o] and "
                "[b, p, d + o]"
            )
        if examples.shape[3] != width:
            raise ValueError(
                f"examples {examples.shape}: the last axis must be dim + outputs = {width}"
            )
        (b, p, s, _), r, n = examples.shape, self.replicas, self.heads
        # Networks are heads of one attention, which they share nothing of but the tokens.
        tokens_bsd = examples.reshape(b * p, s, width).astype(self.dtype)
        query_b1d = query.reshape(b * p, 1, width).astype(self.dtype)

        def project(name, x_btd):
            kernel_rdnh = self.param(f"{name}_kernel", self._init(name), (r, width, n, width))
            kernel_rdnh = kernel_rdnh.astype(self.dtype)
            # Heads nearly cancel each other, which products in bfloat16 would spoil.
            out_btrnh = jnp.einsum("btd,rdnh->btrnh", x_btd, kernel_rdnh, precision="highest")
            return constrain(
                out_btrnh.reshape(b * p, -1, r * n, width), "batch", None, "heads", None
            )

        query_btnh = project("query", query_b1d)
        key_bsnh, value_bsnh = project("key", tokens_bsd), project("value", tokens_bsd)
        attend = jax.checkpoint(self._attend) if self.remat == "full" else self._attend
        out_btnh = attend(query_btnh, key_bsnh, value_bsnh).astype(jnp.float32)
        kernel_rnho = self.param("out_kernel", self._init("out"), (r, n, width, self.outputs))
        prediction_bro = jnp.einsum(
            "brnh,rnho->bro", out_btnh.reshape(b * p, r, n, width), kernel_rnho, precision="highest"
        )
        return Output(prediction_bro.reshape(b, p, r, self.outputs), aux={})

    def _attend(self, query_btnh, key_bsnh, value_bsnh):
        if self.kernel == "softmax":
            with jax.default_matmul_precision("highest"):
                return attention(
                    query_btnh, key_bsnh, value_bsnh, implementation=self.attention_implementation
                )
        s, width = key_bsnh.shape[1::2]
        count = s if self.kernel == "linear_mean" else self.length
        scaled_btnh = query_btnh / (count * width**0.5)
        return feature_attention(scaled_btnh, key_bsnh, value_bsnh, is_normalized=False)

    def _init(self, name):
        half = jnp.where(jnp.arange(self.heads) < self.heads // 2, 1, -1)
        factor, signs = {
            ("small_id", "query"): (1e-6, None),
            ("small_id", "key"): (1e-6, None),
            ("small_id", "value"): (1e-6, None),
            ("small_id_qk", "query"): (1e-4, None),
            ("small_id_qk", "key"): (1e-4, None),
            ("oppo_small_id", "query"): (1e-6, half),
            ("oppo_small_id", "key"): (1e-6, None),
        }.get((self.initial, name), (None, None))
        if factor is not None:
            return lambda key, shape: _identity(shape, factor, signs)
        width = self.dim + self.outputs
        return fan_in_uniform(width * self.heads if name == "out" else width)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        width = self.dim + self.outputs
        shapes = {
            "examples": (batch, self.prompts, self.length, width),
            "query": (batch, self.prompts, width),
        }
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two."""
        width, s = self.dim + self.outputs, self.length
        head = 2.0 * width * (width * (1 + 2 * s) + 2 * s + self.outputs)
        return head * self.heads * self.replicas * self.prompts

    def attention_maps(self, captured: Any) -> dict[str, Array]:
        """Return nothing: weights of single prompts are no picture of the network."""
        del captured
        return {}


TORCH_NAMES = None
"""No checkpoint was released."""

# Replicas are divided like heads of a larger attention.
PARAM_AXES = ((r"(query|key|value|out)_kernel$", ("heads", None, None, None)),)
