# SPDX-License-Identifier: Apache-2.0
"""The attention core: one function, several implementations, no silent differences.

    scores = softcap(scale * query . key) + bias          masked where the mask is False
    out    = normalizer(scores) . value                   lse = log(sum_s exp(scores))

`attention` checks and canonicalises its arguments into a `Call` and hands that to an
implementation. An implementation either serves the call exactly as `reference` would, or refuses
it with NotImplementedError and the reason; it never ignores an argument. What every implementation
can do alike (gates, extra terms of the softmax, stopped gradients) happens here, around them.
"""

import dataclasses
import functools
import importlib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.bias import Bias
from attnjax.ops.dropout import Place
from attnjax.ops.mask import Mask, Visibility
from attnjax.ops.normalizer import EMPTY_LSE, Elementwise, Normalizer, Rowwise, SoftmaxFamily
from attnjax.ops.normalizers import NORMALIZERS
from attnjax.ops.statistics import STATISTICS, TokenMass, name_of
from attnjax.ops.tuning import DEFAULT, Tuning
from attnjax.typing import Array, PRNGKey

__all__ = ["EMPTY_LSE", "IMPLEMENTATIONS", "AttentionOutput", "Call", "attention"]

IMPLEMENTATIONS = {
    "reference": "attnjax.ops.reference",
    "chunked": "attnjax.ops.chunked",
    "pallas_tpu": "attnjax.ops.pallas_tpu",
    "pallas_gpu": "attnjax.ops.pallas_gpu",
    "cudnn": "attnjax.ops.cudnn",
}
"""Name -> module whose `attend(call)` serves a call or raises NotImplementedError.

Its `gradients(call, results, cotangents)` does what `serve_gradients` says, or refuses, too.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What an implementation returns.

    Attributes:
      out: `[b,t,n,hv]`, dtype of the query.
      lse: `[b,n,t]` float32 log-sum-exp of the scores, or None; `EMPTY_LSE` where a row may
        attend nothing.
      probabilities: `[b,n,t,s]` float32 weights before dropout, or None; n is the number of
        chosen heads.
      scores: `[b,n,t,s]` float32 scores, -inf where masked, or None; n as above.
      statistics: arrays by name, see `attnjax.ops.statistics`; empty when none was asked for.
    """

    out: Array
    lse: Array | None = None
    probabilities: Array | None = None
    scores: Array | None = None
    statistics: Mapping[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Call:
    """Checked arguments of one `attention` call, in canonical form: what implementations serve.

    Attributes:
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`, same dtype; `k` divides `n`.
      value: `[b,s,k,hv]`, same dtype.
      visibility: normal form of the mask for t and s.
      bias: floating, rank 4, every axis 1 or that of `[b,n,t,s]`; a `Bias`; or None.
      scale: factor of the raw scores.
      softcap: positive cap of the scaled scores, or None.
      normalizer: an `Elementwise`, or None for plain softmax; a `Rowwise` reaches `reference`
        alone. The extra terms of softmax's relatives are added outside; only statistics need to
        know `extra_logit`.
      extra_logit: `[b|1,n,t|1]` logit that joins the denominator of the weights that statistics
        are about (not of `out`, `lse` and the probabilities), without gradient, or None.
      return_lse: whether the log-sum-exp is wanted.
      probability_heads: query heads whose probabilities are wanted; empty for none.
      score_heads: query heads whose scores are wanted; empty for none.
      statistics: names in `STATISTICS` and `TokenMass`es that are wanted.
      edit: function of probabilities `[b,n,t,s]` and log-sum-exp that gives what to use instead of
        them, or None; knows of extra terms of the softmax, which are not applied again.
      dropout_rate: in [0, 1).
      dropout_key: typed key; None exactly when the rate is 0.
      tuning: where implementations look for measured tile sizes.
      is_partial: whether this is a part of a larger call: outputs and gradients come in
        `statistics_dtype`, to be merged.
      place: where the part lies in the larger call, for dropout; None: it is the whole.
    """

    query: Array
    key: Array
    value: Array
    visibility: Visibility
    bias: Array | Bias | None
    scale: float
    softcap: float | None
    normalizer: Elementwise | Rowwise | None
    extra_logit: Array | None
    return_lse: bool
    probability_heads: tuple[int, ...]
    score_heads: tuple[int, ...]
    statistics: tuple[str | TokenMass, ...]
    edit: Callable[[Array, Array | None], Array] | None
    dropout_rate: float
    dropout_key: PRNGKey | None
    tuning: Tuning = DEFAULT
    is_partial: bool = False
    place: Place | None = None

    @property
    def out_dtype(self) -> jnp.dtype:
        """Dtype of the output: that of the query, or `statistics_dtype` for a part."""
        return self.statistics_dtype if self.is_partial else self.query.dtype

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """`(b, n, t, s)`."""
        b, t, n, _ = self.query.shape
        return b, n, t, self.key.shape[1]

    @property
    def statistics_dtype(self) -> jnp.dtype:
        """Dtype of scores, softmax statistics and accumulators: float32, or wider inputs' own."""
        return jnp.promote_types(self.query.dtype, jnp.float32)

    def refuse(self, name: str, *unserved: str) -> None:
        """Raise NotImplementedError if the call uses an option that an implementation lacks.

        Args:
          name: of the implementation.
          *unserved: among "bias", "bias objects", "softcap", "normalizer", "return_lse",
            "return_probabilities", "return_scores", "statistics", "edit", "dropout", "place".
        """
        used = {
            "bias": self.bias is not None,
            "bias objects": isinstance(self.bias, Bias),
            "softcap": self.softcap is not None,
            "normalizer": self.normalizer is not None,
            "return_lse": self.return_lse,
            "return_probabilities": bool(self.probability_heads),
            "return_scores": bool(self.score_heads),
            "statistics": bool(self.statistics),
            "edit": self.edit is not None,
            "dropout": self.dropout_rate > 0,
            "place": self.dropout_rate > 0 and self.place is not None,
        }
        for option in unserved:
            if used[option]:
                detail = ""
                if option == "normalizer":
                    detail = f" {type(self.normalizer).__name__}"
                raise NotImplementedError(f"{name}: {option}{detail} is not served")


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    bias: Array | Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: str | Normalizer = "softmax",
    implementation: str | Callable[[Call], AttentionOutput] | None = None,
    return_lse: bool = False,
    return_probabilities: bool | Sequence[int] = False,
    return_scores: bool | Sequence[int] = False,
    statistics: Sequence[str | TokenMass] = (),
    gate: Array | None = None,
    stop_gradient: Array | None = None,
    edit: Callable[[Array], Array] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    tuning: Tuning | None = None,
) -> Array | AttentionOutput:
    """Attend every query to the keys it may see and average their values.

    Query head `i` uses key/value head `i // (n // k)`. Scores, statistics and accumulators are
    float32 whatever the dtype of the inputs. A row that may attend nothing (mask all False, or
    bias all -inf) gives output zero, `EMPTY_LSE` and zero gradients; what a normalizer adds to
    every row (a sink logit, a bias key and value) is all there is to such a row.

    Args:
      query: `[b,t,n,h]` floating.
      key: `[b,s,k,h]`, dtype of the query; `k` divides `n`.
      value: `[b,s,k,hv]`, dtype of the query; `hv` may differ from `h`.
      mask: a `Mask`, or bool broadcastable to `[b,n,t,s]`; True means "may attend".
      bias: floating, broadcastable to `[b,n,t,s]`, added after scale and softcap; its gradient has
        its own shape. Or a `Bias`, which is computed where it is needed and never held whole.
      scale: factor of the raw scores; `h ** -0.5` if None.
      softcap: replaces scaled scores `x` by `softcap * tanh(x / softcap)`.
      normalizer: a name in `NORMALIZERS`, or a normalizer with its parameters.
      implementation: one of `IMPLEMENTATIONS`, or a function that serves the checked call as one
        of them would; None chooses the fastest that serves the call.
      return_lse: also return the log-sum-exp of every row (softmax and its relatives only), the
        extra logit of a relative included.
      return_probabilities: also return the weights (before dropout and gates); True, or the query
        heads to return.
      return_scores: also return the masked scores; True, or the query heads to return.
      statistics: statistics of the weights to return, computed without holding the weights: names
        in `STATISTICS` or `TokenMass`, of different names. They carry no gradient.
      gate: floating, broadcastable to `[b,t,n,hv]`, multiplies the output.
      stop_gradient: bool `[b,s]`; keys and values where it is True receive no gradient.
      edit: pure function of the probabilities `[b,n,t,s]` that returns what to use instead, before
        dropout (`reference` only).
      dropout_rate: probability of dropping a weight, in [0, 1). Which weights are dropped is a
        function of the key and the position alone, so all implementations that serve it agree.
      dropout_key: typed key, needed when the rate is not 0.
      tuning: measured tile sizes, see `attnjax.ops.tuning`; its `DEFAULT` if None.

    Returns:
      `out [b,t,n,hv]` in the dtype of the query, or an `AttentionOutput` if anything else is asked
      for.

    Raises:
      ValueError: an argument cannot mean anything; the message names the axis and both sizes.
      NotImplementedError: the named implementation refuses; the message is its reason.
      ExceptionGroup: nothing was named and every implementation refuses; one reason each.
    """
    if isinstance(implementation, str) and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is unknown; choose from {list(IMPLEMENTATIONS)}"
        )
    query, key, value = check_arrays(query, key, value)
    b, t, n, h = query.shape
    s = key.shape[1]
    if stop_gradient is not None:
        key, value = _stop(stop_gradient, key, value)
    scale = h**-0.5 if scale is None else check_number("scale", scale)
    softcap = check_softcap(softcap)
    normalizer = check_normalizer(normalizer)
    normalizer.check(n, h, value.shape[3])
    is_softmax = isinstance(normalizer, SoftmaxFamily)
    if return_lse and not is_softmax:
        raise ValueError(f"return_lse: {type(normalizer).__name__} has no log-sum-exp")
    extra = normalizer.extra_logit(query, scale, softcap) if is_softmax else None
    finish = None
    if is_softmax and type(normalizer) is not SoftmaxFamily:
        finish = functools.partial(normalizer.finish, query, scale=scale, softcap=softcap)
    dropout_rate, dropout_key = _check_dropout(dropout_rate, dropout_key)
    call = Call(
        query=query,
        key=key,
        value=value,
        visibility=check_mask(mask, b, n, t, s),
        bias=check_bias(bias, (b, n, t, s)),
        scale=scale,
        softcap=softcap,
        normalizer=None if is_softmax else normalizer,
        extra_logit=None if extra is None else jax.lax.stop_gradient(extra),
        return_lse=bool(return_lse) or finish is not None,
        probability_heads=_check_heads("return_probabilities", return_probabilities, n),
        score_heads=_check_heads("return_scores", return_scores, n),
        statistics=_check_statistics(statistics, normalizer, b, s),
        edit=_finished_edit(edit, finish),
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        tuning=DEFAULT if tuning is None else tuning,
    )
    output = implementation(call) if callable(implementation) else serve(call, implementation)
    out, lse, probabilities = output.out, output.lse, output.probabilities
    if finish is not None:
        finished = finish(lse=lse)
        if edit is not None:
            # The edit has seen the factor already.
            finished = dataclasses.replace(finished, factor=None)
        if finished.factor is not None and probabilities is not None:
            heads = np.array(call.probability_heads)
            probabilities = probabilities * finished.factor[:, heads, :, None]
        out = finished.output(out.astype(call.statistics_dtype)).astype(query.dtype)
        lse = finished.lse
    if gate is not None:
        out = out * _check_gate(gate, out)
    asked = return_lse or call.probability_heads or call.score_heads or call.statistics
    if not asked:
        return out
    lse = lse if return_lse else None
    return dataclasses.replace(output, out=out, lse=lse, probabilities=probabilities)


