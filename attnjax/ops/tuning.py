# SPDX-License-Identifier: Apache-2.0
"""Tile sizes that were measured to be best, as a value that `attention` is given.

A table is a JSON file that `python -m launch.benchmark --suite=attention --tune` writes. Each entry
says for which implementation, device, dtype and sizes some tiles were the fastest of those tried;
an implementation that finds no entry for a call chooses by its own rule. Entries change nothing but
time.

The default table is the one that comes with this package, or the file that the environment variable
ATTNJAX_TUNING names when this module is imported.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

FORMAT = 1
"""Version of the file."""

TILES = {
    "chunked": ("queries", "keys", "heads"),
    "pallas_gpu": ("forward", "backward", "forward_warps", "backward_warps", "stages"),
    "pallas_tpu": ("queries", "keys"),
}
"""Implementation -> names of what can be tuned; `forward` and `backward` are pairs."""

FARTHEST = 1.0
"""Entries serve lengths that differ by a factor of up to two, t and s together."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was fastest.

    Attributes:
      implementation: key of `attnjax.ops.IMPLEMENTATIONS`.
      device: from `device_name`.
      dtype: name of the dtype of the inputs.
      is_full: whether every query sees every key.
      n, k: query heads and key/value heads.
      t, s: queries and keys.
      h, hv: widths of keys and values.
      tiles: name -> size, or sizes, of the implementation's own `Tiles`.
      milliseconds: of the forward and backward pass that was measured; a note.
    """

    implementation: str
    device: str
    dtype: str
    is_full: bool
    n: int
    k: int
    t: int
    s: int
    h: int
    hv: int
    tiles: tuple[tuple[str, int | tuple[int, ...]], ...]
    milliseconds: float

    @property
    def group(self) -> tuple[Any, ...]:
        """What must be equal for an entry to serve a call; lengths need only be close."""
        return (
            self.implementation, self.device, self.dtype, self.is_full, self.n, self.k, self.h,
            self.hv,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A table of entries; immutable and hashable."""

    entries: tuple[Entry, ...] = ()

    def find(self, implementation: str, call: Any) -> dict[str, Any] | None:
        """Return the tiles of the closest entry for a call on the present device, or None.

        Args:
          implementation: key of `attnjax.ops.IMPLEMENTATIONS`.
          call: an `attnjax.ops.attention.Call`.
        """
        if not self.entries:
            return None
        _, n, t, s = call.scores_shape
        k, h = call.key.shape[2:]
        wanted = (
            implementation, device_name(), str(call.query.dtype), bool(call.visibility.is_full),
            n, k, h, call.value.shape[3],
        )  # fmt: skip
        best, closest = None, FARTHEST
        for entry in self.entries:
            if entry.group == wanted:
                distance = _distance(entry.t, t) + _distance(entry.s, s)
                if distance <= closest:
                    best, closest = entry, distance
        return None if best is None else dict(best.tiles)

    def merged(self, entries: Sequence[Entry]) -> "Tuning":
        """Return a table in which these entries replace those of the same group and lengths."""
        key = lambda entry: (entry.group, entry.t, entry.s)
        found = {key(entry): entry for entry in (*self.entries, *entries)}
        return Tuning(tuple(sorted(found.values(), key=lambda entry: str(key(entry)))))


def device_name() -> str:
    """Return the kind of device that is traced for; of a CPU, with the number of its cores."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return f"cpu x{os.cpu_count()}" if device.platform == "cpu" else device.device_kind


def load(path: str | pathlib.Path) -> Tuning:
    """Read a table.

    Args:
      path: a JSON file.

    Returns:
      The table.

    Raises:
      ValueError: the file is no table of this format; the message names what is wrong.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no table of tiles of format {FORMAT}")
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: entries must be a list")
    return Tuning(tuple(_entry(item, f"{path}: entry {i}") for i, item in enumerate(entries)))


def save(tuning: Tuning, path: str | pathlib.Path) -> None:
    """Write a table; an existing file is replaced as a whole.

    Args:
      tuning: the table.
      path: a JSON file in a folder that exists.
    """
    path = pathlib.Path(path)
    entries = [
        {**dataclasses.asdict(entry), "tiles": dict(entry.tiles)} for entry in tuning.entries
    ]
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(f'{{"format": {FORMAT}, "entries": [\n  {lines}\n]}}\n')
    unfinished.replace(path)


def _entry(item, where) -> Entry:
    types = {field.name: field.type for field in dataclasses.fields(Entry)}
    if not isinstance(item, dict) or item.keys() != types.keys():
        names = sorted(item) if isinstance(item, dict) else item
        raise ValueError(f"{where} must have the keys {sorted(types)}, got {names}")
    for name, kind in types.items():
        if name == "tiles":
            continue
        accepted = (int, float) if kind is float else kind
        is_wrong = not isinstance(item[name], accepted)
        if is_wrong or (isinstance(item[name], bool) and kind is not bool):
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}, got {item[name]!r}")
        if kind is int and item[name] < 1:
            raise ValueError(f"{where}: {name} must be positive, got {item[name]}")
    if item["implementation"] not in TILES:
        raise ValueError(
            f"{where}: implementation {item['implementation']!r} has no tiles to tune; choose from "
            f"{list(TILES)}"
        )
    names = TILES[item["implementation"]]
    if not isinstance(item["tiles"], dict) or tuple(sorted(item["tiles"])) != tuple(sorted(names)):
        raise ValueError(f"{where}: tiles must have the keys {list(names)}, got {item['tiles']!r}")
    return Entry(**{**item, "tiles": _tiles(item, where)})


def _tiles(item, where):
    tiles = {}
    for name, size in item["tiles"].items():
        is_pair = name in ("forward", "backward")
        sizes = size if is_pair and isinstance(size, list) else [size]
        if len(sizes) != 1 + is_pair or any(type(x) is not int or x < 1 for x in sizes):
            wanted = "two positive integers" if is_pair else "a positive integer"
            raise ValueError(f"{where}: tiles: {name} must be {wanted}, got {size!r}")
        if item["implementation"] == "pallas_tpu" and size % 128:
            raise ValueError(f"{where}: tiles: {name} must be a multiple of 128, got {size}")
        if name == "heads" and item["k"] % size:
            raise ValueError(f"{where}: tiles: heads must divide k = {item['k']}, got {size}")
        tiles[name] = tuple(sizes) if is_pair else size
    return tuple(tiles.items())


def _distance(one: int, other: int) -> float:
    return abs(math.log2(max(one, 1) / max(other, 1)))


def _default() -> Tuning:
    named = os.environ.get("ATTNJAX_TUNING")
    return load(named or pathlib.Path(__file__).with_name("tuning.json"))


DEFAULT = _default()
"""The table that `attention` uses unless it is given another."""
