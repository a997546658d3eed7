# SPDX-License-Identifier: Apache-2.0
"""DiT against its equations in float64, patch by patch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from attnjax.errors import RecipeError
from attnjax.models import dit
from attnjax.models.load import abstract_params, build, known_tensors
from attnjax.weights import export_params, flatten, import_params, unflatten

# The width of the heads is not that of the model, patches are not square numbers of channels.
TINY = {
    "num_classes": 3, "image_size": 6, "channels": 3, "patch_size": 2, "width": 12, "depth": 2,
    "num_heads": 2, "head_dim": 4, "mlp_ratio": 2.0,
}  # fmt: skip
# All kinds of routers: chosen with one and with two shared heads, chosen only, all shared.
MIXED = {"depth": 4, "mixture": ((1, 4, 1, 2), (1, 5, 2, 1), (1, 4, 0, 3), (1, 3, 3, 0))}
CLOSE = 2e-5  # float32 through two blocks, relative to the largest
DEEP = 1e-4  # through four blocks, with gates up to 5
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def make(**fields):
    model = build("dit", **TINY | fields)
    rng = np.random.default_rng(0)
    leaves = flatten(abstract_params(model))
    params = {k: 0.3 * rng.standard_normal(x.shape).astype(np.float32) for k, x in leaves.items()}
    return model, unflatten(params), lambda p, b: whole(**fields)(p, b).prediction


@functools.cache
def whole(**fields):
    model = build("dit", **TINY | fields)
    return jax.jit(lambda p, b: model.apply({"params": p}, **b), compiler_options=QUICK)


def draw(b=3, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "noisy": rng.standard_normal((b, 6, 6, 3)).astype(np.float32),
        "time": rng.integers(1_000, size=b).astype(np.float32),
        "label": rng.integers(3, size=b).astype(np.int32),
    }


def close(ours, expected, tolerance=CLOSE):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def dense(params, x):
    kernel = params["kernel"]
    return x @ kernel.reshape(x.shape[-1], -1) + params["bias"].reshape(-1)


def normal(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)


def gates(y, router, heads, shared, top_k):
    """MoH's gates of one layer, token by token, with the factors of the released code."""
    rows = []
    for token in y:
        soft = lambda name: (lambda z: np.exp(z) / np.exp(z).sum())(token @ router[name]["kernel"])
        parts = [np.ones(shared)] if shared < 2 else [shared * soft("shared")]
        if shared < heads:
            probability = soft("routed")
            kept = np.zeros_like(probability)
            best = np.argsort(-probability, kind="stable")[:top_k]
            kept[best] = top_k * probability[best] / probability[best].sum()
            weights = 2 * soft("types") if shared else (1, 1)
            parts = [weights[0] * parts[0], weights[1] * kept]
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def oracle(params, noisy, time, label):
    """One example, in float64 loops over patches and heads."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    swish = lambda x: x / (1 + np.exp(-x))
    gelu = lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    angle = time * np.exp(-math.log(10_000) * np.arange(128) / 128)
    waves = np.concatenate([np.cos(angle), np.sin(angle)])
    condition = dense(p["time"]["down"], swish(dense(p["time"]["up"], waves)))
    condition = swish(condition + p["label_embedding"][label])
    tokens = []
    for row in range(3):
        for column in range(3):
            patch = noisy[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            place = []
            for number in (column, row):
                angle = number / 10_000 ** (np.arange(3) / 3)
                place += [np.sin(angle), np.cos(angle)]
            token = np.einsum("yxc,yxcd->d", patch, p["stem"]["kernel"]) + p["stem"]["bias"]
            tokens.append(token + np.concatenate(place))
    x = np.stack(tokens)
    for i in range(sum(name.startswith("block_") for name in p)):
        block = p[f"block_{i}"]
        shift, scale, gate, shift2, scale2, gate2 = np.split(
            dense(block["modulation"], condition), 6
        )
        y, out = normal(x) * (1 + scale) + shift, block["attention"]["out"]["bias"]
        heads = block["attention"]["out"]["kernel"].shape[0]
        gate_tn = np.ones((9, heads))
        if "router" in block:
            gate_tn = gates(y, block["router"], heads, *MIXED["mixture"][i][2:])
        for n in range(heads):
            q, k, v = (
                y @ block["attention"][name]["kernel"][:, n] + block["attention"][name]["bias"][n]
                for name in ("query", "key", "value")
            )
            weights = np.exp(q @ k.T / 2)
            head = weights / weights.sum(-1, keepdims=True) @ v
            out = out + gate_tn[:, n, None] * head @ block["attention"]["out"]["kernel"][n]
        x = x + gate * out
        y = normal(x) * (1 + scale2) + shift2
        x = x + gate2 * dense(block["mlp"]["down"], gelu(dense(block["mlp"]["up"], y)))
    shift, scale = np.split(dense(p["final"]["modulation"], condition), 2)
    numbers = dense(p["final"]["linear"], normal(x) * (1 + scale) + shift)
    picture = np.empty((6, 6, numbers.shape[-1] // 4))
    for i, patch in enumerate(numbers):
        row, column = 2 * (i // 3), 2 * (i % 3)
        picture[row : row + 2, column : column + 2] = patch.reshape(2, 2, -1)
    return picture


@pytest.mark.parametrize("has_variance", [True, False])
def test_network_against_its_equations(has_variance):
    _, params, run = make(has_variance=has_variance)
    batch = draw()
    batch["label"][2] = 3  # No class.
    expected = [oracle(params, *row) for row in zip(*batch.values(), strict=True)]
    ours = run(params, batch)
    assert ours.dtype == jnp.float32 and ours.shape[-1] == (6 if has_variance else 3)
    close(ours, np.stack(expected))


def test_heads_as_experts_against_their_equations():
    _, params, run = make(**MIXED)
    batch = draw()
    expected = [oracle(params, *row) for row in zip(*batch.values(), strict=True)]
    close(run(params, batch), np.stack(expected), DEEP)
    names = [set(params[f"block_{i}"].get("router", {})) for i in range(4)]
    assert names == [{"routed", "types"}, {"routed", "types", "shared"}, {"routed"}, {"shared"}]
    aux = whole(**MIXED)(params, batch).aux
    # The mean over the three layers that choose is near that of balanced choices, (2 + 1 + 3) / 3.
    assert aux["dropped"] == 0 and 1.9 < aux["balance_loss"] < 3
    assert set(whole()(make()[1], batch).aux) == {"features"}


def test_sparse_heads_equal_dense_ones():
    """Heads that work for the tokens that chose them only, with and without enough places."""
    _, params, run = make(**MIXED)
    batch = draw()
    output = whole(**MIXED, compute="sparse")(params, batch)
    aux, ours, expected = output.aux, np.asarray(output.prediction), run(params, batch)
    # Places are a quarter more than the even share; who finds none gets zero.
    assert 0 <= aux["dropped"] < 0.5 and np.isfinite(ours).all()
    is_far = np.abs(ours - expected).max() > DEEP * np.abs(expected).max()
    assert is_far == (aux["dropped"] > 0)
    every = {"depth": 2, "mixture": ((1, 4, 1, 3), (1, 3, 0, 3))}
    _, params, run = make(**every)
    close(make(**every, compute="sparse")[2](params, batch), run(params, batch))


def test_weight_names_of_experts_go_there_and_back():
    _, params, _ = make(**MIXED)
    tensors = export_params(params, dit.TORCH_NAMES["dit"])
    routers = {name: x.shape for name, x in tensors.items() if ".wg" in name}
    assert routers == {
        "blocks.0.attn.wg.weight": (3, 12), "blocks.0.attn.wg_0.weight": (2, 12),
        "blocks.1.attn.wg.weight": (3, 12), "blocks.1.attn.wg_0.weight": (2, 12),
        "blocks.1.attn.wg_1.weight": (2, 12), "blocks.2.attn.wg.weight": (4, 12),
        "blocks.3.attn.wg_1.weight": (3, 12),
    }  # fmt: skip
    assert tensors["blocks.1.attn.qkv.weight"].shape == (60, 12)
    leaves = flatten(params)
    again = flatten(import_params(tensors, {k: x.shape for k, x in leaves.items()},
                                  dit.TORCH_NAMES))  # fmt: skip
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf)


def test_new_model_says_nothing():
    """Also with heads as experts; kernels are drawn as the released code draws them."""
    for fields in ({}, {"mixture": ((1, 2, 1, 1), (1, 3, 3, 0))}):
        model = build("dit", **TINY | fields)
        init = jax.jit(model.init_with_output, compiler_options=QUICK)
        output, variables = init(jax.random.key(0), **draw())
        assert not np.asarray(output.prediction).any()
    params = variables["params"]
    for i, n in enumerate((2, 3)):
        attention = params[f"block_{i}"]["attention"]
        assert attention["query"]["kernel"].shape == (12, n, 4)
        limits = {"query": 12 + 3 * n * 4, "value": 12 + 3 * n * 4, "out": n * 4 + 12}
        for name, fans in limits.items():
            largest = np.abs(attention[name]["kernel"]).max()
            assert 0.8 * math.sqrt(6 / fans) < largest <= math.sqrt(6 / fans)
    assert np.abs(params["stem"]["kernel"]).max() <= math.sqrt(6 / 24)
    assert 0.01 < np.std(params["time"]["up"]["kernel"]) < 0.03


def test_labels_are_dropped_while_training():
    model, params, run = make(drop_label=0.5)
    batch = draw(16)
    kept, dropped = run(params, batch), run(params, batch | {"label": np.full(16, 3, np.int32)})
    answer = jax.jit(
        lambda key: (
            model.apply({"params": params}, **batch, train=True, rngs={"dropout": key}).prediction
        )
    )
    trained = np.asarray(answer(jax.random.key(0)))
    is_kept, is_dropped = (
        np.abs(trained - x).max((1, 2, 3)) < CLOSE * np.abs(x).max() for x in (kept, dropped)
    )
    assert (is_kept ^ is_dropped).all() and 2 < is_kept.sum() < 14
    assert model.no_class == 3 and params["label_embedding"].shape == (4, 12)
    without = build("dit", **TINY | {"drop_label": 0.0})
    assert flatten(abstract_params(without))["label_embedding"].shape == (3, 12)
    with pytest.raises(ValueError, match="no label"):
        _ = without.no_class


def test_unknown_labels_are_loud():
    _, params, run = make()
    batch = draw()
    out = np.asarray(run(params, batch | {"label": np.array([0, 4, 2], np.int32)}))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()


def test_recomputation_changes_nothing():
    _, params, _ = make()
    batch = draw()

    def gradients(remat):
        model = build("dit", **TINY, remat=remat)
        square = lambda p: jnp.mean(jnp.square(model.apply({"params": p}, **batch).prediction))
        return flatten(jax.jit(jax.grad(square), compiler_options=QUICK)(params))

    plain, again = gradients("none"), gradients("full")
    largest = max(np.abs(x).max() for x in plain.values())
    for path, leaf in plain.items():
        np.testing.assert_allclose(again[path], leaf, atol=CLOSE * largest, err_msg=path)


def products(jaxpr):
    """Multiplications of all matrix products of a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        for nested in jaxprs_in_params(equation.params):
            total += products(nested)
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += size * math.prod(shape[i] for i in contracted)
    return total


