# SPDX-License-Identifier: Apache-2.0
"""CrossViT against stored logits of the reference code, and against timm where it is installed."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.models import crossvit
from attnjax.models.load import abstract_params, build
from attnjax.weights import export_params, flatten, import_params, plan

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_crossvit", FOLDER / "make_crossvit.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

# Float32 sums in another order, through some twenty layers; the second also through the resize,
# whose coordinates PyTorch computes in float32.
TOLERANCE_SAME_SIZE = 1e-5
TOLERANCE_RESIZED = 1e-4
# Relative to the largest entry of each gradient, against float64: PyTorch's own float32 gradients
# of the dagger stems are off by as much as 1.8e-2 (oneDNN's convolutions).
TOLERANCE_GRADIENT = 2e-5

QUICK = ("timm/9-dagger", "timm/tiny cropped")


def formula_params(model, layout):
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    entries = plan(shapes, crossvit.TORCH_NAMES[layout])
    tensors = {name: golden.formula(name, entry.shape) for name, entry in entries.items()}
    return import_params(tensors, shapes, crossvit.TORCH_NAMES)


def layout_of_case(kind, model):
    return "ibm_performer" if model.stem == "performer" else kind


def tolerance_of(model):
    same = model.image_size[0] == model.image_size[1] or model.resize == "crop"
    return TOLERANCE_SAME_SIZE if same else TOLERANCE_RESIZED


@pytest.mark.parametrize(
    "name",
    [
        n if n in QUICK or "/48" in n else pytest.param(n, marks=pytest.mark.slow)
        for n in golden.CASES
    ],
)
def test_logits_equal_the_reference(name):
    kind, preset, overrides = golden.CASES[name]
    model = build("crossvit", preset, **overrides)
    params = formula_params(model, layout_of_case(kind, model))
    image = golden.formula("image", (2, model.image_size[0], model.image_size[0], 3))
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x).logits)(params, image)
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        np.testing.assert_allclose(logits, stored[name], rtol=0, atol=tolerance_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["9", "9-dagger"])
@pytest.mark.filterwarnings("ignore")
def test_logits_and_gradients_equal_timm_with_random_weights(preset):
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    classes = {"timm": golden.import_timm()}
    model = build("crossvit", preset, num_classes=20)
    torch.manual_seed(0)
    net = golden.reference("timm", classes, model)
    for value in net.parameters():
        value.data.add_(0.02 * torch.randn_like(value))
    tensors = {name: x.numpy() for name, x in net.state_dict().items()}
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    params = import_params(tensors, shapes, crossvit.TORCH_NAMES)
    side = model.image_size[0]
    image = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)

    def loss(p):
        logits = model.apply({"params": p}, image).logits
        return jnp.mean(logits**2), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = net.double()(torch.from_numpy(image.transpose(0, 3, 1, 2).astype(np.float64)))
    theirs.square().mean().backward()
    np.testing.assert_allclose(logits, theirs.detach().numpy(), rtol=0, atol=TOLERANCE_SAME_SIZE)
    exported = export_params(grads, crossvit.TORCH_NAMES["timm"])
    for name, value in net.named_parameters():
        expected = value.grad.numpy()
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(
            exported[name] / scale, expected / scale, rtol=0, atol=TOLERANCE_GRADIENT, err_msg=name
        )
