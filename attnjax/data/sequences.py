# SPDX-License-Identifier: Apache-2.0
"""Sequences made on the fly whose answer, and the context it needs, are known.

Every example is a pure function of (seed, index). Token 0 is padding everywhere.
"""

import numpy as np

from attnjax import registry
from attnjax.data.synthetic import stream
from attnjax.errors import RecipeError

DISTRIBUTIONS = ("normal", "sign")

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
LISTOPS_TOKENS = {
    name: 1 + number for number, name in enumerate((*map(str, range(10)), *OPERATORS, "]"))
}
"""Token ids of ListOps: digits, operators, closing bracket; 0 is padding."""


class Needle:
    """One marked value among unmarked ones, a chosen distance before the query at the end.

    Tokens 1..c are unmarked values, c + 1..2c the same values marked, 2c + 1 is the query. The
    label is the marked value. A model that sees the last `context` tokens can be right every time
    where distance < context, and with probability 1 / c elsewhere.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: tokens, the query included.
      distance: of the marked value; 0 draws it among 1, 2, 4, ... below the length.
      context: only the last so many tokens are given; 0 for all.
      classes: number of values c.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        length: int = 128,
        distance: int = 0,
        context: int = 0,
        classes: int = 4,
    ):
        for name, value, fine in (
            ("length", length, length >= 2),
            ("distance", distance, 0 <= distance < length),
            ("context", context, 0 <= context <= length),
            ("classes", classes, classes >= 2),
        ):
            if not fine:
                raise RecipeError(f"source.{name}={value}: does not fit length={length}")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._length, self._context, self.num_classes = length, context or length, classes
        powers = [2**i for i in range(length.bit_length()) if 2**i < length]
        self._distances = [distance] if distance else powers
        self.vocab = 2 * classes + 2

    @property
    def ceiling(self) -> float:
        """Accuracy of the best predictor."""
        found = np.mean([d < self._context for d in self._distances])
        return float(found + (1 - found) / self.num_classes)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        c = self.num_classes
        tokens = rng.integers(1, c + 1, self._length).astype(np.int32)
        distance = self._distances[rng.integers(len(self._distances))]
        label = rng.integers(c)
        tokens[-1] = 2 * c + 1
        tokens[self._length - 1 - distance] = 1 + c + label
        return {
            "tokens": tokens[-self._context :],
            "label": np.int32(label),
            "distance": np.int32(distance),
        }


class MovingAverage:
    """The mean of the last S inputs, at every position that has so many.

    Inputs are independent, of mean 0 and variance 1. The best predictor from the last r < S of them
    is their sum divided by S; its error is `moving_average_floor(S, r)`.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: positions.
      span: S.
      distribution: "normal", or "sign" for -1 and 1.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        length: int = 64,
        span: int = 16,
        distribution: str = "normal",
    ):
        if not 1 <= span <= length:
            raise RecipeError(f"source.span={span}: must be between 1 and length={length}")
        if distribution not in DISTRIBUTIONS:
            hint = registry.nearest(distribution, DISTRIBUTIONS)
            raise RecipeError(f"source.distribution={distribution!r}: {hint}")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._length, self._span, self._distribution = length, span, distribution

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        if self._distribution == "sign":
            values = 2.0 * rng.integers(2, size=self._length) - 1
        else:
            values = rng.standard_normal(self._length)
        sums = np.cumsum(np.concatenate([np.zeros(self._span), values]))
        target = (sums[self._span :] - sums[: -self._span]) / self._span
        return {
            "values": values[:, None].astype(np.float32),
            "target": target[:, None].astype(np.float32),
            "scored": np.arange(self._length) >= self._span - 1,
        }


def moving_average_floor(span: int, reach: int) -> float:
    """Return the mean squared error of the best predictor of `MovingAverage`: (S - r) / S^2.

    Args:
      span: S, inputs in the mean.
      reach: r, inputs that the predictor sees (its own position included).
    """
    return max(0, span - reach) / span**2


