# SPDX-License-Identifier: Apache-2.0
"""Write pointr.npz: what the released PoinTr says on formula-made weights and clouds.

Run:  python tests/goldens/make_pointr.py --reference=DIR

DIR is a checkout of github.com/yuxumin/PoinTr; needs torch. The reference runs in float64 on CPU:
its compiled extensions give way to definitions written here, its depths to two layers each, and, as
documented in our model, its batch norms to layer norms. Weights are functions of our parameter
paths and shapes, so that they need not be stored, and the test needs no torch.
"""

import argparse
import math
import pathlib
import re
import sys
import types
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("pointr.npz")
CASE = dict(
    points=540, groups=(512, 128), queries=20, fold=2, width=24, num_heads=6, global_width=1024,
    depth=(2, 2), neighbours=8, geometric_layers=1,
)  # fmt: skip

_LAYER = (
    (r"norm1", "attention_norm", "norm"),
    (r"(?:self_)?attn\.qkv", "attention", "qkv"),
    (r"norm2", "mlp_norm", "norm"),
    (r"mlp\.fc1", "mlp/up", "linear"),
    (r"mlp\.fc2", "mlp/down", "linear"),
    (r"knn_map\.0", "near", "linear"),
    (r"merge_map", "merge", "linear"),
)
_ENCODER = (*_LAYER, (r"attn\.proj", "attention/out", "linear"))
_DECODER = (
    *_LAYER,
    (r"self_attn\.proj", "attention/out", "linear"),
    (r"norm_q", "cross_norm", "norm"),
    (r"norm_v", "context_norm", "norm"),
    (r"attn\.q_map", "cross/query", "linear"),
    (r"attn\.k_map", "cross/key", "linear"),
    (r"attn\.v_map", "cross/value", "linear"),
    (r"attn\.proj", "cross/out", "linear"),
    (r"knn_map_cross\.0", "cross_near", "linear"),
    (r"merge_map_cross", "cross_merge", "linear"),
)


def _mlp(tensor, path):
    """Linear 0, norm 1, linear 3."""
    return (
        (rf"{tensor}\.0", f"{path}/up", "linear"),
        (rf"{tensor}\.1", f"{path}/norm", "norm"),
        (rf"{tensor}\.3", f"{path}/down", "linear"),
    )


# Tensor of the reference -> parameter path (several: parts of its inputs) and the kind of both.
NAMES = (
    *((rf"base_model\.encoder\.(\d+)\.{t}", rf"encoder_\1/{p}", k) for t, p, k in _ENCODER),
    *((rf"base_model\.decoder\.(\d+)\.{t}", rf"decoder_\1/{p}", k) for t, p, k in _DECODER),
    (r"base_model\.grouper\.input_trans", "proxies/stem", "linear"),
    *((rf"base_model\.grouper\.layer{i + 1}\.0", f"proxies/graph_{i}/edge", "linear")
      for i in range(4)),
    *((rf"base_model\.grouper\.layer{i + 1}\.1", f"proxies/graph_{i}/norm", "norm")
      for i in range(4)),
    *_mlp(r"base_model\.pos_embed", "place"),
    *_mlp(r"base_model\.input_proj", "input"),
    *_mlp(r"base_model\.increase_dim", "pool"),
    *_mlp(r"increase_dim", "rebuild"),
    (r"base_model\.coarse_pred\.0", "coarse/up", "linear"),
    (r"base_model\.coarse_pred\.2", "coarse/down", "linear"),
    (r"base_model\.mlp_query\.0", "query_pooled query_point", "linear"),
    (r"base_model\.mlp_query\.2", "query/up", "linear"),
    (r"base_model\.mlp_query\.4", "query/down", "linear"),
    (r"reduce_map", "rebuild_pooled rebuild_query rebuild_point", "linear"),
    *((rf"foldingnet\.folding{i + 1}\.0", f"folding/point_{i} folding/query_{i}", "linear")
      for i in range(2)),
    *((rf"foldingnet\.folding{i + 1}\.{j}", f"folding/{name}_{i}", kind)
      for i in range(2)
      for j, name, kind in ((1, "norm", "norm"), (3, "hidden", "linear"),
                            (4, "hidden_norm", "norm"), (6, "offset", "linear"))),
)  # fmt: skip


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name, the index and the shape alone.

    Norm scales lie around 1; matrices are scaled so that activations keep their size. The biases of
    queries, keys and values are 0: the reference has none.
    """
    uniform = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if re.search("(query|key|value)/bias$", name) and len(shape) == 2:
        values = np.zeros(shape)
    elif name.endswith("scale"):
        values = 1 + 0.2 * uniform
    elif name.endswith("kernel"):
        outputs = math.prod(shape[1:]) if re.search("(query|key|value)/kernel", name) else shape[-1]
        values = uniform * math.sqrt(3 * outputs / math.prod(shape))
    else:
        values = 0.5 * uniform
    return values.astype(np.float32)


def partial() -> np.ndarray:
    """Return two partial clouds `[2, n, 3]`."""
    return formula("partial", (2, CASE["points"], 3))


def shape_of(path: str, rows: int, columns: int) -> tuple[int, ...]:
    """Return the shape of our kernel that holds a matrix `[rows, columns]`."""
    heads = CASE["num_heads"]
    if re.search("(attention|cross)/out$", path):
        return heads, rows // heads, columns
    if re.search("(attention|cross)/(query|key|value)$", path):
        return rows, heads, columns // heads
    if re.search("(near|edge)$", path):
        return 2, rows // 2, columns
    return rows, columns


def translate(tensor: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the value of a tensor of the reference; None if it is one that it never uses."""
    stem, _, part = tensor.rpartition(".")
    found = ((re.fullmatch(pattern, stem), path, kind) for pattern, path, kind in NAMES)
    match, path, kind = next(entry for entry in found if entry[0])
    paths = match.expand(path).split()
    is_plain = re.match(r"(en|de)coder_(\d+)", paths[0])
    if re.search("near|merge", paths[0]) and int(is_plain[2]) >= CASE["geometric_layers"]:
        return None
    if part == "bias":
        biased = [path for path in paths if path not in ("query_pooled", "rebuild_pooled",
                  "rebuild_query", "folding/query_0", "folding/query_1")]  # fmt: skip
        return formula(f"{biased[0]}/bias", shape)
    if kind == "norm":
        return formula(f"{paths[0]}/scale", shape)
    rows, columns = math.prod(shape[1:]), shape[0]
    if kind == "qkv":
        width = columns // 3
        parts = [f"{paths[0]}/{name}" for name in ("query", "key", "value")]
        kernels = [formula(f"{p}/kernel", shape_of(p, rows, width)) for p in parts]
        return np.concatenate([kernel.reshape(rows, width).T for kernel in kernels])
    few = {"query_point": 3, "rebuild_point": 3, "folding/point_0": 2, "folding/point_1": 3,
           "rebuild_query": CASE["width"]}  # fmt: skip
    most = rows - sum(few.get(path, 0) for path in paths)
    kernels = [
        formula(f"{p}/kernel", shape_of(p, few.get(p, most), columns)).reshape(-1, columns)
        for p in paths
    ]
    return np.concatenate(kernels).T.reshape(shape)