@pytest.mark.parametrize("fields", [{}, MIXED])
def test_flops_are_those_of_the_products(fields):
    model = build("dit", **TINY | fields, attention_implementation="reference")
    program = jax.make_jaxpr(lambda p, b: model.apply({"params": p}, **b).prediction)(
        abstract_params(model), model.example(1)
    )
    assert model.flops() == 2 * products(program.jaxpr)


def test_names_of_the_released_code():
    _, params, _ = make()
    tensors = export_params(params, dit.TORCH_NAMES["dit"])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert len(shapes) == 9 + 2 * 10 + 2
    for name, shape in {
        "x_embedder.proj.weight": (12, 3, 2, 2),
        "t_embedder.mlp.0.weight": (12, 256),
        "t_embedder.mlp.2.bias": (12,),
        "y_embedder.embedding_table.weight": (4, 12),
        "blocks.1.attn.qkv.weight": (24, 12),
        "blocks.1.attn.qkv.bias": (24,),
        "blocks.0.attn.proj.weight": (12, 8),
        "blocks.0.mlp.fc1.weight": (24, 12),
        "blocks.0.mlp.fc2.bias": (12,),
        "blocks.1.adaLN_modulation.1.weight": (72, 12),
        "final_layer.adaLN_modulation.1.weight": (24, 12),
        "final_layer.linear.weight": (24, 12),
    }.items():
        assert shapes[name] == shape, name
    beside = {"pos_embed": np.zeros((1, 9, 12)), **tensors}
    assert known_tensors(dit, beside).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 7}, "patch_size=2 must divide image_size=7"),
        ({"width": 10}, "width=10: must be a multiple of 4"),
        ({"head_dim": None, "num_heads": 5}, "5 heads must divide width=12"),
        ({"mixture": ((1, 2, 1, 1),)}, "runs have 1 layers, depth=2"),
        ({"mixture": ((2, 2, 1),)}, "runs are"),
        ({"mixture": ((2, 2, 2, 1),)}, "2 shared heads and 1 chosen ones"),
        ({"mixture": ((2, 2, 1, 0),)}, "the others never work"),
        ({"compute": "spars"}, "compute='spars': did you mean 'sparse'"),
        ({"drop_label": 1.0}, "drop_label=1.0"),
        ({"remat": "fll"}, "remat='fll': did you mean 'full'"),
        ({"depth": 0}, "depth=0: must be at least 1"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(RecipeError, match=message):
        build("dit", **TINY | fields)


def test_inputs_of_another_shape_are_refused():
    model, params, _ = make()
    for name in ("time", "label", "noisy"):
        with pytest.raises(ValueError, match="must be"):
            model.apply({"params": params}, **draw() | {name: draw()[name][..., None]})
