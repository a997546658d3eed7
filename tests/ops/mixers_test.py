# SPDX-License-Identifier: Apache-2.0
"""Every mixer is the matrix it says it is, and what its flags say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, mixers
from attnjax.ops.linear import feature_attention, gaussian_projection
from attnjax.ops.mixers import convolution, kernels, low_rank, state_space
from attnjax.ops.mixers.random_features import favor_features
from attnjax.ops.mixers.template import matrix_times

B, T, D, N = 2, 24, 16, 4
# Compiling takes longer than running.
QUICK = {"xla_backend_optimization_level": 0}

SAME = 1e-4  # the sheet's tolerance, float32
EXACT = 2e-5  # float32 sums in another order

CASES = {
    "softmax": {}, "softmax causal": {"causal": True, "rotary": True},
    **{f"kernel {k}": {"kernel": k} for k in kernels.KERNELS},
    "kernel rbf causal": {"kernel": "rbf", "causal": True},
    "kernel linear causal": {"kernel": "linear", "causal": True},
    "gaussian_process": {},
    "linformer": {"rank": 6},
    "nystrom": {"landmarks": 5},
    "window": {"window": 3}, "window causal": {"window": 4, "causal": True},
    "dilated causal": {"window": 3, "dilation": 3, "causal": True},
    "global": {"window": 2, "tokens": 3},
    "global causal": {"window": 2, "tokens": 3, "causal": True},
    "random": {"window": 2, "keys": 3}, "random causal": {"window": 2, "keys": 3, "causal": True},
    "block": {"block": 5}, "block causal": {"block": 5, "causal": True},
    "favor": {"features": 32}, "favor causal": {"features": 3, "causal": True},
    "lsh": {"chunk": 5}, "lsh rotary": {"chunk": 8, "buckets": 2, "rotary": True},
    "fnet": {}, "gfnet": {}, "afno": {}, "mlp": {"hidden": 7},
    "convolution": {}, "convolution causal": {"causal": True},
    "convolution short": {"kernel": 5}, "convolution short causal": {"kernel": 4, "causal": True},
    "convolution circular": {"circular": True},
    "convolution longer": {"kernel": 40},
    "s4d": {}, "s4d causal": {"causal": True}, "s4d inverse": {"frequencies": "inverse"},
    "lru": {}, "gated_recurrence": {},
    "transformer_xl": {"segment": 5}, "transformer_xl rotary": {"segment": 8, "rotary": True},
}  # fmt: skip

WITHOUT_MATRIX = {"afno", "mlp"}
DISTRIBUTIONS = {"softmax", "kernel", "window", "dilated", "global", "random", "block", "favor",
                 "lsh", "transformer_xl"}  # fmt: skip
TOEPLITZ = {"convolution", "s4d", "lru", "gfnet"}


jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def made(case):
    mixer = mixers.make(case.split()[0], **CASES[case])
    key, x_key = jax.random.split(jax.random.key(1))
    params = jit(lambda key: mixer.init(key, T, D, N))(key)
    return mixer, params, jax.random.normal(x_key, (B, T, D))


def valid():
    return jnp.arange(T)[None, :] < jnp.array([[T], [T - 7]])


@functools.cache
def computed(case):
    """Everything the tests below ask of a case, from one compilation."""
    mixer, params, x = made(case)
    target = jax.random.normal(jax.random.key(2), x.shape)
    late = jnp.zeros((T, 1)).at[T // 2 :].set(1.0)

    @jit
    def matrix(x, valid):
        found, values = mixer.dense_matrix(params, x, valid), mixer.values(params, x, valid)
        return found, None if found is None else mixer.finish(params, matrix_times(found, values))

    @jit
    def gradients(params):
        loss = lambda p: (jnp.sum((out := mixer.apply(p, x)) * target), out)
        return jax.grad(loss, has_aux=True)(params)

    apply = jit(functools.partial(mixer.apply, params))
    everything, some = jnp.ones((B, T), bool), valid()
    slopes, plain = gradients(params)
    results = {
        "plain": plain,
        "gradients": slopes,
        "both": [(apply(x, seen), *matrix(x, seen)) for seen in (everything, some)],
        "late": apply(x + late, everything),
        "noise": apply(jnp.where(some[..., None], x, 3.0 - x), some),
        "other matrix": matrix(1 - 2 * x, everything)[0],
    }
    return jax.device_get(results)


@pytest.mark.parametrize("case", CASES)
def test_apply_is_the_matrix_times_the_values(case):
    np.testing.assert_allclose(
        computed(case)["plain"], computed(case)["both"][0][0], rtol=0, atol=SAME
    )
    for out, matrix, other in computed(case)["both"]:
        assert out.shape == (B, T, D) and out.dtype == jnp.float32
        assert np.isfinite(out).all()
        assert (matrix is None) == (case.split()[0] in WITHOUT_MATRIX)
        if matrix is not None:
            assert matrix.shape[0] in (1, B) and matrix.shape[1] in (1, N)
            assert matrix.shape[2:] == (T, T)
            np.testing.assert_allclose(out, other, rtol=0, atol=SAME * max(1, abs(out).max()))


@pytest.mark.parametrize("case", [c for c in CASES if c.split()[0] in DISTRIBUTIONS])
def test_rows_are_distributions(case):
    for (_, matrix, _), seen in zip(
        computed(case)["both"], (np.ones((B, T), bool), np.asarray(valid())), strict=True
    ):
        assert matrix.min() >= 0
        kept = np.broadcast_to(seen[:, None, :], matrix.shape[:3])
        # A position of padding may see nothing that counts.
        np.testing.assert_allclose(np.where(kept, matrix.sum(axis=-1), 1), 1, atol=SAME)


@pytest.mark.parametrize("case", CASES)
def test_causal_means_lower_triangular_and_deaf_to_the_future(case):
    mixer, _, _ = made(case)
    out, matrix, _ = computed(case)["both"][0]
    change = abs(computed(case)["late"] - out)[:, : T // 2].max()
    assert (change < EXACT) == mixer.is_causal
    if mixer.is_causal:
        assert abs(np.triu(matrix, 1)).max() == 0
    elif matrix is not None:
        assert abs(np.triu(matrix, 1)).max() > 0


@pytest.mark.parametrize("case", CASES)
def test_padding_has_no_influence(case):
    out, noisy = computed(case)["both"][1][0], computed(case)["noise"]
    kept = np.asarray(valid())
    np.testing.assert_allclose(noisy[kept], out[kept], rtol=0, atol=EXACT * max(1, abs(out).max()))


@pytest.mark.parametrize("case", CASES)
def test_data_dependence_is_as_declared(case):
    matrix, other = computed(case)["both"][0][1], computed(case)["other matrix"]
    is_dependent = made(case)[0].is_data_dependent
    assert is_dependent if matrix is None else (abs(matrix - other).max() > EXACT) == is_dependent


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_all_parameters_but_the_drawn_ones(case):
    for path, leaf in jax.tree.leaves_with_path(computed(case)["gradients"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        assert (abs(leaf).max() > 0) == (name != "random_projection"), name


@pytest.mark.parametrize("case", CASES)
def test_path_length_is_an_upper_bound(case):
    mixer, _, _ = made(case)
    hops, matrix = mixer.path_length(T), computed(case)["both"][0][1]
    if matrix is None or hops is None or "gaussian_process" in case:
        return
    sees = (abs(np.asarray(matrix)) > 0).all(axis=(0, 1)) | np.eye(T, dtype=bool)
    reached = np.linalg.matrix_power(sees.astype(float), hops) > 0
    assert reached[T - 1, 0], hops
    if not mixer.is_causal:
        assert reached.all()


@pytest.mark.parametrize("case", CASES)
def test_costs_are_positive_and_grow(case):
    mixer, _, _ = made(case)
    for cost in (mixer.flops, mixer.activation_bytes):
        assert 0 < cost(64, 32, 4) < cost(128, 32, 4)


def test_families_that_claim_it_are_linear_in_length():
    for name, options in {
        "window": {"window": 8}, "favor": {}, "nystrom": {}, "linformer": {}, "lru": {},
        "transformer_xl": {}, "kernel": {"kernel": "linear"}, "block": {}, "lsh": {"buckets": 8},
        "convolution": {"kernel": 7}, "gated_recurrence": {},
    }.items():  # fmt: skip
        mixer = mixers.make(name, **options)
        for cost in (mixer.flops, mixer.activation_bytes):
            assert cost(2**17, 64, 4) == pytest.approx(2 * cost(2**16, 64, 4), rel=0.01), name
    full = mixers.make("softmax")
    assert full.mixing_flops(2**17, 64, 4) == 4 * full.mixing_flops(2**16, 64, 4)


def test_fnet_is_the_real_part_of_a_two_dimensional_transform():
    mixer, params, x = made("fnet")
    expected = np.fft.fft2(np.asarray(x, np.float64)).real
    np.testing.assert_allclose(
        jit(mixer.apply)(params, x), expected, atol=SAME * abs(expected).max()
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.split()[0] in TOEPLITZ])
def test_diagonals_are_constant(case):
    matrix = np.asarray(computed(case)["both"][0][1])
    for offset in range(1 - T, T):
        diagonal = matrix.diagonal(offset, axis1=2, axis2=3)
        assert np.ptp(diagonal, axis=-1).max() <= EXACT, offset


@pytest.mark.parametrize("is_causal", [False, True])
def test_full_window_is_softmax_attention(is_causal):
    full, params, x = made("softmax causal" if is_causal else "softmax")
    window = mixers.make("window", window=T, causal=is_causal, rotary=full.rotary)
    np.testing.assert_allclose(
        jit(window.apply)(params, x), jit(full.apply)(params, x), rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "cosine"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_factorised_kernel_equals_the_quadratic_form(kernel, is_causal):
    options = {"kernel": kernel, "causal": is_causal}
    factorised = mixers.make("kernel", **options, form="factorised")
    quadratic = mixers.make("kernel", **options, form="quadratic")
    params = factorised.init(jax.random.key(0), T, D, N)
    x = jax.random.normal(jax.random.key(1), (B, 150, D))  # longer than one chunk
    np.testing.assert_allclose(factorised.apply(params, x), quadratic.apply(params, x), atol=EXACT)


@pytest.mark.parametrize("noise", [0.1, 1e-2])
def test_gaussian_process_mean_equals_scikit_learn(noise):
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    rng = np.random.default_rng(0)
    points, queries = rng.standard_normal((40, 3)), rng.standard_normal((9, 3))
    values = rng.standard_normal((40, 2))
    process = GaussianProcessRegressor(RBF(0.7), alpha=noise, optimizer=None).fit(points, values)
    arrays = [jnp.asarray(x, jnp.float32)[None, :, None, :] for x in (queries, points, values)]
    mean = functools.partial(kernels.gaussian_process_mean, "rbf", noise=noise, length_scale=0.7)
    ours = jit(mean)(*arrays)
    np.testing.assert_allclose(ours[0, :, 0], process.predict(queries), atol=1e-4)


def test_random_features_approach_softmax_attention():
    query, key, value = jax.random.normal(jax.random.key(1), (3, B, T, N, D))
    query, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    expected = attention(query, key, value)
    errors = []
    for m in (16, 4096):
        projection = gaussian_projection(jax.random.key(2), m, D)
        out = jit(lambda p, value: feature_attention(*favor_features(query, key, p), value))(
            projection, value
        )
        errors.append(float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)))
    assert errors[1] < 0.05 and errors[1] < errors[0]


def test_causal_features_know_nothing_of_later_keys():
    x = jax.random.normal(jax.random.key(0), (1, T, 1, 8))
    projection = jax.random.normal(jax.random.key(1), (5, 8))
    whole = favor_features(x, x, projection, is_causal=True)[1]
    part = favor_features(x[:, :9], x[:, :9], projection, is_causal=True)[1]
    np.testing.assert_array_equal(whole[:, :9], part)


def test_pseudo_inverse_inverts():
    rows = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (3, 2, 6, 6)), axis=-1)
    inverse = jit(lambda rows: low_rank.pseudo_inverse(rows, 20))(rows)
    np.testing.assert_allclose(rows @ inverse, np.broadcast_to(np.eye(6), rows.shape), atol=2e-3)
    shared = low_rank.pseudo_inverse(rows, 1, is_scale_shared=True)
    assert abs(shared - low_rank.pseudo_inverse(rows, 1)).max() > EXACT


def test_segment_means_are_as_even_as_can_be():
    x = jnp.arange(8.0).reshape(1, 8, 1, 1)
    np.testing.assert_allclose(low_rank.segment_means(x, 3)[0, :, 0, 0], [0.5, 3.0, 6.0])


def test_state_space_step_equals_the_convolution():
    params = state_space.s4d_init(jax.random.key(0), N, 5)
    x = jax.random.normal(jax.random.key(1), (B, T, N, 3))
    kernel = state_space.s4d_kernel(params, T).at[:, 0].add(params["skip"])
    step = lambda state, u: state_space.s4d_step(params, state, u)
    start = jnp.zeros((B, N, 3, 5), jnp.complex64)
    _, out = jit(lambda x: jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0)))(x)
    expected = jit(convolution.convolve)(x, kernel)
    np.testing.assert_allclose(jnp.moveaxis(out, 0, 1), expected, atol=SAME)


@pytest.mark.parametrize("case", ["transformer_xl", "transformer_xl rotary"])
def test_stream_of_segments_equals_the_whole(case):
    mixer, params, x = made(case)

    @jit
    def stream(x):
        cache, parts = None, []
        for start in range(0, T, mixer.segment):
            out, cache = mixer.step(params, x[:, start : start + mixer.segment], cache)
            parts.append(out)
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(stream(x), computed(case)["both"][0][0], rtol=0, atol=EXACT)


def test_cached_segment_receives_no_gradient():
    for is_fixed in (True, False):
        mixer = mixers.make("transformer_xl", segment=8, is_cache_fixed=is_fixed)
        params = mixer.init(jax.random.key(0), T, D, N)
        x = jax.random.normal(jax.random.key(1), (1, T, D))
        reach = jit(jax.grad(lambda x: mixer.apply(params, x)[0, T - 1].sum()))(x)
        assert (abs(reach[0, 8:16]).max() == 0) == is_fixed
        assert abs(reach[0, 16:]).min() > 0


def test_positions_enter_by_name():
    x = jnp.zeros((1, 6, 8))
    table = jnp.arange(48.0).reshape(6, 8)
    assert (mixers.inductive_bias("identity", x) == x).all()
    assert (mixers.inductive_bias("learnt", x, table)[0] == table).all()
    assert abs(mixers.inductive_bias("sinusoid", x)).max() == 1
    with pytest.raises(ValueError, match="choose from identity, sinusoid, learnt, rotary"):
        mixers.inductive_bias("learned", x)
    with pytest.raises(ValueError, match=r"at least \[6,8\]"):
        mixers.inductive_bias("learnt", x, table[:5])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmx", {}, "unknown mixer 'softmx': did you mean 'softmax'.*transformer_xl"),
        ("window", {"windw": 3}, "no option 'windw': did you mean 'window'"),
        ("window", {"window": 0}, "window=0"),
        ("kernel", {"kernel": "expo"}, "kernel 'expo' is unknown; choose from exp"),
        ("kernel", {"form": "both"}, "form 'both' is unknown"),
        ("gaussian_process", {"noise": 0.0}, "noise=0.0"),
        ("lsh", {"buckets": 3}, "buckets=3"),
        ("convolution", {"causal": True, "circular": True}, "cannot be causal"),
        ("s4d", {"frequencies": "linea"}, "choose from linear, inverse"),
        ("lru", {"slowest": 1.0}, "slowest=1.0"),
        ("fnet", {"causal": True}, "no option 'causal'"),
    ],
)
def test_wrong_mixers_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.make(name, **options)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="heads=5 must divide dim=16"):
        mixers.make("softmax").init(jax.random.key(0), T, D, 5)
    with pytest.raises(ValueError, match="at most 2048 tokens, got 4096"):
        mixers.make("gaussian_process").init(jax.random.key(0), 4096, D, N)
    for name in ("linformer", "mlp", "gfnet"):
        mixer = mixers.make(name)
        params = mixer.init(jax.random.key(0), T, D, N)
        with pytest.raises(ValueError, match="sequences of 24 tokens, got 12"):
            mixer.apply(params, jnp.zeros((1, 12, D)))


def test_every_family_is_covered():
    assert {case.split()[0] for case in CASES} == set(mixers.MIXERS)
    for family in mixers.MIXERS.values():
        assert dataclasses.is_dataclass(family) and family.__doc__
