# SPDX-License-Identifier: Apache-2.0
"""Write efficient_states.npz: outputs of CAB's released S4D and long-short attentions.

Run:  python tests/goldens/make_efficient_states.py --reference=DIR

DIR is a checkout of Shark-NLP/CAB. Needs torch and einops. Weights and inputs are functions of
names and shapes, so that they need not be stored, and the test needs neither package.
"""

import argparse
import math
import pathlib
import warnings
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("efficient_states.npz")
B, D, HEADS = 2, 12, 2

# name -> released class, its options, length of the sequence, whether the last example is padded.
CASES = {
    "s4d": ("S4D", {}, 20, True),
    "s4d bidirectional": ("S4D", {"bidirectional": True}, 20, False),
    "long_short": ("AttentionLS", {"num_landmarks": 3, "window_size": 5}, 23, True),
    "long_short even": ("AttentionLS", {"num_landmarks": 2, "window_size": 4}, 16, False),
    "long_short causal": (
        "CausalLS", {"chunk_size": 4, "chunk_rank": 2, "window_size": 8, "mem_len": 16}, 24, True,
    ),
    "long_short causal short": ("CausalLS", {"chunk_size": 4, "window_size": 8, "mem_len": 8}, 6,
                                False),
}  # fmt: skip
PADDED = 7
"""Tokens at the end of the last example that are padding, where there is padding."""


def inputs(name: str) -> np.ndarray:
    """Return the tokens `[b,t,d]` of a case."""
    length = CASES[name][2]
    return np.random.default_rng(length).standard_normal((B, length, D)).astype(np.float32)


def valid(name: str) -> np.ndarray | None:
    """Return which tokens are no padding, `[b,t]`; None if all."""
    _, _, length, is_padded = CASES[name]
    return np.arange(length) < [[length], [length - PADDED]] if is_padded else None


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name and the shape alone."""
    uniform = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("log_dt"):
        values = -3.5 + uniform
    elif name.endswith("log_w_real"):
        values = math.log(0.5) + 0.2 * uniform
    elif name.endswith("w_imag"):
        values = 10 + 10 * uniform
    elif "ln" in name and name.endswith("weight"):
        values = 1 + 0.3 * uniform
    elif name.endswith("weight"):
        values = uniform * math.sqrt(6 / shape[-1])
    else:
        values = uniform
    return values.astype(np.float32)


def params(name: str) -> dict:
    """Return the weights of a case as our parameters."""
    kind, options, _, _ = CASES[name]
    h = D // HEADS
    if kind == "S4D":
        ways = 2 if options.get("bidirectional") else 1
        kernel = "kernel.kernel."
        out = formula("output_linear.weight", (D, HEADS * D)).T
        return {
            "log_dt": formula(f"{kernel}log_dt", (D,)),
            "log_decay": formula(f"{kernel}log_w_real", (1, 8)),
            "frequency": formula(f"{kernel}w_imag", (1, 8)),
            "output": formula(f"{kernel}C", (ways * HEADS, D, 8, 2)),
            "skip": formula("D", (HEADS, D)),
            "out": {
                "kernel": out.reshape(HEADS, D, D),
                "bias": formula("output_linear.bias", (D,)),
            },
        }

    def linear(theirs, width=h, has_bias=True):
        kernel = formula(f"{theirs}.weight", (HEADS * width, D)).T.reshape(D, HEADS, width)
        bias = formula(f"{theirs}.bias", (HEADS * width,)).reshape(HEADS, width)
        return {"kernel": kernel} | ({"bias": bias} if has_bias else {})

    norm = lambda theirs: {
        "scale": formula(f"{theirs}.weight", (D,)),
        "bias": formula(f"{theirs}.bias", (D,)),
    }
    if kind == "AttentionLS":
        out = linear("W_o")
        return {
            **{ours: linear(f"W_{ours[0]}") for ours in ("query", "key", "value")},
            "out": {
                "kernel": formula("W_o.weight", (D, D)).T.reshape(HEADS, h, D),
                "bias": out["bias"].reshape(D),
            },
            "pool": linear("dconv_fc", options["num_landmarks"]),
            "norm_window": norm("dual_ln_l"),
            "norm_pool": norm("dual_ln_s"),
        }
    return {
        "query": linear("proj_query", has_bias=False),
        "key": linear("proj_key", has_bias=False),
        "value": linear("proj_val", has_bias=False),
        "out": {"kernel": formula("proj_out.weight", (D, D)).T.reshape(HEADS, h, D)},
        "pool": linear("dconv_1", options.get("chunk_rank", 1)),
        "norm_window": norm("dual_ln_win"),
        "norm_pool": norm("dual_ln_dproj"),
        "window_position": linear("r_net", has_bias=False),
        "chunk_position": linear("r_net_chunk"),
        "content_bias": formula("r_w_bias", (1, HEADS, 1, 1, h)).reshape(HEADS, h),
        "position_bias": formula("r_r_bias", (1, HEADS, 1, h)).reshape(HEADS, h),
    }


def run(library, name: str) -> np.ndarray:
    """Return the output `[b,t,d]` of the reference for one case."""
    import torch

    kind, options, _, _ = CASES[name]
    module = library.get_cls(kind)(embed_dim=D, num_heads=HEADS, **options).eval()
    mask = valid(name)
    if mask is not None:
        mask = torch.from_numpy(~mask)
    x = torch.from_numpy(inputs(name))
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if not key.endswith("inv_freq"):
                value.copy_(torch.from_numpy(formula(key, tuple(value.shape))))
        out, _ = module(x, x, x, key_padding_mask=mask, batch_first=True)
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
