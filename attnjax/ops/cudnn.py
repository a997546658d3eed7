# SPDX-License-Identifier: Apache-2.0
"""cuDNN's flash attention, by way of `jax.nn.dot_product_attention`.

Only what cuDNN computes exactly as `reference` does is served: float16 and bfloat16, everything
visible, causal masks and causal windows of as many queries as keys, and lengths of keys, as long as
all of it is known while tracing. Its log-sum-exp comes rounded and without gradient, its dropout is
a stream of its own, and rows that may attend nothing get the mean of the values: all refused,
except rows whose bias is -inf, which are put right here.

Tests see that calls are refused or lowered as meant; `pytest -m gpu` runs them on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.attention import AttentionOutput, Call
from attnjax.typing import Array

LARGE = {"bfloat16": 2.0**40, "float16": 2.0**14}
"""What a bias is cut off at: cuDNN subtracts two infinities."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A mask in cuDNN's terms.

    Attributes:
      is_causal: whether queries see no later keys; as many queries as keys.
      left: how many keys before its own a query sees, or None for all.
      lengths: int32 `[b|1]` number of keys of every example, or None for all.
    """

    is_causal: bool = False
    left: int | None = None
    lengths: np.ndarray | None = None


def attend(call: Call, *, needs_gpu: bool = True) -> AttentionOutput:
    """Serve a call by cuDNN.

    Args:
      call: the checked arguments.
      needs_gpu: whether to refuse where there is no GPU; False to lower a call without one.

    Returns:
      An `AttentionOutput` with the output alone.

    Raises:
      NotImplementedError: there is no GPU or no cuDNN, or the call is not one of those above.
    """
    name = "cudnn"
    if needs_gpu and jax.default_backend() != "gpu":
        raise NotImplementedError(f"{name}: needs a GPU, not {jax.default_backend()}")
    call.refuse(
        name, "normalizer", "bias objects", "softcap", "return_lse", "return_probabilities",
        "return_scores", "statistics", "edit", "dropout",
    )  # fmt: skip
    _check_shapes(call)
    pattern = _pattern(call)
    lengths = pattern.lengths
    if lengths is not None:
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), call.query.shape[:1])
    bias, is_empty_bnt = _bias(call)
    try:
        out = jax.nn.dot_product_attention(
            call.query,
            call.key,
            call.value,
            bias,
            scale=call.scale,
            is_causal=pattern.is_causal,
            key_value_seq_lengths=lengths,
            local_window_size=None if pattern.left is None else (pattern.left, 0),
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as error:
        raise NotImplementedError(f"{name}: {error}") from error
    if is_empty_bnt is not None:
        out = jnp.where(is_empty_bnt.swapaxes(1, 2)[..., None], 0, out)
    return AttentionOutput(out=out)


def gradients(call: Call, results: tuple, cotangents: tuple) -> tuple:
    """Refuse: cuDNN's backward pass is not to be had without its forward pass."""
    raise NotImplementedError("cudnn: gradients of a part are not served")


def _check_shapes(call):
    _, _, t, s = call.scores_shape
    h, hv = call.query.shape[3], call.value.shape[3]
    refusals = {
        f"{call.query.dtype} inputs are not served": call.query.dtype.name not in LARGE,
        "an empty batch is not served": call.query.shape[0] == 0,
        f"values as wide as keys are needed, not {hv} and {h}": h != hv,
        f"the width of a head must be a multiple of 8 up to 256, not {h}": h % 8 or h > 256,
        f"with a bias, numbers of queries and keys must be even, not {t} and {s}": (
            call.bias is not None and (t % 2 or s % 2)
        ),
    }
    for reason, applies in refusals.items():
        if applies:
            raise NotImplementedError(f"cudnn: {reason}")


def _pattern(call: Call) -> Pattern:
    """Recognise a mask in its normal form."""
    visibility = call.visibility
    _, _, t, s = call.scores_shape
    if visibility.is_full:
        return Pattern()
    refusal = NotImplementedError(
        "cudnn: a mask must be known while tracing and be causal, a causal window (as many queries "
        "as keys), or at least one key long per example"
    )
    is_plain = visibility.rest is None and visibility.query_ids is None
    if not (is_plain and visibility.is_static):
        raise refusal
    lower, upper = visibility.lower, visibility.upper
    if lower.shape[1:3] != (1, 1):
        raise refusal
    lower_bt, upper_bt = lower[:, 0, 0], upper[:, 0, 0]
    lengths = upper_bt.max(axis=-1)
    query = np.arange(t)
    if (lengths < 1).any():
        raise refusal
    given = None if (lengths == s).all() else lengths.astype(np.int32)
    if (lower_bt == 0).all():
        if (upper_bt == lengths[:, None]).all():
            return Pattern(lengths=given)
        if t == s and (upper_bt == np.minimum(query + 1, lengths[:, None])).all():
            return Pattern(is_causal=True, lengths=given)
        raise refusal
    left = int(s - 1 - lower_bt[0, -1])
    is_window = (lower_bt == np.maximum(query - left, 0)).all() and (upper_bt == query + 1).all()
    if t == s and is_window:
        return Pattern(is_causal=True, left=left)
    raise refusal


def _bias(call: Call) -> tuple[Array | None, Array | None]:
    """Return a bias `[b|1,n|1,t,s]` without infinities, and which rows they leave empty."""
    if call.bias is None:
        return None, None
    _, _, t, s = call.scores_shape
    bias = jnp.broadcast_to(call.bias, (*call.bias.shape[:2], t, s))
    may_see = bias > -jnp.inf
    if not call.visibility.is_full:
        may_see = may_see & call.visibility.dense(t, s)
    large = LARGE[call.query.dtype.name]
    bias = jnp.maximum(bias, -large).astype(call.query.dtype)
    return bias, ~may_see.any(axis=-1)
