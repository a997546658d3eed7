# SPDX-License-Identifier: Apache-2.0
"""Token mixers by name: every family of long-sequence models behind one template.

    mixer = mixers.make("window", window=64, causal=True)
    params = mixer.init(key, length, dim, heads)
    y = mixer.apply(params, x)

The template, and what of it is the paper's, is in `attnjax.ops.mixers.template`.
"""

import dataclasses
from typing import Any

from attnjax.ops.mixers.convolution import Convolution
from attnjax.ops.mixers.hashing import HashBuckets
from attnjax.ops.mixers.kernels import GaussianProcess, Kernel
from attnjax.ops.mixers.low_rank import Linformer, Nystrom
from attnjax.ops.mixers.mlp import Perceptron
from attnjax.ops.mixers.random_features import Favor
from attnjax.ops.mixers.recurrence import GatedRecurrence, LinearRecurrence
from attnjax.ops.mixers.segments import SegmentRecurrence
from attnjax.ops.mixers.softmax import Block, Dilated, Global, Random, Softmax, Window
from attnjax.ops.mixers.spectral import AdaptiveFourier, Fourier, SpectralGate
from attnjax.ops.mixers.state_space import S4D
from attnjax.ops.mixers.template import BIASES, Attention, Mixer, inductive_bias
from attnjax.registry import nearest

__all__ = ["BIASES", "MIXERS", "Attention", "Mixer", "inductive_bias", "make"]

MIXERS: dict[str, type[Mixer]] = {
    "softmax": Softmax,
    "kernel": Kernel,
    "gaussian_process": GaussianProcess,
    "linformer": Linformer,
    "nystrom": Nystrom,
    "window": Window,
    "dilated": Dilated,
    "global": Global,
    "random": Random,
    "block": Block,
    "favor": Favor,
    "lsh": HashBuckets,
    "fnet": Fourier,
    "gfnet": SpectralGate,
    "afno": AdaptiveFourier,
    "mlp": Perceptron,
    "convolution": Convolution,
    "s4d": S4D,
    "lru": LinearRecurrence,
    "gated_recurrence": GatedRecurrence,
    "transformer_xl": SegmentRecurrence,
}
"""Name -> family."""


def make(name: str, **options: Any) -> Mixer:
    """Return a mixer by name.

    Args:
      name: key of `MIXERS`.
      **options: fields of that family.

    Returns:
      The mixer.

    Raises:
      ValueError: the name or an option is unknown (the choices are listed), or a value is wrong.
    """
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}: {nearest(name, MIXERS)}")
    family = MIXERS[name]
    fields = [field.name for field in dataclasses.fields(family)]
    for option in options:
        if option not in fields:
            raise ValueError(f"mixer {name!r} has no option {option!r}: {nearest(option, fields)}")
    return family(**options)
