# SPDX-License-Identifier: Apache-2.0
"""What the mixers of `ops.relaxed` cost: closed forms of "Deconstructing Attention", 2510.11602.

b examples of t tokens, model width d, n heads of h = d / n, as many key/value heads. Operations are
those of one layer's mixer as the paper prints them, without its output projection.
"""

from collections.abc import Callable

from attnjax.ops.relaxed import MIXERS

# Numbers kept for all tokens so far.
_NUMBERS: dict[str, Callable[[int, int, int, int], int]] = {
    "standard": lambda b, t, d, n: 2 * b * t * d,
    "mlp": lambda b, t, d, n: 0,
    "approximate": lambda b, t, d, n: 3 * b * d + 2 * b * d * d // n,
    "non_approximate": lambda b, t, d, n: b * d + 2 * b * n,
    "random_embedding": lambda b, t, d, n: (b + 1) * t * d,
    "fixed_sequence": lambda b, t, d, n: (b + 1) * t * d,
    "static_embedding": lambda b, t, d, n: 2 * b * t * d,
}

_PREFILL: dict[str, Callable[[int, int, int], int]] = {
    "standard": lambda b, t, d: 4 * b * t * t * d + 6 * b * t * d * d,
    "mlp": lambda b, t, d: 6 * b * t * d * d,
    "approximate": lambda b, t, d: 14 * b * t * d * d,
    "non_approximate": lambda b, t, d: 6 * b * t * d * d,
    "random_embedding": lambda b, t, d: 2 * t * t * d + 2 * b * t * t * d + 6 * b * t * d * d,
    "fixed_sequence": lambda b, t, d: 2 * t * t * d + 2 * b * t * t * d + 6 * b * t * d * d,
    "static_embedding": lambda b, t, d: 4 * b * t * t * d + 6 * b * t * d * d,
}


def cache_bytes(
    mixer: str, batch: int, length: int, width: int, heads: int, itemsize: int = 2
) -> int:
    """Return the bytes that one layer keeps while decoding.

    Args:
      mixer: a member of `MIXERS`.
      batch, length, width, heads: b, t, d, n.
      itemsize: bytes of a stored number.

    Raises:
      ValueError: there is no such mixer, or the heads do not divide the width.
    """
    _check(mixer)
    if width % heads:
        raise ValueError(f"heads={heads} does not divide width={width}")
    return itemsize * _NUMBERS[mixer](batch, length, width, heads)


def prefill_flops(mixer: str, batch: int, length: int, width: int) -> int:
    """Return the operations of one layer's mixer for whole texts.

    Args:
      mixer: a member of `MIXERS`.
      batch, length, width: b, t, d.

    Raises:
      ValueError: there is no such mixer.
    """
    _check(mixer)
    return _PREFILL[mixer](batch, length, width)


def decode_flops(mixer: str, batch: int, length: int, width: int) -> int:
    """Return the operations of one layer's mixer for one more token after t.

    The paper prints this for one map for all examples, 2 t d + 2 b t d + 6 b d^2; in the others one
    query takes the place of t, too.

    Args:
      mixer: a member of `MIXERS`.
      batch, length, width: b, t, d.

    Raises:
      ValueError: there is no such mixer.
    """
    _check(mixer)
    whole, rest = (_PREFILL[mixer](batch, t, width) for t in (length, 2 * length))
    # a t^2 + c t from its values at t and 2 t; one query costs a t + c.
    square = (rest - 2 * whole) // (2 * length)
    return square + (whole - square * length) // length


def _check(mixer):
    if mixer not in MIXERS:
        raise ValueError(f"mixer {mixer!r}: choose from {', '.join(MIXERS)}")
