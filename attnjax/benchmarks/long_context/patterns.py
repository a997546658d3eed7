# SPDX-License-Identifier: Apache-2.0
"""The fourteen masks of LongCA-bench, drawn for a total length.

Regular ones have no parameters but the window; those of documents draw lengths from a sampler.
Document patterns with long documents are the same with the sampler ":mixture".
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from attnjax.benchmarks.long_context import block_sparse
from attnjax.benchmarks.long_context.lengths import Sampler, sampler
from attnjax.ops import mask

PIECE = 1024
"""Tokens of a block of `block_causal_document`."""
MOST_PIECES = 8
"""Blocks of its longest document."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the masks of a length depend on.

    Attributes:
      window: farthest visible distance of windows, w + 1 keys in the causal form.
      compat_2w: whether a global window has 2 w global tokens, as one of the reference's two
        disagreeing definitions has it, instead of w.
      distribution: where lengths of documents come from, see `lengths.sampler`.
      piece: tokens of a block of `block_causal_document`.
      heads: query heads.
      kv_heads: key/value heads; block-sparse masks have one map for each.
      block: mean tokens of a block of block-sparse masks.
      ratio: fraction of their pairs of blocks that is kept.
      selection: see `block_sparse.keep`.
      minimum: smallest block of variable size; 0 for half the mean.
      is_per_head: whether each map has variable blocks of its own.
    """

    window: int = 1024
    compat_2w: bool = False
    distribution: str = "pile"
    piece: int = PIECE
    heads: int = 1
    kv_heads: int = 1
    block: int = 128
    ratio: float = 0.5
    selection: str = "head"
    minimum: int = 0
    is_per_head: bool = False

    def lengths(self, total: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw the documents of one sequence."""
        return self.sampler.draw(total, rng)

    @property
    def sampler(self) -> Sampler:
        """The sampler that `distribution` names."""
        return sampler(self.distribution)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One drawn mask.

    Attributes:
      pattern: key of `PATTERNS`.
      total: queries, and as many keys.
      mask: the mask.
      lengths: documents it is made of; one of the whole length where it knows none.
      prefix: tokens of its prefix, or None.
    """

    pattern: str
    total: int
    mask: mask.Mask
    lengths: tuple[int, ...]
    prefix: int | None = None


def _plain(make):
    return lambda total, setting, rng: (make(setting), (total,), None)


def _of_documents(make):
    def draw(total, setting, rng):
        lengths = setting.lengths(total, rng)
        return make(lengths), lengths, None

    return draw


def _prefix(of_each):
    def draw(total, setting, rng):
        lengths = setting.lengths(total, rng)
        prefix = int(rng.integers(1, lengths[0], endpoint=True))
        if of_each:
            return mask.prefix_lm_documents(lengths, prefix), lengths, prefix
        return mask.prefix_lm(prefix), (total,), prefix

    return draw


def _block_causal(total, setting, rng):
    lengths, rest = [], total
    while rest:
        pieces = int(rng.integers(1, MOST_PIECES, endpoint=True))
        lengths.append(min(pieces * setting.piece, rest))
        rest -= lengths[-1]
    return mask.block_causal_document(lengths, setting.piece), tuple(lengths), None


def _sparse(is_variable):
    def draw(total, setting, rng):
        size = min(setting.block, total)
        arguments = (setting.kv_heads, total, size, setting.ratio, rng)
        if is_variable:
            least = setting.minimum or max(1, size // 2)
            made = block_sparse.variable(
                *arguments, minimum=least, selection=setting.selection,
                is_per_head=setting.is_per_head,
            )  # fmt: skip
        else:
            made = block_sparse.uniform(*arguments, selection=setting.selection)
        return made.mask(setting.heads // setting.kv_heads), (total,), None

    return draw


Draw = Callable[[int, Setting, np.random.Generator], tuple[mask.Mask, tuple[int, ...], int | None]]

PATTERNS: dict[str, Draw] = {
    "full": _plain(lambda setting: mask.full()),
    "causal": _plain(lambda setting: mask.causal()),
    "full_document": _of_documents(lambda lengths: mask.documents(lengths, causal=False)),
    "causal_document": _of_documents(lambda lengths: mask.documents(lengths, causal=True)),
    "sliding_window": _plain(lambda setting: mask.sliding_window(setting.window, setting.window)),
    "sliding_window_causal": _plain(lambda setting: mask.sliding_window(setting.window, 0)),
    "share_question": _of_documents(mask.share_question),
    "causal_blockwise": _of_documents(mask.causal_blockwise),
    "prefix_lm_causal": _prefix(of_each=False),
    "prefix_lm_document": _prefix(of_each=True),
    "global_sliding_window": _plain(
        lambda setting: mask.global_sliding_window(
            setting.window, 2 * setting.window if setting.compat_2w else setting.window
        )
    ),
    "block_causal_document": _block_causal,
    "uniform_block_sparse": _sparse(is_variable=False),
    "variable_block_sparse": _sparse(is_variable=True),
}  # fmt: skip
"""Name -> how it is drawn, in the order of the paper."""

REGULAR = tuple(PATTERNS)[:6]
HETEROGENEOUS = tuple(PATTERNS)[6:12]
SPARSE = tuple(PATTERNS)[12:]
STATIC = REGULAR + HETEROGENEOUS
"""Patterns that are made of slices."""

RANDOM = tuple(
    name for name in PATTERNS
    if name in SPARSE or "document" in name or name.startswith(("share", "causal_b", "prefix"))
)  # fmt: skip
"""Patterns of which several masks are drawn."""


def draw(pattern: str, total: int, setting: Setting, rng: np.random.Generator) -> Drawn:
    """Draw one mask.

    Args:
      pattern: key of `PATTERNS`.
      total: queries, and as many keys.
      setting: what masks depend on.
      rng: source of randomness.

    Returns:
      The mask and what it was made of.

    Raises:
      ValueError: the pattern is unknown, or the setting cannot make it.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r} is unknown; choose from {list(PATTERNS)}")
    if setting.heads % setting.kv_heads:
        raise ValueError(f"heads={setting.heads} must be a multiple of kv_heads={setting.kv_heads}")
    return Drawn(pattern, total, *PATTERNS[pattern](total, setting, rng))