class ListOps:
    """Nested list operations on digits, evaluated: ten classes (Nangia and Bowman, 1804.06028).

    MIN, MAX, MED (the median, rounded down) and SM (sum modulo ten), in the lengths and token set
    of the Long Range Arena; the generator is ours.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: tokens; shorter expressions are padded with 0.
      shortest: an expression has at least so many tokens.
      depth: largest nesting.
      arguments: largest number of arguments, at least 2.
    """

    num_classes = 10

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 96_000,
        length: int = 2_000,
        shortest: int = 500,
        depth: int = 10,
        arguments: int = 10,
    ):
        if not 1 <= shortest <= length or depth < 1 or arguments < 2:
            raise RecipeError(
                f"source: shortest={shortest}, depth={depth} and arguments={arguments} do not fit "
                f"length={length}"
            )
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._length, self._shortest = length, shortest
        self._depth, self._arguments = depth, arguments
        self.vocab = len(LISTOPS_TOKENS) + 1

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        words = self._expression(rng)
        tokens = np.zeros(self._length, np.int32)
        tokens[: len(words)] = [LISTOPS_TOKENS[word] for word in words]
        return {"tokens": tokens, "label": np.int32(evaluate(words))}

    def _expression(self, rng):
        """Grow from one operator: replace digits by operators until the tokens are enough."""
        target = int(rng.integers(self._shortest, self._length + 1))
        words, depths = self._operation(rng, 0)
        while len(words) < target:
            digits = [i for i, w in enumerate(words) if w.isdigit() and depths[i] < self._depth]
            if not digits:
                break
            place = digits[rng.integers(len(digits))]
            new, deeper = self._operation(rng, depths[place])
            if len(words) + len(new) - 1 > self._length:
                break
            words[place : place + 1], depths[place : place + 1] = new, deeper
        return words

    def _operation(self, rng, depth):
        count = int(rng.integers(2, self._arguments + 1))
        count = min(count, self._length - 2)
        digits = [str(digit) for digit in rng.integers(10, size=count)]
        words = [OPERATORS[rng.integers(len(OPERATORS))], *digits, "]"]
        return words, [depth + 1] * len(words)


def evaluate(words: list[str]) -> int:
    """Return the value of a ListOps expression, such as ["[MAX", "2", "9", "]"].

    Raises:
      ValueError: it is no complete expression.
    """
    reduce = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda values: int(np.median(values)),
        "[SM": lambda values: sum(values) % 10,
    }
    stack: list[tuple[str, list[int]]] = [("", [])]
    for word in words:
        if word in reduce:
            stack.append((word, []))
        elif word == "]":
            operator, values = stack.pop()
            if not stack or not values:
                raise ValueError("a bracket closes nothing, or a list without arguments")
            stack[-1][1].append(reduce[operator](values))
        elif word.isdigit() and len(word) == 1:
            stack[-1][1].append(int(word))
        else:
            raise ValueError(f"{word!r} is no digit, operator or bracket")
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise ValueError("the expression is not complete")
    return stack[0][1][0]


class Pathfinder:
    """Are the two dots joined by a dashed curve? (Linsley et al., arXiv 1805.08315.)

    Two curves that keep their distance, and short distractors, all dashed, are drawn on a square.
    The dots mark both ends of one curve (label 1) or one end of each (label 0). Pixels come row by
    row as a sequence in [0, 1]: 32 x 32 of the Long Range Arena's Pathfinder, 128 x 128 of Path-X.
    The generator is ours.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      side: pixels of a side, at least 16.
      distractors: short curves.
    """

    num_classes = 2

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 160_000,
        side: int = 32,
        distractors: int = 3,
    ):
        if side < 16 or distractors < 0:
            raise RecipeError(f"source.side={side}, source.distractors={distractors}: too small")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._side, self._distractors = side, distractors

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        image, label = self.draw(rng)
        return {"values": image.reshape(-1, 1), "label": np.int32(label)}

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Return the picture `[side, side]` float32 and the label."""
        long, curves = round(0.75 * self._side), []
        while len(curves) < 2:  # rarely, the first curve leaves no room for the second
            taken = np.zeros((self._side, self._side), bool)
            found = [_free_curve(rng, taken, long) for _ in range(2)]
            curves = [curve for curve in found if curve is not None]
        short = [_free_curve(rng, taken, long // 3) for _ in range(self._distractors)]
        image = np.zeros((self._side, self._side), np.float32)
        for curve in (*curves, *(curve for curve in short if curve is not None)):
            place = np.arange(len(curve))
            dashed = curve[(place % 4 < 3) | (place >= len(curve) - 3)]
            image[dashed[:, 0], dashed[:, 1]] = 0.5
        label = int(rng.integers(2))
        first, second = curves[:2] if rng.integers(2) else curves[1::-1]
        for y, x in (first[0], first[-1] if label else second[-1]):
            image[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 1.0
        return image, label


def _free_curve(rng, taken, steps):
    """Draw a smooth curve of pixels, four away from all others, and mark its surroundings as taken.

    Where there is no room it becomes shorter, down to half of the steps; then it is None.
    """
    side, shortest = len(taken), steps // 2
    while steps >= max(4, shortest):
        for _ in range(40):
            place, angle = rng.uniform(2, side - 3, 2), rng.uniform(0, 2 * np.pi)
            pixels = [tuple(np.rint(place).astype(int))]
            while len(pixels) < steps:
                angle += rng.normal(0, 0.2)
                place = place + 0.5 * np.array([np.sin(angle), np.cos(angle)])
                pixel = tuple(np.rint(place).astype(int))
                if not (2 <= pixel[0] < side - 2 and 2 <= pixel[1] < side - 2):
                    break
                if pixel != pixels[-1]:
                    pixels.append(pixel)
            curve = np.array(pixels)
            if len(curve) == steps and not taken[curve[:, 0], curve[:, 1]].any():
                for y, x in curve:
                    taken[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = True
                return curve
        steps -= max(1, steps // 8)
    return None
