# SPDX-License-Identifier: Apache-2.0
"""Lengths of documents: histograms, files of them, and the sampler that fills a total.

Lengths are drawn interval by interval until the total is reached, as LongCA-bench does (arXiv
2510.17896): an interval by its probability, then an integer between both of its ends, both
included; what exceeds the rest of the total is cut off, and no document is empty.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
import re

import numpy as np

K = 1024


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Probabilities of intervals of lengths.

    Attributes:
      edges: (low, high) of each interval in increasing order; a file writes [low, high).
      weights: positive finite weight of each; they need not sum to one.
    """

    edges: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if len(self.edges) != len(self.weights) or not self.edges:
            raise ValueError(
                f"a histogram needs one weight per interval, got {len(self.edges)} intervals and "
                f"{len(self.weights)} weights"
            )
        previous = 0
        for low, high in self.edges:
            if not previous <= low < high:
                raise ValueError(
                    f"interval [{low},{high}) must be increasing and begin at {previous} or later"
                )
            previous = high
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or sum(self.weights) <= 0:
            raise ValueError(f"weights must be finite, not negative, and not all 0: {self.weights}")

    @property
    def probabilities(self) -> np.ndarray:
        """Weights divided by their sum, float64 `[intervals]`."""
        weights = np.asarray(self.weights, np.float64)
        return weights / weights.sum()

    def draw(self, rng: np.random.Generator) -> int:
        """Draw one length, at least 1."""
        low, high = self.edges[rng.choice(len(self.edges), p=self.probabilities)]
        return max(1, int(rng.integers(low, high, endpoint=True)))


def _from_upper_edges(pairs):
    """Intervals that begin where the one before ends."""
    highs = [high for high, _ in pairs]
    edges = tuple(zip([0, *highs[:-1]], highs, strict=True))
    return Histogram(edges, tuple(weight for _, weight in pairs))


# Section 3 of the benchmark's reference code. The quantiles of the Pile are re-binned; the upper
# end of its last interval is our choice, which 0.2 percent of the documents notice.
HISTOGRAMS = {
    "pile": _from_upper_edges((
        (128, 0.229), (256, 0.269), (512, 0.222), (1024, 0.128), (2304, 0.077), (4704, 0.041),
        (14208, 0.030), (32 * K, 0.0022),
    )),
    "short": _from_upper_edges((
        (256, 0.0766), (512, 0.1651), (768, 0.1246), (1024, 0.0972), (1536, 0.1324),
        (2048, 0.0927), (2560, 0.072), (3072, 0.0519), (3584, 0.0379), (4096, 0.0264),
        (5120, 0.038), (6144, 0.0245), (7168, 0.0145), (8192, 0.0097), (10240, 0.0122),
        (15360, 0.0128), (20480, 0.0051), (65536, 0.0064),
    )),
    "long": _from_upper_edges((
        (2 * K, 0.16), (4 * K, 0.05), (8 * K, 0.04), (16 * K, 0.06), (32 * K, 0.08),
        (64 * K, 0.21), (128 * K, 0.4), (256 * K, 0.2), (512 * K, 0.05), (1024 * K, 0.04),
        (2048 * K, 0.01), (4096 * K, 0.01),
    )),
}  # fmt: skip
"""Histograms that ship. ProLong's of 64K and 512K are the user's own files, see `load`."""