def _finished_edit(edit, finish):
    """Let an edit see the weights including the effect of what softmax's relatives add."""
    if edit is None:
        return None

    def edited(probabilities_bnts, lse_bnt):
        if finish is not None and (factor_bnt := finish(lse=lse_bnt).factor) is not None:
            probabilities_bnts = probabilities_bnts * factor_bnt[..., None]
        return edit(probabilities_bnts)

    return edited


def automatic_order(call: Call) -> tuple[str, ...]:
    """Return the implementations to try for a call, the one expected to be fastest first.

    Materialised scores win while they are small, or no larger than the keys (a few queries). The
    CPU limit is measured; accelerators have room for more before the memory matters. `cudnn` is
    only used by name, because it rounds differently from the others.
    """
    b, n, t, s = call.scores_shape
    platform = _platform()
    limit = 2**21 if platform == "cpu" else 2**26
    is_few = n * t <= call.key.shape[2] * call.key.shape[3]
    kernels = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform)
    if kernels and not is_few:
        return (kernels, "chunked", "reference")
    is_dense = b * n * t * s <= limit or is_few
    return ("reference", "chunked") if is_dense else ("chunked", "reference")


def _platform() -> str:
    """Return what is traced for: the default backend, or TPUs that an ambient mesh describes."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    is_tpu = device is not None and device.platform == "tpu"
    return "tpu" if is_tpu else jax.default_backend()


def serve(call: Call, implementation: str | None = None) -> AttentionOutput:
    """Let an implementation serve a call: the named one, or the first that does.

    Raises:
      NotImplementedError: the named implementation refuses; the message is its reason.
      ExceptionGroup: nothing was named and every implementation refuses; one reason each.
    """
    return _first_served(call, implementation, lambda module: module.attend(call))


def serve_gradients(
    call: Call,
    results: tuple[Array, Array],
    cotangents: tuple[Array, Array],
    implementation: str | None = None,
) -> tuple[Array, Array, Array, Any]:
    """Return what the keys of a part contribute to the gradients of a larger softmax attention.

    With weights p = exp(scores - lse) of the larger call, restricted to these keys,

        dscores = p * (dout . value - sum_h(dout out) + dlse)

    Args:
      call: the part, with `is_partial`, as it was served forward.
      results: `out [b,t,n,hv]` and `lse [b,n,t]` of the larger call, in `statistics_dtype`.
      cotangents: of both.
      implementation: one of `IMPLEMENTATIONS`; None chooses the first that can.

    Returns:
      Gradients of query, key, value in `statistics_dtype`, and of the bias (None without one).

    Raises:
      NotImplementedError, ExceptionGroup: as `serve`.
    """
    return _first_served(
        call, implementation, lambda module: module.gradients(call, results, cotangents)
    )


def _first_served(call: Call, implementation: str | None, use: Callable) -> Any:
    if implementation is not None:
        return use(_module(implementation, call))
    refusals = []
    for name in automatic_order(call):
        try:
            return use(_module(name, call))
        except NotImplementedError as refusal:
            refusals.append(refusal)
    raise ExceptionGroup("no implementation of attention serves this call", refusals)


def _module(name: str, call: Call) -> Any:
    if isinstance(call.normalizer, Rowwise) and name != "reference":
        call.refuse(name, "normalizer")
    target = IMPLEMENTATIONS[name]
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name != target:
            raise
        raise NotImplementedError(
            f"{name}: this version of attnjax does not contain this implementation"
        ) from None


def check_arrays(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Return `query [b,t,n,h]`, `key [b,s,k,h]` and `value [b,s,k,hv]` as arrays.

    Raises:
      ValueError: ranks, dtypes or sizes do not belong together.
    """
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
    b, _, n, h = query.shape
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
    return query, key, value


