# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling's view of a text: some tokens hidden, to be guessed.

Devlin et al., "BERT", arXiv 1810.04805, Section 3.1: 15 % of the tokens are to be guessed; of these
80 % are replaced by the mask, 10 % by any token, and 10 % stay. Liu et al., "RoBERTa", arXiv
1907.11692, Section 4.1: drawn anew whenever a text is read.
"""

import zlib

import numpy as np

from attnjax.data.tokenizers import MASK, RESERVED
from attnjax.errors import RecipeError


def mask_tokens(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    vocab_size: int,
    rate: float = 0.15,
    replaced: tuple[float, float] = (0.8, 0.1),
    mask: int = MASK,
    reserved: int = RESERVED,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide some tokens of a text; a pure function of the tokens and the generator's state.

    Args:
      tokens: int `[t]`.
      rng: draws which, and what takes their places.
      vocab_size: number of tokens, the reserved ones included.
      rate: share of the tokens that are to be guessed; at least one is. Fractions are rounded up or
        down at random.
      replaced: shares of these that become the mask, and any token that is not reserved.
      mask: the mask's token.
      reserved: tokens below are never to be guessed.

    Returns:
      The tokens with some replaced, int32 `[t]`, and which are to be guessed, bool `[t]`.
    """
    candidates = np.flatnonzero(tokens >= reserved)
    count = int(rate * len(candidates) + rng.random())
    count = min(len(candidates), max(1, count))
    chosen = rng.permutation(candidates)[:count]
    draw = rng.random(count)
    random = rng.integers(reserved, vocab_size, count)
    to_mask, to_random = replaced
    hidden = np.array(tokens, np.int32)
    hidden[chosen] = np.where(
        draw < to_mask, mask, np.where(draw < to_mask + to_random, random, hidden[chosen])
    )
    scored = np.zeros(len(hidden), bool)
    scored[chosen] = True
    return hidden, scored


class MaskTokens:
    """The pipeline of masked language modelling: `tokens [t]` to `tokens`, `target`, `scored`.

    Training draws anew each time. In evaluation what is hidden depends on the text and the seed
    alone, so that all models guess the same.

    Args:
      vocab_size: number of tokens, the reserved ones included.
      rate: share of the tokens that are to be guessed.
      mask: the mask's token.
      reserved: tokens below are never to be guessed.
      seed: of evaluation.
    """

    random = True

    def __init__(
        self,
        vocab_size: int,
        rate: float = 0.15,
        mask: int = MASK,
        reserved: int = RESERVED,
        seed: int = 0,
    ):
        for name, value, fine in (
            ("rate", rate, 0 < rate < 1),
            ("mask", mask, 0 <= mask < vocab_size),
            ("reserved", reserved, 0 <= reserved < vocab_size),
        ):
            if not fine:
                raise RecipeError(f"pipeline.{name}={value}: does not fit vocab_size={vocab_size}")
        self._options = dict(vocab_size=vocab_size, rate=rate, mask=mask, reserved=reserved)
        self._seed = seed % 2**64

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        target = np.asarray(example["tokens"], np.int32)
        if rng is None:
            rng = np.random.default_rng((self._seed, zlib.crc32(target.tobytes())))
        tokens, scored = mask_tokens(target, rng, **self._options)
        return {"tokens": tokens, "target": target, "scored": scored}
