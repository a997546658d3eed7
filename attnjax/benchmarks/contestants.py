# SPDX-License-Identifier: Apache-2.0
"""Who takes part in the attention benchmark: our implementations and whatever peers are installed.

A contestant turns a case into a function of `(query, key, value)`, or refuses with
NotImplementedError and the reason; a peer is asked only for what its own interface says.
"""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import IMPLEMENTATIONS, attention, mask

MASKS: dict[str, Callable[[int], mask.Mask]] = {
    "full": lambda t: mask.full(),
    "causal": lambda t: mask.causal(),
    "window": lambda t: mask.sliding_window(max(1, t // 16), 0),
    "window_256": lambda t: mask.sliding_window(256, 0),
    "documents": lambda t: mask.documents(_parts(t, (5, 1, 3, 2, 4, 1)), causal=True),
    "prefix": lambda t: mask.prefix_lm(t // 4),
    "shared_question": lambda t: mask.share_question(_parts(t, (2, 3, 3, 4, 4))),
    "global_window": lambda t: mask.global_sliding_window(max(1, t // 32)),
    "block_sparse": lambda t: _block_sparse(t),
}
"""Name -> mask for t queries and as many keys."""


PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Directions, and their operations as multiples of the forward pass."""


def attention_flops(area: float, heads: int, width: int, direction: str = "forward") -> float:
    """Return 4 area heads width, times 2.5 backward: two products forward, five backward.

    Args:
      area: visible elements of one head.
      heads: query heads.
      width: of a head.
      direction: key of `PASSES`; a multiply-add is two operations.
    """
    return 4.0 * area * heads * width * PASSES[direction]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
      mask: key of `MASKS`.
      dtype: name of the dtype.
      b, t, n, k, h: examples, tokens (queries and keys), query heads, key/value heads, width.
      direction: "forward", "backward", or "both" for one after the other.
    """

    mask: str
    dtype: str
    b: int
    t: int
    n: int
    k: int
    h: int
    direction: str

    def make_mask(self) -> mask.Mask:
        """Return the mask."""
        return MASKS[self.mask](self.t)

    @property
    def area(self) -> float:
        """Visible elements of one example and head, the mean over heads if they differ."""
        found = np.asarray(self.make_mask().area(self.t, self.t))
        return found.item() if found.size == 1 else float(found.mean())

    @property
    def flops(self) -> float:
        """Operations of one call, see `attention_flops`."""
        return self.b * attention_flops(self.area, self.n, self.h, self.direction)

    def arrays(self) -> tuple[jax.Array, ...]:
        """Return query, key, value and a cotangent of the output, normally distributed."""
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (self.n, self.k, self.k, self.n)
        return tuple(
            jax.random.normal(key, (self.b, self.t, count, self.h), self.dtype)
            for key, count in zip(keys, heads, strict=True)
        )


Function = Callable[..., Any]


def with_backward(attend: Function) -> Callable[..., Any]:
    """Return a function of query, key, value and cotangent: the output and the gradients."""

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(cotangent.astype(out.dtype))

    return both


def ours(
    implementation: str | None, see: Callable[[Case], mask.Mask] = lambda case: case.make_mask()
) -> Callable[[Case], Function]:
    """Return the contestant of one of our implementations.

    Args:
      implementation: as `attention` takes it.
      see: makes the mask of a case in the form that the contestant is given it.

    Returns:
      The contestant, whose functions also take the options of `attention` by name.
    """

    def make(case: Case) -> Function:
        seen = see(case)
        return lambda q, k, v, **options: attention(
            q, k, v, mask=seen, implementation=implementation, **options
        )

    return make


def jax_nn(case: Case) -> Function:
    """`jax.nn.dot_product_attention`, XLA."""
    options: dict[str, Any] = {}
    if case.mask == "causal":
        options["is_causal"] = True
    elif case.mask != "full":
        options["mask"] = jnp.asarray(case.make_mask().dense_bnts(case.t, case.t))
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def flax(case: Case) -> Function:
    """`flax.linen.dot_product_attention`, which knows dense masks and no grouped heads."""
    linen = _import("flax.linen")
    if case.k != case.n:
        raise NotImplementedError("flax: no grouped-query heads")
    visible = None
    if case.mask != "full":
        visible = jnp.asarray(case.make_mask().dense_bnts(case.t, case.t))
    return lambda q, k, v: linen.dot_product_attention(q, k, v, mask=visible)


def tokamax(case: Case) -> Function:
    """`tokamax.dot_product_attention`, its own choice of implementation."""
    module = _import("tokamax")
    options: dict[str, Any] = {}
    if case.mask == "causal":
        options["is_causal"] = True
    elif case.mask != "full":
        options["mask"] = jnp.asarray(case.make_mask().dense_bnts(case.t, case.t))
    return lambda q, k, v: module.dot_product_attention(q, k, v, **options)


CONTESTANTS: dict[str, Callable[[Case], Function]] = {
    **{name: ours(name) for name in IMPLEMENTATIONS},
    "jax.nn": jax_nn,
    "flax": flax,
    "tokamax": tokamax,
}
"""Name -> contestant that runs in this process."""


class Torch:
    """PyTorch's `scaled_dot_product_attention` in a process of its own; a context manager."""

    def __init__(self, threads: int = 0):
        """Remember how many CPU threads it may use (0: its own choice)."""
        self.threads = threads
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Torch":
        return self

    def __exit__(self, *exception) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=30)

    def prepare(self, case: Case) -> Callable[[], float]:
        """Return a function that runs a case once and returns its seconds.

        Raises:
          NotImplementedError: torch is not installed, or has no such mask.
        """
        if importlib.util.find_spec("torch") is None:
            raise NotImplementedError("torch: not installed")
        request = {
            "shape": [case.b, case.n, case.t, case.h],
            "kv_heads": case.k,
            "dtype": case.dtype,
            "mask": case.mask,
            "direction": case.direction,
            "threads": self.threads,
        }
        answer = self._ask({"case": request})
        if "refused" in answer:
            raise NotImplementedError(f"torch: {answer['refused']}")
        return lambda: self._ask({"run": 1})["seconds"]

    def _ask(self, request):
        if self._process is None:
            command = [sys.executable, "-m", "attnjax.benchmarks.torch_worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise NotImplementedError("torch: its process ended")
        return json.loads(line)


def _import(name):
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise NotImplementedError(f"{name}: not installed")
    return importlib.import_module(name)


def _parts(t, shares):
    """Cut t tokens into documents of roughly these shares."""
    ends = [round(t * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    return [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]


def _block_sparse(t):
    """A quarter of the blocks of 128 tokens, the same for all heads, the diagonal always kept."""
    size = min(128, t)
    count = t // size
    kept = np.random.default_rng(0).random((count, count)) < 0.25
    np.fill_diagonal(kept, True)
    sizes = [size] * (count - 1) + [t - size * (count - 1)]
    return mask.blocks(kept, sizes, sizes)
