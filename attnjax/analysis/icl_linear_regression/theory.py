# SPDX-License-Identifier: Apache-2.0
"""What the theory says of omega and mu: a loss in closed form, its flow and its optima.

    L~(omega, mu) = 1 + s - 2 mu.omega + mu^T (omega omega^T + (1 + s)/L exp(d omega omega^T)) mu

with s = sigma^2, L examples, d coordinates, and exp element by element: He et al., arXiv
2503.12734, Section 4. A head is (omega_h, mu_h), see `circuits`. Compute in float32 or wider; two
opposite heads nearly cancel.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Setting:
    """The regression that heads are trained on.

    Attributes:
      dim: d, coordinates of x.
      length: L, examples of a prompt.
      noise: s, variance of the noise.
    """

    dim: int = 5
    length: int = 40
    noise: float = 0.1

    def __post_init__(self):
        if self.dim < 1 or self.length < 1 or self.noise < 0:
            raise ValueError(f"{self}: need dim >= 1, length >= 1 and noise >= 0")

    @property
    def variance(self) -> float:
        """1 + s, of an answer."""
        return 1 + self.noise


def loss(omega: Array, mu: Array, setting: Setting) -> Array:
    """Return L~, a scalar, of heads `[n]`."""
    return setting.variance - 2 * jnp.dot(mu, omega) + mu @ _matrix(omega, setting) @ mu


def gradients(omega: Array, mu: Array, setting: Setting) -> tuple[Array, Array]:
    """Return dL~/d omega and dL~/d mu, `[n]` each."""
    weighted = jnp.exp(setting.dim * jnp.outer(omega, omega)) * jnp.outer(mu, mu)
    factor = 2 * setting.dim * setting.variance / setting.length
    d_omega = -2 * mu + 2 * jnp.dot(mu, omega) * mu + factor * weighted @ omega
    return d_omega, -2 * omega + 2 * _matrix(omega, setting) @ mu


def best_mu(omega: Array, setting: Setting) -> Array:
    """Return the smallest mu `[n]` that minimises L~ for given omega `[n]`, A^-1 omega."""
    # Similar heads make A all but singular.
    return jnp.linalg.lstsq(_matrix(omega, setting), jnp.asarray(omega))[0]


def flow(
    omega: Array, mu: Array, setting: Setting, *, steps: int, rate: float = 0.01, every: int = 1
) -> dict[str, Array]:
    """Follow the gradient of L~ / 2 by Euler steps.

    Args:
      omega, mu: `[n]`, where the heads start.
      setting: the regression.
      steps: number of steps, a multiple of `every`.
      rate: length of a step.
      every: steps between two records.

    Returns:
      `step [k]`, `omega [k, n]`, `mu [k, n]`, `loss [k]`, the start included.

    Raises:
      ValueError: an argument is out of range.
    """
    if steps < 1 or every < 1 or steps % every or not rate > 0:
        raise ValueError(f"steps={steps}, every={every}, rate={rate}: steps must be a multiple")
    omega, mu = jnp.asarray(omega), jnp.asarray(mu)
    if omega.ndim != 1 or omega.shape != mu.shape:
        raise ValueError(f"omega {omega.shape} and mu {mu.shape} must be [n]")

    def move(_, heads):
        d_omega, d_mu = gradients(*heads, setting)
        return heads[0] - rate / 2 * d_omega, heads[1] - rate / 2 * d_mu

    def record(heads, _):
        heads = jax.lax.fori_loop(0, every, move, heads)
        return heads, heads

    _, later = jax.jit(lambda heads: jax.lax.scan(record, heads, length=steps // every))(
        (omega, mu)
    )
    omegas, mus = (
        jnp.concatenate([first[None], x]) for first, x in zip((omega, mu), later, strict=True)
    )
    losses = jax.vmap(lambda o, m: loss(o, m, setting))(omegas, mus)
    return {
        "step": jnp.arange(0, steps + 1, every),
        "omega": omegas,
        "mu": mus,
        "loss": losses,
    }


def one_head(setting: Setting) -> tuple[float, float]:
    """Return the best omega and mu of a single head."""
    omega = 1 / math.sqrt(setting.dim)
    mu = math.sqrt(setting.dim) / (1 + math.e * setting.variance * setting.dim / setting.length)
    return omega, mu


def best_step(setting: Setting) -> float:
    """Return eta, the best step of one step of gradient descent, 1 / (1 + (1 + s) d / L).

    Two opposite heads have 2 omega mu -> eta as omega -> 0; so has every even number of heads.
    """
    return 1 / (1 + setting.variance * setting.dim / setting.length)


def opposite_heads_loss(setting: Setting) -> float:
    """Return the limit of L~ of two opposite heads: 1 + s - eta."""
    return setting.variance - best_step(setting)


def ridge_risk(setting: Setting) -> float:
    """Return the risk of ridge regression, the Bayes estimator, as d and L grow at xi = d / L.

    Excess and noise are both in it, as in a mean squared error against noisy answers.
    """
    s, xi = setting.noise, setting.dim / setting.length
    root = math.sqrt(4 * s + (s + (1 - xi) / xi) ** 2)
    return 0.5 * (s + (xi - 1) / xi + root)


def _matrix(omega, setting):
    products = jnp.outer(omega, omega)
    return products + setting.variance / setting.length * jnp.exp(setting.dim * products)
