# SPDX-License-Identifier: Apache-2.0
"""The classification task with a small model that follows the model contract."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnjax import metrics
from attnjax.errors import RecipeError
from attnjax.tasks import Classification, Task

SHARDING_ROUNDING = 1e-6
"""Sums over a split batch are taken in another order."""

PARAM_AXES = ((r".*head/kernel", ("embed", None)),)


@flax.struct.dataclass
class Output:
    logits: jax.Array
    aux: dict


class Toy(nn.Module):
    """One dense layer, dropout, and a uniform attention map of the image's size."""

    num_classes: int = 10
    dropout: float = 0.0

    @nn.compact
    def __call__(self, image, *, train=False):
        self.sow("attention", "probabilities", jnp.ones((image.shape[0], 1, 1, 4)) / 4)
        x = image.reshape(image.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Output(logits=nn.Dense(self.num_classes, name="head")(x), aux={})

    def example(self, batch):
        return {"image": jax.ShapeDtypeStruct((batch, 4, 4, 3), jnp.float32)}

    def flops(self):
        return 2.0 * 4 * 4 * 3 * self.num_classes

    def attention_maps(self, captured):
        (probabilities,) = captured["attention"]["probabilities"]
        return {"only": probabilities[:, 0, 0].reshape(-1, 2, 2)}


class Sequence(Toy):
    def example(self, batch):
        return {"tokens": jax.ShapeDtypeStruct((batch, 4), jnp.int32)}


def make_batch(size=8, classes=10, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(size, 4, 4, 3)).astype(np.float32),
        "label": rng.integers(0, classes, size).astype(np.int32),
        "index": np.arange(100, 100 + size, dtype=np.int32),
    }


def test_task_follows_the_contract():
    task = Classification(Toy())
    assert isinstance(task, Task)
    assert task.inputs == ("image", "label")
    assert task.param_axes == PARAM_AXES
    assert set(task.example(2)) == set(task.inputs)
    assert {x.shape[0] for x in task.example(2).values()} == {2}
    assert task.flops == 3 * 2 * 48 * 10


def test_init_needs_shapes_only_and_depends_on_the_key_only():
    task, batch = Classification(Toy()), make_batch()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    params = task.init(jax.random.key(0), batch)
    abstract = jax.eval_shape(lambda key: task.init(key, shapes), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract)
    assert jax.tree.structure(jax.eval_shape(task.init, jax.random.key(0), batch))
    other = task.init(jax.random.key(0), make_batch(seed=5))
    jax.tree.map(np.testing.assert_array_equal, params, other)
    assert set(params) == {"head"}


def test_init_refuses_models_with_state():
    class Stateful(Toy):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = nn.BatchNorm(use_running_average=not train)(image.reshape(image.shape[0], -1))
            return Output(logits=nn.Dense(self.num_classes)(x), aux={})

    with pytest.raises(NotImplementedError, match="batch_stats"):
        Classification(Stateful()).init(jax.random.key(0), make_batch())


def test_loss_is_plain_cross_entropy_by_default():
    task, batch = Classification(Toy()), make_batch()
    params = task.init(jax.random.key(0), batch)
    loss, scalars = jax.jit(task.loss)(params, batch, jax.random.key(1), 0)
    logits = task.predict(params, batch)["logits"]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    assert loss.dtype == jnp.float32 and loss.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=SHARDING_ROUNDING)
    assert scalars["accuracy"] == np.mean(np.argmax(logits, -1) == batch["label"])


def test_loss_depends_on_the_key_through_dropout_and_mixing_only():
    batch = make_batch()
    for options, dropout, is_random in (
        ({}, 0.0, False),
        ({}, 0.5, True),
        ({"mixup": 0.8, "cutmix": 1.0}, 0.0, True),
    ):
        task = Classification(Toy(dropout=dropout), **options)
        params = task.init(jax.random.key(0), batch)
        loss = jax.jit(task.loss)
        losses = [float(loss(params, batch, jax.random.key(s), 0)[0]) for s in (1, 1, 2)]
        assert losses[0] == losses[1]
        assert (losses[0] != losses[2]) == is_random


def test_label_out_of_range_makes_the_loss_nan():
    task, batch = Classification(Toy()), make_batch()
    params = task.init(jax.random.key(0), batch)
    batch["label"][3] = 10
    assert np.isnan(jax.jit(task.loss)(params, batch, jax.random.key(1), 0)[0])
    assert np.isnan(jax.jit(task.evaluate)(params, batch)["loss"].compute())


def test_check_names_the_example():
    task, batch = Classification(Toy()), make_batch()
    task.check(batch)
    batch["label"][3] = 10
    with pytest.raises(RecipeError, match="label 10 of example 103 is outside 0 to 9"):
        task.check(batch)
    task.check({**batch, "valid": np.arange(8) != 3})
    with pytest.raises(RecipeError, match="no image"):
        task.check({"label": batch["label"]})
    with pytest.raises(RecipeError, match="integers"):
        task.check({**batch, "label": batch["label"].astype(np.float32)})


def test_evaluate_honours_valid():
    task, batch = Classification(Toy()), make_batch()
    params = task.init(jax.random.key(0), batch)
    padded = {name: np.concatenate([x, np.zeros_like(x[:3])]) for name, x in batch.items()}
    padded["image"][8:] = np.nan
    padded["valid"] = np.arange(11) < 8
    plain = metrics.compute(jax.jit(task.evaluate)(params, batch))
    masked = metrics.compute(jax.jit(task.evaluate)(params, padded))
    assert set(plain) == {"accuracy", "top5", "loss", "confusion"}
    assert masked.pop("confusion").sum() == 8
    for name, value in masked.items():
        assert value == pytest.approx(plain[name], rel=SHARDING_ROUNDING)


def test_evaluate_leaves_out_what_says_nothing():
    def names(task):
        params = jax.eval_shape(task.init, jax.random.key(0), make_batch())
        return set(jax.eval_shape(task.evaluate, params, make_batch()))

    assert names(Classification(Toy(num_classes=5))) == {"accuracy", "loss", "confusion"}
    assert names(Classification(Toy(num_classes=101), top_k=3)) == {"accuracy", "loss", "top3"}


def test_sharded_batch_gives_the_same_loss():
    task = Classification(Toy(), label_smoothing=0.1)
    batch = make_batch()
    params = task.init(jax.random.key(0), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, _), gradient = step(params, batch, jax.random.key(3), 0)
    (split, _), split_gradient = step(params, sharded, jax.random.key(3), 0)
    np.testing.assert_allclose(split, loss, rtol=SHARDING_ROUNDING)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(split_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=SHARDING_ROUNDING)


def test_predict_and_explain():
    task, batch = Classification(Toy()), make_batch()
    params = task.init(jax.random.key(0), batch)
    prediction = task.predict(params, {"image": batch["image"]})
    np.testing.assert_allclose(prediction["probabilities"].sum(-1), 1, rtol=SHARDING_ROUNDING)
    explanation = jax.jit(task.explain)(params, batch)
    np.testing.assert_array_equal(explanation["prediction"], prediction["prediction"])
    assert explanation["maps"]["only"].shape == (8, 2, 2)
    assert set(explanation) == {"image", "label", "prediction", "maps"}


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 1.0}, {"mixup": -1.0}, {"mix_probability": 2.0}, {"top_k": 0}]
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(RecipeError, match=f"task.{next(iter(options))}="):
        Classification(Toy(), **options)


def test_mixing_needs_images():
    with pytest.raises(RecipeError, match="Sequence reads tokens"):
        Classification(Sequence(), mixup=0.8)