LONG_DOCUMENTS = (8 * K, 30 * K)
"""Ends, both included, of the uniform lengths of long documents."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the lengths of one sequence are drawn.

    Attributes:
      histogram: of the lengths.
      long_share: share of the total that long documents take (0.6 in the runs over several
        devices, 0 otherwise); their lengths are uniform in `long_range`, and all are shuffled.
      long_range: shortest and longest of the long documents.
      cap: largest share of the total that one document may take (1/4 in Magi's runs), or None.
    """

    histogram: Histogram
    long_share: float = 0.0
    long_range: tuple[int, int] = LONG_DOCUMENTS
    cap: float | None = None

    def __post_init__(self):
        if not 0 <= self.long_share <= 1:
            raise ValueError(f"long_share={self.long_share}: must be between 0 and 1")
        low, high = self.long_range
        if not 1 <= low <= high:
            raise ValueError(f"long_range={self.long_range}: must be increasing, from 1 on")
        if self.cap is not None and not 0 < self.cap <= 1:
            raise ValueError(f"cap={self.cap}: must be above 0 and at most 1")

    def draw(self, total: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw lengths that sum to the total.

        Args:
          total: tokens, at least 1.
          rng: source of randomness.

        Returns:
          Positive lengths.

        Raises:
          ValueError: the total is not positive.
        """
        if total < 1:
            raise ValueError(f"total={total}: must be at least 1")
        most = total if self.cap is None else max(1, int(self.cap * total))
        long_total = round(self.long_share * total)
        lengths = _fill(total - long_total, lambda: min(self.histogram.draw(rng), most))
        if long_total:
            low, high = self.long_range
            uniform = lambda: min(int(rng.integers(low, high, endpoint=True)), most)
            lengths += _fill(long_total, uniform)
            lengths = [lengths[i] for i in rng.permutation(len(lengths))]
        return tuple(lengths)


def _fill(total, draw):
    lengths = []
    while total > 0:
        lengths.append(max(1, min(draw(), total)))
        total -= lengths[-1]
    return lengths


def sampler(name: str) -> Sampler:
    """Return a sampler by name.

    Args:
      name: a histogram of `HISTOGRAMS` or a .json or .csv file of one, then any of ":mixture" (60
        percent of the tokens in long documents) and ":capped" (no document above a quarter).

    Raises:
      ValueError: the name, an option or the file is wrong.
    """
    source, *options = name.split(":")
    if source in HISTOGRAMS:
        histogram = HISTOGRAMS[source]
    elif source.endswith((".json", ".csv")):
        histogram = load(pathlib.Path(source))
    else:
        raise ValueError(
            f"distribution {source!r} is unknown; choose from {list(HISTOGRAMS)} or name a .json "
            "or .csv file"
        )
    known = {"mixture": {"long_share": 0.6}, "capped": {"cap": 0.25}}
    chosen: dict = {}
    for option in options:
        if option not in known:
            raise ValueError(f"option {option!r} of {name!r} is unknown; choose from {list(known)}")
        chosen |= known[option]
    return Sampler(histogram, **chosen)


_INTERVAL = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*\)")


def load(path: pathlib.Path) -> Histogram:
    """Read a histogram from a file.

    A JSON file holds an object `{"[a,b)": p, ...}`. A CSV file has the columns range, number,
    percentage and cumulative-percentage (with or without percent signs), ranges written "[a,b)".

    Raises:
      ValueError: the file cannot be read or is malformed; the message names file and line.
    """
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"{path}: a histogram is a .json or a .csv file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    entries = _json_entries(path, text) if path.suffix == ".json" else _csv_entries(path, text)
    if not entries:
        raise ValueError(f"{path}:1: no interval")
    reached = 0
    for line, (low, high), _ in entries:
        if not reached <= low < high:
            raise ValueError(f"{path}:{line}: [{low},{high}) must increase from {reached} on")
        reached = high
    try:
        return Histogram(tuple(e[1] for e in entries), tuple(e[2] for e in entries))
    except ValueError as error:
        raise ValueError(f"{path}:{entries[-1][0]}: {error}") from error


def _interval(path, line, text):
    match = _INTERVAL.fullmatch(text.strip())
    if not match:
        raise ValueError(f'{path}:{line}: range {text!r} must be written "[a,b)"')
    return int(match[1]), int(match[2])


def _number(path, line, name, text, most=math.inf):
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(text, bool) or not 0 <= value <= most or math.isinf(value):
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise ValueError(f"{path}:{line}: {name} {text!r} must be a number, not negative{limit}")
    return value


def _json_entries(path, text):
    pairs = []

    def keep(items):
        pairs.extend(items)
        return dict(items)

    try:
        found = json.loads(text, object_pairs_hook=keep)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON: {error.msg}") from error
    if not isinstance(found, dict) or len(pairs) != text.count(":"):
        raise ValueError(f'{path}:1: must be one object of the form {{"[a,b)": p, ...}}')
    # Keys hold no colon, so that the colons of the text stand for the entries, in order.
    lines = [1 + text.count("\n", 0, m.start()) for m in re.finditer(":", text)]
    return [
        (line, _interval(path, line, key), _number(path, line, "probability", value))
        for line, (key, value) in zip(lines, pairs, strict=True)
    ]


_COLUMNS = ("range", "number", "percentage", "cumulative")
_ROUNDING = 0.5
"""Percent by which percentages may differ from the numbers beside them."""


def _csv_entries(path, text):
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no CSV: {error}") from error
    header = [name.strip().lower() for name in rows[0][1]] if rows else []
    if len(header) != 4 or not all(map(str.startswith, header, _COLUMNS)):
        raise ValueError(
            f"{path}:1: columns must be range, number, percentage, cumulative-percentage; "
            f"got {header}"
        )
    entries, shares = [], []
    for line, row in rows[1:]:
        if len(row) != 4:
            raise ValueError(f"{path}:{line}: {len(row)} fields instead of 4")
        interval = _interval(path, line, row[0])
        number = _number(path, line, "number", row[1])
        percent, cumulative = (
            _number(path, line, name, field.strip().removesuffix("%"), 100 + _ROUNDING)
            for name, field in zip(_COLUMNS[2:], row[2:], strict=True)
        )
        entries.append((line, interval, number))
        shares.append((percent, cumulative))
    total, reached = sum(e[2] for e in entries), 0.0
    for (line, _, number), (percent, cumulative) in zip(entries, shares, strict=True):
        exact = 100 * number / total if total else 0.0
        reached += exact
        for name, stated, true in (
            ("percentage", percent, exact),
            ("cumulative percentage", cumulative, reached),
        ):
            if abs(stated - true) > _ROUNDING:
                raise ValueError(f"{path}:{line}: {name} {stated:g} is {true:.2f} by the numbers")
    return entries
