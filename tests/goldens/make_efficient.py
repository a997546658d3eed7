# SPDX-License-Identifier: Apache-2.0
"""Write efficient.npz: outputs of CAB's released attentions that share one multi-head shell.

Run:  python tests/goldens/make_efficient.py --reference=DIR

DIR is a checkout of Shark-NLP/CAB. Needs torch and einops. Weights and inputs are functions of
names and shapes, so that they need not be stored, and the test needs neither package.
"""

import argparse
import pathlib
import warnings
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("efficient.npz")
B, T, S, D, HEADS = 2, 23, 17, 12, 2
PADDED = 6
"""Tokens at the end of examples that are padding, where there is padding. All examples have as
many: Nystromformer, Performer and LARA as released give masks to the wrong ones."""

# name -> released class, its options, pattern, whether keys are padded.
CASES = {
    "softmax": ("MultiheadAttention", {}, "noncausal_self", True),
    "softmax cross": ("MultiheadAttention", {}, "noncausal_cross", True),
    "local": ("LocalAttention", {"wsize": 3}, "noncausal_self", False),
    "local padded": ("LocalAttention", {"wsize": 3}, "noncausal_self", True),
    "local causal": ("LocalAttention", {"wsize": 4}, "causal_self", False),
    "abc": ("ABC", {"num_landmarks": 5}, "noncausal_self", True),
    "abc cross": ("ABC", {"num_landmarks": 5}, "noncausal_cross", True),
    "abc causal": ("ABC", {"num_landmarks": 5}, "causal_self", False),
    "nystrom": ("NystromAttention", {"num_landmarks": 4}, "noncausal_self", False),
    "nystrom padded": (
        "NystromAttention", {"num_landmarks": 4, "conv_kernel_size": 3}, "noncausal_self", True,
    ),
    "performer": ("Performer", {"approx_attn_dim": 9}, "noncausal_self", True),
    "performer cross": ("Performer", {"approx_attn_dim": 9}, "noncausal_cross", True),
    "lara": ("Lara", {"num_landmarks": 4}, "noncausal_self", False),
    "lara padded": ("Lara", {"num_landmarks": 4}, "noncausal_self", True),
    "cosformer": ("CosformerAttention", {}, "noncausal_self", True),
    "cosformer cross": ("CosformerAttention", {}, "noncausal_cross", False),
    "prob_sparse": ("ProbSparse", {"factor": 2}, "noncausal_self", False),
    "prob_sparse mix": ("ProbSparse", {"factor": 2, "mix": True}, "noncausal_self", False),
}  # fmt: skip


def inputs(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the tokens `[b,t,d]` of a case, and those of the context where there is one."""
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal((B, length, D)).astype(np.float32) for length in (T, S))
    return x, context if CASES[name][2].endswith("cross") else None


def valid(name: str) -> np.ndarray | None:
    """Return which keys are no padding, `[b,t]` or `[b,s]`; None if all."""
    _, _, pattern, is_padded = CASES[name]
    length = S if pattern.endswith("cross") else T
    return np.arange(length) < [[length - PADDED]] * B if is_padded else None


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name and the shape alone."""
    name = name.replace("_projection", "_proj").replace("query", "q").replace("key", "k")
    name = name.replace("value", "v")
    uniform = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    scale = np.sqrt(3 / shape[-1]) if name.endswith("weight") else 1.0
    return (uniform * scale).astype(np.float32)


def directions(features: int) -> np.ndarray:
    """Return what the Performer projects to, `[n,m,h]`."""
    return 1.5 * formula("eval_proj", (HEADS, features, D // HEADS))


def sample(queries: int, number: int) -> np.ndarray:
    """Return where queries look, in [0, 1): `[queries,number]`."""
    return (formula("sample", (queries, number)) + 1) / 2


def params(name: str) -> dict:
    """Return the weights of a case as our parameters."""
    kind, options, _, _ = CASES[name]
    h = D // HEADS
    found = {}
    for ours in ("query", "key", "value"):
        kernel = formula(f"{ours}_proj.weight", (D, D)).T.reshape(D, HEADS, h)
        bias = formula(f"{ours}_proj.bias", (D,)).reshape(HEADS, h)
        found[ours] = {"kernel": kernel, "bias": bias}
    found["out"] = {
        "kernel": formula("out_proj.weight", (D, D)).T.reshape(HEADS, h, D),
        "bias": formula("out_proj.bias", (D,)),
    }
    if kind == "ABC":
        shape = (h, options["num_landmarks"])
        found["control_key"] = formula("compress_k", shape)
        found["control_value"] = formula("compress_v", shape)
    if "conv_kernel_size" in options:
        width = options["conv_kernel_size"]
        # PyTorch's convolutions do not turn the kernel round.
        found["filter"] = formula("conv.weight", (HEADS, 1, width, 1)).reshape(HEADS, width)[
            :, ::-1
        ]
    return found


def run(library, name: str) -> np.ndarray:
    """Return the output `[b,t,d]` of the reference for one case."""
    import torch

    kind, options, pattern, _ = CASES[name]
    flags = {"causal": pattern.startswith("causal"), "cross": pattern.endswith("cross")}
    family = getattr(library, kind, None) or library.get_cls(kind)
    module = family(embed_dim=D, num_heads=HEADS, dropout=0.0, **flags, **options).eval()
    x, context = (None if a is None else torch.from_numpy(a) for a in inputs(name))
    context = x if context is None else context
    mask = valid(name)
    mask = None if mask is None else torch.from_numpy(~mask)
    with torch.no_grad():
        for key, value in module.named_parameters():
            value.copy_(torch.from_numpy(formula(key, tuple(value.shape))))
        if kind == "Performer":
            module.eval_proj = torch.from_numpy(directions(options["approx_attn_dim"]))
        if kind == "ProbSparse":
            torch.randint = lambda most, shape: torch.from_numpy(sample(*shape) * most).long()
        out, _ = module(x, context, context, key_padding_mask=mask, batch_first=True)
    return out.numpy()


def main() -> None:
    """Run every case and write the file."""
    # Not above: the tests import this file for its formulas.
    from cab_release import load

    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", required=True)
    library = load(parser.parse_args().reference)
    warnings.simplefilter("ignore")
    np.savez_compressed(GOLDENS, **{name: run(library, name) for name in CASES})
    print(f"{GOLDENS}: {len(CASES)} cases, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
