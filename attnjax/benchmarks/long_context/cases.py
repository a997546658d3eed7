# SPDX-License-Identifier: Apache-2.0
"""One computation of the benchmark: a drawn mask, sizes, and how many devices share them."""

import dataclasses
import functools

import jax
import numpy as np

from attnjax.benchmarks.contestants import Case
from attnjax.benchmarks.long_context import layouts
from attnjax.benchmarks.long_context.patterns import RANDOM, SPARSE, Drawn, Setting, draw
from attnjax.benchmarks.turns import Protocol
from attnjax.ops import mask

SEED = 42
"""The paper's seed; draw i of any pattern starts from (SEED, i), so that documents are alike."""


DEFAULT_SETTING = Setting()
DEFAULT_PROTOCOL = Protocol()


@dataclasses.dataclass(frozen=True)
class LongCase(Case):
    """What is computed; `mask` is a key of `PATTERNS`.

    Attributes:
      setting: what the mask depends on.
      draw: which of the drawn masks.
      devices: devices that share the tokens; with one, kernels compete instead of methods.
      protocol: how often contestants run.
    """

    setting: Setting = DEFAULT_SETTING
    draw: int = 0
    devices: int = 1
    protocol: Protocol = DEFAULT_PROTOCOL

    @property
    def drawn(self) -> Drawn:
        """The mask and the documents it is made of."""
        setting = dataclasses.replace(self.setting, heads=self.n, kv_heads=self.k)
        return _drawn(self.mask, self.t, setting, self.draw)

    @property
    def label(self) -> str:
        """The pattern with what it depends on, such as "causal_document:pile"."""
        setting, parts = self.setting, [self.mask]
        if self.mask in SPARSE:
            parts += [setting.block, setting.ratio, setting.selection]
        elif self.mask in RANDOM and self.mask != "block_causal_document":
            parts += [setting.distribution]
        elif "window" in self.mask:
            parts += [setting.window]
        return ":".join(map(str, parts))

    def make_mask(self) -> mask.Mask:
        """Return the mask."""
        return self.drawn.mask

    def arrays(self) -> tuple[jax.Array, ...]:
        """Return query, key, value and cotangent; tokens split over the devices, in order."""
        arrays = super().arrays()
        if self.devices == 1:
            return arrays
        return jax.device_put(arrays, layouts.token_sharding(self.devices))


@functools.lru_cache(maxsize=16)
def _drawn(pattern, total, setting, index):
    return draw(pattern, total, setting, np.random.default_rng((SEED, index)))
