# SPDX-License-Identifier: Apache-2.0
"""Partial and complete clouds of points: the PCN data set on disk, shapes made on the fly.

Yuan et al., "PCN: Point Completion Network", arXiv 1808.00671. Nothing is downloaded.
"""

import json
import math
import os
import pathlib
import re

import numpy as np

from attnjax import registry
from attnjax.data.records import check_on_error
from attnjax.data.sources import check_split
from attnjax.data.synthetic import stream
from attnjax.errors import RecipeError

SPLITS = ("train", "val", "test")
SHAPES = ("box", "cylinder", "sphere", "torus")
RENDERINGS = 8
"""Partial clouds of every training model; the other splits have one."""

_HEADER_LIMIT = 4096
_KINDS = {"F": "f", "I": "i", "U": "u"}
_SIZES = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}


class Pcn:
    """The PCN data set: `root/<split>/complete/<taxonomy>/<model>.pcd` and its partial clouds.

    Partial clouds are `root/<split>/partial/<taxonomy>/<model>/NN.pcd`, 00 to 07 in training and 00
    elsewhere, each an example of its own; `root/PCN.json` lists the models. An example holds
    `partial [n,3]` with any number of points, `complete [m,3]`, both float32, and `label`, the
    taxonomy's place in the list.

    Args:
      root: folder of PCN.json; `~` and environment variables are expanded.
      split: "train", "val" or "test".
      renderings: partial clouds of a training model, 1 to 8; with 1, also
        `partial/<taxonomy>/<model>.pcd` will do.
      on_error: "raise", or "skip" to replace clouds that cannot be read.

    Raises:
      RecipeError: the list is missing or makes no sense, or there is no folder of the split.
    """

    def __init__(
        self, root: str, split: str = "train", renderings: int = RENDERINGS, on_error: str = "raise"
    ):
        self.on_error = check_on_error(on_error)
        check_split(split, SPLITS)
        if not 1 <= renderings <= RENDERINGS:
            raise RecipeError(f"source.renderings={renderings}: must be from 1 to {RENDERINGS}")
        base = pathlib.Path(os.path.expandvars(root)).expanduser()
        self._base = base / split
        self._renderings = renderings if split == "train" else 1
        self.taxonomies, self._models = _read_list(base / "PCN.json", split)
        for part in ("partial", "complete"):
            if not (self._base / part).is_dir():
                raise RecipeError(f"source.root={root!r}: no folder {self._base / part}")

    def __len__(self) -> int:
        return len(self._models) * self._renderings

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        taxonomy, _ = self._models[index // self._renderings]
        return {
            "partial": read_pcd(self._partial(index)),
            "complete": read_pcd(self._file("complete", index)),
            "label": np.int32(self.taxonomies.index(taxonomy)),
        }

    def locate(self, index: int) -> str:
        """Return the path of a partial cloud."""
        return str(self._partial(index))

    def _file(self, part, index):
        taxonomy, model = self._models[index // self._renderings]
        return self._base / part / taxonomy / f"{model}.pcd"

    def _partial(self, index):
        whole = self._file("partial", index)
        if self._renderings == 1 and whole.is_file():
            return whole
        return whole.with_suffix("") / f"{index % self._renderings:02d}.pcd"


class ParametricShapes:
    """Boxes, cylinders, spheres and tori of random size and pose, seen from one side.

    Points lie on the surface, equally many on equal areas, and no further than 0.5 from the centre.
    The partial cloud consists of other points, whose normals face a random direction; that a torus
    may hide parts of itself is left aside. All four shapes are symmetric about the centre, so that
    the partial cloud and its reflection together are a complete one. An example also holds `view
    [3]`, the direction, and `label`, the shape's place in `SHAPES`. Every example is a pure
    function of (seed, index).

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      points: of the partial cloud.
      complete_points: of the complete cloud.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 65_536,
        points: int = 256,
        complete_points: int = 1024,
    ):
        for name, value in (("points", points), ("complete_points", complete_points)):
            if value < 1:
                raise RecipeError(f"source.{name}={value}: must be at least 1")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._points, self._complete = points, complete_points

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        label = int(rng.integers(len(SHAPES)))
        make = _surface(SHAPES[label], rng)
        rotation, view = _rotation(rng), _directions(rng, 1)[0]
        complete, _ = make(self._complete)
        # About half of all points face the viewer, so that one round is nearly always enough.
        seen = np.zeros((0, 3))
        while len(seen) < self._points:
            points, normals = make(4 * self._points)
            seen = np.concatenate([seen, points[normals @ rotation.T @ view > 0]])
        return {
            "partial": (seen[: self._points] @ rotation.T).astype(np.float32),
            "complete": (complete @ rotation.T).astype(np.float32),
            "view": view.astype(np.float32),
            "label": np.int32(label),
        }


class PointClouds:
    """Bring partial clouds to one size; mirror both clouds while training.

    The points of a partial cloud are drawn without replacement, or, where there are too few, each
    is taken as often as any other, give or take one (the release fills up with the origin instead).

    Args:
      points: of the partial cloud.
      complete_points: that a complete cloud must have.
      mirror: while training, mirror x, z, both or neither, equally often.
    """

    random = True

    def __init__(self, points: int = 2048, complete_points: int = 16_384, mirror: bool = True):
        for name, value in (("points", points), ("complete_points", complete_points)):
            if value < 1:
                raise RecipeError(f"pipeline.{name}={value}: must be at least 1")
        self.points, self.complete_points, self.mirror = points, complete_points, mirror

    def __call__(
        self, example: dict, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        is_training = rng is not None
        # Evaluation always draws the same points.
        rng = rng if is_training else np.random.default_rng(0)
        partial, complete = (
            np.asarray(example[name], np.float32) for name in ("partial", "complete")
        )
        for name, cloud in (("partial", partial), ("complete", complete)):
            if cloud.ndim != 2 or cloud.shape[1] != 3 or not len(cloud):
                raise ValueError(f"{name} cloud has shape {cloud.shape}, expected [points, 3]")
        if len(complete) != self.complete_points:
            raise ValueError(
                f"complete cloud has {len(complete)} points, pipeline.complete_points is "
                f"{self.complete_points}"
            )
        rounds = math.ceil(self.points / len(partial))
        chosen = np.concatenate([rng.permutation(len(partial)) for _ in range(rounds)])
        partial = partial[chosen[: self.points]]
        if is_training and self.mirror:
            x, z = rng.integers(0, 2, 2)
            sign = np.array([1 - 2 * x, 1, 1 - 2 * z], np.float32)
            partial, complete = partial * sign, complete * sign
        return {"partial": partial, "complete": complete}


def read_pcd(path: str | pathlib.Path) -> np.ndarray:
    """Read the coordinates of a file of the Point Cloud Library, version 0.7.

    Args:
      path: a file with fields x, y, z among its fields, `DATA ascii` or `DATA binary`.

    Returns:
      float32 `[points, 3]`.

    Raises:
      ValueError: the file is missing, truncated, compressed or makes no sense; it is named.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    content = path.read_bytes()
    found = re.search(rb"^DATA[ \t]+(\S+)[ \t]*\r?\n?", content[:_HEADER_LIMIT], re.MULTILINE)
    if not found:
        raise ValueError(f"{path}: no line 'DATA' in its first {_HEADER_LIMIT} bytes")
    header = _header(path, content[: found.start()])
    names = header["FIELDS"]
    counts = [_number(path, "COUNT", x) for x in header.get("COUNT", ["1"] * len(names))]
    sizes = [_number(path, "SIZE", x) for x in header["SIZE"]]
    kinds = header["TYPE"]
    if not len(names) == len(sizes) == len(kinds) == len(counts):
        raise ValueError(f"{path}: FIELDS, SIZE, TYPE and COUNT differ in length")
    for kind, size in zip(kinds, sizes, strict=True):
        if size not in _SIZES.get(kind, ()):
            raise ValueError(f"{path}: no number of TYPE {kind} and SIZE {size}")
    missing = [name for name in "xyz" if names.count(name) != 1]
    if missing:
        raise ValueError(f"{path}: FIELDS {' '.join(names)} lack {' '.join(missing)}")
    rows = _number(path, "POINTS", header["POINTS"][0])
    body, form = content[found.end() :], found.group(1).decode(errors="replace")
    if form == "ascii":
        points = _ascii(path, body, rows, names, counts)
    elif form == "binary":
        fields = [f"<{_KINDS[kind]}{size}" for kind, size in zip(kinds, sizes, strict=True)]
        points = _binary(path, body, rows, names, counts, fields)
    else:
        raise ValueError(f"{path}: DATA {form} is not supported; choose ascii or binary")
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if wrong.size:
        raise ValueError(f"{path}: point {wrong[0]} is not finite")
    return points


def _header(path, text):
    header = {}
    for line in text.decode("ascii", errors="replace").splitlines():
        words = line.split("#")[0].split()
        if words:
            header[words[0]] = words[1:]
    for name in ("FIELDS", "SIZE", "TYPE", "POINTS"):
        if not header.get(name):
            raise ValueError(f"{path}: the header has no {name}")
    return header


def _number(path, name, word):
    if not word.isdigit() or len(word) > 9 or int(word) < 1:
        raise ValueError(f"{path}: {name} {word!r} is no number above 0")
    return int(word)


def _ascii(path, body, rows, names, counts):
    lines = body.decode("ascii", errors="replace").split("\n")
    lines = [line for line in lines if line.strip()]
    if len(lines) != rows:
        raise ValueError(f"{path}: {len(lines)} lines of points, the header says {rows}")
    starts = np.cumsum([0, *counts])
    columns = [int(starts[names.index(name)]) for name in "xyz"]
    points = np.empty((rows, 3), np.float32)
    for row, line in enumerate(lines):
        words = line.split()
        if len(words) != starts[-1]:
            raise ValueError(f"{path}: point {row} has {len(words)} of {starts[-1]} numbers")
        try:
            points[row] = [float(words[column]) for column in columns]
        except ValueError as error:
            raise ValueError(f"{path}: point {row}: {line.strip()[:60]!r}: {error}") from error
    return points


def _binary(path, body, rows, names, counts, fields):
    # Names of other fields may repeat ("_" is padding): places tell them apart.
    dtype = np.dtype([(f"{i}", *x) for i, x in enumerate(zip(fields, counts, strict=True))])
    if len(body) < rows * dtype.itemsize:
        raise ValueError(
            f"{path}: {len(body)} bytes of points, the header says {rows * dtype.itemsize}"
        )
    records = np.frombuffer(body, dtype, rows)
    columns = [records[f"{names.index(name)}"].reshape(rows, -1)[:, 0] for name in "xyz"]
    return np.stack(columns, axis=-1).astype(np.float32)


def _read_list(path, split):
    """Return the taxonomies in order, and (taxonomy, model) of every model of the split."""
    if not path.is_file():
        present = sorted(f.name for f in path.parent.glob("*")) if path.parent.is_dir() else []
        raise RecipeError(f"no file {path}: {registry.nearest(path.name, present[:20])}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from error
    expected = (
        f"{path}: expected a list of objects with 'taxonomy_id' and lists of models per split"
    )
    if not isinstance(entries, list) or not entries:
        raise RecipeError(expected)
    taxonomies, models = [], []
    for entry in entries:
        names = entry.get(split) if isinstance(entry, dict) else None
        taxonomy = entry.get("taxonomy_id") if isinstance(entry, dict) else None
        if not isinstance(names, list) or not all(_is_name(x) for x in (taxonomy, *names)):
            raise RecipeError(f"{expected}; entry {len(taxonomies)} has none of {split}")
        taxonomies.append(taxonomy)
        models += [(taxonomy, name) for name in names]
    if not models:
        raise RecipeError(f"{path}: no model of split {split!r}")
    return taxonomies, models


def _is_name(x):
    """Whether a name of the list stays inside the folder."""
    return isinstance(x, str) and re.fullmatch(r"[\w-]+", x) is not None


def _directions(rng, count):
    x = rng.standard_normal((count, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _rotation(rng):
    """A rotation, uniform among all, `[3, 3]`."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)


def _surface(shape, rng):
    """Return a function from a number of points to as many points and normals, `[n, 3]` each."""
    if shape == "sphere":
        radius = rng.uniform(0.2, 0.5)

        def make(count):
            normals = _directions(rng, count)
            return radius * normals, normals

    elif shape == "torus":
        tube = rng.uniform(0.05, 0.15)
        ring = rng.uniform(2 * tube, 0.5 - tube)

        def make(count):
            around = rng.uniform(0, 2 * np.pi, count)
            # Area grows with the distance from the axis: outer points are drawn more often.
            inner = np.empty(0)
            while len(inner) < count:
                angle = rng.uniform(0, 2 * np.pi, 2 * count)
                share = (ring + tube * np.cos(angle)) / (ring + tube)
                inner = np.concatenate([inner, angle[rng.uniform(size=2 * count) < share]])
            inner = inner[:count]
            outward = np.stack([np.cos(around), np.sin(around), np.zeros(count)], axis=-1)
            up = np.array([0.0, 0.0, 1.0])
            normals = np.cos(inner)[:, None] * outward + np.sin(inner)[:, None] * up
            return ring * outward + tube * normals, normals

    elif shape == "box":
        half = rng.uniform(0.1, 0.5 / math.sqrt(3), 3)
        areas = np.array([half[1] * half[2], half[0] * half[2], half[0] * half[1]])

        def make(count):
            axis = rng.choice(3, count, p=areas / areas.sum())
            sign = rng.choice((-1.0, 1.0), count)
            points = rng.uniform(-1, 1, (count, 3)) * half
            normals = np.zeros((count, 3))
            normals[np.arange(count), axis] = sign
            points[np.arange(count), axis] = sign * half[axis]
            return points, normals

    else:
        radius, height = rng.uniform(0.1, 0.35, 2)  # half of the height
        side = 2 * height / (2 * height + radius)  # its share of the area

        def make(count):
            around = rng.uniform(0, 2 * np.pi, count)
            outward = np.stack([np.cos(around), np.sin(around), np.zeros(count)], axis=-1)
            is_side = rng.uniform(size=count) < side
            sign = rng.choice((-1.0, 1.0), count)
            up = sign[:, None] * np.array([0.0, 0.0, 1.0])
            middle = rng.uniform(-1, 1, (count, 1)) * np.array([0.0, 0.0, height])
            disc = radius * np.sqrt(rng.uniform(size=(count, 1))) * outward + height * up
            points = np.where(is_side[:, None], radius * outward + middle, disc)
            return points, np.where(is_side[:, None], outward, up)

    return make
