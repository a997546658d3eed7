# SPDX-License-Identifier: Apache-2.0
"""Pictures of a class by diffusion: learn to see noise and its width, then sample.

    loss = |noise - network(a x + sqrt(1 - a^2) noise, t, class)|^2 + bound T / 1000 + balance

As DiT (arXiv 2212.09748) trains and samples: 1,000 steps, learned variances, 250 steps to sample,
guidance away from "no class"; the balance of heads that are experts is that of MoH (arXiv
2410.11842).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric, to_uint8
from attnjax.metrics.samples import MEASURES, SampleQuality
from attnjax.ops import diffusion
from attnjax.ops import learned_variance as variance
from attnjax.tasks.model_task import ModelTask, check_labels, check_picture, row_name
from attnjax.typing import Array, Batch, Params, PRNGKey

INPUTS = ("noisy", "time", "label")
"""What the network reads."""

REFERENCE_STEPS = 1_000
"""Steps for which the bound has weight 1."""


class ClassDiffusion(ModelTask):
    """Sampling `image` float32 `[b,y,x,c]`, about in [-1, 1], of `label` int32 `[b]`.

    In evaluation the batch may hold `valid [b]` bool. Samples and noise of evaluation come from a
    fixed key and the picture beside them, so that neither its place in a batch nor the batch's size
    matters.

    Attributes:
      levels: float64 `[T + 1]`, signal levels.
      steps: coefficients of all T steps.
      times: those that a sample passes through.
    """

    def __init__(
        self,
        model: Any,
        *,
        steps: int = 1_000,
        first_beta: float = 1e-4,
        last_beta: float = 2e-2,
        sample_steps: int = 250,
        eta: float = -1.0,
        guidance: float = 1.0,
        guided_channels: int = 3,
        clip: bool = False,
        balance: float = 0.01,
        judge: bool = False,
        seed: int = 0,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module of `noisy`, `time` and `label` that returns `.prediction` and `.aux`,
            such as `models.dit.DiT`.
          steps: T, diffusion steps; betas grow linearly.
          first_beta, last_beta: the first and the last.
          sample_steps: steps of a sample, evenly over the schedule.
          eta: -1: steps back are as wide as the model says; 1: as DDPM; 0: the deterministic DDIM.
          guidance: scale of classifier-free guidance while sampling; 1: none, one pass per step.
          guided_channels: the first channels are guided, at most this many; 0: all.
          clip: keep implied clean pictures in [-1, 1] while sampling.
          balance: weight of the mean balance loss of layers that route, if the model has any.
          judge: sample a picture for every one of an evaluation, and measure how good they are.
          seed: of the noise in evaluation.

        Raises:
          RecipeError: a value is out of range, or the model reads something else.
        """
        super().__init__(model)
        if set(self._model_inputs) != set(INPUTS):
            raise RecipeError(
                f"task class_diffusion needs a model of {', '.join(INPUTS)}; "
                f"{type(model).__name__} reads {', '.join(self._model_inputs)}"
            )
        for name, value, fine in (
            ("guidance", guidance, guidance >= 0),
            ("guided_channels", guided_channels, guided_channels >= 0),
            ("balance", balance, balance >= 0),
            ("eta", eta, eta == -1 or 0 <= eta <= 1),
        ):
            if not fine:
                raise RecipeError(f"task.{name}={value!r} is out of range")
        if guidance != 1 and not model.drop_label:
            raise RecipeError(f"task.guidance={guidance}: needs a model with drop_label above 0")
        try:
            self.levels = diffusion.signal_levels(
                diffusion.betas("linear", steps, first=first_beta, last=last_beta)
            )
            self.steps = variance.learned_steps(self.levels)
            self.times = variance.space_times(steps, sample_steps)
        except ValueError as error:
            raise RecipeError(f"task class_diffusion: {error}") from error
        self.channels = int(model.example(1)["noisy"].shape[-1])
        self.eta = eta if eta >= 0 else (None if model.has_variance else 1.0)
        self.guidance, self.clip, self.balance = guidance, clip, balance
        self.guided_channels = min(guided_channels or self.channels, self.channels)
        self.judge, self.seed = judge, seed

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch entries that `loss` reads."""
        return ("image", "label")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        example = self.model.example(batch)
        return {"image": example["noisy"], "label": example["label"]}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, other shapes, unknown labels or NaN.

        Raises:
          RecipeError: names the entry, and what it holds.
        """
        self.check_names(batch)
        image, labels = np.asarray(batch["image"]), np.asarray(batch["label"])
        check_picture("image", image, self.example(1)["image"])
        check_labels(batch, int(self.model.num_classes))
        if len(labels) != len(image):
            raise RecipeError(f"{len(labels)} labels for {len(image)} pictures")
        infinite = ~np.isfinite(image).all(axis=(1, 2, 3))
        if infinite.any():
            where = row_name(batch, int(np.argmax(infinite)))
            raise RecipeError(f"'image' of {where} holds NaN or infinity")

    def init(self, key: PRNGKey, batch: Mapping[str, Any]) -> Params:
        """Return new parameters; of the batch nothing matters."""
        del batch
        return super().init(key, self.model.example(1))

    def _errors(self, params, batch, noise_byxc, index_b, **options):
        """Return squared errors and bounds `[b]`, and the model's `aux`."""
        image = batch["image"]
        at = variance.at_time(self.steps, index_b, image.ndim)
        noisy_byxc = diffusion.q_sample(image, noise_byxc, at.step.level.reshape(-1))
        inputs = {"noisy": noisy_byxc, "time": at.time, "label": batch["label"]}
        output = self._apply(params, inputs, **options)
        seen_byxc, share_byxc = self._split(output.prediction)
        if not self.model.has_variance:
            squares_b = jnp.mean(jnp.square(noise_byxc - seen_byxc), axis=(1, 2, 3))
            return squares_b, jnp.zeros_like(squares_b), output.aux
        squares_b, bound_b = variance.losses(
            image, noisy_byxc, noise_byxc, seen_byxc, share_byxc, at
        )
        return squares_b, bound_b * (len(self.levels) - 1) / REFERENCE_STEPS, output.aux

    def _split(self, prediction_byxc):
        """Return noise and share; without a learned variance the share of the posterior."""
        noise_byxc = prediction_byxc[..., : self.channels]
        if self.model.has_variance:
            return noise_byxc, prediction_byxc[..., self.channels :]
        return noise_byxc, -jnp.ones_like(noise_byxc)

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the loss of noise and variance at one time and one draw of noise per example.

        Args:
          params: what `init` returned.
          batch: the global batch.
          key: this step's own key.
          step: unused; part of the contract.

        Returns:
          Scalar float32 loss, and its parts `noise_error` and `bound`; of a model that chooses
          heads also `balance_loss` without its weight, and `dropped`.
        """
        del step
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        image = batch["image"]
        index_b = jax.random.randint(time_key, image.shape[:1], 0, len(self.levels) - 1)
        noise_byxc = jax.random.normal(noise_key, image.shape)
        squares_b, bound_b, aux = self._errors(
            params, batch, noise_byxc, index_b, train=True, rngs={"dropout": dropout_key}
        )
        parts = {"noise_error": jnp.mean(squares_b), "bound": jnp.mean(bound_b)}
        loss = parts["noise_error"] + parts["bound"]
        if "balance_loss" in aux:
            loss = loss + self.balance * aux["balance_loss"]
            parts |= {name: aux[name] for name in ("balance_loss", "dropped")}
        return loss, parts

    def sample(self, params: Params, label: Array, keys: PRNGKey) -> Array:
        """Return pictures float32 `[b,y,x,c]` of labels `[b]` with typed keys `[b]`."""
        is_guided = self.guidance != 1
        no_class_b = jnp.full_like(label, self.model.no_class) if is_guided else None

        def answer(noisy, time, label):
            return self._apply(params, {"noisy": noisy, "time": time, "label": label}).prediction

        def predict(noisy_byxc, time_b):
            if not is_guided:
                return self._split(answer(noisy_byxc, time_b, label))
            both = jnp.concatenate([label, no_class_b])
            twice = lambda x: jnp.concatenate([x, x])
            with_class, without = jnp.split(answer(twice(noisy_byxc), twice(time_b), both), 2)
            return self._split(
                variance.guide(with_class, without, self.guidance, self.guided_channels)
            )

        shape = self.example(1)["image"].shape[1:]
        return variance.sample(
            predict, keys, shape, self.levels, self.times, eta=self.eta, clip=self.clip
        )

    def _keys(self, image, number):
        keys = diffusion.content_keys(self.seed, to_uint8(image))
        return jax.vmap(jax.random.fold_in, (0, None))(keys, number)

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of metrics.

        Returns:
          `loss` and its parts `noise_error` and `bound` at one draw of time and noise per example;
          with `judge` also the measures of `metrics.samples`, of one sample per example.
        """
        image, label = batch["image"], batch["label"]
        valid = batch["valid"] if "valid" in batch else jnp.ones(label.shape, bool)
        last = len(self.levels) - 1
        index_b = jax.vmap(lambda key: jax.random.randint(key, (), 0, last))(self._keys(image, 1))
        draw = lambda key: jax.random.normal(key, image.shape[1:])
        squares_b, bound_b, _ = self._errors(
            params, batch, jax.vmap(draw)(self._keys(image, 2)), index_b
        )
        values = {"loss": squares_b + bound_b, "noise_error": squares_b, "bound": bound_b}
        states: dict[str, Metric] = {n: Mean.of(v, valid=valid) for n, v in values.items()}
        if self.judge:
            made = self.sample(params, label, self._keys(image, 0))
            states |= {
                name: SampleQuality.of(name, image, made, label, valid=valid) for name in MEASURES
            }
        return states

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,y,x,c]` float32, a sample of every label."""
        keys = self._keys(batch["image"], 0)
        return {"prediction": self.sample(params, batch["label"], keys)}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return samples, the pictures of the batch, and where the network looks at little noise.

        Returns:
          `prediction` and `real` `[b,y,x,c]`, `label [b]`; `maps`, title -> `[b,y',x']` float32.
        """
        made = self.predict(params, batch)["prediction"]
        inputs = {"noisy": made, "time": jnp.zeros(made.shape[:1]), "label": batch["label"]}
        _, captured = self._apply(params, inputs, mutable=["attention"])
        maps = self.model.attention_maps(captured)
        return {"prediction": made, "real": batch["image"], "label": batch["label"], "maps": maps}
