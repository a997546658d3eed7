# SPDX-License-Identifier: Apache-2.0
"""The same model in somebody else's library, to compare the speed of a training step."""

import dataclasses
from collections.abc import Callable

import numpy as np

from attnjax.errors import RecipeError
from attnjax.models.load import build as build_model
from attnjax.recipe import Recipe
from attnjax.registry import nearest

TIMM_NAMES = {
    ("crossvit", "tiny"): "crossvit_tiny_240",
    ("crossvit", "small"): "crossvit_small_240",
    ("crossvit", "base"): "crossvit_base_240",
    ("crossvit", "9"): "crossvit_9_240",
    ("crossvit", "15"): "crossvit_15_240",
    ("crossvit", "18"): "crossvit_18_240",
    ("crossvit", "9-dagger"): "crossvit_9_dagger_240",
    ("crossvit", "15-dagger"): "crossvit_15_dagger_240",
    ("crossvit", "18-dagger"): "crossvit_18_dagger_240",
    ("crossvit", "15-dagger-384"): "crossvit_15_dagger_408",
    ("crossvit", "18-dagger-384"): "crossvit_18_dagger_408",
}
"""(slug, preset) -> name in timm."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation of a recipe's model.

    Attributes:
      name: library and version.
      parameters: trained scalars.
      forward: logits of a fixed batch, evaluation mode; waits for the result.
      step: one optimiser step on a fixed batch; waits for the result.
      decode: writes `DECODED` tokens behind every prompt of a fixed batch; None for other models.
    """

    name: str
    parameters: int
    forward: Callable[[], object]
    step: Callable[[], object]
    decode: Callable[[], object] | None = None


PROMPT, DECODED = 32, 64
"""Tokens of a prompt, and tokens written behind it, where decoding is measured."""


def build(name: str, recipe: Recipe, threads: int) -> Peer:
    """Build a peer for a recipe.

    Args:
      name: "timm" for a classification recipe whose model has a preset; "transformers" for one of
        the decoder.
      recipe: float32.
      threads: CPU threads it may use.

    Returns:
      The peer, at random weights and on random inputs.

    Raises:
      RecipeError: no such peer, it is not installed, or it has no such model.
    """
    makers = {"timm": _timm, "transformers": _transformers}
    if name not in makers:
        raise RecipeError(f"--peer={name!r}: {nearest(name, makers)}")
    return makers[name](recipe, threads)


def _timm(recipe, threads):
    try:
        import timm
        import torch
    except ImportError as error:
        raise RecipeError(
            f"--peer=timm needs the extra parity: pip install 'attnjax[parity]' ({error})"
        ) from error
    model, optim = recipe.model, recipe.optim
    title = TIMM_NAMES.get((model["name"], model.get("preset", "")))
    if title is None:
        raise RecipeError(f"timm has no counterpart of {model['name']}, preset {model['preset']!r}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    classes = model.get("num_classes", 1000)
    net = timm.create_model(
        title, num_classes=classes, drop_path_rate=float(model.get("drop_path", 0.0))
    )
    side = net.img_size[0] if isinstance(net.img_size, (tuple, list)) else net.img_size
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((recipe.batch, 3, side, side), np.float32))
    label = torch.from_numpy(rng.integers(0, classes, recipe.batch))
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=recipe.task.get("label_smoothing", 0.0))
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip

    def forward():
        net.eval()
        with torch.inference_mode():
            return net(image).numpy()

    def step():
        net.train()
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(net(image), label)
        loss.backward()
        optimizer.step()
        return loss.item()

    count = sum(x.numel() for x in net.parameters())
    return Peer(f"timm {timm.__version__}, torch {torch.__version__}", count, forward, step)


def _transformers(recipe, threads):
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RecipeError(
            "--peer=transformers needs torch and transformers: pip install 'attnjax[parity]' "
            f"transformers ({error})"
        ) from error
    if recipe.model.get("name") != "decoder":
        raise RecipeError(f"--peer=transformers: no counterpart of {recipe.model.get('name')!r}")
    fields = {k: v for k, v in recipe.model.items() if k not in ("name", "preset", "weights")}
    model, optim = (
        build_model("decoder", recipe.model.get("preset") or None, **fields),
        recipe.optim,
    )
    plain = model.projections == "plain" and len(model.heads) == 2
    if model.attention != "causal" or model.window or model.experts or not plain:
        raise RecipeError("--peer=transformers: only plain LLaMA shapes are compared")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.width, num_hidden_layers=model.depth,
            intermediate_size=model.hidden, num_attention_heads=model.heads[0],
            num_key_value_heads=model.heads[1], tie_word_embeddings=model.tied,
            rms_norm_eps=model.epsilon, max_position_embeddings=model.length,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shape = (recipe.batch, model.length)
    tokens = torch.from_numpy(rng.integers(0, model.vocab_size, shape))
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip

    def forward():
        net.eval()
        with torch.inference_mode():
            return net(tokens, labels=tokens).loss.item()

    def step():
        net.train()
        optimizer.zero_grad(set_to_none=True)
        loss = net(tokens, labels=tokens).loss
        loss.backward()
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), optim.clip)
        optimizer.step()
        return loss.item()

    def decode():
        net.eval()
        with torch.inference_mode():
            return net.generate(
                tokens[:, :PROMPT], max_new_tokens=DECODED, do_sample=False, use_cache=True
            )

    count = sum(x.numel() for x in net.parameters())
    name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Peer(name, count, forward, step, decode)
