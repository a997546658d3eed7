# SPDX-License-Identifier: Apache-2.0
"""Write vit.npz: logits of a vision transformer made of PyTorch's layers on formula-made weights.

Run:  python tests/goldens/make_vit.py

Needs torch. Weights have timm's names and are functions of names and shapes, so that they need not
be stored, and the test needs no package.
"""

import math
import pathlib
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("vit.npz")
FIELDS = dict(num_classes=7, image_size=24, patch_size=8, width=24, depth=2, num_heads=3, hidden=40)

# name -> fields of our model.
CASES = {"token": FIELDS | {"pool": "token"}, "mean": FIELDS | {"pool": "mean"}}


def images() -> np.ndarray:
    """Return the pictures `[2, 24, 24, 3]` of all cases."""
    return np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name and the shape alone.

    Norm weights lie around 1; matrices are scaled so that activations keep their size.
    """
    uniform = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("weight") and len(shape) == 1:
        values = 1 + 0.3 * uniform
    elif name.endswith("weight"):
        values = uniform * math.sqrt(3 / math.prod(shape[1:]))
    else:
        values = 0.5 * uniform
    return values.astype(np.float32)


def run(name: str) -> np.ndarray:
    """Return the logits `[2, classes]` of one case, computed in float64."""
    import torch
    from torch import nn

    f = CASES[name]
    d, patch = f["width"], f["patch_size"]
    give = lambda tensor, *shape: torch.from_numpy(formula(tensor, shape)).double()

    def fill(module, prefix, names):
        for theirs, ours in names.items():
            parameter = module.get_parameter(theirs)
            parameter.data = give(f"{prefix}{ours}", *parameter.shape)
        return module.double().eval()

    both = lambda part: {"weight": f"{part}.weight", "bias": f"{part}.bias"}
    with torch.no_grad():
        stem = fill(nn.Conv2d(3, d, patch, patch), "", both("patch_embed.proj"))
        x = torch.from_numpy(images()).double().permute(0, 3, 1, 2)
        x = stem(x).flatten(2).transpose(1, 2)
        if f["pool"] == "token":
            x = torch.cat([give("cls_token", 1, 1, d).expand(2, -1, -1), x], dim=1)
        x = x + give("pos_embed", 1, x.shape[1], d)
        for i in range(f["depth"]):
            layer = nn.TransformerEncoderLayer(
                d, f["num_heads"], f["hidden"], dropout=0.0, activation="gelu",
                layer_norm_eps=1e-6, batch_first=True, norm_first=True,
            )  # fmt: skip
            names = {"self_attn.in_proj_weight": "attn.qkv.weight",
                     "self_attn.in_proj_bias": "attn.qkv.bias"}  # fmt: skip
            for theirs, ours in (
                ("self_attn.out_proj", "attn.proj"), ("linear1", "mlp.fc1"),
                ("linear2", "mlp.fc2"), ("norm1", "norm1"), ("norm2", "norm2"),
            ):  # fmt: skip
                names |= {f"{theirs}.{k}": v for k, v in both(ours).items()}
            x = fill(layer, f"blocks.{i}.", names)(x)
        x = fill(nn.LayerNorm(d, eps=1e-6), "", both("norm"))(x)
        x = x[:, 0] if f["pool"] == "token" else x.mean(dim=1)
        return fill(nn.Linear(d, f["num_classes"]), "", both("head"))(x).float().numpy()


def main() -> None:
    """Run every case and write the file."""
    np.savez_compressed(GOLDENS, **{name: run(name) for name in CASES})
    print(f"{GOLDENS}: {len(CASES)} cases, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
