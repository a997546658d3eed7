# SPDX-License-Identifier: Apache-2.0
"""Super-resolution by diffusion: learn to see noise, then sample the picture behind it.

    loss = mean |noise - network(a x + sqrt(1 - a^2) noise, low, a)|

Saharia et al., "Image Super-Resolution via Iterative Refinement", arXiv 2104.07636, Algorithms 1
and 2; settings and metrics of CAB, arXiv 2210.07661.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric, psnr, ssim, to_uint8
from attnjax.nn.pattern_attention import RANDOM
from attnjax.ops import diffusion
from attnjax.tasks.model_task import ModelTask, check_picture, row_name
from attnjax.typing import Array, Batch, Params, PRNGKey

INPUTS = ("noisy", "low", "noise_level")
"""What the network reads."""

RANGE = 1 + 1e-3
"""Largest absolute value of a pixel: pictures are in [-1, 1], up to rounding."""


class SuperResolution(ModelTask):
    """From `low` to `high`, both float32 `[b,y,x,c]` in [-1, 1].

    `low` is the low-resolution picture enlarged to the size of `high`. In evaluation the batch may
    hold `valid [b]` bool. Pictures are sampled with noise from a fixed key and from the picture to
    be enlarged, so that neither its place in a batch nor the batch's size matters.

    Attributes:
      levels: float64 `[T + 1]`, signal levels to train at.
      sample_levels: those that a sample passes through, from the last to the first.
    """

    def __init__(
        self,
        model: Any,
        *,
        steps: int = 2_000,
        schedule: str = "linear",
        first_beta: float = 1e-6,
        last_beta: float = 1e-2,
        sample_steps: int = 0,
        eta: float = 1.0,
        clip: bool = True,
        seed: int = 0,
        ssim_window: int = 11,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module of `noisy`, `low` and `noise_level` that returns `.noise`, such as
            `models.sr3.SR3`.
          steps: T, diffusion steps.
          schedule: name in `ops.diffusion.SCHEDULES`.
          first_beta, last_beta: of the linear schedule.
          sample_steps: steps of a sample, evenly over the schedule; 0: all.
          eta: 1 samples as DDPM, 0 as the deterministic DDIM.
          clip: keep implied clean pictures in [-1, 1] while sampling.
          seed: of the noise in evaluation.
          ssim_window: side of SSIM's window, odd; smaller than 11 for tiny pictures.

        Raises:
          RecipeError: a value is out of range, or the model reads something else.
        """
        super().__init__(model)
        if set(self._model_inputs) != set(INPUTS):
            raise RecipeError(
                f"task super_resolution needs a model of {', '.join(INPUTS)}; "
                f"{type(model).__name__} reads {', '.join(self._model_inputs)}"
            )
        shape = model.example(1)["low"].shape
        if not 1 <= ssim_window <= min(shape[1:3]) or ssim_window % 2 == 0:
            raise RecipeError(
                f"task.ssim_window={ssim_window}: must be odd and at most the picture's side, "
                f"{min(shape[1:3])}"
            )
        try:
            betas = diffusion.betas(schedule, steps, first=first_beta, last=last_beta)
            self.levels = diffusion.signal_levels(betas)
            self.sample_levels = diffusion.stride_levels(self.levels, sample_steps or steps)
            diffusion.reverse_steps(self.sample_levels, eta)
        except ValueError as error:
            raise RecipeError(f"task super_resolution: {error}") from error
        self.eta, self.clip, self.seed, self.ssim_window = eta, clip, seed, ssim_window

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch entries that `loss` reads."""
        return ("low", "high")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        picture = self.model.example(batch)["low"]
        return {"low": picture, "high": picture}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, or pictures of another size or range.

        Raises:
          RecipeError: names the entry, and what it holds.
        """
        self.check_names(batch)
        for name, expected in self.example(1).items():
            array = np.asarray(batch[name])
            check_picture(name, array, expected)
            # Written so that NaN is out of range.
            wrong = ~(np.abs(array) <= RANGE).all(axis=(1, 2, 3))
            if wrong.any():
                row = int(np.argmax(wrong))
                raise RecipeError(
                    f"{name!r} of {row_name(batch, row)} holds "
                    f"{float(np.abs(array[row]).max())}: pixels must be in [-1, 1]; use the "
                    "pipeline picture_pairs"
                )

    def init(self, key: PRNGKey, batch: Mapping[str, Any]) -> Params:
        """Return new parameters; of the batch nothing matters."""
        del batch
        return super().init(key, self.model.example(1))

    def _errors(self, params, batch, noise_byxc, level_b, **options) -> Array:
        """Return the mean absolute error of the noise of every example, `[b]`."""
        noisy_byxc = diffusion.q_sample(batch["high"], noise_byxc, level_b)
        inputs = {"noisy": noisy_byxc, "low": batch["low"], "noise_level": level_b}
        predicted_byxc = self._apply(params, inputs, **options).noise
        return jnp.mean(jnp.abs(noise_byxc - predicted_byxc), axis=(1, 2, 3))

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean absolute error of the noise over pixels and examples.

        Args:
          params: what `init` returned.
          batch: the global batch.
          key: this step's own key.
          step: unused; part of the contract.

        Returns:
          Scalar float32 loss, and it again as `noise_error`. (The released code sums and divides by
          the number of pixels, which is the same.)
        """
        del step
        level_key, noise_key, dropout_key, attention_key = jax.random.split(key, 4)
        high = batch["high"]
        level_b = diffusion.sample_levels(level_key, self.levels, high.shape[0])
        noise_byxc = jax.random.normal(noise_key, high.shape)
        rngs = {"dropout": dropout_key, RANDOM: attention_key}
        loss = jnp.mean(self._errors(params, batch, noise_byxc, level_b, train=True, rngs=rngs))
        return loss, {"noise_error": loss}

    def _keys(self, low) -> PRNGKey:
        """Return a key per example, a function of the seed and the picture."""
        return diffusion.content_keys(self.seed, to_uint8(low))

    def sample(self, params: Params, low: Array) -> Array:
        """Return high-resolution pictures, float32 `[b,y,x,c]` in [-1, 1], of `low`, likewise."""

        def denoise(noisy_byxc, level_b):
            inputs = {"noisy": noisy_byxc, "low": low, "noise_level": level_b}
            return self._apply(params, inputs).noise

        pictures = diffusion.sample(
            denoise, self._keys(low), low.shape[1:], self.sample_levels, eta=self.eta,
            clip=self.clip,
        )  # fmt: skip
        return jnp.clip(pictures, -1, 1)

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of metrics of sampled pictures, on 8-bit pixels.

        Returns:
          `psnr` in dB and `ssim` of the samples; `low_psnr` and `low_ssim` of the enlarged pictures
          as they are; `loss`, the noise error at one draw of level and noise per example.
        """
        low, high = batch["low"], batch["high"]
        valid = batch["valid"] if "valid" in batch else jnp.ones(low.shape[:1], bool)
        level_keys, noise_keys = (
            jax.vmap(jax.random.fold_in, (0, None))(self._keys(low), i) for i in (1, 2)
        )
        one_level = lambda key: diffusion.sample_levels(key, self.levels, 1)[0]
        noise_byxc = jax.vmap(lambda key: jax.random.normal(key, low.shape[1:]))(noise_keys)
        errors_b = self._errors(params, batch, noise_byxc, jax.vmap(one_level)(level_keys))
        states = {"loss": Mean.of(errors_b, valid=valid)}
        target = to_uint8(high)
        for prefix, pictures in (("", self.sample(params, low)), ("low_", low)):
            pixels = to_uint8(pictures)
            similarity_b = ssim(pixels, target, window=self.ssim_window)
            states[f"{prefix}psnr"] = Mean.of(psnr(pixels, target), valid=valid)
            states[f"{prefix}ssim"] = Mean.of(similarity_b, valid=valid)
        return states

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,y,x,c]` float32 in [-1, 1]."""
        return {"prediction": self.sample(params, batch["low"])}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return sampled pictures, what they are made from, and where the last step looks.

        Returns:
          `prediction`, `low`, `high` `[b,y,x,c]`; `maps`, title -> `[b,y',x']` float32.
        """
        picture = self.sample(params, batch["low"])
        level_b = jnp.full(picture.shape[:1], self.sample_levels[1], jnp.float32)
        inputs = {"noisy": picture, "low": batch["low"], "noise_level": level_b}
        _, captured = self._apply(params, inputs, mutable=["attention"])
        maps = self.model.attention_maps(captured)
        return {"prediction": picture, "low": batch["low"], "high": batch["high"], "maps": maps}
