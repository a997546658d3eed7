# SPDX-License-Identifier: Apache-2.0
"""A number told once in a long text of no interest, and asked for at its end."""

import numpy as np

from attnjax.data.synthetic import stream
from attnjax.data.tokenizers import BYTES, make_tokenizer
from attnjax.errors import RecipeError

INSTRUCTION = (
    "One important fact is hidden in a long text without interest. Find it and keep it in mind: "
    "it will be asked for."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LARGEST = 50_000


class PassKey:
    """The pass-key prompts of Mohtashami and Jaggi, arXiv 2305.16300, Section 4.2.

        instruction / filler / The pass key is N. Remember it. N is the pass key. / filler /
        What is the pass key? The pass key is N.

    The filler repeats five short sentences; how much of it stands in front is drawn, as is N from 1
    to 50,000. Examples have `tokens` int32 and `scored` bool `[length]`: the number at the end and
    the full stop behind it are to be predicted, so that all of them right is what greedy generation
    and reading the first integer would give. What is left of the length is filled up behind the
    answer, with token 0, unscored.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: tokens of an example.
      filler: characters of filler; -1: as many as fit.
      instruction: the first line.
      tokenizer: "bytes", or the path of a `tokenizers` JSON file.
      reserved: tokens in front of the tokenizer's own: 0, or 4.

    Raises:
      RecipeError: a prompt does not fit the length, or an argument is out of range.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 1_000_000,
        length: int = 512,
        filler: int = -1,
        instruction: str = INSTRUCTION,
        *,
        tokenizer: str = BYTES,
        reserved: int = 0,
    ):
        self._stream, self._seed, self._size = stream(split, seed, size)
        if filler < -1:
            raise RecipeError(f"source.filler={filler}: must be at least 0, or -1")
        self._tokenizer = make_tokenizer(tokenizer, reserved)
        self.vocab_size, self.length = self._tokenizer.vocab_size, length
        self._instruction = instruction
        self._filler = 0 if filler == -1 else filler
        self._check(self._filler)
        if filler == -1:
            self._filler = self._most()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        number = int(rng.integers(1, LARGEST + 1))
        prompt, answer = self._encode(int(rng.integers(self._filler + 1)), self._filler, number)
        tokens, scored = np.zeros(self.length, np.int32), np.zeros(self.length, bool)
        end = len(prompt) + len(answer)
        tokens[:end] = np.concatenate([prompt, answer])
        scored[len(prompt) : end] = True
        return {"tokens": tokens, "scored": scored}

    def _encode(self, before, filler, number):
        """Return the tokens of a prompt with so many characters of filler, and of its answer."""
        repeated = " ".join([FILLER] * (filler // len(FILLER) + 1))
        lines = [
            self._instruction,
            repeated[:before],
            f"The pass key is {number}. Remember it. {number} is the pass key.",
            repeated[: filler - before],
            "What is the pass key? The pass key is",
        ]
        return [self._tokenizer.encode(x.encode()) for x in ("\n".join(lines), f" {number}.")]

    def _needed(self, filler):
        # Tokens other than bytes may take some more or less, wherever the filler is cut.
        places = range(0, filler + 1, max(1, filler // 8))
        return max(sum(map(len, self._encode(at, filler, LARGEST))) for at in places)

    def _check(self, filler):
        needed = self._needed(filler)
        if needed > self.length:
            raise RecipeError(
                f"source.length={self.length}: a prompt with {filler} characters of filler takes "
                f"{needed} tokens"
            )

    def _most(self):
        low, high = 0, 16 * self.length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._needed(middle) <= self.length else (low, middle - 1)
        return low