def check_mask(mask: Mask | Array | None, b: int, n: int, t: int, s: int) -> Visibility:
    """Return who may attend whom of a mask for scores `[b,n,t,s]`.

    Raises:
      ValueError: the mask is for another shape.
    """
    if mask is None:
        return Visibility()
    if not isinstance(mask, Mask):
        array = mask if isinstance(mask, np.ndarray) else jnp.asarray(mask)
        mask = masks.array(_broadcastable("mask", array, (b, n, t, s)))
    visibility = mask.visibility(t, s)
    shapes = [jnp.shape(x) for x in (visibility.lower, visibility.upper) if x is not None]
    shapes += [
        (ids.shape[0], 1) for ids in (visibility.query_ids, visibility.key_ids) if ids is not None
    ]
    if visibility.rest is not None:
        shapes.append(jax.eval_shape(lambda: visibility.rest.tile(0, 0, 1, 1)).shape)
    for examples, heads, *_ in shapes:
        if examples not in (1, b) or heads not in (1, n):
            raise ValueError(
                f"mask is for [b,n] = {(examples, heads)}, expected ({b} or 1, {n} or 1)"
            )
    return visibility


def check_bias(bias: Array | Bias | None, shape: tuple[int, int, int, int]) -> Any:
    """Return a bias for scores of shape `(b, n, t, s)`; an array has rank 4 afterwards.

    Raises:
      ValueError: it does not broadcast, or is not floating.
    """
    if bias is None:
        return None
    if isinstance(bias, Bias):
        bias.check(*shape)
        return bias
    bias = _broadcastable("bias", jnp.asarray(bias), shape)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias must be floating, got {bias.dtype}")
    return bias