def install(reference: str) -> None:
    """Make the reference importable without its compiled extensions and its other models."""
    import torch

    def furthest(xyz, count):
        chosen = torch.zeros(len(xyz), count, dtype=torch.long)
        distance = torch.full(xyz.shape[:2], math.inf, dtype=xyz.dtype)
        for i in range(1, count):
            last = torch.take_along_dim(xyz, chosen[:, i - 1, None, None], dim=1)
            distance = torch.minimum(distance, ((xyz - last) ** 2).sum(-1))
            chosen[:, i] = distance.argmax(1)
        return chosen

    def module(name, **entries):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(entries)
        return sys.modules[name]

    pick = lambda x, index: torch.take_along_dim(x, index[:, None], dim=2)
    utils = module("pointnet2_ops.pointnet2_utils", furthest_point_sample=furthest,
                   gather_operation=pick)  # fmt: skip
    module("pointnet2_ops", pointnet2_utils=utils)
    module("extensions")
    module("extensions.chamfer_dist", ChamferDistanceL1=torch.nn.Identity)
    module("timm")
    module("timm.models")
    module("timm.models.layers", DropPath=torch.nn.Identity,
           trunc_normal_=torch.nn.init.trunc_normal_)  # fmt: skip
    module("utils")
    module("utils.logger", print_log=lambda *args, **options: None)
    module("models").__path__ = [f"{reference}/models"]
    catalogue = types.SimpleNamespace(register_module=lambda: lambda module: module)
    module("models.build", MODELS=catalogue)
    torch.Tensor.cuda = lambda tensor: tensor


def run(reference: str) -> dict[str, np.ndarray]:
    """Return `coarse [2, q, 3]` and `fine [2, q fold^2, 3]` of the reference."""
    import torch

    install(reference)
    from models import PoinTr as home

    class ChannelNorm(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    original = home.PCTransformer
    home.PCTransformer = lambda **options: original(**{**options, "depth": CASE["depth"]})
    points = CASE["queries"] * CASE["fold"] ** 2
    model = home.PoinTr(types.SimpleNamespace(
        trans_dim=CASE["width"], knn_layer=CASE["geometric_layers"], num_pred=points,
        num_query=CASE["queries"],
    ))  # fmt: skip
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.BatchNorm1d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ChannelNorm(layer.num_features))
    model = model.double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            ours = translate(name, tuple(value.shape))
            if ours is not None:
                value.copy_(torch.from_numpy(np.ascontiguousarray(ours)))
        coarse, fine = model(torch.from_numpy(partial()).double())
    return {"coarse": coarse[:, : CASE["queries"]].numpy(), "fine": fine[:, :points].numpy(),
            "sample": coarse[:, CASE["queries"] :].numpy()}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", required=True)
    found = run(parser.parse_args().reference)
    np.savez_compressed(GOLDENS, **{name: x.astype(np.float32) for name, x in found.items()})
