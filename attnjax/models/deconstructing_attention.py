# SPDX-License-Identifier: Apache-2.0
"""A decoder whose layers give up one principle of softmax attention, all of them or some.

Xue, Moosavi and Aletras, "Deconstructing Attention: Investigating Design Principles for Effective
Language Modeling", arXiv 2510.11602. No code was found at the announced address; implemented from
the paper's text. What it leaves open is our design: the size of the MLP mixer (the parameters of
the projections it replaces), rotary positions of the Taylor series, the norm of a layer before the
queries and keys of another stream, and that the stream of a constant sequence has gradients.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attention import CAPTURE, Projection
from attnjax.nn.norm import RMSNorm
from attnjax.nn.stack import check_tokens, token_logits
from attnjax.nn.text import (
    LOGITS,
    REMATS,
    DecoderLayer,
    Kernel,
    RotaryAttention,
    SwiGlu,
    TokenTable,
    starts,
)
from attnjax.ops.cache import FullCache
from attnjax.ops.efficient import Stream
from attnjax.ops.positions import Rotary
from attnjax.ops.relaxed import (
    MIXERS,
    CumulativeState,
    TaylorState,
    check_taylor,
    cumulative_logits,
    cumulative_map,
    cumulative_softmax,
    extend_cumulative,
    extend_taylor,
    taylor_attention,
)
from attnjax.parallel.constrain import gather
from attnjax.registry import nearest
from attnjax.typing import Array, Params
from attnjax.weights.names import rule

PAPER = {
    "title": "Deconstructing Attention: Investigating Design Principles for Effective Language "
    "Modeling",
    "id": "arXiv:2510.11602",
    "year": 2025,
    "code": "https://github.com/HUIYINXUE/DeconAttn (announced, not found)",
    "licence": "not found",
    "claim": "Mixing tokens is indispensable; the exact form of attention and its dependence on "
    "the sequence can be relaxed, above all in layers between standard ones.",
}

_SIZES = {"vocab_size": 50_304, "length": 2048}

# Sizes: the table of models in the paper's Appendix; vocabulary: that of Pythia, padded; grouped
# heads: the published configuration of Qwen2.5-0.5B.
PRESETS = {
    "70m": {**_SIZES, "width": 512, "depth": 6, "heads": (8, 8), "hidden": 2048},
    "160m": {**_SIZES, "width": 768, "depth": 12, "heads": (12, 12), "hidden": 3072},
    "500m": {**_SIZES, "width": 896, "depth": 24, "heads": (14, 14), "hidden": 4864},
    "500m-gqa": {**_SIZES, "width": 896, "depth": 24, "heads": (14, 2), "hidden": 4864},
    "1.7b": {
        **_SIZES, "width": 2048, "depth": 28, "heads": (16, 16), "hidden": 6144,
        "family": "qwen3", "tied": False,
    },
}  # fmt: skip

FAMILIES = ("qwen2", "qwen3")
"""Biases on query, key and value; or norms of queries and keys instead."""

CONSTANT = ("random_embedding", "fixed_sequence")
"""Mixers whose queries and keys are those of one constant sequence."""

SKIPS = ("none", "layer", "mixer")

OPTIONS = {
    "approximate": {"norm": "separate", "second": "diagonal", "epsilon": 1e-6},
    "random_embedding": {"sigma": 0.02, "seed": 0},
    "fixed_sequence": {"tokens": (), "seed": 0},
}
"""Options of mixers, with the paper's values where it has some."""

EPSILON = 1e-6


def _every(step, depth):
    return range(step, depth + 1, step)