def check_softcap(softcap: float | None) -> float | None:
    """Return the cap; raise ValueError if it is not a positive finite number."""
    if softcap is not None and not (softcap := check_number("softcap", softcap)) > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    return softcap


def check_normalizer(normalizer: str | Normalizer) -> Normalizer:
    """Return the normalizer, made if it was named.

    Raises:
      ValueError: the name is unknown or needs parameters, or it is no normalizer.
    """
    if isinstance(normalizer, str):
        if normalizer not in NORMALIZERS:
            raise ValueError(
                f"normalizer {normalizer!r} is unknown; choose from {list(NORMALIZERS)}"
            )
        try:
            return NORMALIZERS[normalizer]()
        except TypeError as error:
            raise ValueError(
                f"normalizer {normalizer!r} has parameters: pass an instance ({error})"
            ) from None
    if not isinstance(normalizer, Normalizer):
        raise ValueError(f"normalizer must be a name or a normalizer, got {normalizer!r}")
    return normalizer


def _check_heads(name, heads, n) -> tuple[int, ...]:
    if heads is True or heads is False:
        return tuple(range(n)) if heads else ()
    heads = tuple(int(head) for head in heads)
    for head in heads:
        if not 0 <= head < n:
            raise ValueError(f"{name}: there is no head {head} among {n}")
    return heads


