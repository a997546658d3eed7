# SPDX-License-Identifier: Apache-2.0
"""Who competes: kernels on one device, context-parallel methods on several, and what each supports.

What a kernel declares is checked before anything is compiled; what only the device or the compiler
knows is refused by the implementation itself. Both end as the status of a cell.
"""

import dataclasses
from collections.abc import Callable

import jax

from attnjax.benchmarks.contestants import Function, jax_nn, ours
from attnjax.benchmarks.long_context import layouts, patterns
from attnjax.benchmarks.long_context.cases import LongCase
from attnjax.benchmarks.long_context.patterns import PATTERNS, STATIC
from attnjax.benchmarks.turns import check_memory
from attnjax.ops import mask


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and what it declares.

    Attributes:
      name: for messages.
      make: turns a case into a function of query, key and value.
      patterns: masks it supports.
      dtypes: of query, key and value.
      has_grouped_heads: whether heads may share keys and values.
      width_multiple: what the width of a head must be a multiple of.
      widest: widest head, or None.
      has_backward: whether there are gradients.
      is_materialised: whether all scores are in memory at once.
    """

    name: str
    make: Callable[[LongCase], Function]
    patterns: tuple[str, ...] = tuple(PATTERNS)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    has_grouped_heads: bool = True
    width_multiple: int = 1
    widest: int | None = None
    has_backward: bool = True
    is_materialised: bool = False

    def refusal(self, case: LongCase) -> str:
        """Return why a case is not supported; empty when it is."""
        reasons = {
            f"mask {case.mask}": case.mask not in self.patterns,
            f"dtype {case.dtype}": case.dtype not in self.dtypes,
            f"{case.n} query heads for {case.k}": case.n != case.k and not self.has_grouped_heads,
            f"heads of {case.h}": bool(
                case.h % self.width_multiple or (self.widest and case.h > self.widest)
            ),
            f"pass {case.direction}": case.direction != "forward" and not self.has_backward,
        }
        found = [reason for reason, applies in reasons.items() if applies]
        return f"{self.name}: {', '.join(found)} not supported" if found else ""

    def __call__(self, case: LongCase) -> Function:
        """Return the function of a case.

        Raises:
          NotImplementedError: the case is not supported.
          MemoryError: scores that are all kept need more memory than there is.
        """
        if reason := self.refusal(case):
            raise NotImplementedError(reason)
        if self.is_materialised:
            check_memory(4.0 * case.b * case.n * case.t**2)
        return self.make(case)


def _predicate(case: LongCase) -> mask.Mask:
    """Visibility as a function of positions, as FlexAttention's mask_mod has it."""
    return mask.predicate(patterns.predicate(case.drawn, case.setting))


def _columns(case: LongCase) -> mask.Mask:
    """Visibility as row indices for each key, as FlashMask has it."""
    return mask.from_columns(case.make_mask().columns(case.t, case.t))


def _blockwise(see: Callable[[LongCase], mask.Mask]) -> Callable[[LongCase], Function]:
    """The device's own kernel, or `chunked`; never all scores at once, as small calls have it."""

    def make(case: LongCase) -> Function:
        has_kernel = jax.default_backend() in ("gpu", "tpu")
        return ours(None if has_kernel else "chunked", see)(case)

    return make


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("reference", ours("reference"), is_materialised=True),
        Kernel("jax.nn", jax_nn, patterns=STATIC, is_materialised=True),
        Kernel("chunked", ours("chunked")),
        Kernel("pallas_tpu", ours("pallas_tpu")),
        Kernel("pallas_gpu", ours("pallas_gpu"), widest=256),
        Kernel(
            "cudnn",
            ours("cudnn"),
            patterns=("full", "causal", "sliding_window_causal"),
            dtypes=("bfloat16", "float16"),
            width_multiple=8,
            widest=256,
        ),
        Kernel("predicate", _blockwise(_predicate), patterns=STATIC),
        Kernel("columns", _blockwise(_columns), patterns=STATIC),
    )
}
"""Kernels of one device; PyTorch's fused attention is the contestant "torch". Rows without keys,
which block-sparse masks may have, are not 0 for `jax.nn`."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A context-parallel attention as a contestant.

    Attributes:
      name: one of `layouts.METHODS`.
    """

    name: str

    def __call__(self, case: LongCase) -> Function:
        """Return the function of a case, see `layouts.attend`.

        Raises:
          NotImplementedError: the case is not supported.
        """
        heads = (case.n, case.k)
        return layouts.attend(self.name, case.make_mask(), case.t, heads, case.devices)


METHODS = {name: Method(name) for name in layouts.METHODS}
"""Methods of several devices."""
