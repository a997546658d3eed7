# SPDX-License-Identifier: Apache-2.0
"""The static patterns: their slices are known once the lengths are."""

import itertools

import numpy as np

from attnjax.ops.mask.algebra import Mask, register
from attnjax.ops.mask.slices import Slice, band_slices, prefix_slices, row_intervals
from attnjax.ops.mask.visibility import Visibility, normalise


class Ranged(Mask):
    """A mask whose `slices` say everything; its visibility is intervals."""

    def visibility(self, t, s):
        parts = self.slices(t, s)
        if parts == (Slice(0, t, 0, s),):
            return Visibility()
        return Visibility(*row_intervals(parts, t, s))


@register()
class Full(Ranged):
    """Everything."""

    def slices(self, t, s):
        return (Slice(0, t, 0, s),)


@register()
class Band(Ranged):
    """-left <= key - position <= right, where position = query + s - t; None: no limit."""

    left: int | None
    right: int | None

    def visibility(self, t, s):
        position = np.arange(t) + (s - t)
        lower = np.zeros(t, np.int64) if self.left is None else position - self.left
        upper = np.full(t, s) if self.right is None else position + self.right + 1
        return _bounds(lower, upper, s)

    def slices(self, t, s):
        return band_slices(0, t, 0, s, s - t, self.left, self.right)


@register()
class Documents(Ranged):
    """See `mask.documents`."""

    lengths: tuple
    is_causal: bool

    def slices(self, t, s):
        kind = "causal" if self.is_causal else "full"
        return tuple(Slice(a, b, a, b, kind) for a, b in _document_ranges(self, t, s))


@register()
class ShareQuestion(Ranged):
    """See `mask.share_question`."""

    lengths: tuple

    def slices(self, t, s):
        (_, first), *others = ranges = _document_ranges(self, t, s)
        own = [Slice(a, b, a, b, "causal") for a, b in ranges]
        return (*own, *(Slice(a, b, 0, first) for a, b in others))


@register()
class CausalBlockwise(Ranged):
    """See `mask.causal_blockwise`."""

    lengths: tuple

    def slices(self, t, s):
        *others, (a, b) = _document_ranges(self, t, s)
        own = [Slice(c, d, c, d, "causal") for c, d in others]
        return (*own, Slice(a, b, 0, b, "causal"))


@register()
class PrefixDocuments(Ranged):
    """See `mask.prefix_lm_documents`."""

    lengths: tuple
    prefix: int

    def slices(self, t, s):
        return tuple(
            part
            for a, b in _document_ranges(self, t, s)
            for part in prefix_slices(a, b, a, b, self.prefix)
        )


@register()
class Prefix(Ranged):
    """See `mask.prefix_lm`."""

    prefix: int

    def slices(self, t, s):
        return prefix_slices(0, t, 0, s, self.prefix)


@register()
class GlobalWindow(Ranged):
    """See `mask.global_sliding_window`."""

    window_size: int
    global_tokens: int

    def slices(self, t, s):
        if t != s:
            raise ValueError(f"a global window needs as many queries as keys, not {t} and {s}")
        first = min(self.global_tokens, t)
        w = self.window_size
        parts = [Slice(0, first, 0, s), Slice(first, t, 0, first)]
        parts += band_slices(first, t, first, s, 0, w, w)
        return tuple(p for p in parts if p.area)


@register()
class BlockCausalDocuments(Ranged):
    """See `mask.block_causal_document`."""

    lengths: tuple
    block: int

    def slices(self, t, s):
        return tuple(
            Slice(c, min(c + self.block, b), a, min(c + self.block, b))
            for a, b in _document_ranges(self, t, s)
            for c in range(a, b, self.block)
        )


@register()
class Slices(Ranged):
    """See `mask.slices`."""

    parts: tuple

    def slices(self, t, s):
        for part in self.parts:
            if part.query_stop > t or part.key_stop > s:
                raise ValueError(f"{part} exceeds {t} queries or {s} keys")
        return self.parts


def _document_ranges(mask, t, s):
    ends = list(itertools.accumulate(mask.lengths))
    if t != s or ends[-1] > t:
        raise ValueError(
            f"documents of {ends[-1]} tokens do not fit {t} queries and {s} keys: both must "
            "be equal and no fewer than the tokens"
        )
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _bounds(lower, upper, s):
    lower, upper = (np.asarray(x, np.int32)[None, None, None] for x in (lower, upper))
    return Visibility(*normalise(lower, upper, s))
