# SPDX-License-Identifier: Apache-2.0
"""LongCA-bench as grids of cells: masks x kernels x context-parallel methods x lengths x devices.

Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism
(arXiv:2510.17896). Kernels of one device run over lengths, block-sparse masks over densities, and
methods of several devices at a constant number of tokens for each.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from attnjax.benchmarks import turns
from attnjax.benchmarks.long_context.cases import DEFAULT_PROTOCOL, LongCase
from attnjax.benchmarks.long_context.kernels import KERNELS, METHODS
from attnjax.benchmarks.long_context.lengths import K, sampler
from attnjax.benchmarks.long_context.patterns import (
    PATTERNS,
    RANDOM,
    SPARSE,
    STATIC,
    Setting,
)
from attnjax.benchmarks.turns import Protocol

PAPER = {
    "title": "Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context "
    "Parallelism",
    "id": "arXiv:2510.17896",
    "year": 2025,
    "code": "https://github.com/NJUDeepEngine/LongCA-bench",
    "licence": "Apache-2.0",
    "claim": "Dispatching chunks of queries by their visible area balances heterogeneous masks "
    "over many devices, where zig-zag placement balances causal masks alone.",
}

# Sizes as in the paper's Section "Experiments" and the reference code: kernels of 64:8 and 64:64
# heads of 128 up to 48K tokens, block-sparse ones of 4 heads up to 128K, 8K tokens per device on
# up to 96 devices with 30 masks per pattern. "quick" and "standard" are ours.
PRESETS = {
    "quick": {
        "patterns": tuple(PATTERNS),
        "kernels": ("chunked", "cudnn", "predicate", "columns"),
        "lengths": (256,),
        "heads": ((8, 2, 32),),
        "dtypes": ("float32",),
        "directions": ("both",),
        "devices": (8,),
        "device_patterns": ("full", "causal_document"),
        "tokens_per_device": 64,
        "ratios": (0.5,),
        "blocks": (64,),
        "draws": 1,
        "window": 32,
        "protocol": Protocol(rounds=5, warmup=1, budget=1.0),
    },
    "standard": {
        "lengths": (K, 4 * K),
        "heads": ((8, 2, 64), (8, 8, 64)),
        "directions": ("forward", "both"),
        "devices": (2, 4, 8),
        "tokens_per_device": 512,
        "draws": 3,
        "protocol": Protocol(rounds=15, warmup=2),
    },
    "kernels": {
        "patterns": STATIC,
        "lengths": tuple(K * n for n in (1, 2, 4, 8, 16, 24, 32, 40, 48)),
        "heads": ((64, 8, 128), (64, 64, 128)),
        "directions": ("forward", "backward"),
        "methods": (),
        "draws": 1,
        "protocol": Protocol(rounds=100, warmup=25, budget=60.0, flush_bytes=2**28),
    },
    "sparse": {
        "patterns": SPARSE,
        "lengths": tuple(K * n for n in (16, 32, 64, 128)),
        "heads": ((4, 4, 128), (4, 1, 128)),
        "directions": ("forward", "backward"),
        "methods": (),
        "ratios": (0.1, 0.2, 0.5, 0.8, 1.0),
        "blocks": (64, 128),
        "draws": 1,
        "protocol": Protocol(rounds=100, warmup=25, budget=60.0, flush_bytes=2**28),
    },
    "distributed": {
        "kernels": (),
        "devices": (8, 16, 32, 48, 64, 96),
        "tokens_per_device": 8 * K,
        "heads": ((64, 8, 128),),
        "directions": ("forward", "backward", "both"),
        "draws": 30,
        "protocol": Protocol(rounds=15, warmup=5, budget=60.0, flush_bytes=2**28),
    },
}

# Nothing is learned, so that there is no weight map.
TORCH_NAMES = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """A set of cells.

    Attributes:
      patterns: masks for kernels.
      kernels: names in `KERNELS`, or "torch".
      lengths: tokens for kernels.
      heads: (query heads, key/value heads, width) each.
      dtypes: names of dtypes.
      directions: keys of `PASSES`.
      methods: names in `METHODS`.
      devices: numbers of devices for methods.
      device_patterns: masks for methods.
      tokens_per_device: for methods.
      distribution: of document lengths for kernels; methods have long documents besides (":mixture"
        is appended where no option is given).
      ratios: kept fractions of block-sparse masks.
      blocks: their (mean) block sizes.
      draws: masks of each random pattern.
      window: farthest distance that windows see.
      protocol: how often things run.
    """

    patterns: tuple[str, ...] = tuple(PATTERNS)
    kernels: tuple[str, ...] = (*KERNELS, "torch")
    lengths: tuple[int, ...] = (K,)
    heads: tuple[tuple[int, int, int], ...] = ((64, 8, 128),)
    dtypes: tuple[str, ...] = ("bfloat16",)
    directions: tuple[str, ...] = ("forward",)
    methods: tuple[str, ...] = tuple(METHODS)
    devices: tuple[int, ...] = (8,)
    device_patterns: tuple[str, ...] = ("full", "causal", "full_document", "causal_document")
    tokens_per_device: int = 8 * K
    distribution: str = "pile"
    ratios: tuple[float, ...] = (0.5,)
    blocks: tuple[int, ...] = (128,)
    draws: int = 1
    window: int = K
    protocol: Protocol = DEFAULT_PROTOCOL

    def cases(self) -> Iterable[tuple[LongCase, tuple[str, ...]]]:
        """Yield the cases in order, each with the names of its contestants."""
        if self.kernels:
            for t in self.lengths:
                for case in self._of_length(t, self.patterns, self.distribution, 1):
                    yield case, self.kernels
        source = self.distribution
        if ":" not in source:
            source += ":mixture"
        if self.methods:
            for devices in self.devices:
                t = devices * self.tokens_per_device
                for case in self._of_length(t, self.device_patterns, source, devices):
                    yield case, self.methods

    def _of_length(self, t, patterns, distribution, devices):
        for pattern in patterns:
            for setting in self._settings(pattern, distribution):
                for n, k, h in self.heads:
                    for dtype in self.dtypes:
                        for direction in self.directions:
                            for index in range(self.draws if pattern in RANDOM else 1):
                                yield LongCase(
                                    pattern, dtype, 1, t, n, k, h, direction,
                                    setting=setting, draw=index, devices=devices,
                                    protocol=self.protocol,
                                )  # fmt: skip

    def _settings(self, pattern, distribution):
        if pattern not in SPARSE:
            return [Setting(window=self.window, distribution=distribution)]
        return [Setting(block=block, ratio=ratio) for block in self.blocks for ratio in self.ratios]


def cell(contestant: str, case: LongCase) -> str:
    """Return the name of a cell, "ring@8/causal_document:pile/float32/512x4x2x32/both/0"."""
    size = "x".join(str(x) for x in (case.t, case.n, case.k, case.h))
    parts = (f"{contestant}@{case.devices}", case.label, case.dtype, size, case.direction)
    return "/".join((*parts, str(case.draw)))


def make_grid(name: str) -> Grid:
    """Return a grid by name.

    Args:
      name: key of `PRESETS`, and after a colon where document lengths come from if not from the
        Pile: see `lengths.sampler`, as in "kernels:lengths/prolong_64k.csv".

    Raises:
      ValueError: the name or the distribution is unknown.
    """
    preset, _, distribution = name.partition(":")
    if preset not in PRESETS:
        raise ValueError(f"shapes {preset!r} are unknown; choose from {list(PRESETS)}")
    if not distribution:
        return Grid(**PRESETS[preset])
    sampler(distribution)
    return Grid(**PRESETS[preset], distribution=distribution)


def grid(shapes: str, only: str = "") -> list[tuple[LongCase, list[str]]]:
    """List the cases of a grid with the contestants of each.

    Args:
      shapes: see `make_grid`.
      only: regular expression searched in names of cells; empty for all.

    Raises:
      ValueError: the name is unknown, the expression malformed, or nothing is left.
    """
    return turns.choose(make_grid(shapes).cases(), only, cell)


def placements(cases: Sequence[tuple[LongCase, Sequence[str]]]) -> list[LongCase]:
    """Return one case for each mask that several devices share, whatever heads and dtypes."""
    found = {}
    for case, _ in cases:
        if case.devices > 1:
            found.setdefault((case.devices, case.t, case.label, case.draw), case)
    return list(found.values())
