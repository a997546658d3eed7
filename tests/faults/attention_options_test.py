# SPDX-License-Identifier: Apache-2.0
"""Fault 23: an option of attention that an implementation lacks is refused, never ignored.

Every implementation times every option: NotImplementedError that names the option, or the answer of
the reference, in everything that is returned and in the gradients. There is no third outcome.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import IMPLEMENTATIONS, NORMALIZERS, STATISTICS, TokenMass, attention
from attnjax.ops.cases import BIASES, MASKS, Case

CASE = Case("case", t=9, s=9)
TOLERANCE = 2e-5
"""Largest difference over largest entry, float32."""


def case_options(**fields):
    return Case("case", t=9, s=9, **fields).options(2)


def squared(probabilities):
    return probabilities**2


RNG = np.random.default_rng(0)
CALLS = {
    "scale": (("scale",), dict(scale=0.9)),
    "softcap": (("softcap",), dict(softcap=0.8)),
    **{f"mask {m}": (("mask",), case_options(mask=m)) for m in MASKS},
    **{
        f"bias {x}": (("bias", "return_lse"), dict(return_lse=True, **case_options(bias=x)))
        for x in BIASES
    },
    **{
        f"normalizer {x}": (("normalizer",), case_options(normalizer=x))
        for x in NORMALIZERS
        if x != "softmax"
    },
    "return_lse": (("return_lse",), dict(return_lse=True)),
    "return_probabilities": (("return_probabilities",), dict(return_probabilities=True)),
    "probabilities of heads": (("return_probabilities",), dict(return_probabilities=[2, 0])),
    "return_scores": (("return_scores",), dict(return_scores=[1], **case_options(mask="dense"))),
    **{
        f"statistic {x}": (("statistics",), dict(statistics=(x,), **case_options(mask="dense")))
        for x in STATISTICS
    },
    "statistic of tokens": (
        ("statistics",), dict(statistics=(TokenMass(jnp.asarray(RNG.random((2, 9)))),)),
    ),
    "statistics with a sink": (
        ("statistics",),
        dict(statistics=("key_mass", "entropy"), **case_options(normalizer="sink_logit")),
    ),
    "gate": (("gate",), dict(gate=jnp.asarray(RNG.random((2, 9, 4, 1)), jnp.float32))),
    "stop_gradient": (
        ("stop_gradient",), dict(stop_gradient=jnp.asarray(RNG.random((2, 9)) < 0.5)),
    ),
    "edit": (("edit",), dict(edit=squared)),
    "dropout": (("dropout",), dict(dropout_rate=0.4, dropout_key=jax.random.key(1))),
    "everything of softmax": (
        ("mask", "bias", "softcap", "dropout", "return_lse"),
        dict(
            return_lse=True,
            **case_options(mask="heads", bias="heads", softcap=1.1, dropout_rate=0.2),
        ),
    ),
}  # fmt: skip

FAMILIES = ("mask ", "bias ", "normalizer ", "statistic ")


def quick_and_slow(names):
    """Return all names; of every second member of a large family the test is a slow one."""
    rank = dict.fromkeys(FAMILIES, 0)
    for name in names:
        family = next((x for x in FAMILIES if name.startswith(x)), None)
        if family is not None:
            rank[family] += 1
        is_slow = family is not None and rank[family] % 2 == 0
        yield pytest.param(name, marks=pytest.mark.slow) if is_slow else name


SHAPES = {
    "plain": {},
    "multi-query": dict(k=1),
    "no groups": dict(k=4),
    "other lengths": dict(t=5, s=11),
    "more queries than keys": dict(t=7, s=4),
    "one of each": dict(t=1, s=1, n=1, k=1),
    "wide values": dict(hv=12),
    "odd heads": dict(h=5, hv=3),
    "no examples": dict(b=0),
}


def answer(implementation, case, options):
    """Everything that is returned, and the gradients of everything that has one."""
    arrays = case.arrays()

    def run(arrays, options):
        result = attention(**arrays, **options, implementation=implementation)
        if isinstance(result, jax.Array):
            result = {"out": result}
        else:
            result = {name: getattr(result, name) for name in result.__dataclass_fields__}
        smooth = [x for name, x in result.items() if name in ("out", "lse", "probabilities")]
        weigh = lambda x: (jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x).sum()
        return sum(weigh(jnp.maximum(x, -10)) for x in smooth if x is not None), result

    inputs = dict(zip(("query", "key", "value"), arrays, strict=True))
    learnt = {k: v for k, v in options.items() if k in ("bias", "gate")}
    rest = {k: v for k, v in options.items() if k not in learnt}
    slope, result = jax.grad(
        lambda inputs, learnt: run(inputs, learnt | rest), (0, 1), has_aux=True
    )(inputs, learnt)
    return {"gradients": slope, **result}


@functools.cache
def reference(name, is_shape):
    if is_shape:
        return answer("reference", Case("case", **SHAPES[name]), {})
    return answer("reference", CASE, CALLS[name][1])


@functools.cache
def plain_refusal(implementation):
    """Why an implementation serves nothing on this machine, or None if it does."""
    try:
        attention(*CASE.arrays(), implementation=implementation)
    except NotImplementedError as refusal:
        return str(refusal)
    return None


def check(implementation, case, options, names, expected):
    try:
        found = answer(implementation, case, options)
    except NotImplementedError as refusal:
        message = str(refusal)
        assert message.startswith(f"{implementation}: ")
        if message != plain_refusal(implementation):
            assert any(name in message for name in names), message
        return
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        hidden = ~np.isfinite(b) | (b < -1e29)
        np.testing.assert_allclose(a[hidden], b[hidden], rtol=1e-6)
        limit = TOLERANCE * max(1.0, np.abs(b[~hidden]).max(initial=0))
        np.testing.assert_allclose(a[~hidden], b[~hidden], rtol=0, atol=limit)


@pytest.mark.parametrize("name", list(quick_and_slow(CALLS)))
@pytest.mark.parametrize("implementation", [x for x in IMPLEMENTATIONS if x != "reference"])
def test_options(implementation, name):
    names, options = CALLS[name]
    check(implementation, CASE, options, names, reference(name, False))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", [x for x in IMPLEMENTATIONS if x != "reference"])
def test_shapes(implementation, name):
    shape = Case("case", **SHAPES[name])
    check(
        implementation, shape, {}, ("batch", "head", "quer", "key", "width"), reference(name, True)
    )


def test_options_change_the_answer():
    """Otherwise an implementation that ignores one would pass."""
    plain = answer("reference", CASE, {"return_lse": True})
    for name in CALLS:
        found = reference(name, False)
        if name == "stop_gradient":
            ours, theirs = (x["gradients"][0]["key"] for x in (found, plain))
        elif name == "bias queries":  # Only the log-sum-exp can tell.
            ours, theirs = found["lse"], plain["lse"]
        elif {"mask", "bias", "edit", "gate", "softcap", "scale", "dropout"} & {name.split()[0]}:
            ours, theirs = found["out"], plain["out"]
        else:
            continue
        assert np.abs(ours - theirs).max() > 1e-3, name


def test_every_argument_is_among_them():
    given = {key for _, options in CALLS.values() for key in options}
    # A table of tiles changes nothing but time: `tests/ops/tuning_test.py`.
    names = set(attention.__kwdefaults__) - {"implementation", "tuning"}
    assert given == names
