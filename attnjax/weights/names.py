# SPDX-License-Identifier: Apache-2.0
"""Explicit tables that relate parameter paths to the tensor names of other libraries.

A table is a tuple of rules. Every parameter must match exactly one rule and every tensor must be
produced by exactly one set of parameters, so that a table is a bijection or an error.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attnjax.errors import RecipeError

NATIVE = "attnjax"
"""The layout in which tensors carry parameter paths and shapes."""

LISTED = 20
"""Names shown per list of an error."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a name table.

    Attributes:
      params: path template, `{}` for every number; several templates are parts of one fused tensor,
        in this order along its first axis, or the one that `FUSED` says of the layout.
      tensor: name template of the other library, `{}` for the same numbers in the same order.
      layout: how axes correspond, a key of `LAYOUTS`.
      is_stacked: the parameter has a leading axis, whose rows are tensors of their own; the tensor
        template has one more `{}`, the last, for their numbers.
    """

    params: tuple[str, ...]
    tensor: str
    layout: str = "same"
    is_stacked: bool = False


def rule(params: str | Sequence[str], tensor: str, layout: str = "same") -> Rule:
    """Write a `Rule` with one template as plain text."""
    return Rule((params,) if isinstance(params, str) else tuple(params), tensor, layout)


def stacked(params: str | Sequence[str], tensor: str, layout: str = "same") -> Rule:
    """Relate parameters with a leading axis of layers to one tensor per layer."""
    return dataclasses.replace(rule(params, tensor, layout), is_stacked=True)


def stacked_linear(params: str, tensor: str, layout: str = "in") -> tuple[Rule, Rule]:
    """Relate kernels and biases with a leading axis of layers to one Linear layer per layer."""
    return (
        stacked(f"{params}/kernel", f"{tensor}.weight", layout),
        stacked(f"{params}/bias", f"{tensor}.bias"),
    )


def stacked_norm(params: str, tensor: str) -> tuple[Rule, Rule]:
    """Relate scales and biases with a leading axis of layers to one norm per layer."""
    return (
        stacked(f"{params}/scale", f"{tensor}.weight"),
        stacked(f"{params}/bias", f"{tensor}.bias"),
    )


def linear(params: str, tensor: str) -> tuple[Rule, Rule]:
    """Relate a Dense layer to a Linear layer."""
    return (
        rule(f"{params}/kernel", f"{tensor}.weight", "in"),
        rule(f"{params}/bias", f"{tensor}.bias"),
    )


def conv(params: str, tensor: str) -> tuple[Rule, Rule]:
    """Relate a two-dimensional convolution `[y, x, in, out]` to one `[out, in, y, x]`."""
    return (
        rule(f"{params}/kernel", f"{tensor}.weight", "conv"),
        rule(f"{params}/bias", f"{tensor}.bias"),
    )


def conv1d(params: str, tensor: str) -> tuple[Rule, Rule]:
    """Relate a one-dimensional convolution `[t, in, out]` to one `[out, in, t]`."""
    return (
        rule(f"{params}/kernel", f"{tensor}.weight", "conv1d"),
        rule(f"{params}/bias", f"{tensor}.bias"),
    )


def norm(params: str, tensor: str) -> tuple[Rule, Rule]:
    """Relate the scale and bias of a norm to its weight and bias."""
    return rule(f"{params}/scale", f"{tensor}.weight"), rule(f"{params}/bias", f"{tensor}.bias")


def projections(params: str, tensor: str, parts: Sequence[str], *, bias: bool = True):
    """Relate query, key or value projections to one Linear layer over all heads.

    Args:
      params: path template of the attention module.
      tensor: name template of the Linear layer.
      parts: which of "query", "key", "value" it holds, in order.
      bias: whether there are biases.

    Returns:
      One or two rules.
    """
    kernel = rule([f"{params}/{part}/kernel" for part in parts], f"{tensor}.weight", "in")
    vector = rule([f"{params}/{part}/bias" for part in parts], f"{tensor}.bias", "vector")
    return (kernel, vector) if bias else (kernel,)


def output(params: str, tensor: str) -> tuple[Rule, Rule]:
    """Relate an attention output projection `[n, h, d]` to a Linear layer."""
    return (
        rule(f"{params}/kernel", f"{tensor}.weight", "out"),
        rule(f"{params}/bias", f"{tensor}.bias"),
    )


# layout -> (shape of the tensor, parameter to tensor, tensor to parameter of a shape)
LAYOUTS = {
    "same": (lambda s: s, lambda x: x, lambda x, s: x),
    "vector": (lambda s: (_size(s),), lambda x: x.reshape(-1), lambda x, s: x.reshape(s)),
    "in": (
        lambda s: (_size(s[1:]), s[0]),
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda x, s: x.T.reshape(s),
    ),
    "out": (
        lambda s: (s[-1], _size(s[:-1])),
        lambda x: x.reshape(-1, x.shape[-1]).T,
        lambda x, s: x.T.reshape(s),
    ),
    "conv": (
        lambda s: (s[3], s[2], s[0], s[1]),
        lambda x: x.transpose(3, 2, 0, 1),
        lambda x, s: x.transpose(2, 3, 1, 0),
    ),
    # A linear map that is a convolution of side 1, and vectors with an axis of 1 for the tokens.
    "conv_1x1": (
        lambda s: (s[1], s[0], 1, 1),
        lambda x: x.T[:, :, None, None],
        lambda x, s: x[:, :, 0, 0].T,
    ),
    "middle": (
        lambda s: (s[0], 1, s[1]),
        lambda x: x[:, None],
        lambda x, s: x[:, 0],
    ),
    "last": (lambda s: (*s, 1), lambda x: x[..., None], lambda x, s: x[..., 0]),
    "conv1d": (lambda s: tuple(s[::-1]), lambda x: x.T, lambda x, s: x.T),
    # GPT-2 keeps linear maps as [in, out].
    "in_plain": (
        lambda s: (s[0], _size(s[1:])),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x, s: x.reshape(s),
    ),
    "out_plain": (
        lambda s: (_size(s[:-1]), s[-1]),
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x, s: x.reshape(s),
    ),
}

FUSED = {"in_plain": 1}
"""Layout -> axis along which parts of one tensor follow each other; the first for all others."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file and the parameters it holds.

    Attributes:
      paths: parameter paths, in order along the tensor's fused axis.
      shapes: shapes of what it holds of them.
      layout: a key of `LAYOUTS`.
      row: it holds this row of its parameter's first axis; None: all of it.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: str
    row: int | None = None

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """Shapes of the parts of the tensor."""
        return [LAYOUTS[self.layout][0](shape) for shape in self.shapes]

    @property
    def axis(self) -> int:
        """Axis of the tensor along which its parts follow each other."""
        return FUSED.get(self.layout, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        first, *others = self.parts
        total = first[self.axis] + sum(p[self.axis] for p in others) if others else None
        return (*first[: self.axis], total, *first[self.axis + 1 :]) if others else first


def plan(shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule] | None) -> dict[str, Entry]:
    """Work out which tensor holds which parameters.

    Args:
      shapes: shape of every parameter by path.
      rules: a name table; None for the native layout.

    Returns:
      Entries by tensor name; together they hold every parameter, or row of a stacked one, exactly
      once.

    Raises:
      RecipeError: the table is no bijection for these parameters.
    """
    if rules is None:
        return {path: Entry((path,), (tuple(shape),), "same") for path, shape in shapes.items()}
    compiled = [
        (re.compile(re.escape(template).replace(r"\{\}", r"(\d+)")), part, line)
        for line in rules
        for part, template in enumerate(line.params)
    ]
    found: dict[str, dict[int, str]] = {}
    lines: dict[str, Rule] = {}
    rows: dict[str, int] = {}
    for path, shape in shapes.items():
        matches = [(m, part, line) for p, part, line in compiled if (m := p.fullmatch(path))]
        if len(matches) != 1:
            raise RecipeError(f"parameter {path} matches {len(matches)} rules of the name table")
        match, part, line = matches[0]
        for row in range(shape[0]) if line.is_stacked else (None,):
            numbers = match.groups() if row is None else (*match.groups(), row)
            tensor = line.tensor.format(*numbers)
            if part in found.setdefault(tensor, {}) or lines.setdefault(tensor, line) is not line:
                raise RecipeError(f"tensor {tensor} would hold {path} and another parameter")
            found[tensor][part] = path
            rows[tensor] = row
    entries = {}
    for tensor, parts in found.items():
        if len(parts) != len(lines[tensor].params):
            raise RecipeError(f"tensor {tensor} has only the parts {sorted(parts.values())}")
        paths = tuple(parts[i] for i in range(len(parts)))
        skipped = 0 if rows[tensor] is None else 1
        held = tuple(tuple(shapes[p])[skipped:] for p in paths)
        entries[tensor] = Entry(paths, held, lines[tensor].layout, rows[tensor])
    return entries


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by slash-separated path."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def layout_of(
    names: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    tables: Mapping[str, Sequence[Rule]] | None,
) -> str:
    """Return the layout that shares the most names with a file: `NATIVE` or a key of `tables`.

    Tables that do not cover these parameters are left out.
    """
    distances = {}
    for layout, rules in {NATIVE: None, **(tables or {})}.items():
        try:
            known = plan(shapes, rules)
        except RecipeError:
            continue
        distances[layout] = len(set(names) ^ set(known))
    return min(distances, key=distances.get)


