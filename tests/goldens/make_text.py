# SPDX-License-Identifier: Apache-2.0
"""Write text.npz: what transformers' and PyTorch's text models compute on formula-made weights.

Run:  python tests/goldens/make_text.py

Needs torch and transformers. Weights are functions of names and shapes, so that they need not be
stored, and the test needs neither package. Parameters of the published sizes are counted, too.
"""

import math
import pathlib
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("text.npz")
SIZES = dict(vocab_size=40, width=32, depth=2, num_heads=4, hidden=48, length=24)

# name -> slug, layout, fields of our model.
CASES = {
    "gpt2": ("gpt2", "hf", SIZES),
    "bert": ("encoder", "bert", SIZES | dict(family="bert", pooler=True)),
    "roberta": ("encoder", "roberta", SIZES | dict(family="roberta", pooler=True)),
}
PAIRS = dict(vocab_size=40, width=32, depth=(2, 2), num_heads=4, hidden=48, lengths=(16, 12))
"""Fields of our encoder-decoder, whose layers PyTorch has."""


def tokens(name: str) -> np.ndarray:
    """Return the token ids `[2, 16]` of a case; the second text of encoders is padded."""
    ids = 2 + (np.arange(32).reshape(2, 16) * 7 + 3 * np.arange(2)[:, None]) % 38
    if name != "gpt2":
        ids[1, 11:] = {"bert": 0, "roberta": 1}[name]
    return ids


def types(name: str) -> np.ndarray | None:
    """Return the types `[2, 16]` of a case, if it has them."""
    return (np.arange(16)[None] >= [[6], [3]]).astype(np.int64) if name == "bert" else None


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name and the shape alone.

    Norm weights lie around 1; matrices are scaled so that activations keep their size.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    uniform = rng.uniform(-1, 1, shape)
    if len(shape) == 1:
        values = 0.3 * uniform if name.endswith("bias") else 1 + 0.2 * uniform
    elif "embed" in name or "wte" in name or "wpe" in name:
        values = uniform
    else:
        values = uniform * math.sqrt(3 / shape[0])
    return values.astype(np.float32)


def make(name: str):
    """Return the reference model of a case, in float64, with formula-made weights."""
    import torch
    import transformers

    _, _, fields = CASES[name]
    plain = dict(vocab_size=fields["vocab_size"], attn_implementation="eager")
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=fields["width"], n_layer=fields["depth"], n_head=fields["num_heads"],
            n_inner=fields["hidden"], n_positions=fields["length"], bos_token_id=0, eos_token_id=0,
            **plain,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = dict(
            hidden_size=fields["width"], num_hidden_layers=fields["depth"],
            num_attention_heads=fields["num_heads"], intermediate_size=fields["hidden"], **plain,
        )  # fmt: skip
        if name == "bert":
            config = transformers.BertConfig(max_position_embeddings=fields["length"], **sizes)
            model = transformers.BertForMaskedLM(config)
            model.bert.pooler = transformers.BertModel(config).pooler
        else:
            config = transformers.RobertaConfig(
                max_position_embeddings=fields["length"] + 2, type_vocab_size=1,
                layer_norm_eps=1e-5, **sizes,
            )  # fmt: skip
            model = transformers.RobertaForMaskedLM(config)
            model.roberta.pooler = transformers.RobertaModel(config).pooler
    model = model.double().eval()
    tied = ("lm_head.weight", "decoder.weight", "decoder.bias")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not key.endswith(tied) and value.is_floating_point():
                value.copy_(torch.from_numpy(formula(key, tuple(value.shape))))
    return model


def run(name: str) -> dict[str, np.ndarray]:
    """Return `hidden [l+1, b, t, d]`, `logits [b, t, v]` and, of encoders, `pooled [b, d]`."""
    import torch

    model = make(name)
    ids = torch.from_numpy(tokens(name))
    inputs = {"input_ids": ids}
    if name != "gpt2":
        inputs["attention_mask"] = (ids != {"bert": 0, "roberta": 1}[name]).long()
    if types(name) is not None:
        inputs["token_type_ids"] = torch.from_numpy(types(name))
    found = {}
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        if name != "gpt2":
            found["pooled"] = getattr(model, name).pooler(output.hidden_states[-1])
    found |= {"hidden": torch.stack(output.hidden_states), "logits": output.logits}
    return {part: array.numpy().astype(np.float32) for part, array in found.items()}


