# SPDX-License-Identifier: Apache-2.0
"""Prompts of linear regressions: examples (x_l, y_l) of one unknown beta, then a query x_q.

He et al., "In-Context Linear Regression Demystified", arXiv 2503.12734, Section 2 and the release.
One task: x ~ N(0, C), C_ij = rho^|i-j|, beta ~ N(0, I/d), and noise of variance sigma^2 on all
answers. Two tasks share x: the first reads its first d_1 coordinates, the second its last d_2, each
beta ~ N(0, I), and noise of variance d_i sigma^2 is on the answers of the examples only.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from attnjax.data.synthetic import stream
from attnjax.errors import RecipeError
from attnjax.registry import nearest

INPUTS = ("normal", "diabetes")
"""Where x comes from: the normal law, or standardised patients of scikit-learn's diabetes set."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as arrays, float32.

    Attributes:
      examples: `[p, s, d + o]`, x and its answers.
      query: `[p, d + o]`, x and zeros.
      target: `[p, o]`, the answers to the query.
      beta: `[p, d, o]`, zero where a task does not read.
    """

    examples: np.ndarray
    query: np.ndarray
    target: np.ndarray
    beta: np.ndarray

    @property
    def dim(self) -> int:
        """d, coordinates of x."""
        return self.beta.shape[1]

    @property
    def x(self) -> np.ndarray:
        """`[p, s, d]`."""
        return self.examples[..., : self.dim]

    @property
    def y(self) -> np.ndarray:
        """`[p, s, o]`."""
        return self.examples[..., self.dim :]

    @property
    def x_query(self) -> np.ndarray:
        """`[p, d]`."""
        return self.query[..., : self.dim]


@dataclasses.dataclass(frozen=True)
class Law:
    """What prompts are drawn from.

    Attributes:
      dim: d, coordinates of x.
      length: s, examples of a prompt.
      noise: sigma^2.
      correlation: rho in (-1, 1); 0 makes the coordinates independent.
      supports: numbers of first and of last coordinates that two tasks read; empty: one task that
        reads all.
      inputs: member of `INPUTS`.
    """

    dim: int = 5
    length: int = 40
    noise: float = 0.1
    correlation: float = 0.0
    supports: tuple[int, ...] = ()
    inputs: str = "normal"

    def __post_init__(self):
        for name, fine in (
            ("dim", self.dim >= 1),
            ("length", self.length >= 1),
            ("noise", self.noise >= 0),
            ("correlation", -1 < self.correlation < 1),
        ):
            if not fine:
                raise RecipeError(f"source.{name}={getattr(self, name)!r} is out of range")
        if self.supports and (
            len(self.supports) != 2 or not all(1 <= size <= self.dim for size in self.supports)
        ):
            raise RecipeError(
                f"source.supports={tuple(self.supports)}: must be two numbers of coordinates from "
                f"1 to dim={self.dim}, or empty"
            )
        if self.inputs not in INPUTS:
            raise RecipeError(f"source.inputs={self.inputs!r}: {nearest(self.inputs, INPUTS)}")

    @property
    def outputs(self) -> int:
        """o, answers to a query."""
        return len(self.supports) or 1

    def covariance(self) -> np.ndarray:
        """Return C, `[d, d]` float64."""
        place = np.arange(self.dim)
        return np.float64(self.correlation) ** np.abs(place[:, None] - place)

    def masks(self) -> np.ndarray:
        """Return which coordinates each task reads, `[o, d]` bool."""
        place = np.arange(self.dim)
        if not self.supports:
            return np.ones((1, self.dim), bool)
        first, last = self.supports
        return np.stack([place < first, place >= self.dim - last])

    def draw(self, rng: np.random.Generator, count: int) -> Prompts:
        """Draw prompts; the generator's state is all that they depend on.

        Args:
          rng: random generator.
          count: p, number of prompts.

        Raises:
          RecipeError: the diabetes set has fewer columns than `dim`.
        """
        s, d, o = self.length, self.dim, self.outputs
        x = self._inputs(rng, count * (s + 1)).reshape(count, s + 1, d)
        beta = rng.standard_normal((count, d, o)) * self.masks().T
        if not self.supports:
            beta /= np.sqrt(d)
        y = np.einsum("psd,pdo->pso", x, beta)
        deviation = np.sqrt(self.noise) * np.sqrt(self.supports or (1.0,))
        noise = deviation * rng.standard_normal(y.shape)
        if self.supports:
            noise[:, -1] = 0  # the query's answers are told without noise here
        y += noise
        z = np.concatenate([x, y], axis=-1).astype(np.float32)
        query = z[:, -1].copy()
        query[:, d:] = 0
        return Prompts(z[:, :-1], query, z[:, -1, d:], beta.astype(np.float32))

    def _inputs(self, rng, rows):
        if self.inputs == "normal":
            x = rng.standard_normal((rows, self.dim))
            return x @ np.linalg.cholesky(self.covariance()).T if self.correlation else x
        columns = _diabetes()
        if self.dim > columns.shape[1]:
            raise RecipeError(
                f"source.dim={self.dim}: the diabetes set has {columns.shape[1]} columns"
            )
        return columns[rng.integers(len(columns), size=rows), : self.dim]


class RegressionPrompts:
    """Groups of fresh prompts, so that one example of a batch is many small regressions.

    Examples have `examples [p, s, d + o]`, `query [p, d + o]` and `target [p, o]`, float32.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: groups.
      prompts: p, prompts of a group.
      dim, length, noise, correlation, supports, inputs: see `Law`.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 1_000_000,
        prompts: int = 64,
        *,
        dim: int = 5,
        length: int = 40,
        noise: float = 0.1,
        correlation: float = 0.0,
        supports: Sequence[int] = (),
        inputs: str = "normal",
    ):
        if prompts < 1:
            raise RecipeError(f"source.prompts={prompts}: must be at least 1")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._prompts = prompts
        self.law = Law(dim, length, noise, correlation, tuple(supports), inputs)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        drawn = self.law.draw(rng, self._prompts)
        return {"examples": drawn.examples, "query": drawn.query, "target": drawn.target}