def import_params(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, Sequence[int]],
    tables: Mapping[str, Sequence[Rule]] | None = None,
    *,
    source: str = "weights",
    fit: Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Convert the tensors of a file to parameters.

    Args:
      tensors: arrays by name, in any known layout.
      shapes: shape of every parameter by path.
      tables: layout -> name table, besides the native one.
      source: what error messages call the file.
      fit: called with (path, array, wanted shape) for tensors of another shape that hold one
        parameter; returns what to use instead, or the array as it is.

    Returns:
      The nested dict of float32 numpy arrays.

    Raises:
      RecipeError: tensors are missing, left over, of another shape, no floats or not finite; one
        message lists all of them, with both shapes, and nothing is loaded.
    """
    layout = layout_of(list(tensors), shapes, tables)
    entries = plan(shapes, None if layout == NATIVE else tables[layout])
    tensors = dict(tensors)
    for name, entry in entries.items() if fit else ():
        is_whole = len(entry.paths) == 1 and entry.row is None
        if name in tensors and is_whole and tensors[name].shape != entry.shape:
            tensors[name] = fit(entry.paths[0], tensors[name], entry.shape)
    missing = [f"{name} {_show(entries[name].shape)}" for name in entries if name not in tensors]
    extra = [f"{name} {_show(tensors[name].shape)}" for name in tensors if name not in entries]
    wrong, integer, infinite = [], [], []
    for name, entry in entries.items():
        if name not in tensors:
            continue
        if tensors[name].dtype.kind in "biu":
            integer.append(f"{name} {tensors[name].dtype}")
        elif tensors[name].shape != entry.shape:
            shape = tensors[name].shape
            hint = " (transposed?)" if shape == entry.shape[::-1] and len(shape) > 1 else ""
            wrong.append(f"{name} {_show(shape)} in the file, {_show(entry.shape)} here{hint}")
        elif not np.isfinite(tensors[name].astype(np.float32)).all():
            infinite.append(name)
    lists = {
        "missing": missing,
        "not expected": extra,
        "wrong shape": wrong,
        "no floating numbers": integer,
        "not finite": infinite,
    }
    if any(lists.values()):
        text = "; ".join(_listing(title, lines) for title, lines in lists.items() if lines)
        raise RecipeError(f"{source} (layout {layout!r}) does not fit the model: {text}")
    params: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        pieces = [tensors[name]]
        if len(entry.paths) > 1:
            ends = np.cumsum([part[entry.axis] for part in entry.parts])
            pieces = np.split(tensors[name], ends[:-1], axis=entry.axis)
        for path, shape, piece in zip(entry.paths, entry.shapes, pieces, strict=True):
            leaf = np.asarray(LAYOUTS[entry.layout][2](piece, shape), np.float32)
            if entry.row is not None:
                params.setdefault(path, np.empty(shapes[path], np.float32))[entry.row] = leaf
            else:
                params[path] = leaf
    return unflatten(params)


def export_params(
    params: Mapping[str, Any], rules: Sequence[Rule] | None = None
) -> dict[str, np.ndarray]:
    """Convert parameters to the tensors of another library.

    Args:
      params: nested dict of arrays.
      rules: the name table; None for the native layout.

    Returns:
      Arrays by tensor name.

    Raises:
      RecipeError: the table is no bijection for these parameters.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    tensors = {}
    for name, entry in plan({p: x.shape for p, x in leaves.items()}, rules).items():
        held = [leaves[p] if entry.row is None else leaves[p][entry.row] for p in entry.paths]
        pieces = [LAYOUTS[entry.layout][1](leaf) for leaf in held]
        is_fused = len(pieces) > 1
        tensors[name] = np.concatenate(pieces, axis=entry.axis) if is_fused else pieces[0]
    return tensors


def _listing(title, lines):
    more = f", and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return f"{title} ({len(lines)}): {', '.join(lines[:LISTED])}{more}"


def _show(shape):
    return "[" + ",".join(map(str, shape)) + "]"


def _size(shape):
    return int(np.prod(shape, dtype=np.int64))