def pair() -> dict[str, np.ndarray]:
    """Return `source [2, 16]` and `target [2, 12]`; the second source is padded."""
    source, target = tokens("gpt2"), tokens("gpt2")[:, ::-1][:, :12].copy()
    source[1, 11:] = 0
    return {"source": source, "target": target}


def run_pair() -> np.ndarray:
    """Return logits `[b, t, v]` of PyTorch's transformer layers."""
    import torch
    from torch import nn

    v, d = PAIRS["vocab_size"], PAIRS["width"]
    fields = dict(
        d_model=d, nhead=PAIRS["num_heads"], dim_feedforward=PAIRS["hidden"], dropout=0.0,
        activation="gelu", batch_first=True,
    )  # fmt: skip
    embedding = lambda rows: nn.ModuleDict(
        {"tokens": nn.Embedding(v, d), "positions": nn.Embedding(rows, d), "norm": nn.LayerNorm(d)}
    )
    encoder, decoder = nn.TransformerEncoderLayer(**fields), nn.TransformerDecoderLayer(**fields)
    source_length, target_length = PAIRS["lengths"]
    parts = nn.ModuleDict({
        "source_embed": embedding(source_length),
        "target_embed": embedding(target_length),
        "encoder": nn.TransformerEncoder(encoder, PAIRS["depth"][0], enable_nested_tensor=False),
        "decoder": nn.TransformerDecoder(decoder, PAIRS["depth"][1]),
        "head": nn.Linear(d, v, bias=False),
    }).double()  # fmt: skip
    with torch.no_grad():
        for key, value in parts.state_dict().items():
            value.copy_(torch.from_numpy(formula(key, tuple(value.shape))))
        ids = {name: torch.from_numpy(array) for name, array in pair().items()}

        def embed(name):
            part, tokens = parts[f"{name}_embed"], ids[name]
            positions = part["positions"].weight[: tokens.shape[1]]
            return part["norm"](math.sqrt(d) * part["tokens"](tokens) + positions)

        padding = ids["source"] == 0
        memory = parts["encoder"](embed("source"), src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(target_length, dtype=torch.float64)
        hidden = parts["decoder"](
            embed("target"), memory, tgt_mask=causal, memory_key_padding_mask=padding
        )
        return parts["head"](hidden).numpy().astype(np.float32)


def count(kind: str, head: str, config) -> int:
    """Return the parameters of a model of published size, without allocating any."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{kind}{head}")(config)
    return sum(p.numel() for p in model.parameters())


def counts() -> dict[str, int]:
    """Return parameters of the published sizes, by our preset, with head and without."""
    import transformers

    base = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    large = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    roberta = dict(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
    found = {}
    for size, sizes in (("base", base), ("large", large)):
        for kind, extra in (("Bert", {}), ("Roberta", roberta)):
            config = getattr(transformers, f"{kind}Config")(**sizes, **extra)
            name = f"{kind.lower()}_{size}"
            found[f"{name}/masked"] = count(kind, "ForMaskedLM", config)
            found[f"{name}/none"] = count(kind, "Model", config)
    for name, width, depth, heads in (
        ("small", 768, 12, 12), ("medium", 1024, 24, 16), ("large", 1280, 36, 20),
        ("xl", 1600, 48, 25),
    ):  # fmt: skip
        config = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=heads)
        found[f"gpt2/{name}"] = count("GPT2", "LMHeadModel", config)
    return found


def main() -> None:
    """Run every case and write the file."""
    results = {f"{name}/{part}": array for name in CASES for part, array in run(name).items()}
    results["pair/logits"] = run_pair()
    results |= {f"count/{name}": np.int64(number) for name, number in counts().items()}
    np.savez_compressed(GOLDENS, **results)
    print(f"{GOLDENS}: {len(CASES)} cases, {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