def _check_statistics(statistics, normalizer, b, s):
    names = [name_of(item) for item in statistics]
    if len({*names}) < len(names):
        raise ValueError(f"statistics {names} would overwrite one another: name them differently")
    if isinstance(normalizer, Elementwise) and normalizer.is_signed:
        for name in ("entropy", "max_probability"):
            if name in names:
                raise ValueError(f"{type(normalizer).__name__} has signed weights: no {name}")
    for item in statistics:
        if isinstance(item, TokenMass):
            item.check(b, s)
        elif item not in STATISTICS:
            raise ValueError(
                f"statistic {item!r} is unknown; choose from {list(STATISTICS)} or a TokenMass"
            )
    return tuple(statistics)


def _check_dropout(dropout_rate, dropout_key):
    dropout_rate = check_number("dropout_rate", dropout_rate)
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate == 0.0:
        return dropout_rate, None
    if dropout_key is None:
        raise ValueError(f"dropout_rate {dropout_rate} needs a dropout_key")
    if not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key) or dropout_key.shape:
        raise ValueError("dropout_key must be one typed key (jax.random.key)")
    return dropout_rate, dropout_key


def _check_gate(gate, out):
    gate = jnp.asarray(gate)
    fits = gate.ndim <= 4 and all(
        size in (1, whole) for size, whole in zip(gate.shape[::-1], out.shape[::-1], strict=False)
    )
    if not fits or not jnp.issubdtype(gate.dtype, jnp.floating):
        raise ValueError(
            f"gate must be floating and broadcast to [b,t,n,h] = {out.shape}, got {gate.dtype} "
            f"{gate.shape}"
        )
    return gate.astype(out.dtype)


def _stop(stop_gradient, key, value):
    stop = jnp.asarray(stop_gradient)
    if (
        stop.dtype != bool
        or stop.ndim != 2
        or stop.shape[1] != key.shape[1]
        or stop.shape[0] not in (1, key.shape[0])
    ):
        raise ValueError(
            f"stop_gradient must be bool [b,s] = {key.shape[:2]}, got {stop.dtype} {stop.shape}"
        )
    stop = stop[:, :, None, None]
    return tuple(jnp.where(stop, jax.lax.stop_gradient(x), x) for x in (key, value))


def _broadcastable(name: str, array: Any, shape: tuple[int, int, int, int]) -> Any:
    if array.ndim > 4:
        raise ValueError(f"{name} must broadcast to [b,n,t,s] = {shape}, got shape {array.shape}")
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    axes = ("b (batch)", "n (heads)", "t (queries)", "s (keys)")
    for axis, size, expected in zip(axes, array.shape, shape, strict=True):
        if size not in (1, expected):
            raise ValueError(f"{name} axis {axis} has size {size}, expected 1 or {expected}")
    return array


def check_number(name: str, value: Any) -> float:
    """Return the value as a float; raise ValueError if it is not a finite Python number."""
    if isinstance(value, (numbers.Real, np.number)) and math.isfinite(value):
        return float(value)
    raise ValueError(f"{name} must be a finite Python number, got {value!r}")
