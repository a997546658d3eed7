# SPDX-License-Identifier: Apache-2.0
"""Write informer.npz: what the released Informer says on formula-made weights and inputs.

Run:  python tests/goldens/make_informer.py --reference=DIR

DIR is a checkout of github.com/zhouhaoyi/Informer2020; needs torch. The reference runs in float64
with full attention, without "mix" and, as documented in our model, with layer norm in place of the
batch norm of its distilling. Weights are functions of our parameter paths and shapes, so that they
need not be stored, and the test needs no torch.
"""

import argparse
import math
import pathlib
import re
import sys
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("informer.npz")
CASE = dict(
    lengths=(13, 5, 6), channels=3, time_features=4, width=16, num_heads=2, hidden=24, depth=(3, 2),
    dropout=0.0,
)  # fmt: skip
LENGTH, LABEL, HORIZON = CASE["lengths"]

# Tensor of the reference -> parameter path and how its axes become ours.
NAMES = (
    (r"(en|de)c_embedding\.value_embedding\.tokenConv", r"\1coder_embedding/value", "conv"),
    (r"(en|de)c_embedding\.temporal_embedding\.embed", r"\1coder_embedding/time", "linear"),
    (r"encoder\.attn_layers\.(\d+)\.attention\.(query|key|value)_projection",
     r"encoder_\1/attention/\2", "heads"),
    (r"encoder\.attn_layers\.(\d+)\.attention\.out_projection", r"encoder_\1/attention/out", "out"),
    (r"decoder\.layers\.(\d+)\.self_attention\.(query|key|value)_projection",
     r"decoder_\1/attention/\2", "heads"),
    (r"decoder\.layers\.(\d+)\.self_attention\.out_projection", r"decoder_\1/attention/out", "out"),
    (r"decoder\.layers\.(\d+)\.cross_attention\.(query|key|value)_projection",
     r"decoder_\1/cross/\2", "heads"),
    (r"decoder\.layers\.(\d+)\.cross_attention\.out_projection", r"decoder_\1/cross/out", "out"),
    (r"(en|de)coder\.(?:attn_)?layers\.(\d+)\.conv1", r"\1coder_\2/mlp/up", "point"),
    (r"(en|de)coder\.(?:attn_)?layers\.(\d+)\.conv2", r"\1coder_\2/mlp/down", "point"),
    (r"(en|de)coder\.(?:attn_)?layers\.(\d+)\.norm1", r"\1coder_\2/attention_norm", "norm"),
    (r"encoder\.attn_layers\.(\d+)\.norm2", r"encoder_\1/mlp_norm", "norm"),
    (r"decoder\.layers\.(\d+)\.norm2", r"decoder_\1/cross_norm", "norm"),
    (r"decoder\.layers\.(\d+)\.norm3", r"decoder_\1/mlp_norm", "norm"),
    (r"encoder\.conv_layers\.(\d+)\.downConv", r"distil_\1/conv", "conv"),
    (r"encoder\.conv_layers\.(\d+)\.norm", r"distil_\1/norm", "norm"),
    (r"(en|de)coder\.norm", r"\1coder_norm", "norm"),
    (r"projection", "head", "linear"),
)  # fmt: skip


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name, the index and the shape alone.

    Norm scales lie around 1; matrices are scaled so that activations keep their size.
    """
    uniform = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("scale"):
        values = 1 + 0.2 * uniform
    elif name.endswith("kernel"):
        outputs = math.prod(shape[1:]) if re.search("query|key|value/k", name) else shape[-1]
        values = uniform * math.sqrt(3 * outputs / math.prod(shape))
    else:
        values = 0.5 * uniform
    return values.astype(np.float32)


def inputs() -> dict[str, np.ndarray]:
    """Return the model's inputs, two examples."""
    c, f = CASE["channels"], CASE["time_features"]
    return {
        "past": 2 * formula("past", (2, LENGTH, c)),
        "past_time": formula("past_time", (2, LENGTH, f)),
        "future_time": formula("future_time", (2, HORIZON, f)),
    }


def translate(tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the value of a tensor of the reference: our parameter, its axes moved."""
    stem, _, part = tensor.rpartition(".")
    found = ((re.fullmatch(pattern, stem), path, kind) for pattern, path, kind in NAMES)
    match, path, kind = next(entry for entry in found if entry[0])
    path = match.expand(path)
    heads = CASE["num_heads"]
    if part == "bias":
        ours = (heads, shape[0] // heads) if kind == "heads" else shape
        return formula(f"{path}/bias", ours).reshape(shape)
    if kind == "norm":
        return formula(f"{path}/scale", shape)
    ours = {
        "conv": shape[::-1],
        "linear": shape[::-1],
        "point": shape[1::-1],
        "heads": (shape[1], heads, shape[0] // heads),
        "out": (heads, shape[1] // heads, shape[0]),
    }[kind]
    value = formula(f"{path}/kernel", ours)
    if kind == "conv":
        return value.transpose(2, 1, 0)
    value = value.reshape(shape[1], shape[0]).T
    return value[..., None] if kind == "point" else value


def run(reference: str) -> np.ndarray:
    """Return the forecast `[2, h, c]` of the reference."""
    sys.path.insert(0, reference)
    import torch
    from models.model import Informer

    class ChannelNorm(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    width = CASE["width"]
    model = Informer(
        CASE["channels"], CASE["channels"], CASE["channels"], LENGTH, LABEL,
        HORIZON, d_model=width, n_heads=CASE["num_heads"], e_layers=CASE["depth"][0],
        d_layers=CASE["depth"][1], d_ff=CASE["hidden"], attn="full", embed="timeF", mix=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    for layer in model.encoder.conv_layers:
        layer.norm = ChannelNorm(width)
    model = model.double().eval()
    given = {name: torch.from_numpy(x).double() for name, x in inputs().items()}
    start = given["past"][:, LENGTH - LABEL :]
    zeros = torch.zeros(2, HORIZON, CASE["channels"], dtype=torch.float64)
    time = torch.cat([given["past_time"][:, -LABEL:], given["future_time"]], dim=1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(translate(name, tuple(value.shape)).copy()))
        out = model(given["past"], given["past_time"], torch.cat([start, zeros], dim=1), time)
    return out.numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", required=True)
    np.savez_compressed(GOLDENS, forecast=run(parser.parse_args().reference))
