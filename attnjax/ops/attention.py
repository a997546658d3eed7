# SPDX-License-Identifier: Apache-2.0
"""The attention core: one function, several implementations, no silent differences.

    scores = softcap(scale * query . key) + bias          masked where the mask is False
    out    = normalizer(scores) . value                   lse = log(sum_s exp(scores))

`attention` checks and canonicalises its arguments into a `Call` and hands that to an
implementation. An implementation either serves the call exactly as `reference` would, or refuses
it with NotImplementedError and the reason; it never ignores an argument.
"""

import dataclasses
import importlib
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array, PRNGKey

IMPLEMENTATIONS = {
    "reference": "attnjax.ops.reference",
    "chunked": "attnjax.ops.chunked",
    "pallas_tpu": "attnjax.ops.pallas_tpu",
    "pallas_gpu": "attnjax.ops.pallas_gpu",
    "cudnn": "attnjax.ops.cudnn",
}
"""Name -> module whose `attend(call)` serves a call or raises NotImplementedError."""

NORMALIZERS = ("softmax",)
"""How a row of scores becomes weights."""

EMPTY_LSE = -1e30
"""Log-sum-exp of a row that may attend nothing: finite, so that differences of two stay finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What an implementation returns.

    Attributes:
      out: `[b,t,n,hv]`, dtype of the query.
      lse: `[b,n,t]` float32 log-sum-exp of the scores, or None; `EMPTY_LSE` where a row may
        attend nothing.
      probabilities: `[b,n,t,s]` float32 weights before dropout, or None.
    """

    out: Array
    lse: Array | None = None
    probabilities: Array | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """Checked arguments of one `attention` call, in canonical form.

    Attributes:
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`, same dtype; `k` divides `n`.
      value: `[b,s,k,hv]`, same dtype.
      mask: bool, rank 4, every axis 1 or that of `[b,n,t,s]`; or None.
      bias: floating, rank 4, every axis 1 or that of `[b,n,t,s]`; or None.
      scale: factor of the raw scores.
      softcap: positive cap of the scaled scores, or None.
      normalizer: one of `NORMALIZERS`.
      return_lse: whether the log-sum-exp is wanted.
      return_probabilities: whether the weights are wanted.
      dropout_rate: in [0, 1).
      dropout_key: typed key; None exactly when the rate is 0.
    """

    query: Array
    key: Array
    value: Array
    mask: Array | None
    bias: Array | None
    scale: float
    softcap: float | None
    normalizer: str
    return_lse: bool
    return_probabilities: bool
    dropout_rate: float
    dropout_key: PRNGKey | None

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """`(b, n, t, s)`."""
        b, t, n, _ = self.query.shape
        return b, n, t, self.key.shape[1]

    @property
    def statistics_dtype(self) -> jnp.dtype:
        """Dtype of scores, softmax statistics and accumulators: float32, or wider inputs' own."""
        return jnp.promote_types(self.query.dtype, jnp.float32)


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: str = "softmax",
    implementation: str | None = None,
    return_lse: bool = False,
    return_probabilities: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
) -> Array | AttentionOutput:
    """Attend every query to the keys it may see and average their values.

    Query head `i` uses key/value head `i // (n // k)`. Scores, statistics and accumulators are
    float32 whatever the dtype of the inputs. A row that may attend nothing (mask all False, or
    bias all -inf) gives output zero, `EMPTY_LSE` and zero gradients.

    Args:
      query: `[b,t,n,h]` floating.
      key: `[b,s,k,h]`, dtype of the query; `k` divides `n`.
      value: `[b,s,k,hv]`, dtype of the query; `hv` may differ from `h`.
      mask: bool, broadcastable to `[b,n,t,s]`; True means "may attend".
      bias: floating, broadcastable to `[b,n,t,s]`, added after scale and softcap; its gradient has
        its own shape.
      scale: factor of the raw scores; `h ** -0.5` if None.
      softcap: replaces scaled scores `x` by `softcap * tanh(x / softcap)`.
      normalizer: one of `NORMALIZERS`.
      implementation: one of `IMPLEMENTATIONS`; None chooses the fastest that serves the call.
      return_lse: also return the log-sum-exp of every row.
      return_probabilities: also return the weights (before dropout).
      dropout_rate: probability of dropping a weight, in [0, 1). Which weights are dropped is a
        function of the key and the position alone, so all implementations that serve it agree.
      dropout_key: typed key, needed when the rate is not 0.

    Returns:
      `out [b,t,n,hv]` in the dtype of the query, or an `AttentionOutput` if the log-sum-exp or the
      probabilities are asked for.

    Raises:
      ValueError: an argument cannot mean anything; the message names the axis and both sizes.
      NotImplementedError: the named implementation refuses; the message is its reason.
      ExceptionGroup: nothing was named and every implementation refuses; one reason each.
    """
    call = _canonical(
        query, key, value, mask, bias, scale, softcap, normalizer,
        return_lse, return_probabilities, dropout_rate, dropout_key,
    )  # fmt: skip
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation {implementation!r} is unknown; choose from {list(IMPLEMENTATIONS)}"
            )
        output = _attend(implementation, call)
    else:
        output = _first_served(automatic_order(call), call)
    return output if return_lse or return_probabilities else output.out