_LAYOUTS = {
    "uniform": lambda n: (),
    "hybrid": lambda n: _every(2, n),
    "even": lambda n: _every(2, n),
    "odd": lambda n: range(1, n + 1, 2),
    "top": lambda n: range(1, n // 2 + 1),
    "middle": lambda n: (*range(1, n // 4 + 1), *range(n - n // 4 + 1, n + 1)),
    "bottom": lambda n: range(n // 2 + 1, n + 1),
    "quarter": lambda n: _every(4, n),
    "first": lambda n: (1,),
    "last": lambda n: (n,),
    "bilateral": lambda n: (1, n),
}

LAYOUTS = tuple(_LAYOUTS)
"""Where the standard layers are; "top" is near the input, as in the paper's table of names."""


def standard_layers(layout: Any, depth: int) -> tuple[int, ...]:
    """Return the numbers of the standard layers, counted from 1.

    Args:
      layout: a member of `LAYOUTS`, or the numbers themselves.
      depth: number of layers.

    Returns:
      Rising numbers.

    Raises:
      RecipeError: there is no such layout, or a number is no layer.
    """
    if isinstance(layout, str):
        if layout not in _LAYOUTS:
            raise RecipeError(f"model.layout={layout!r}: {nearest(layout, _LAYOUTS)}")
        layout = _LAYOUTS[layout](depth)
    layers = sorted(set(layout))
    for layer in layers:
        if not isinstance(layer, int) or not 1 <= layer <= depth:
            raise RecipeError(f"model.layout: layer {layer!r} is none of 1 to {depth}")
    return tuple(layers)


@flax.struct.dataclass
class Output:
    """What the model returns.

    Attributes:
      logits: `[b, t, v]` float32.
      aux: with Taylor series, `negative_denominators`: the share of first-order denominators below
        zero, where gradients explode, float32 scalar; empty with other mixers.
    """

    logits: Array
    aux: dict[str, Array]


class CumulativeAttention(RotaryAttention):
    """Non-approximate: the weight of a token is the same for all later ones.

    Q = silu(H W_query), K = H W_key. A query meets the key of its own place alone, so that rotary
    positions would cancel.
    """

    def mix(self, query, key, value, positions, segments, lengths, cache):
        del positions, lengths
        query = jax.nn.silu(query)
        if self.is_captured(CAPTURE):
            weights_bnts = cumulative_map(query, key, segments=segments)
            self.capture(weights_bnts, None, value.shape[0])
        if self.is_captured(LOGITS):
            logits_bnt = jnp.moveaxis(cumulative_logits(query, key), 1, 2)
            self.capture(None, logits_bnt[..., None], value.shape[0])
        if cache is not None:
            return *extend_cumulative(query, key, value, cache), {}
        return cumulative_softmax(query, key, value, segments=segments), None, {}


class TaylorAttention(RotaryAttention):
    """Approximate: the second-order series of exp, with rotary positions.

    Attributes:
      options: norm, second and epsilon of `ops.relaxed.taylor_attention`.
    """

    options: Any = None

    def mix(self, query, key, value, positions, segments, lengths, cache):
        del lengths
        options = dict(self.options or {})
        query, key = self.turn(query, positions), self.turn(key, positions)
        if cache is not None:
            out, cache = extend_taylor(query, key, value, cache, positions[0, 0], **options)
            return out, cache, {}
        out_btnh, (_, first_btn, _) = taylor_attention(
            query, key, value, segments=segments, return_denominators=True, **options
        )
        return out_btnh, None, {"negative_denominators": jnp.mean(first_btn < 0)}


class ChannelMixer(nn.Module):
    """MLP: no token knows of another. out = SwiGlu(x) W_out, with as many parameters as attention.

    Attributes:
      heads: query heads n and key/value heads k of the attention it replaces.
      dtype: compute dtype.
    """

    heads: tuple
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, positions, segments=None, lengths=None, cache=None, source=None):
        """Map `x [b, t, d]`; called as `RotaryAttention`."""
        del positions, segments, lengths, source
        (n, k), (b, t, d) = self.heads, x.shape
        hidden_btd = SwiGlu(max(1, round(d * (n + 2 * k) / (3 * n))), self.dtype, name="mlp")(x)
        kernel, _ = Projection((n, d // n, d), None, self.dtype, name="out")()
        hidden_btnh = hidden_btd.reshape(b, t, n, d // n)
        out_btd = jnp.einsum("btnh,nhd->btd", hidden_btnh, gather(kernel, "heads", None, None))
        return out_btd, cache, {}


class NoMixer(nn.Module):
    """Adds nothing: takes the place of a mixer that is left out."""

    @nn.compact
    def __call__(self, x, positions, segments=None, lengths=None, cache=None, source=None):
        """Return zeros of the shape of x; called as `RotaryAttention`."""
        del positions, segments, lengths, source
        return jnp.zeros_like(x), cache, {}


class RelaxedDecoder(nn.Module):
    """Qwen2.5's or Qwen3's decoder with relaxed mixers in some layers, standard ones in the others.

    Parameters beside the mixers, and those of mixers with queries and keys, are drawn alike for all
    mixers from one key. Layers are numbered from 1.

    Attributes:
      vocab_size: v.
      length: tokens of an example for `example` and `flops`, and of the constant sequence of
        "random_embedding" and "fixed_sequence", which no example may exceed.
      width: d.
      depth: number of layers.
      heads: query heads, which divide the width, and key/value heads, which divide them.
      hidden: hidden width of the channel stage.
      mixer: of the relaxed layers, a member of `MIXERS`.
      layout: which layers are standard: a member of `LAYOUTS`, or their numbers.
      skip: what is left out of the relaxed layers of a trained model: "none", the whole "layer", or
        the "mixer". Parameters are the same.
      options: of the mixer, see `OPTIONS`. "approximate": `norm`, `second`, `epsilon`;
        "random_embedding": `sigma` and `seed` of the constant; "fixed_sequence": its `tokens`, at
        least as many as the length, drawn evenly from `seed` where there are none.
      family: a member of `FAMILIES`.
      rope_base: of the rotary wavelengths.
      tied: the head is the transposed token table.
      dtype: compute dtype; logits are float32.
      remat: a key of `nn.text.REMATS`: what the backward pass computes again.
      attention_implementation: passed to `nn.attend`.
    """

    vocab_size: int = 256
    length: int = 128
    width: int = 64
    depth: int = 2
    heads: tuple = (4, 4)
    hidden: int = 128
    mixer: str = "standard"
    layout: Any = "uniform"
    skip: str = "none"
    options: Any = None
    family: str = "qwen2"
    rope_base: float = 1_000_000.0
    tied: bool = True
    dtype: str = "float32"
    remat: str = "none"
    attention_implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, known in (
            ("mixer", MIXERS), ("skip", SKIPS), ("family", FAMILIES), ("remat", REMATS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(f"model.{name}={value!r}: {nearest(value, known)}")
        for name in ("vocab_size", "length", "width", "depth", "hidden"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if len(self.heads) != 2 or min(self.heads) < 1 or self.heads[0] % self.heads[1]:
            raise RecipeError(
                f"model.heads={tuple(self.heads)}: must be query heads and a divisor of their "
                "number, the key/value heads"
            )
        if self.width % (2 * self.heads[0]):
            raise RecipeError(
                f"model.width={self.width}: must be an even multiple of the {self.heads[0]} heads"
            )
        standard_layers(self.layout, self.depth)
        self._check_options()

    def _check_options(self):
        known = OPTIONS.get(self.mixer, {})
        for name in self.options or {}:
            if name not in known:
                raise RecipeError(
                    f"model.options: {self.mixer} has no {name!r}: {nearest(name, known)}"
                )
        options = self.mixer_options
        if self.mixer == "approximate":
            try:
                check_taylor(options["norm"], options["second"])
            except ValueError as error:
                raise RecipeError(f"model.options: {error}") from error
            if not options["epsilon"] > 0:
                raise RecipeError(f"model.options: epsilon={options['epsilon']}: must be above 0")
        if self.mixer == "random_embedding" and not options["sigma"] > 0:
            raise RecipeError(f"model.options: sigma={options['sigma']}: must be above 0")
        tokens = options.get("tokens", ())
        if len(tokens) and len(tokens) < self.length:
            raise RecipeError(
                f"model.options: {len(tokens)} tokens of the fixed sequence, but "
                f"model.length={self.length}"
            )
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise RecipeError(
                f"model.options: tokens of the fixed sequence must be in 0 to {self.vocab_size - 1}"
            )

    @property
    def mixer_options(self) -> dict[str, Any]:
        """The options of the mixer, with the defaults of those that are not given."""
        return {**OPTIONS.get(self.mixer, {}), **(self.options or {})}

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of every layer."""
        standard = standard_layers(self.layout, self.depth)
        return tuple(
            "standard" if layer in standard else self.mixer for layer in range(1, self.depth + 1)
        )

    @property
    def is_causal(self) -> bool:
        """Whether tokens see no later ones: always."""
        return True

    def setup(self):
        self.embed = TokenTable(self.vocab_size, self.width, self.dtype)
        layer = DecoderLayer
        if REMATS[self.remat] is not None:
            layer = nn.remat(layer, policy=REMATS[self.remat])
        self.layers = [
            layer(
                heads=tuple(self.heads), hidden=self.hidden, epsilon=EPSILON, dtype=self.dtype,
                mixer=self._factory(mixer),
            )
            for mixer in self.mixers
        ]  # fmt: skip
        self.norm = RMSNorm(EPSILON, self.dtype)
        if not self.tied:
            self.head = Kernel((self.width, self.vocab_size))

    def _factory(self, mixer):
        heads = tuple(self.heads)
        if mixer != "standard" and self.skip == "mixer" and not self.is_initializing():
            return NoMixer
        if mixer == "mlp":
            return functools.partial(ChannelMixer, heads, self.dtype)
        is_qwen2 = self.family == "qwen2"
        shared = {
            "heads": heads, "rotary": Rotary(self.rope_base), "qkv_bias": is_qwen2,
            "head_epsilon": None if is_qwen2 else EPSILON, "dtype": self.dtype,
            "implementation": self.attention_implementation,
        }  # fmt: skip
        if mixer == "non_approximate":
            return functools.partial(CumulativeAttention, **shared)
        if mixer == "approximate":
            return functools.partial(TaylorAttention, **shared, options=self.mixer_options)
        return functools.partial(RotaryAttention, **shared)

    def __call__(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> Output:
        """Score the next token at every place.

        Args:
          tokens: int `[b, t]` in [0, v).
          segments: int `[b, t]`, documents packed into one example: tokens see those of their own
            number only. 0 is padding, on either side.
          train: without effect: there is no dropout.

        Returns:
          An `Output`.

        Raises:
          ValueError: arguments have the wrong shape, or are longer than the constant sequence.
        """
        hidden_btd, aux = self.encode(tokens, segments, train=train)
        return Output(self._logits(hidden_btd), aux)

    def encode(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False
    ) -> tuple[Array, dict[str, Array]]:
        """Return the normalised last hidden states `[b, t, d]`, and `Output.aux`.

        Arguments as in `__call__`.
        """
        del train
        check_tokens(tokens=tokens, segments=segments)
        t = tokens.shape[1]
        places = jnp.arange(t, dtype=jnp.int32)[None]
        positions = places if segments is None else starts(segments)
        x = first = self.embed(tokens)
        constant, measured = self._constant(t), []
        for number, (mixer, layer) in enumerate(zip(self.mixers, self.layers, strict=True), 1):
            if self._is_left_out(mixer):
                continue
            source = None
            if mixer == "static_embedding":
                source = first
            elif mixer in CONSTANT:
                # Where positions differ between examples, so do the maps.
                source = constant if segments is None else jnp.take(constant[0], positions, axis=0)
            x, (_, measures) = layer(x, positions, segments, None, None, source)
            measured.append(measures)
            if number < self._last_constant:
                constant, _ = layer(constant, places, None, None, None)
        return self.norm(x), _means(measured)

    def empty_cache(self, batch: int, capacity: int, dtype: Any = None) -> Stream:
        """Return a cache without tokens for `extend`.

        Called as `model.apply(variables, batch, capacity, method="empty_cache")`: the streams of a
        constant sequence are functions of the parameters, computed here once for all examples.

        Args:
          batch: number of examples.
          capacity: most tokens of an example.
          dtype: of the storage; the compute dtype by default.

        Returns:
          A `Stream` whose state has what every layer keeps, `layers`, and the inputs
          `[1, capacity, d]` of the layers that the constant sequence has maps in, `constants`.

        Raises:
          ValueError: the capacity exceeds the constant sequence.
        """
        (n, k), dtype = self.heads, dtype or self.dtype
        h = self.width // n
        sizes = {"heads": k, "width": h, "capacity": capacity, "dtype": dtype}
        constant, places = self._constant(capacity), jnp.arange(capacity, dtype=jnp.int32)[None]
        layers, constants = [], []
        for number, (mixer, layer) in enumerate(zip(self.mixers, self.layers, strict=True), 1):
            constants.append(constant if mixer in CONSTANT else None)
            if mixer in CONSTANT:
                state = FullCache.empty(batch=1, value_width=batch * h, **sizes)
            elif mixer == "non_approximate":
                state = CumulativeState.empty(batch, n, h, dtype)
            elif mixer == "approximate":
                state = TaylorState.empty(batch, n, h, self.mixer_options["second"], dtype)
            else:
                state = None if mixer == "mlp" else FullCache.empty(batch=batch, **sizes)
            layers.append(state)
            if number < self._last_constant and not self._is_left_out(mixer):
                constant, _ = layer(constant, places, None, None, None)
        state = {"layers": tuple(layers), "constants": tuple(constants)}
        return Stream(jnp.zeros((), jnp.int32), state)

    def extend(self, tokens: Array, cache: Stream) -> tuple[Output, Stream]:
        """Score the next token after each of some new ones: a prompt, or a step of decoding.

        Args:
          tokens: int `[b, c]`, the new ones; all examples grow alike.
          cache: from `empty_cache`, or from the call before.

        Returns:
          The output for the new tokens, and the cache afterwards.

        Raises:
          ValueError: the cache is for another model.
        """
        check_tokens(tokens=tokens)
        if len(cache.state["layers"]) != self.depth:
            raise ValueError(
                f"the cache is for {len(cache.state['layers'])} layers, not {self.depth}: make it "
                "with empty_cache"
            )
        c = tokens.shape[1]
        positions = cache.position + jnp.arange(c, dtype=jnp.int32)[None]
        x = first = self.embed(tokens)
        states = list(cache.state["layers"])
        for i, (mixer, layer) in enumerate(zip(self.mixers, self.layers, strict=True)):
            if self._is_left_out(mixer):
                continue
            source = first if mixer == "static_embedding" else None
            if mixer in CONSTANT:
                stream = cache.state["constants"][i]
                source = jax.lax.dynamic_slice_in_dim(stream, cache.position, c, axis=1)
            x, (states[i], _) = layer(x, positions, None, None, states[i], source)
        state = {**cache.state, "layers": tuple(states)}
        return Output(self._logits(self.norm(x)), {}), Stream(cache.position + c, state)

    def head_kernel(self, params: Params) -> Array:
        """Return the matrix `[d, v]` float32 that turns hidden states into logits."""
        return params["embed"]["embedding"].T if self.tied else params["head"]["kernel"]

    def attention_maps(self, captured: Mapping[str, Any]) -> dict[str, Array]:
        """Return where the last token looks, averaged over heads.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.

        Returns:
          Title -> `[b, 1, s]` for the first and the last layer that has a map; empty where none
          has one.
        """
        maps = self.layer_maps(captured)
        return {
            f"last token, layer {layer}": maps[layer][:, :, -1].mean(axis=1)[:, None]
            for layer in sorted({*list(maps)[:1], *list(maps)[-1:]})
        }

    def layer_maps(self, captured: Mapping[str, Any]) -> dict[int, Array]:
        """Return the maps of all layers that have one: number of the layer -> `[b,n,t,s]` float32.

        The MLP and Taylor mixers have none.

        Args:
          captured: what `apply(..., mutable=["attention"])` returned beside the output.
        """
        captured = captured.get(CAPTURE, captured)
        names = ((number, f"layers_{number - 1}") for number in range(1, self.depth + 1))
        return {
            number: captured[name]["attention"]["probabilities"][0]
            for number, name in names
            if "attention" in captured.get(name, {})
        }

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of the inputs."""
        return {"tokens": jax.ShapeDtypeStruct((batch, self.length), jnp.int32)}

    def flops(self) -> float:
        """Count the matrix products of one example's forward pass; a multiply-add is two.

        Pairs of tokens that a mask hides are not counted, nor is the stream of a constant sequence,
        which all examples share.
        """
        (n, k), d, t = self.heads, self.width, self.length
        pairs = t * (t + 1) // 2
        features = d // n if self.mixer_options.get("second") != "full" else (d // n) ** 2
        mixing = {
            "standard": 4.0 * d * pairs,
            "static_embedding": 4.0 * d * pairs,
            "approximate": 4.0 * t * d * (1 + d // n + features),
        }
        mixing |= dict.fromkeys(CONSTANT, 2.0 * d * pairs)
        total = 2.0 * t * d * self.vocab_size
        for mixer in self.mixers:
            if not self._is_left_out(mixer):
                projections = 2 * d * d + 2 * d * (d // n) * k
                total += 2.0 * t * (projections + 3 * d * self.hidden) + mixing.get(mixer, 0.0)
        return total

    @property
    def _last_constant(self):
        """The number of the last layer with a map of the constant sequence; 0 if there is none."""
        return max((i for i, mixer in enumerate(self.mixers, 1) if mixer in CONSTANT), default=0)

    def _is_left_out(self, mixer):
        is_skipped = self.skip == "layer" and mixer != "standard"
        return is_skipped and (self.scope is None or not self.is_initializing())

    def _constant(self, t):
        """Return the first t vectors of the constant sequence `[1, t, d]`; None without one."""
        if not self._last_constant:
            return None
        if t > self.length:
            raise ValueError(
                f"{t} tokens, but the constant sequence of {self.mixer} has model.length="
                f"{self.length}"
            )
        options = self.mixer_options
        key = jax.random.key(options["seed"])
        if self.mixer == "random_embedding":
            shape = (self.length, self.width)
            noise_td = options["sigma"] * jax.random.normal(key, shape, jnp.float32)
            return noise_td[None, :t].astype(self.dtype)
        tokens = jnp.asarray(options["tokens"], jnp.int32)
        if not tokens.size:
            tokens = jax.random.randint(key, (self.length,), 0, self.vocab_size)
        return self.embed(tokens[None, :t])

    def _logits(self, hidden_btd):
        return token_logits(
            hidden_btd, self.embed.embedding.T if self.tied else self.head()
        )  # fmt: skip


def _means(measured):
    """Average what the layers measured, over those that did."""
    names = {name for measures in measured for name in measures}
    take = lambda name: [measures[name] for measures in measured if name in measures]
    return {name: jnp.mean(jnp.stack(take(name))) for name in sorted(names)}


def _names():
    ours, theirs = "layers_{}/attention", "model.layers.{}.self_attn"
    yield rule("embed/embedding", "model.embed_tokens.weight")
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        yield rule(f"{ours}/{part}/kernel", f"{theirs}.{letter}_proj.weight", "in")
        yield rule(f"{ours}/{part}/bias", f"{theirs}.{letter}_proj.bias", "vector")
    for part, letter in (("query", "q"), ("key", "k")):
        yield rule(f"{ours}/{part}_norm/scale", f"{theirs}.{letter}_norm.weight")
    yield rule(f"{ours}/out/kernel", f"{theirs}.o_proj.weight", "out")
    for part in ("gate", "up", "down"):
        tensor = f"model.layers.{{}}.mlp.{part}_proj.weight"
        yield rule(f"layers_{{}}/mlp/{part}/kernel", tensor, "in")
    yield rule("layers_{}/attention_norm/scale", "model.layers.{}.input_layernorm.weight")
    yield rule("layers_{}/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight")
    yield rule("norm/scale", "model.norm.weight")
    yield rule("head/kernel", "lm_head.weight", "in")


TORCH_NAMES = {"hf": tuple(_names())}
"""Layout -> name table: Qwen2's and Qwen3's. MLP mixers exist in no published layout."""
