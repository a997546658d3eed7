# SPDX-License-Identifier: Apache-2.0
"""Normalizers: derivatives of every parameter, identities between them, and what they refuse.

Their values are held to formulas in float64 by `core_test`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import EMPTY_LSE, NORMALIZERS, attention, mask, normalizers
from attnjax.ops.cases import Case, draw_normalizer

CASE = Case("case", hv=6)
B, T, S, N, K, H, HV = (getattr(CASE, name) for name in ("b", "t", "s", "n", "k", "h", "hv"))
TOLERANCE = 2e-6
"""Of float32 numbers of size one."""
STEP = 1e-5
"""Of central differences in float64, whose error is its square."""
DIFFERENCE = 1e-7
"""Largest relative error of a central difference: STEP squared and rounding over STEP."""

NAMES = list(NORMALIZERS)
RELATIVES = [name for name in NAMES if issubclass(NORMALIZERS[name], normalizers.SoftmaxFamily)]
VISIBLE = np.random.default_rng(5).random((B, N, T, S)) < 0.7
VISIBLE[0, 0, 0] = False


def make(name, seed=3):
    if name == "grouped":
        return normalizers.Grouped(np.arange(S)[None] % 4 == 3)
    return draw_normalizer(name, np.random.default_rng(seed), N, H, HV)


def run(normalizer, arrays=None, **options):
    query, key, value = CASE.arrays(4) if arrays is None else arrays
    options = {"mask": VISIBLE, "implementation": "reference", **options}
    return attention(query, key, value, normalizer=normalizer, **options)


def close(ours, theirs, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def is_array(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def loss_of(name):
    """A scalar function of everything that is differentiable, in float64, and a point."""
    rng = np.random.default_rng(6)
    normalizer = make(name)
    leaves, tree = jax.tree.flatten(normalizer)
    point = {
        "arrays": [np.asarray(x, np.float64) for x in CASE.arrays(4)],
        "bias": rng.standard_normal((N, T, S)),
        "leaves": [np.asarray(x, np.float64) for x in leaves if is_array(x)],
    }
    dout, dlse = rng.standard_normal((B, T, N, HV)), rng.standard_normal((B, N, T))
    has_lse = name in RELATIVES

    def loss(point):
        kept = iter(point["leaves"])
        rebuilt = jax.tree.unflatten(tree, [next(kept) if is_array(x) else x for x in leaves])
        result = run(rebuilt, point["arrays"], bias=point["bias"], softcap=2.5, return_lse=has_lse)
        if not has_lse:
            return (result * dout).sum()
        lse = jnp.where(result.lse > EMPTY_LSE / 2, result.lse, 0)
        return (result.out * dout).sum() + (lse * dlse).sum()

    return loss, jax.tree.map(jnp.asarray, point)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_differences(name):
    """First order, in each input and parameter, in float64."""
    with jax.enable_x64(True):
        loss, point = loss_of(name)
        both = jax.jit(jax.value_and_grad(loss))
        slope = both(point)[1]
        rng = np.random.default_rng(8)
        flat, tree = jax.tree.flatten(point)
        for i, leaf in enumerate(flat):
            along = rng.standard_normal(leaf.shape)
            side = lambda sign: both(
                tree.unflatten(
                    [x + sign * STEP * along if j == i else x for j, x in enumerate(flat)]
                )
            )[0]
            expected = (side(1) - side(-1)) / (2 * STEP)
            found = jnp.vdot(jax.tree.leaves(slope)[i], along)
            np.testing.assert_allclose(found, expected, rtol=DIFFERENCE, atol=DIFFERENCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_and_second_derivatives(name):
    """In all inputs and parameters at once, in float64."""
    with jax.enable_x64(True):
        loss, point = loss_of(name)
        both = jax.jit(jax.value_and_grad(loss))
        gradient = lambda point: both(point)[1]
        slope = gradient(point)
        rng = np.random.default_rng(8)
        along = jax.tree.map(lambda x: rng.standard_normal(x.shape), point)
        move = lambda sign: jax.tree.map(lambda x, v: x + sign * STEP * v, point, along)
        pulled = sum(map(jnp.vdot, jax.tree.leaves(slope), jax.tree.leaves(along)))
        pushed, second = jax.jit(lambda *a: jax.jvp(both, *a)[1])((point,), (along,))
        np.testing.assert_allclose(pushed, pulled, rtol=1e-10, atol=1e-10)
        ahead, behind = gradient(move(1)), gradient(move(-1))
        for a, b, c in zip(*map(jax.tree.leaves, (second, ahead, behind)), strict=True):
            size = max(1.0, float(np.abs(a).max()))
            np.testing.assert_allclose(a, (b - c) / (2 * STEP), rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_where_it_is_hard(name):
    """Rows and tiles without keys, -inf biases, scores of +-10,000, zeros, a single key."""
    normalizer = make(name)

    def total(leaves, arrays, bias, visible):
        tree = jax.tree.structure(normalizer)
        rebuilt = jax.tree.unflatten(tree, leaves)
        return (run(rebuilt, arrays, bias=bias, mask=visible, scale=1.0) ** 2).sum()

    leaves = jax.tree.leaves(normalizer)
    learnt = [i for i, x in enumerate(leaves) if is_array(x)]
    bias = np.zeros((B, N, T, S), np.float32)
    bias[:, :, 1] = -np.inf
    extreme = Case("extreme", hv=HV, is_extreme=True).arrays(1)
    zeros = tuple(0 * x for x in extreme)

    def gradients(arrays, bias, visible):
        def of(kept, arrays, bias):
            whole = list(leaves)
            for i, x in zip(learnt, kept, strict=True):
                whole[i] = x
            return total(whole, arrays, bias, visible)

        return jax.grad(of, argnums=(0, 1, 2))([leaves[i] for i in learnt], arrays, bias)

    for arrays in (extreme, zeros):
        for visible in (VISIBLE, np.zeros((1, 1), bool)):
            for x in jax.tree.leaves(gradients(arrays, jnp.asarray(bias), visible)):
                assert np.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_keys_hold_only_what_is_added_to_every_row(name):
    out = run(make(name), mask=np.zeros((1, 1), bool))
    added = {"kv_bias": 1, "v_bias": 1, "ca_bias": 1}.get(name, 0)
    expected = np.zeros((N, HV)) if not added else np.broadcast_to(make(name).value, (N, HV))
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))


def test_identities():
    softmax, one = run("softmax"), run("softmax_one")
    close(run(normalizers.SinkLogit(jnp.full(N, -1e9))), softmax)
    close(run(normalizers.SinkLogit(jnp.full(N, -jnp.inf))), softmax)
    close(run(normalizers.SinkLogit(jnp.zeros(1))), one)
    close(run(normalizers.KeyBias(jnp.zeros((1, H)))), one)
    close(run(normalizers.Clipped(gamma=0.0, zeta=1.0)), softmax)
    close(run(normalizers.ValueBias(jnp.zeros((1, HV)))), softmax)
    close(run(normalizers.ContextBias(jnp.ones((1, H)), jnp.zeros((1, HV)))), softmax)
    close(run(normalizers.Elastic(jnp.zeros(N))), softmax)
    close(run(normalizers.SoftpickSurvey(0.0)), softmax)
    close(run(normalizers.ElasticSurvey(1.0)), softmax)
    close(run(normalizers.Grouped(np.zeros((1, S), bool))), softmax)
    assert normalizers.Clipped.from_alpha(12, 480) == normalizers.Clipped(-0.025, 1.0)
    assert np.abs(one - softmax).max() > 0.01


@pytest.mark.parametrize("rows", [1, K, N])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bias_keys_are_keys_in_front(rows, softcap):
    """The definition: another key and value, always visible, for whoever shares them."""
    rng = np.random.default_rng(7)
    bias_key, bias_value = rng.standard_normal((rows, H)), rng.standard_normal((rows, HV))
    bias_key, bias_value = (x.astype(np.float32) for x in (bias_key, bias_value))
    query, key, value = CASE.arrays(4)
    # As many key/value heads as query heads, so that every head can have its own.
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    lead = lambda x, y: jnp.concatenate(
        [jnp.broadcast_to(jnp.repeat(y, N // rows, axis=0), (B, 1, N, y.shape[1])), x], axis=1
    )
    visible = np.concatenate([np.ones((B, N, T, 1), bool), VISIBLE], axis=-1)
    options = dict(mask=visible, softcap=softcap, return_lse=True, return_probabilities=True)
    longer = lambda v: attention(query, lead(key, bias_key), lead(value, v), **options)
    for made, v in (
        (normalizers.KeyValueBias(bias_key, bias_value), bias_value),
        (normalizers.KeyBias(bias_key), 0 * bias_value),
    ):
        ours, theirs = run(made, **options | {"mask": VISIBLE}), longer(v)
        close(ours.out, theirs.out)
        close(ours.lse, theirs.lse)
        close(ours.probabilities, theirs.probabilities[..., 1:])
    context = run(normalizers.ContextBias(bias_key, bias_value), softcap=softcap)
    second = attention(
        query, lead(key, bias_key), lead(0 * value, bias_value), mask=visible, softcap=softcap
    )
    close(context, run("softmax", softcap=softcap) + second)


def test_parameters_travel_through_jit_as_arguments():
    step = jax.jit(jax.grad(lambda made: run(made).sum()))
    for name in ("sink_logit", "elastic", "kv_bias"):
        gradient = step(make(name))
        assert isinstance(gradient, NORMALIZERS[name])
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", RELATIVES)
def test_what_is_shown_of_softmax_relatives_is_consistent(name):
    """Output, probabilities, log-sum-exp, statistics and edits all speak of the same weights."""
    made = make(name)
    _, _, value = CASE.arrays(4)
    heads = [3, 1]
    shown = run(
        made, return_probabilities=heads, return_scores=heads, return_lse=True,
        statistics=("entropy", "key_mass"),
    )  # fmt: skip
    p, scores = shown.probabilities, shown.scores
    lse = shown.lse[:, heads, :, None]
    seen = np.isfinite(scores)
    np.testing.assert_array_equal(seen, VISIBLE[:, heads])
    safe = jnp.where(seen, scores, 0)
    close(p, jnp.where(seen, jnp.exp(safe - jnp.where(lse > -1e29, lse, 0)), 0))
    close(shown.statistics["key_mass"][:, heads], p.sum(2))
    close(shown.statistics["entropy"][:, heads], jax.scipy.special.entr(p).sum(-1))
    mixed = jnp.einsum("bnts,bsnh->btnh", p, value[:, :, np.array(heads) // (N // K)])
    if not hasattr(made, "value"):
        close(shown.out[:, :, heads], mixed)
    received = []

    def edit(probabilities):
        received.append(probabilities)
        return probabilities * 2

    edited = run(made, edit=edit, return_probabilities=heads, statistics=("key_mass",))
    close(received[0][:, heads], p)
    close(edited.probabilities, 2 * p)
    close(edited.statistics["key_mass"][:, heads], 2 * p.sum(2))
    close(edited.out[:, :, heads], shown.out[:, :, heads] + mixed)


def test_kernel_features():
    query, key, value = CASE.arrays(4)
    mapped = normalizers.kernel_features(query, key, "elu1")
    out = attention(
        *mapped, value, normalizer=normalizers.Kernel("sum"), implementation="reference"
    )
    phi = lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1
    weights = np.einsum("btnh,bsnh->bnts", phi(query), np.repeat(phi(key), N // K, axis=2)) / 2
    weights /= weights.sum(-1, keepdims=True)
    close(out, np.einsum("bnts,bsnh->btnh", weights, np.repeat(value, N // K, axis=2)))
    same = normalizers.kernel_features(query, key, "identity")
    np.testing.assert_array_equal(same[1], key)
    wide = normalizers.kernel_features(query, key, lambda x: jax.nn.relu(x @ jnp.ones((H, 7))))
    assert wide[0].shape == (B, T, N, 7) and wide[1].shape == (B, S, K, 7)
    with pytest.raises(ValueError, match=r"'cosine' is unknown; choose from .*'elu1'"):
        normalizers.kernel_features(query, key, "cosine")
    with pytest.raises(ValueError, match="divisor 'max' is none of"):
        run(normalizers.Kernel("max"))


def test_integral_is_softmax_of_mean_scores():
    rng = np.random.default_rng(9)
    noisy = lambda x: jnp.stack(
        [x + rng.standard_normal(x.shape).astype(np.float32) for _ in range(3)]
    )
    query, key, value = CASE.arrays(4)
    queries, keys = noisy(query), noisy(key)
    joined = normalizers.integral(queries, keys)
    out = attention(*joined, value, scale=H**-0.5)
    mean = np.mean(
        [
            attention(q, k, value, return_scores=True, implementation="reference").scores
            for q, k in zip(queries, keys, strict=True)
        ],
        axis=0,
    )
    weights = jax.nn.softmax(mean)
    close(out, np.einsum("bnts,bsnh->btnh", weights, np.repeat(value, N // K, axis=2)))
    with pytest.raises(ValueError, match=r"need \[m,b,t,n,h\]"):
        normalizers.integral(queries[:2], keys)


def test_softpick_gives_nothing_to_scores_up_to_zero():
    query, key, value = CASE.arrays(4)
    shown = run("softpick", return_probabilities=True, return_scores=True)
    np.testing.assert_array_equal(shown.probabilities[shown.scores <= 0], 0)
    low = run("softpick", (query, key, value), bias=np.full((1, 1, 1, 1), -1e4, np.float32))
    np.testing.assert_array_equal(low, 0)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 30.0])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_softpick_derivative_counts_epsilon(implementation, size):
    """In float64, for scores so small that epsilon is much of the denominator, and for large."""
    rng = np.random.default_rng(9)
    scores, along = size * rng.standard_normal((2, 1, N, T, S))
    assert (abs(scores) > 1e-4 * size).all()  # A step crosses no kink.
    dout = rng.standard_normal((1, T, N, HV))
    with jax.enable_x64(True):
        value = jnp.asarray(rng.standard_normal((1, S, K, HV)))
        zeros = jnp.zeros((1, T, N, H)), jnp.zeros((1, S, K, H))

        def loss(scores):
            options = dict(bias=scores, mask=None, implementation=implementation)
            return (run("softpick", (*zeros, value), **options) * dout).sum()

        both = jax.jit(jax.value_and_grad(loss))
        out, slope = both(scores)
        step = STEP / max(1, size)
        difference = (both(scores + step * along)[0] - both(scores - step * along)[0]) / (2 * step)
        # The value and the derivative of relu(e^z - 1) / (sum |e^z - 1| + epsilon), written out.
        change = np.expm1(scores)
        total = abs(change).sum(-1, keepdims=True) + 1e-8
        weights = np.maximum(change, 0) / total
        dweights = np.einsum("btnh,bsnh->bnts", dout, np.repeat(value, N // K, axis=2))
        mean = (weights * dweights).sum(-1, keepdims=True)
        exact = np.exp(scores) * ((scores > 0) * dweights - np.sign(scores) * mean) / total
        np.testing.assert_allclose(out, (weights * dweights).sum(), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(slope, exact, rtol=1e-12, atol=1e-13 * abs(exact).max())
        rounding = 1e-15 / step
        np.testing.assert_allclose(
            jnp.vdot(slope, along),
            difference,
            rtol=0,
            atol=1e-9 * abs(exact * along).sum() + rounding,
        )


def test_sigmoid_length_bias_and_normalization():
    scores = np.asarray(run("softmax", return_scores=True).scores, np.float64)
    count = np.maximum(VISIBLE.sum(-1, keepdims=True), 1)
    for normalized in (False, True):
        for biased in (False, True):
            made = normalizers.Sigmoid(normalized, biased)
            found = run(made, return_probabilities=True).probabilities
            expected = 1 / (1 + np.exp(-scores) * (count if biased else 1))
            if normalized:
                expected = expected / (expected.sum(-1, keepdims=True) + 1e-8)
            close(found, expected)
    plain = run(normalizers.Elu1(False), return_probabilities=True).probabilities
    close(plain, np.where(VISIBLE, np.where(scores > 0, scores + 1, np.exp(scores)), 0))


def test_names():
    with pytest.raises(
        ValueError, match=r"'sparsemax' is unknown; choose from \['softmax', .*'grouped'"
    ):
        run("sparsemax")
    with pytest.raises(ValueError, match="'sink_logit' has parameters: pass an instance"):
        run("sink_logit")
    with pytest.raises(ValueError, match="must be a name or a normalizer, got 3"):
        run(3)
    listed = [line.split()[0] for line in normalizers.__doc__.splitlines() if line[:4] == " " * 4]
    assert set(NAMES) <= set(listed)
    assert all(cls.__doc__ for cls in NORMALIZERS.values())
    keyed = {name for name, cls in NORMALIZERS.items() if "key" in cls.__dataclass_fields__}
    assert keyed == {name for name, cls in NORMALIZERS.items() if cls.has_key} != set()


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (normalizers.SinkLogit(jnp.zeros(3)), r"logits must be .* divides 4, got \(3,\)"),
        (normalizers.KeyBias(jnp.zeros((N, H + 1))), r"key must be \('heads', 4\)"),
        (normalizers.KeyValueBias(jnp.zeros((N, H)), jnp.zeros((1, H))), r"value must be .*6"),
        (normalizers.ContextBias(jnp.zeros(H), jnp.zeros((N, HV))), r"key must be"),
        (normalizers.ValueBias(jnp.zeros((0, HV))), r"value must be"),
        (normalizers.Clipped(0.1), "need gamma <= 0"),
        (normalizers.Clipped(-0.1, 0.9), "zeta >= 1"),
        (normalizers.Elastic(jnp.zeros(2)), r"tau must be one number or \[n\] = \(4,\)"),
        (normalizers.SoftpickSurvey(jnp.zeros((4, 1))), "threshold must be one number"),
        (normalizers.ElasticSurvey(0.0), "temperature must be positive"),
        (normalizers.Grouped(np.zeros(S, bool)), r"is_landmark must be bool \[b,s\]"),
        (normalizers.Grouped(np.zeros((3, S), bool)), "does not fit 6 queries of 9 keys"),
        (normalizers.Grouped(np.zeros((1, S), bool), 0.5), "needs a key"),
        (normalizers.Grouped(np.zeros((1, S), bool), 1.5), r"must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit(normalizer, message):
    with pytest.raises(ValueError, match=message):
        run(normalizer)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="Softpick has no log-sum-exp"):
        run("softpick", return_lse=True)
    with pytest.raises(ValueError, match="Kernel has signed weights: no entropy"):
        run("kernel", statistics=("entropy",))
    with pytest.raises(NotImplementedError, match="chunked: normalizer Grouped is not served"):
        run(make("grouped"), implementation="chunked")
    out = attention(*CASE.arrays(), normalizer=make("grouped"), mask=mask.causal())
    assert out.shape == (B, T, N, HV)  # Without a name somebody serves it.
