# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: many channel stages, of which every token takes one or two."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.nn.initializers import LINEAR
from attnjax.ops.routing import assign_experts, expert_capacity
from attnjax.parallel.constrain import constrain, gather
from attnjax.recipe import check_arguments
from attnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """The numbers of a mixture of experts.

    Attributes:
      count: experts e.
      top_k: experts of a token, 1 or 2.
      capacity: places of an expert, as a multiple of its even share of the tokens of a group.
      load_loss: weight of the load-balancing loss of every layer.
      z_loss: weight of the router's z-loss of every layer.
      group: tokens that share places; consecutive tokens of one example. The matrices that move
        tokens grow with it, and with small groups more tokens find no place.
    """

    count: int
    top_k: int = 2
    capacity: float = 1.25
    load_loss: float = 0.01
    z_loss: float = 1e-3
    group: int = 1024

    def __post_init__(self):
        for name, fine in (
            ("top_k", self.top_k in (1, 2)),
            ("count", self.count >= self.top_k),
            ("capacity", self.capacity > 0),
            ("load_loss", self.load_loss >= 0),
            ("z_loss", self.z_loss >= 0),
            ("group", self.group >= 1),
        ):
            if not fine:
                raise ValueError(f"experts.{name}={getattr(self, name)!r} is out of range")

    @classmethod
    def of(cls, values: "Mapping[str, Any] | ExpertOptions | None") -> "ExpertOptions | None":
        """Return options from a recipe's dict; None and an empty dict mean no experts.

        Raises:
          RecipeError: a name is unknown, or `count` is missing.
          ValueError: a value is out of range.
        """
        if values is None or isinstance(values, cls):
            return values
        if not values:
            return None
        check_arguments(cls, values, "model.experts")
        return cls(**values)


class ExpertKernel(nn.Module):
    """The kernels `[e, in, out]` of one linear map of every expert, in the compute dtype."""

    shape: tuple
    dtype: str = "float32"

    @nn.compact
    def __call__(self) -> Array:
        """Return the kernels."""
        return self.param("kernel", LINEAR, self.shape, jnp.float32).astype(self.dtype)


class Experts(nn.Module):
    """out = sum_k weight_k * expert_k(x), expert(x) = (silu(x W_gate) * (x W_up)) W_down.

    Experts are divided over the mesh axes of the logical axis "expert", over which tokens are
    divided, too: what is moved between devices are tokens. A token for which no place is left
    gets zero.

    Attributes:
      hidden: hidden width f of an expert.
      options: see `ExpertOptions`.
      dtype: compute dtype; the router computes in float32.
    """

    hidden: int
    options: ExpertOptions
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Map tokens.

        Args:
          x: `[b, t, d]`.
          valid: bool `[b, t]`; tokens where it is False take no place and get zero.

        Returns:
          `[b, t, d]`, and float32 scalars: `load_loss` and `z_loss` without their weights,
          `penalty` their weighted sum, and `dropped`, the share of choices without a place.
        """
        b, t, d = x.shape
        e, f, options = self.options.count, self.hidden, self.options
        s = min(options.group, t)
        m = -(-t // s)
        valid = jnp.ones((b, t), bool) if valid is None else valid
        x_bmsd = jnp.pad(x.astype(self.dtype), ((0, 0), (0, m * s - t), (0, 0)))
        x_bmsd = constrain(x_bmsd.reshape(b, m, s, d), "batch", "sequence", None, None)
        valid = jnp.pad(valid, ((0, 0), (0, m * s - t))).reshape(b * m, s)

        router = nn.Dense(e, use_bias=False, kernel_init=LINEAR, name="router")
        logits = router(x_bmsd.astype(jnp.float32)).reshape(b * m, s, e)
        capacity = expert_capacity(s, e, options.top_k, options.capacity)
        assigned = assign_experts(logits, top_k=options.top_k, capacity=capacity, valid=valid)
        apart = lambda x: x.astype(self.dtype).reshape(b, m, s, e, capacity)
        kernel = lambda name, *shape: ExpertKernel(shape, self.dtype, name=name)()
        gate_edf = gather(kernel("gate", e, d, f), "expert", None, "mlp")
        up_edf = gather(kernel("up", e, d, f), "expert", None, "mlp")
        down_efd = gather(kernel("down", e, f, d), "expert", "mlp", None)

        # The two constraints in a row are one exchange of tokens for experts between devices.
        sent = jnp.einsum("bmsec,bmsd->ebmcd", apart(assigned.dispatch), x_bmsd)
        sent = constrain(sent, None, "batch", "sequence", None, None)
        sent = constrain(sent, "expert", "batch", "sequence", None, None)
        hidden = jax.nn.silu(jnp.einsum("ebmcd,edf->ebmcf", sent, gate_edf))
        hidden = hidden * jnp.einsum("ebmcd,edf->ebmcf", sent, up_edf)
        hidden = constrain(hidden, "expert", "batch", "sequence", None, "mlp")
        returned = jnp.einsum("ebmcf,efd->ebmcd", hidden, down_efd)
        returned = constrain(returned, "expert", "batch", "sequence", None, None)
        returned = constrain(returned, None, "batch", "sequence", None, None)
        out_bmsd = jnp.einsum("bmsec,ebmcd->bmsd", apart(assigned.combine), returned)
        penalty = options.load_loss * assigned.load_loss + options.z_loss * assigned.z_loss
        measures = {
            "load_loss": assigned.load_loss,
            "z_loss": assigned.z_loss,
            "penalty": penalty,
            "dropped": assigned.dropped,
        }
        return out_bmsd.reshape(b, m * s, d)[:, :t], measures
