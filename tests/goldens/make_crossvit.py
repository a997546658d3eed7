# SPDX-License-Identifier: Apache-2.0
"""Write crossvit.npz: logits of the reference implementations with weights made by a formula.

Run:  python tests/goldens/make_crossvit.py --ibm=<checkout of IBM/CrossViT>

Needs the extra `parity` (torch and timm). Weights and images are functions of names and shapes, so
that neither has to be stored and the test needs no torch.
"""

import argparse
import importlib.machinery
import math
import pathlib
import sys
import types
import warnings
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("crossvit.npz")
SMALL = dict(
    num_classes=10, image_size=(48, 48), dims=(32, 64), num_heads=(4, 8), mlp_ratio=(2.0, 3.0),
    depth=((1, 2, 0), (1, 2, 0)),
)  # fmt: skip

# name -> (reference, preset, overrides); the names are the keys of the file.
CASES = {
    **{f"timm/{p}": ("timm", p, {}) for p in (
        "tiny", "small", "base", "9", "15", "18", "9-dagger", "15-dagger", "18-dagger",
        "15-dagger-384", "18-dagger-384",
    )},
    "timm/tiny without resize": ("timm", "tiny", dict(image_size=(240, 240))),
    "timm/9-dagger without resize": ("timm", "9-dagger", dict(image_size=(240, 240))),
    "timm/tiny cropped": ("timm", "tiny", dict(resize="crop")),
    "timm/48 linear": ("timm", None, SMALL),
    "timm/48 dagger": ("timm", None, SMALL | dict(stem="dagger")),
    "timm/48 from 96": ("timm", None, SMALL | dict(image_size=(96, 48))),
    "ibm/48 linear": ("ibm", None, SMALL),
    "ibm/48 dagger": ("ibm", None, SMALL | dict(stem="dagger")),
    "ibm/48 stacked": ("ibm", None, SMALL | dict(depth=((1, 2, 1), (1, 1, 2)))),
    "ibm/48 t2t": ("ibm", None, SMALL | dict(stem="t2t")),
    "ibm/48 performer": ("ibm", None, SMALL | dict(stem="performer")),
    "ibm/240 t2t": ("ibm", None, SMALL | dict(stem="t2t", image_size=(240, 224))),
    "ibm/240 performer": ("ibm", None, SMALL | dict(stem="performer", image_size=(240, 224))),
}  # fmt: skip


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name, the index and the shape alone.

    Norm weights lie around 1; matrices are scaled so that activations keep their size.
    """
    with np.errstate(over="ignore"):
        z = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(
            zlib.crc32(name.encode()) << 32
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    uniform = uniform.reshape(shape)
    if name == "image":
        values = 1.5 * uniform
    elif len(shape) == 1:
        # Only norms have vectors that are called weight.
        values = 1 + 0.2 * uniform if name.endswith("weight") else 0.1 * uniform
    elif len(shape) == 3:
        values = 0.3 * uniform
    else:
        values = uniform * math.sqrt(3 / math.prod(shape[1:]))
    return values.astype(np.float32)


def import_timm():
    """Import timm's CrossViT, with empty stand-ins for torchvision where it is not installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets",
                     ".models", ".models.feature_extraction", ".io"):  # fmt: skip
            module = _Anything(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.__path__ = []
            sys.modules[module.__name__] = module
            parent, _, child = module.__name__.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm.models.crossvit

    return timm.models.crossvit.CrossVit


def import_ibm(checkout: str):
    """Import IBM's CrossViT from a checkout."""
    import_timm()
    for name in ("timm.models.registry", "timm.models.layers"):
        # Newer versions of timm no longer accept foreign modules in their registry.
        sys.modules[name] = types.ModuleType(name)
    import timm.layers
    import timm.models.vision_transformer

    sys.modules["timm.models.registry"].register_model = lambda function: function
    vars(sys.modules["timm.models.layers"]).update(vars(timm.layers))
    timm.models.vision_transformer._cfg = dict
    block = timm.models.vision_transformer.Block
    # Its argument `drop` has another name by now.
    timm.models.vision_transformer.Block = lambda *, drop, **rest: block(**rest, proj_drop=drop)
    sys.path.insert(0, checkout)
    import models.crossvit

    return models.crossvit.VisionTransformer


class _AnythingClass(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnythingClass(name, (), {})


def reference(kind, classes, model):
    """Build the reference counterpart of one of our models, with weights by formula."""
    import functools

    import torch

    fine, coarse = model.image_size
    arguments = dict(
        patch_size=list(model.patch_size),
        num_classes=model.num_classes,
        embed_dim=list(model.dims),
        depth=[list(stage) for stage in model.depth],
        num_heads=list(model.num_heads),
        mlp_ratio=[*model.mlp_ratio, 1.0],
        qkv_bias=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        multi_conv=model.stem == "dagger",
    )
    if kind == "timm":
        scale = (1.0, coarse / fine)
        net = classes["timm"](
            img_size=fine, img_scale=scale, crop_scale=model.resize == "crop", **arguments
        )
    else:
        hybrid = model.stem if model.stem in ("t2t", "performer") else None
        net = classes["ibm"](img_size=[fine, coarse], hybrid_backbone=hybrid, **arguments)
    net.eval()
    state = net.state_dict()
    net.load_state_dict({n: torch.from_numpy(formula(n, tuple(x.shape))) for n, x in state.items()})
    return net


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ibm", required=True, help="checkout of IBM/CrossViT")
    options = parser.parse_args()
    import torch

    from attnjax.models.load import build

    classes = {"timm": import_timm(), "ibm": import_ibm(options.ibm)}
    logits = {}
    for name, (kind, preset, overrides) in CASES.items():
        model = build("crossvit", preset, **overrides)
        net = reference(kind, classes, model)
        image = formula("image", (2, model.image_size[0], model.image_size[0], 3))
        with torch.no_grad():
            logits[name] = net(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
        print(f"{name}: {np.abs(logits[name]).mean():.3f}", flush=True)
    np.savez_compressed(GOLDENS, **logits)


if __name__ == "__main__":
    main()
