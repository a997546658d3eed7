# SPDX-License-Identifier: Apache-2.0
"""Write decoder.npz: hidden states and logits of transformers' decoders on formula-made weights.

Run:  python tests/goldens/make_decoder.py

Needs torch and transformers. Weights are functions of names and shapes, so that they need not be
stored, and the test needs neither package.
"""

import math
import pathlib
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("decoder.npz")
SIZES = dict(vocab_size=40, width=32, depth=3, hidden=48, length=24)

# name -> fields of our model; the first word is the family.
CASES = {
    "llama": SIZES | dict(heads=(4, 4)),
    "llama grouped": SIZES | dict(heads=(4, 2), rotary=500_000.0, epsilon=1e-3),
    "mistral window": SIZES | dict(heads=(4, 2), window=5),
    "qwen2": SIZES
    | dict(heads=(4, 1), rotary=1_000_000.0, epsilon=1e-6, projections="biased", tied=True),
    "qwen2 bidirectional": SIZES
    | dict(heads=(4, 2), projections="biased", tied=True, epsilon=1e-6, attention="bidirectional"),
    "llama scaled": SIZES
    | dict(heads=(4, 2), rotary={"base": 100.0, "scaling": (8.0, 1.0, 4.0, 16)}, epsilon=1e-6),
    "qwen3": SIZES | dict(heads=(4, 2, 12), projections="normed", epsilon=1e-6),
}


def tokens() -> np.ndarray:
    """Return the token ids `[2, 24]` of all cases."""
    return (np.arange(48).reshape(2, 24) * 7 + 3 * np.arange(2)[:, None]) % 40


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name, the index and the shape alone.

    Norm weights lie around 1; matrices are scaled so that activations keep their size.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    uniform = rng.uniform(-1, 1, shape)
    if len(shape) == 1:
        values = 0.3 * uniform if name.endswith("bias") else 1 + 0.2 * uniform
    elif "embed" in name:
        values = uniform
    else:
        values = uniform * math.sqrt(3 / shape[1])
    return values.astype(np.float32)


def rope(rotary) -> dict:
    """Return transformers' parameters of our rotary positions."""
    if not isinstance(rotary, dict):
        return {"rope_type": "default", "rope_theta": rotary}
    factor, low, high, length = rotary["scaling"]
    return {
        "rope_type": "llama3", "rope_theta": rotary["base"], "factor": factor,
        "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }  # fmt: skip


def run(name: str) -> dict[str, np.ndarray]:
    """Return `hidden [l+1, b, t, d]` and `logits [b, t, v]` of the reference for one case."""
    import torch
    import transformers

    family, fields = name.split()[0], CASES[name]
    n, k, *width = fields["heads"]
    options = dict(
        vocab_size=fields["vocab_size"], hidden_size=fields["width"],
        num_hidden_layers=fields["depth"], num_attention_heads=n, num_key_value_heads=k,
        intermediate_size=fields["hidden"], rms_norm_eps=fields.get("epsilon", 1e-5),
        tie_word_embeddings=fields.get("tied", False), attn_implementation="eager",
        max_position_embeddings=64,
        rope_parameters=rope(fields.get("rotary", 10_000.0)),
    )  # fmt: skip
    if width:
        options["head_dim"] = width[0]
    if family == "mistral":
        options["sliding_window"] = fields.get("window")
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key != "lm_head.weight" or not fields.get("tied"):
                value.copy_(torch.from_numpy(formula(key, tuple(value.shape))))
        extra = {}
        if fields.get("attention") == "bidirectional":
            extra["attention_mask"] = torch.zeros((2, 1, 24, 24), dtype=torch.float64)
        output = model(torch.from_numpy(tokens()), output_hidden_states=True, **extra)
    hidden = torch.stack(output.hidden_states).numpy()
    return {"hidden": hidden.astype(np.float32), "logits": output.logits.numpy().astype(np.float32)}


def main() -> None:
    """Run every case and write the file."""
    results = {f"{name}/{part}": array for name in CASES for part, array in run(name).items()}
    np.savez_compressed(GOLDENS, **results)
    print(f"{GOLDENS}: {len(CASES)} cases, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
