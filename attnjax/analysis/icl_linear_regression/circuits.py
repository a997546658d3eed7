# SPDX-License-Identifier: Apache-2.0
"""Circuits of one layer of attention on regression prompts: what heads look for and write.

    KQ^h = W_K^T W_Q / sqrt(d + o)      OV^h = W_O W_V
    prediction = sum_h sum_l softmax_l(z_l^T KQ^h z_q) OV^h z_l

He et al., arXiv 2503.12734, Section 3. A trained KQ is omega_h times the identity on x, an OV reads
the answer alone, times mu_h. The last diagonal entries of KQ multiply zeros and mean nothing.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.attention import attention
from attnjax.typing import Array, Params

POSITIVE, DUMMY, NEGATIVE = 1, 0, -1
"""Classes of heads."""

DUMMY_SHARE = 0.1
"""Heads whose |omega| and |mu| stay below this share of the largest ones do nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Circuits:
    """Circuits of n heads; any axes may stand in front, such as replicas.

    Attributes:
      kq: `[..., n, d + o, d + o]`, rows are of keys, columns of queries; the scale is in it.
      ov: `[..., n, o, d + o]`.
    """

    kq: Array
    ov: Array

    @property
    def outputs(self) -> int:
        """o, answers of an example."""
        return self.ov.shape[-2]

    @property
    def dim(self) -> int:
        """d, coordinates of x."""
        return self.ov.shape[-1] - self.ov.shape[-2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pattern:
    """How near circuits are to the pattern that the theory knows; axes in front as in `Circuits`.

    Attributes:
      omega: `[..., n]`, mean of the first d diagonal entries of KQ.
      mu: `[..., n]`, last entry of OV (one answer), or the largest entry on answers by size.
      diagonal_ratio: `[...]`, squares of the diagonal over those of the d x d block, mean of heads.
      diagonal_variance: `[...]`, variance of the d diagonal entries, mean of heads.
      answer_ratio: `[...]`, squares of OV on the answers over all of OV, mean of heads.
      imbalance: `[...]`, |sum_h mu_h| / sum_h |mu_h|.
      spread: `[...]`, largest over smallest |omega_h| of heads that are no dummies, minus 1.
      kind: `[..., n]` int32: POSITIVE (omega > 0), NEGATIVE or DUMMY.
    """

    omega: Array
    mu: Array
    diagonal_ratio: Array
    diagonal_variance: Array
    answer_ratio: Array
    imbalance: Array
    spread: Array
    kind: Array


def extract(query: Array, key: Array, value: Array, out: Array) -> Circuits:
    """Multiply kernels to circuits.

    Args:
      query, key, value: `[..., d + o, n, h]`.
      out: `[..., n, h, o]`.

    Raises:
      ValueError: shapes do not fit.
    """
    if query.shape != key.shape or key.shape != value.shape or out.ndim != query.ndim:
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape}, out {out.shape} do not fit"
        )
    multiply = lambda form, *arrays: jnp.einsum(form, *arrays, precision="highest")
    kq = multiply("...inh,...jnh->...nij", key, query) / query.shape[-1] ** 0.5
    return Circuits(kq, multiply("...nho,...inh->...noi", out, value))


def of_params(params: Params) -> Circuits:
    """Return the circuits of `models.regression_attention`, with its axis of replicas in front.

    Raises:
      ValueError: a kernel is missing.
    """
    names = [f"{part}_kernel" for part in ("query", "key", "value", "out")]
    if missing := [name for name in names if name not in params]:
        raise ValueError(f"parameters have no {', '.join(missing)}: {sorted(params)}")
    return extract(*(params[name] for name in names))


def ideal(omega: Array, mu: Array, dim: int) -> Circuits:
    """Return the circuits of the theory for one answer: omega_h on x, mu_h on the answer.

    Args:
      omega, mu: `[..., n]`.
      dim: d.
    """
    on_x = jnp.diag(jnp.where(jnp.arange(dim + 1) < dim, 1.0, 0.0))
    on_y = (jnp.arange(dim + 1) == dim).astype(jnp.float32)
    kq = jnp.asarray(omega)[..., None, None] * on_x
    return Circuits(kq, (jnp.asarray(mu)[..., None] * on_y)[..., None, :])


