# SPDX-License-Identifier: Apache-2.0
"""Predictors that a network is compared with, as pure functions of a prompt.

All take `x [p, s, d]`, `y [p, s]`, `query [p, d]` and return `[p]`: He et al., arXiv 2503.12734,
Sections 4 and 5. `attention_heads` is the network reduced to one pair of numbers per head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.attention import attention
from attnjax.typing import Array

Predictor = Callable[[Array, Array, Array], Array]


def attention_heads(omega: Array, mu: Array) -> Predictor:
    """Return sum_h mu_h sum_l y_l softmax_l(omega_h x_l . x_q) for heads `[n]`.

    One head is Nadaraya-Watson's kernel regression with the kernel exp(omega x . x_q), times mu.
    """
    omega_n, mu_n = jnp.atleast_1d(omega), jnp.atleast_1d(mu)

    def predict(x, y, query):
        with jax.default_matmul_precision("highest"):
            query_p1nd = omega_n[:, None] * query[:, None, None]
            read_p1n1 = attention(
                query_p1nd.astype(x.dtype), x[:, :, None], y[:, :, None, None], scale=1.0
            )
            return read_p1n1[:, 0, :, 0] @ mu_n.astype(x.dtype)

    return predict


def gradient_descent(step: float) -> Predictor:
    """Return (step / L) sum_l y_l x_l . x_q: one step from beta = 0."""

    def predict(x, y, query):
        return step * _dot("ps,psd,pd->p", y, x, query) / x.shape[1]

    return predict


def debiased_gradient_descent(step: float) -> Predictor:
    """Return (step / L) sum_l y_l (x_l - mean of x) . x_q."""
    plain = gradient_descent(step)
    return lambda x, y, query: plain(x - x.mean(axis=1, keepdims=True), y, query)


def preconditioned(matrix: Array) -> Predictor:
    """Return (1 / L) sum_l y_l x_l^T G x_q for G `[d, d]`."""

    def predict(x, y, query):
        return _dot("ps,psd,de,pe->p", y, x, jnp.asarray(matrix, x.dtype), query) / x.shape[1]

    return predict


def ridge(noise: float) -> Predictor:
    """Return x_q^T (X^T X + d noise I)^-1 X^T y, Bayes' estimate for beta ~ N(0, I/d)."""

    def predict(x, y, query):
        d = x.shape[-1]
        gram = _dot("psd,pse->pde", x, x) + d * noise * jnp.eye(d, dtype=x.dtype)
        beta = jnp.linalg.solve(gram, _dot("psd,ps->pd", x, y)[..., None])[..., 0]
        return _dot("pd,pd->p", beta, query)

    return predict


def fit_preconditioner(x: Array, y: Array, query: Array, target: Array) -> np.ndarray:
    """Return the G `[d, d]` with the least squared error of `preconditioned` on prompts.

    Args:
      x, y, query: as for every predictor; tens of thousands of prompts make G exact to a percent.
      target: `[p]`.
    """
    x, y, query, target = (np.asarray(a, np.float64) for a in (x, y, query, target))
    p, s, d = x.shape
    features = np.einsum("ps,psd,pe->pde", y, x, query, optimize=True).reshape(p, d * d) / s
    found, *_ = np.linalg.lstsq(features, target, rcond=None)
    return found.reshape(d, d)


def alignment(a: Array, b: Array) -> float:
    """Return the cosine of two matrices as vectors."""
    a, b = np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64))
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def _dot(form, *arrays):
    return jnp.einsum(form, *arrays, precision="highest")