def save_prompts(path: str | pathlib.Path, prompts: Prompts) -> None:
    """Write prompts as .npz with the arrays `z`, `z_q`, `y_q` and `beta`."""
    arrays = {name: getattr(prompts, field) for name, field in _STORED.items()}
    np.savez(path, **arrays)


def load_prompts(path: str | pathlib.Path) -> Prompts:
    """Read what `save_prompts` wrote.

    Raises:
      RecipeError: names the file, and the array that is missing or of a wrong shape.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise RecipeError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: np.asarray(stored[name], np.float32) for name in stored.files}
    except (ValueError, OSError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if missing := sorted(set(_STORED) - set(found)):
        raise RecipeError(f"{path}: no array {', '.join(missing)}")
    beta = found["beta"]
    p, d, o = beta.shape if beta.ndim == 3 else (0, 0, 0)
    s = found["z"].shape[1] if found["z"].ndim == 3 else 0
    expected = {"z": (p, s, d + o), "z_q": (p, d + o), "y_q": (p, o), "beta": (p, d, o)}
    for name, shape in expected.items():
        if found[name].shape != shape or 0 in shape:
            raise RecipeError(
                f"{path}: {name} has shape {found[name].shape}, expected "
                "z [p, s, d + o], z_q [p, d + o], y_q [p, o], beta [p, d, o]"
            )
    return Prompts(**{field: found[name] for name, field in _STORED.items()})


_STORED = {"z": "examples", "z_q": "query", "y_q": "target", "beta": "beta"}


def _diabetes():
    from sklearn.datasets import load_diabetes

    columns = load_diabetes().data
    return (columns - columns.mean(axis=0)) / columns.std(axis=0)
