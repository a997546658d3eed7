# SPDX-License-Identifier: Apache-2.0
"""Attention as a normalised Gram matrix, and as the mean of a Gaussian process.

    kernel attention     M = D^-1 G,  G_ij = k(q_i, k_j),  D = diag(G 1)
    Gaussian process     M = Sigma_* (Sigma + s^2 I)^-1,  Sigma_ij = k(k_i, k_j), Sigma_* = G

G, k(.) and Sigma (covariance) are [paper symbols]; which kernels, their scales and the noise s^2
are [our design]. Kernels are positive, so that rows of M are distributions: "polynomial" is
(q . k / sqrt(h) + 1)^2 and "cosine" 1 + cos(q, k), not the bare cosine.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.linear import feature_attention
from attnjax.ops.mixers.template import Attention, masked, matrix_times, without_padding
from attnjax.typing import Array

KERNELS = ("exp", "rbf", "linear", "polynomial", "cosine")
FORMS = ("quadratic", "factorised")

GAUSSIAN_PROCESS_LIMIT = 2048
"""Longest sequence of the cubic reference."""


def gram(kernel: str, query: Array, key: Array, *, length_scale: float | None = None) -> Array:
    """Return the Gram matrix G_ij = k(q_i, k_j).

    exp: exp(q . k / sqrt(h));  rbf: exp(-|q - k|^2 / (2 length_scale^2));
    linear: phi(q) . phi(k), phi = elu + 1;  polynomial: (q . k / sqrt(h) + 1)^2;
    cosine: 1 + cos(q, k)

    Args:
      kernel: one of `KERNELS`.
      query: `[b,t,n,h]`.
      key: `[b,s,n,h]`.
      length_scale: of "rbf"; h ** 0.25 if None, which makes D^-1 G softmax attention but for the
        norms of the keys.

    Returns:
      `[b,n,t,s]` float32.

    Raises:
      ValueError: the kernel is unknown.
    """
    _check_kernel(kernel)
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if kernel in ("linear", "polynomial", "cosine"):
        return _products(features(kernel, query), features(kernel, key))
    dot_bnts = _products(query, key)
    if kernel == "exp":
        return jnp.exp(dot_bnts * query.shape[-1] ** -0.5)
    square = lambda x: jnp.moveaxis(jnp.sum(x * x, axis=-1), 1, 2)
    distance_bnts = square(query)[..., :, None] + square(key)[..., None, :] - 2 * dot_bnts
    return jnp.exp(-jnp.maximum(distance_bnts, 0) * _rbf_scale(length_scale, query.shape[-1]) / 2)


def features(kernel: str, x: Array) -> Array:
    """Return phi(x) with k(q, k) = phi(q) . phi(k), of the kernels that have finitely many.

    Args:
      kernel: "linear" (h features), "polynomial" ((h + 1)^2) or "cosine" (h + 1).
      x: `[b,t,n,h]`.

    Returns:
      `[b,t,n,m]` float32.

    Raises:
      ValueError: the kernel is another.
    """
    x_btnh = x.astype(jnp.float32)
    one_btn1 = jnp.ones((*x.shape[:-1], 1), jnp.float32)
    if kernel == "linear":
        return jax.nn.elu(x_btnh) + 1
    if kernel == "cosine":
        norm_btn1 = jnp.sqrt(jnp.sum(x_btnh * x_btnh, axis=-1, keepdims=True) + 1e-12)
        return jnp.concatenate([x_btnh / norm_btn1, one_btn1], axis=-1)
    if kernel == "polynomial":
        u_btnh = jnp.concatenate([x_btnh * x.shape[-1] ** -0.25, one_btn1], axis=-1)
        return (u_btnh[..., :, None] * u_btnh[..., None, :]).reshape(*x.shape[:-1], -1)
    raise ValueError(
        f"kernel {kernel!r} has no finite features; choose from linear, polynomial, cosine"
    )


def gaussian_process_mean(
    kernel: str,
    query: Array,
    key: Array,
    value: Array,
    *,
    noise: float,
    length_scale: float | None = None,
    valid: Array | None = None,
) -> Array:
    """Return the posterior mean at the queries, given noisy values at the keys.

    Sigma_* (Sigma + noise I)^-1 value

    Args:
      kernel: one of `KERNELS`.
      query: `[b,t,n,h]`.
      key: `[b,s,n,h]`.
      value: `[b,s,n,h']`.
      noise: s^2, variance of the observations.
      length_scale: see `gram`.
      valid: bool `[b,s]`, False where there is no observation.

    Returns:
      `[b,t,n,h']` float32.
    """
    across_bnts = gram(kernel, query, key, length_scale=length_scale)
    among_bnss = gram(kernel, key, key, length_scale=length_scale)
    if valid is not None:
        across_bnts = across_bnts * valid[:, None, None, :]
        among_bnss = among_bnss * (valid[:, None, None, :] & valid[:, None, :, None])
    among_bnss = among_bnss + noise * jnp.eye(key.shape[1], dtype=jnp.float32)
    factor = jax.scipy.linalg.cho_factor(among_bnss, lower=True)
    value_bnsh = jnp.moveaxis(masked(value.astype(jnp.float32), valid), 1, 2)
    return jnp.moveaxis(across_bnts @ jax.scipy.linalg.cho_solve(factor, value_bnsh), 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel(Attention):
    """Kernel attention, D^-1 G V.

    "exp" is softmax attention and "rbf" is softmax attention with the bias -|k|^2 / 2 on the keys
    (what depends on the query alone cancels), so both run on the attention core. The others are
    sums of products of features, computed quadratically or in the factorised form,
    phi(Q) (phi(K)^T V).

    Attributes:
      kernel: one of `KERNELS`.
      causal: no query sees a later key.
      form: "quadratic", or "factorised" for kernels with finite features.
      length_scale: of "rbf", see `gram`; 0 for its default.
    """

    kernel: str = "linear"
    causal: bool = False
    form: str = "factorised"
    length_scale: float = 0.0

    def __post_init__(self):
        _check_kernel(self.kernel)
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is unknown; choose from {', '.join(FORMS)}")

    @property
    def _is_factorised(self):
        return self.form == "factorised" and self.kernel not in ("exp", "rbf")

    def attend(self, params, query, key, value, valid):
        if self.kernel in ("exp", "rbf"):
            mask, bias, scale = self._softmax_options(key, valid)
            return attention(query, key, value, mask=mask, bias=bias, scale=scale)
        if self._is_factorised:
            query_btnm, key_bsnm = features(self.kernel, query), features(self.kernel, key)
            key_bsnm = masked(key_bsnm, valid)
            mixed = feature_attention(query_btnm, key_bsnm, value, is_causal=self.causal)
        else:
            weights_bnts = self.weights(params, query, key, valid)
            mixed = matrix_times(weights_bnts, value.astype(jnp.float32))
        return mixed.astype(value.dtype)

    def weights(self, params, query, key, valid):
        del params
        gram_bnts = gram(self.kernel, query, key, length_scale=self.length_scale or None)
        if self.causal:
            gram_bnts = jnp.tril(gram_bnts)
        if valid is not None:
            gram_bnts = gram_bnts * valid[:, None, None, :]
        return gram_bnts / (gram_bnts.sum(axis=-1, keepdims=True) + 1e-8)

    def _softmax_options(self, key, valid):
        mask = without_padding(masks.causal() if self.causal else masks.full(), valid)
        if self.kernel == "exp":
            return mask, None, None
        scale = _rbf_scale(self.length_scale or None, key.shape[-1])
        norms_bsn = jnp.sum(jnp.square(key.astype(jnp.float32)), axis=-1)
        return mask, -scale / 2 * jnp.moveaxis(norms_bsn, 1, 2)[:, :, None, :], scale

    def mixing_flops(self, length, dim, heads):
        if not self._is_factorised:
            return 4.0 * length * (length + 1) / (2 if self.causal else 1) * dim
        h = dim // heads
        width = {"linear": h, "polynomial": (h + 1) ** 2, "cosine": h + 1}[self.kernel]
        return 4.0 * length * width * dim

    def mixing_numbers(self, length, dim, heads):
        if self._is_factorised:
            h = dim // heads
            width = {"linear": h, "polynomial": (h + 1) ** 2, "cosine": h + 1}[self.kernel]
            return 2.0 * length * heads * width
        return length * heads if self.kernel in ("exp", "rbf") else 1.0 * heads * length**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianProcess(Attention):
    """Posterior mean of a Gaussian process with the values as observations: a cubic reference.

    Attributes:
      kernel: one of `KERNELS`.
      noise: s^2, variance of the observations.
      length_scale: of "rbf", see `gram`; 0 for its default.
    """

    kernel: str = "rbf"
    noise: float = 0.1
    length_scale: float = 0.0

    def __post_init__(self):
        _check_kernel(self.kernel)
        if self.noise <= 0:
            raise ValueError(f"noise={self.noise}: must be positive")

    def own_params(self, key, length, dim, heads):
        _check_reference(length)
        return {}

    def attend(self, params, query, key, value, valid):
        del params
        _check_reference(key.shape[1])
        mixed = gaussian_process_mean(
            self.kernel, query, key, value, noise=self.noise,
            length_scale=self.length_scale or None, valid=valid,
        )  # fmt: skip
        return mixed.astype(value.dtype)

    def weights(self, params, query, key, valid):
        # The mean is linear in the observations: its matrix is the mean of unit vectors.
        b, s, n, _ = key.shape
        unit_bsns = jnp.broadcast_to(jnp.eye(s, dtype=jnp.float32)[None, :, None, :], (b, s, n, s))
        return jnp.moveaxis(self.attend(params, query, key, unit_bsns, valid), 1, 2)

    def mixing_flops(self, length, dim, heads):
        return heads * length**3 / 3 + 8.0 * length**2 * dim

    def mixing_numbers(self, length, dim, heads):
        return 3.0 * heads * length**2


def _products(query_btnm, key_bsnm):
    return jnp.einsum("btnm,bsnm->bnts", query_btnm, key_bsnm)


def _rbf_scale(length_scale, h):
    """Return 1 / length_scale^2."""
    return 1 / math.sqrt(h) if length_scale is None else 1 / length_scale**2


def _check_kernel(kernel):
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; choose from {', '.join(KERNELS)}")


def _check_reference(length):
    if length > GAUSSIAN_PROCESS_LIMIT:
        raise ValueError(
            f"the Gaussian process is a cubic reference for at most {GAUSSIAN_PROCESS_LIMIT} "
            f"tokens, got {length}"
        )