def automatic_order(call: Call) -> tuple[str, ...]:
    """Return the implementations to try for a call, the one expected to be fastest first.

    Materialised scores win while they are small, or no larger than the keys (a few queries). The
    CPU limit is measured; accelerators have room for more before the memory matters. `cudnn` is
    only used by name, because it rounds differently from the others.
    """
    b, n, t, s = call.scores_shape
    limit = 2**21 if jax.default_backend() == "cpu" else 2**26
    is_dense = b * n * t * s <= limit or n * t <= call.key.shape[2] * call.key.shape[3]
    return ("reference", "chunked") if is_dense else ("chunked", "reference")


def _first_served(names: tuple[str, ...], call: Call) -> AttentionOutput:
    refusals = []
    for name in names:
        try:
            return _attend(name, call)
        except NotImplementedError as refusal:
            refusals.append(refusal)
    raise ExceptionGroup("no implementation of attention serves this call", refusals)


def _attend(name: str, call: Call) -> AttentionOutput:
    target = IMPLEMENTATIONS[name]
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name != target:
            raise
        raise NotImplementedError(
            f"{name}: this version of attnjax does not contain this implementation"
        ) from None
    return module.attend(call)


def _canonical(
    query, key, value, mask, bias, scale, softcap, normalizer,
    return_lse, return_probabilities, dropout_rate, dropout_key,
) -> Call:  # fmt: skip
    query, key, value = (jnp.asarray(array) for array in (query, key, value))
    arrays = {"query": (query, "btnh"), "key": (key, "bskh"), "value": (value, "bskh")}
    for name, (array, axes) in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must have axes [{','.join(axes)}], got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
        if array.dtype != query.dtype:
            raise ValueError(
                f"{name} is {array.dtype} but query is {query.dtype}: cast one of them"
            )
        for axis, size in list(zip(axes, array.shape, strict=True))[1:]:
            if size == 0:
                raise ValueError(f"{name} axis {axis} has size 0")
    b, t, n, h = query.shape
    _, s, k, _ = key.shape
    for name, axis, size, other, expected in (
        ("key", "b (batch)", key.shape[0], "query", b),
        ("value", "b (batch)", value.shape[0], "query", b),
        ("value", "s (keys)", value.shape[1], "key", s),
        ("value", "k (key/value heads)", value.shape[2], "key", k),
        ("key", "h (head width)", key.shape[3], "query", h),
    ):
        if size != expected:
            raise ValueError(f"{name} axis {axis} has size {size}, but {other} has {expected}")
    if n % k:
        raise ValueError(f"query axis n (heads) has size {n}, not a multiple of key axis k = {k}")

    if mask is not None:
        mask = _broadcastable("mask", mask, (b, n, t, s))
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask must be bool (True = may attend), got {mask.dtype}")
    if bias is not None:
        bias = _broadcastable("bias", bias, (b, n, t, s))
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(f"bias must be floating, got {bias.dtype}")

    scale = h**-0.5 if scale is None else _number("scale", scale)
    if softcap is not None and not (softcap := _number("softcap", softcap)) > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer {normalizer!r} is unknown; choose from {list(NORMALIZERS)}")
    dropout_rate = _number("dropout_rate", dropout_rate)
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate == 0.0:
        dropout_key = None
    elif dropout_key is None:
        raise ValueError(f"dropout_rate {dropout_rate} needs a dropout_key")
    elif not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key) or dropout_key.shape:
        raise ValueError("dropout_key must be one typed key (jax.random.key)")
    return Call(
        query, key, value, mask, bias, scale, softcap, normalizer,
        bool(return_lse), bool(return_probabilities), dropout_rate, dropout_key,
    )  # fmt: skip


def _broadcastable(name: str, array, shape: tuple[int, int, int, int]) -> Array:
    array = jnp.asarray(array)
    if array.ndim > 4:
        raise ValueError(f"{name} must broadcast to [b,n,t,s] = {shape}, got shape {array.shape}")
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    axes = ("b (batch)", "n (heads)", "t (queries)", "s (keys)")
    for axis, size, expected in zip(axes, array.shape, shape, strict=True):
        if size not in (1, expected):
            raise ValueError(f"{name} axis {axis} has size {size}, expected 1 or {expected}")
    return array


def _number(name: str, value) -> float:
    if isinstance(value, (numbers.Real, np.number)) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{name} must be a finite Python number, got {value!r}")
