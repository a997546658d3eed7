# SPDX-License-Identifier: Apache-2.0
"""N-gram language models with Kneser-Ney smoothing: what a network has to beat.

    p_n(w | h) = max(c(hw) - D, 0) / c(h) + D T(h) / c(h) p_{n-1}(w | h without its first token)

c counts at the highest order, and below it in how many contexts a token was seen; T(h) tokens
followed h; p_0 is uniform. Kneser and Ney, 1995; Chen and Goodman, 1999, Section 2.7.
"""

from collections.abc import Iterable, Sequence

import numpy as np

DISCOUNT = 0.75
"""D."""


class NGram:
    """Counts of all orders up to n, as sorted arrays."""

    def __init__(self, documents: Iterable[np.ndarray], order: int = 5, vocab_size: int = 256):
        """Count.

        Args:
          documents: int `[t]` each; contexts do not reach over their ends.
          order: n, tokens of an n-gram, at least 1.
          vocab_size: v; v ** n must fit 63 bits.

        Raises:
          ValueError: an argument is out of range, a token is outside the vocabulary, or there is no
            token.
        """
        if order < 1 or vocab_size < 2 or vocab_size**order >= 2**63:
            raise ValueError(f"order={order}, vocab_size={vocab_size}: v ** n must fit 63 bits")
        self.order, self.vocab_size = order, vocab_size
        documents = [self._check(tokens) for tokens in documents]
        if not sum(map(len, documents)):
            raise ValueError("there is no token to count")
        self._levels = []
        above = None
        for n in range(order, 0, -1):
            if above is None:
                keys = np.concatenate([self._keys(tokens, n)[n - 1 :] for tokens in documents])
                grams, counts = np.unique(keys, return_counts=True)
            else:
                # In how many contexts a gram was seen; where texts begin there is none before it.
                first = [self._keys(tokens[: order - 1], n)[n - 1 :] for tokens in documents]
                seen = np.concatenate([above % vocab_size**n, *map(np.unique, first)])
                grams, counts = np.unique(seen, return_counts=True)
            contexts, place = np.unique(grams // vocab_size, return_inverse=True)
            totals = np.bincount(place, weights=counts, minlength=len(contexts))
            kinds = np.bincount(place, minlength=len(contexts))
            self._levels.append((n, grams, counts, contexts, totals, kinds))
            above = grams
        self._levels.reverse()

    def _check(self, tokens):
        tokens = np.asarray(tokens, np.int64)
        if tokens.ndim != 1 or ((tokens < 0) | (tokens >= self.vocab_size)).any():
            raise ValueError(f"tokens {tokens.shape} must be [t] from 0 to {self.vocab_size - 1}")
        return tokens

    def _keys(self, tokens, n):
        """Return the number of the n tokens that end at every place, `[t]`; the first are void."""
        keys = np.zeros(len(tokens), np.int64)
        for back in range(min(n, len(tokens))):
            shifted = tokens[: len(tokens) - back]
            keys[back:] += shifted * self.vocab_size**back
        return keys

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Return p of every token after those before it, float64 `[t]`.

        Args:
          tokens: int `[t]`, one document.
        """
        tokens = self._check(tokens)
        p = np.full(len(tokens), 1 / self.vocab_size)
        for n, grams, counts, contexts, totals, kinds in self._levels:
            keys = self._keys(tokens, n)
            gram_at, is_gram = _find(grams, keys)
            context_at, is_context = _find(contexts, keys // self.vocab_size)
            is_context &= np.arange(len(tokens)) >= n - 1
            count = np.where(is_gram, counts[gram_at], 0)
            total, kind = totals[context_at], kinds[context_at]
            better = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * kind * p) / total
            p = np.where(is_context, better, p)
        return p

    def bits_per_token(self, documents: Sequence[np.ndarray]) -> float:
        """Return the mean of -log2 p over all tokens but the first of every document."""
        bits = [-np.log2(self.probabilities(tokens)[1:]) for tokens in documents]
        return float(np.concatenate(bits).mean())


def _find(table, keys):
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return place, table[place] == keys