def predicate(drawn: Drawn, setting: Setting) -> Callable:
    """Return a static pattern as a function of query and key positions, for mask_mod kernels.

    Args:
      drawn: a mask of one of `STATIC`.
      setting: what it was drawn with.

    Returns:
      A function of integer positions that broadcast against each other; NumPy or JAX arrays.

    Raises:
      NotImplementedError: the pattern is block-sparse.
    """
    if drawn.pattern in SPARSE:
        raise NotImplementedError(f"{drawn.pattern} is no function of positions alone")
    lengths = np.asarray(drawn.lengths)
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    start = np.repeat((np.cumsum(lengths) - lengths).astype(np.int32), lengths)
    look = lambda table, x: (table if isinstance(x, np.ndarray) else jnp.asarray(table))[x]
    own = lambda x: look(document, x)
    inside = lambda x: x - look(start, x)
    same = lambda q, k: own(q) == own(k)
    w, prefix, piece = setting.window, drawn.prefix, setting.piece
    first = (2 if setting.compat_2w else 1) * w
    return {
        "full": lambda q, k: (q >= 0) & (k >= 0),
        "causal": lambda q, k: k <= q,
        "full_document": same,
        "causal_document": lambda q, k: same(q, k) & (k <= q),
        "sliding_window": lambda q, k: abs(q - k) <= w,
        "sliding_window_causal": lambda q, k: (k <= q) & (q - k <= w),
        "share_question": lambda q, k: (same(q, k) & (k <= q)) | ((own(k) == 0) & (own(q) > 0)),
        "causal_blockwise": lambda q, k: (k <= q) & (same(q, k) | (own(q) == len(lengths) - 1)),
        "prefix_lm_causal": lambda q, k: (k < prefix) | (k <= q),
        "prefix_lm_document": lambda q, k: same(q, k) & ((inside(k) < prefix) | (k <= q)),
        "global_sliding_window": lambda q, k: (abs(q - k) <= w) | (q < first) | (k < first),
        "block_causal_document": lambda q, k: (
            same(q, k) & (inside(k) // piece <= inside(q) // piece)
        ),
    }[drawn.pattern]
