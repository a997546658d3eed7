# SPDX-License-Identifier: Apache-2.0
"""The attentions of CAB by name: nine efficient ones beside softmax, in four patterns.

    abc = efficient.make("abc", causal=True, landmarks=16)
    params = abc.init(key, dim, heads)
    y = abc.apply(params, x, query_valid=valid)
    y_t, stream = abc.step(params, x[:, t : t + 1], stream)

Interface and shell are in `attnjax.ops.efficient.template`. Linear attention by features, random
projections, Nystrom's method and state spaces are shared with `attnjax.ops.linear` and
`attnjax.ops.mixers`.
"""

import dataclasses
from typing import Any

from attnjax.ops.efficient.abc import Abc
from attnjax.ops.efficient.controls import Nothing
from attnjax.ops.efficient.cosformer import Cosformer
from attnjax.ops.efficient.lara import Lara
from attnjax.ops.efficient.long_short import LongShort
from attnjax.ops.efficient.nystrom import Nystrom
from attnjax.ops.efficient.performer import Performer
from attnjax.ops.efficient.prob_sparse import ProbSparse
from attnjax.ops.efficient.softmax import Local, Softmax
from attnjax.ops.efficient.state_space import S4D
from attnjax.ops.efficient.template import PATTERNS, PatternAttention, Stream, pattern_of
from attnjax.registry import nearest

__all__ = ["ATTENTIONS", "CONTROLS", "PATTERNS", "PatternAttention", "Stream", "make", "pattern_of"]

ATTENTIONS: dict[str, type[PatternAttention]] = {
    "abc": Abc,
    "cosformer": Cosformer,
    "lara": Lara,
    "local": Local,
    "long_short": LongShort,
    "nystrom": Nystrom,
    "performer": Performer,
    "prob_sparse": ProbSparse,
    "s4d": S4D,
    "softmax": Softmax,
}
"""Name -> class."""

CONTROLS: dict[str, type[PatternAttention]] = {"none": Nothing}
"""What `make` knows besides: no attentions, but what these are compared with."""


def make(name: str, **options: Any) -> PatternAttention:
    """Return an attention by name.

    Args:
      name: key of `ATTENTIONS` or `CONTROLS`.
      **options: fields of that class.

    Returns:
      The attention.

    Raises:
      ValueError: the name or an option is unknown (the choices are listed), a value is wrong, or
        the attention has no form for the pattern.
    """
    known = ATTENTIONS | CONTROLS
    if name not in known:
        raise ValueError(f"unknown attention {name!r}: {nearest(name, known)}")
    family = known[name]
    fields = [field.name for field in dataclasses.fields(family)]
    for option in options:
        if option not in fields:
            raise ValueError(
                f"attention {name!r} has no option {option!r}: {nearest(option, fields)}"
            )
    return family(**options)
