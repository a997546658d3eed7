# SPDX-License-Identifier: Apache-2.0
"""MoH-ViT: numbers of heads, its balance in the loss, names of the release, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models.load import abstract_params
from attnjax.models.moh import PRESETS, TORCH_NAMES, MixtureOfHeadViT
from attnjax.tasks import Classification
from attnjax.weights import flatten, plan

FIELDS = dict(
    num_classes=5, image_size=32, widths=(8, 8, 8, 8), num_heads=(2, 2, 2, 4), depths=(1, 1, 1, 1),
    ratios=(2, 2, 2, 2), shared=(2, 1, 1, 1), chosen=(0, 1, 1, 2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "share"),
    [
        ("small_dense", 1), ("base_75", 0.75), ("base_50", 0.5), ("small_80", 0.7995),
        ("small_75", 0.7529),
    ],
)  # fmt: skip
def test_heads_at_work(preset, share):
    assert MixtureOfHeadViT(**PRESETS[preset]).activated() == pytest.approx(share, abs=5e-5)


def test_names_of_the_release():
    """One tensor of every kind, with its shape."""
    model = MixtureOfHeadViT(**PRESETS["base_50"])
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    found = {name: entry.shape for name, entry in plan(shapes, TORCH_NAMES["release"]).items()}
    expected = {
        "patch_embed1.proj.weight": (96, 3, 7, 7), "patch_embed3.norm.bias": (384,),
        "block1.4.attn.q.weight": (96, 96), "block1.0.attn.kv.bias": (192,),
        "block2.0.attn.sr.weight": (192, 192, 1, 1), "block2.0.attn.norm.weight": (192,),
        "block3.22.attn.relative_pos_bias_local": (16, 9),
        "block3.0.attn.learnable_tokens": (16, 24, 9), "block3.0.attn.learnable_bias": (16, 1, 9),
        "block4.0.attn.qkv.weight": (2304, 768), "block4.4.attn.temperature": (32, 1, 1),
        "block4.0.attn.query_embedding": (32, 1, 24), "block4.0.attn.cpb_fc1.weight": (512, 2),
        "block4.0.attn.cpb_fc2.weight": (32, 512), "block4.0.attn.wg.weight": (28, 768),
        "block4.0.attn.wg_0.weight": (2, 768), "block4.0.attn.wg_1.weight": (4, 768),
        "block4.0.attn.proj.weight": (768, 768), "block1.0.mlp.fc1.weight": (1024, 96),
        "block1.0.mlp.dwconv.dwconv.weight": (512, 1, 3, 3), "block1.0.mlp.fc2.weight": (96, 512),
        "block1.0.norm1.weight": (96,), "norm4.weight": (768,), "head.weight": (1000, 768),
    }  # fmt: skip
    assert {name: tuple(found[name]) for name in expected} == expected


def test_balance_is_part_of_the_loss():
    model = MixtureOfHeadViT(**FIELDS, balance=0.5)
    task = Classification(model)
    image = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    batch = {"image": image, "label": np.array([0, 1, 2, 3])}
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    of = lambda params: task.loss(params, batch, jax.random.key(0), 0)
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(of, has_aux=True))(params)
    output = jax.jit(model.apply)({"params": params}, image)
    nll = -jax.nn.log_softmax(output.logits)[np.arange(4), batch["label"]].mean()
    np.testing.assert_allclose(loss, nll + 0.5 * metrics["balance_loss"], rtol=1e-5)
    np.testing.assert_allclose(output.aux["penalty"], 0.5 * metrics["balance_loss"], rtol=1e-5)
    routers = [g for path, g in flatten(gradients).items() if path.endswith("routed/kernel")]
    # With one head to choose from, scores are 1 whatever they are.
    assert len(routers) == 3 and np.abs(routers[-1]).max() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(image_size=48), "model.image_size=48"),
        (dict(widths=(8, 8, 8)), "model.widths"),
        (dict(num_heads=(3, 2, 2, 4)), "multiples of num_heads"),
        (dict(chosen=None), "give both or neither"),
        (dict(chosen=(0, 2, 1, 2)), "at most the other 1 chosen"),
        (dict(shared=(1, 1, 1, 1)), "never work"),
        (dict(drop_path=1.0), "model.drop_path=1.0"),
        (dict(remat="some"), "model.remat='some'"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(RecipeError, match=message):
        MixtureOfHeadViT(**(FIELDS | fields))