def predict(circuits: Circuits, examples: Array, query: Array) -> Array:
    """Predict as the network does whose circuits these are.

    Args:
      circuits: without axes in front.
      examples: `[p, s, d + o]`.
      query: `[p, d + o]`.

    Returns:
      `[p, o]` float32.
    """
    with jax.default_matmul_precision("highest"):
        query_p1nd = jnp.einsum("nij,pj->pni", circuits.kq, query)[:, None]
        tokens_ps1d = examples[:, :, None]
        read_p1nd = attention(query_p1nd, tokens_ps1d, tokens_ps1d, scale=1.0)
        return jnp.einsum("ptnd,nod->po", read_p1nd, circuits.ov)


def measure(circuits: Circuits) -> Pattern:
    """Say how near circuits are to omega_h I and mu_h e_y."""
    d = circuits.dim
    block = circuits.kq[..., :d, :d]
    diagonal = jnp.diagonal(block, axis1=-2, axis2=-1)
    omega = diagonal.mean(axis=-1)
    answers = jnp.diagonal(circuits.ov[..., d:], axis1=-2, axis2=-1)
    largest = jnp.argmax(jnp.abs(answers), axis=-1, keepdims=True)
    mu = jnp.take_along_axis(answers, largest, axis=-1)[..., 0]
    share = lambda part, whole: _share(jnp.square(part), jnp.square(whole))
    size = lambda x: jnp.abs(x) / _positive(jnp.abs(x).max(axis=-1, keepdims=True))
    is_dummy = (size(omega) < DUMMY_SHARE) & (size(mu) < DUMMY_SHARE)
    absolute = jnp.abs(omega)
    widest = jnp.where(is_dummy, 0, absolute).max(axis=-1)
    narrowest = jnp.where(is_dummy, jnp.inf, absolute).min(axis=-1)
    return Pattern(
        omega=omega,
        mu=mu,
        diagonal_ratio=share(diagonal, block).mean(axis=-1),
        diagonal_variance=diagonal.var(axis=-1).mean(axis=-1),
        answer_ratio=share(circuits.ov[..., d:], circuits.ov).mean(axis=-1),
        imbalance=jnp.abs(mu.sum(axis=-1)) / _positive(jnp.abs(mu).sum(axis=-1)),
        spread=widest / _positive(narrowest) - 1,
        kind=jnp.where(is_dummy, DUMMY, jnp.sign(omega)).astype(jnp.int32),
    )


def allocation(circuits: Circuits, masks: np.ndarray) -> Mapping[str, np.ndarray]:
    """Say which task each head of a multi-task network serves, and where it looks for it.

    Args:
      circuits: without axes in front.
      masks: `[o, d]` bool, coordinates that each task reads.

    Returns:
      `answer_share [n, o]`, squares of OV on the diagonal of the answers, over their sum; `task
      [n]`, the task that has 90 percent of them, or -1; `support_share [n, o]`, squares of the KQ
      diagonal on the coordinates of each task, over those on all.
    """
    d = circuits.dim
    answers_no = np.square(np.diagonal(np.asarray(circuits.ov)[..., d:], axis1=-2, axis2=-1))
    diagonal_nd = np.square(np.diagonal(np.asarray(circuits.kq)[..., :d, :d], axis1=-2, axis2=-1))
    share = answers_no / np.maximum(answers_no.sum(axis=-1, keepdims=True), 1e-30)
    support = diagonal_nd @ np.asarray(masks, np.float64).T
    support /= np.maximum(diagonal_nd.sum(axis=-1, keepdims=True), 1e-30)
    task = np.where(share.max(axis=-1) >= 0.9, share.argmax(axis=-1), -1)
    return {"answer_share": share, "task": task, "support_share": support}


def _share(part, whole):
    """Sum of `part [..., n, d]` over that of `whole [..., n, a, b]`."""
    return part.reshape(*whole.shape[:-2], -1).sum(axis=-1) / _positive(whole.sum(axis=(-2, -1)))


def _positive(x):
    return jnp.maximum(x, jnp.finfo(jnp.float32).tiny)
