# SPDX-License-Identifier: Apache-2.0
"""A model that compiles in no time, for faults that do not care what is trained.

`logits = dropout(fine) W + b`: it reads the source of the tiny recipe and learns nothing of it.
"""

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

PRESETS = {}


@flax.struct.dataclass
class Output:
    """Holds `logits [b, v]`."""

    logits: jax.Array


class Linear(nn.Module):
    """One affine map from all values of the fine patches."""

    num_classes: int = 2

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {"fine": jax.ShapeDtypeStruct((batch, 16, 48), jnp.float32)}

    def flops(self) -> float:
        """Return forward operations per example."""
        return 2.0 * 16 * 48 * self.num_classes

    @nn.compact
    def __call__(self, fine, *, train: bool = False) -> Output:
        x_bd = nn.Dropout(0.1, deterministic=not train)(fine.reshape(fine.shape[0], -1))
        return Output(nn.Dense(self.num_classes, name="head")(x_bd))
