# SPDX-License-Identifier: Apache-2.0
"""Speech synthesis: from phonemes to log-mel frames, all at once or step by step.

Training, synthesis and evaluation are those of CAB, arXiv 2210.07661: the reference of a distortion
is the target's own spectrogram made a wave by Griffin and Lim's algorithm, as is the prediction.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import audio
from attnjax.errors import RecipeError
from attnjax.losses.speech import (
    Error,
    duration_error,
    end_error,
    mean_error,
    mel_error,
    squared_error,
)
from attnjax.metrics import Mean, Metric
from attnjax.metrics.speech import mel_cepstral_distortion, mel_spectral_distortion
from attnjax.nn.pattern_attention import RANDOM
from attnjax.nn.speech import PRENET
from attnjax.tasks.model_task import ModelTask, row_name
from attnjax.typing import Array, Batch, Params, PRNGKey

LOUDEST = 12.0
"""Log-mel values of synthesised speech are cut off here, so that bad models make no infinities."""


class SpeechTask(ModelTask):
    """What both ways of speaking share. Subclasses say what their errors are and how they speak.

    The batch holds the model's inputs, `mel [b,t,c]` float32 (raw log-mel frames) and, in
    evaluation, `valid [b]` bool. The model reads and writes (mel - mean) / deviation.
    """

    needed: tuple[str, ...] = ()
    """What the model must read."""

    def __init__(
        self,
        model: Any,
        *,
        mel_mean: Any = 0.0,
        mel_deviation: Any = 1.0,
        distortion: bool = True,
        iterations: int = 32,
        rate: int = 22_050,
        seed: int = 0,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module of phonemes with `frames`, `length`, `mels` and `vocab_size`.
          mel_mean: of log-mel frames, one number or one of every band; see
            `data.speech.mel_statistics`.
          mel_deviation: their standard deviation, likewise, above 0.
          distortion: evaluate distortions, too: speech is synthesised and made a wave.
          iterations: of Griffin and Lim's algorithm.
          rate: samples per second.
          seed: of the phases with which it starts, and of what is drawn in synthesis.

        Raises:
          RecipeError: a value is out of range, or the model is of another kind.
        """
        super().__init__(model)
        if set(self._model_inputs) != set(self.needed):
            raise RecipeError(
                f"task {type(self).__name__} needs a model of {', '.join(self.needed)}; "
                f"{type(model).__name__} reads {', '.join(self._model_inputs)}"
            )
        self.mean = _per_band("mel_mean", mel_mean, model.mels)
        self.deviation = _per_band("mel_deviation", mel_deviation, model.mels)
        if not (self.deviation > 0).all():
            raise RecipeError(f"task.mel_deviation={mel_deviation!r}: must be above 0")
        if iterations < 0:
            raise RecipeError(f"task.iterations={iterations}: must be at least 0")
        try:
            self.mel = audio.Mel(rate=rate, bands=model.mels)
        except ValueError as error:
            raise RecipeError(f"task.rate={rate}: {error}") from error
        self.distortion, self.iterations, self.seed = distortion, iterations, seed

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        shape = (batch, self.model.frames, self.model.mels)
        return self.model.example(batch) | {"mel": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, other shapes, or values that mean nothing.

        Raises:
          RecipeError: names the entry and the row.
        """
        self.check_names(batch)
        arrays = {name: np.asarray(batch[name]) for name in self.inputs}
        for name, expected in self.example(len(arrays["mel"])).items():
            if arrays[name].shape != expected.shape:
                raise RecipeError(
                    f"{name} has shape {arrays[name].shape}, the model and task read "
                    f"{expected.shape}"
                )
        tokens, size = arrays["phonemes"], self.model.vocab_size
        counts = arrays["duration"].sum(axis=1) if "duration" in arrays else arrays["frames"]
        for what, wrong in (
            (f"phonemes outside 0 to {size - 1} (model.vocab_size)",
             ((tokens < 0) | (tokens >= size)).any(axis=1)),
            ("no phonemes", (tokens == 0).all(axis=1)),
            (f"frames that are not between 1 and {self.model.frames}",
             (counts < 1) | (counts > self.model.frames)),
            ("mel that is not finite", ~np.isfinite(arrays["mel"]).all(axis=(1, 2))),
        ):  # fmt: skip
            if wrong.any():
                row = int(np.argmax(wrong))
                where = row_name(batch, row)
                raise RecipeError(f"{where} has {what}")

    def normal(self, mel: Array) -> Array:
        """Return frames as the model reads and writes them."""
        return (mel - self.mean) / self.deviation

    def raw(self, mel: Array) -> Array:
        """Return log-mel frames of what the model wrote."""
        lowest = jnp.log(self.mel.floor)
        return jnp.clip(mel * self.deviation + self.mean, lowest, LOUDEST)

    def errors(self, params: Params, batch: Batch, **options: Any) -> dict[str, Error]:
        """Return errors by name, whose means are the terms of the loss."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its errors are")

    def speak(self, params: Params, phonemes: Array) -> tuple[Array, Array]:
        """Return log-mel frames `[b,t,c]` of phonemes `[b,s]`, and how many there are, `[b]`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it speaks")

    def vocode(self, mel: Array, frames: Array) -> tuple[Array, Array]:
        """Make waves of spectrograms.

        Args:
          mel: `[b,t,c]` raw log-mel frames.
          frames: int `[b]`, how many exist.

        Returns:
          `[b, samples]` float32, 0 beyond the length, and the length int `[b]`.
        """
        with jax.default_matmul_precision("float32"):
            magnitude = audio.magnitudes(jnp.asarray(mel, jnp.float32), self.mel)
        shape = magnitude.shape[1:]
        phase = jax.random.uniform(jax.random.key(self.seed), shape, minval=-jnp.pi, maxval=jnp.pi)
        waves = audio.griffin_lim(
            magnitude, phase, window=self.mel.window, hop=self.mel.hop, iterations=self.iterations,
            frames=frames, loop=jax.lax.fori_loop,
        )  # fmt: skip
        return waves, self.mel.hop * (frames - 1)

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the sum of all terms, each a mean over what exists in the batch; and each."""
        del step
        names = ("dropout", RANDOM, PRENET)
        rngs = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        errors = self.errors(params, batch, train=True, rngs=rngs)
        terms = {name: mean_error(error) for name, error in errors.items()}
        return sum(terms.values()), terms

    def target_frames(self, batch: Batch) -> Array:
        """Return how many frames of the target exist, int `[b]`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long its targets are")

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of every term of the loss and, with `distortion`, of synthesised speech.

        Returns:
          Terms by name, as in `loss`, but over all examples; `mcd` and `msd`, mel-cepstral and
          mel-spectral distortion per synthesised frame; `frames`, how many are synthesised,
          relative to the target.
        """
        rows = batch["phonemes"].shape[0]
        valid_b = batch["valid"] if "valid" in batch else jnp.ones(rows, bool)
        states: dict[str, Metric] = {}
        for name, (error, counts) in self.errors(params, batch).items():
            states[name] = Mean.of(error, valid=counts & valid_b[:, None])
        if not self.distortion:
            return states
        frames_b = self.target_frames(batch)
        mel_btc, spoken_b = self.speak(params, batch["phonemes"])
        reference, reference_lengths = self.vocode(batch["mel"], frames_b)
        synthesised, synthesised_lengths = self.vocode(mel_btc, spoken_b)
        for name, measure in (("mcd", mel_cepstral_distortion), ("msd", mel_spectral_distortion)):
            states[name] = measure(
                reference, synthesised, self.mel.rate, reference_lengths=reference_lengths,
                synthesised_lengths=synthesised_lengths, valid=valid_b,
            )  # fmt: skip
        total = lambda counts_b: jnp.sum(jnp.where(valid_b, counts_b, 0))
        return states | {"frames": Mean(total=total(spoken_b), weight=total(frames_b))}

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return synthesised `mel [b,t,c]` float32, raw log-mel, and `frames [b]` int32."""
        mel, frames = self.speak(params, batch["phonemes"])
        return {"mel": mel, "frames": frames}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,t,c]`, log-mel with the target given, and the model's `maps`."""
        output, captured = self._output(params, batch, mutable=["attention"])
        return {"prediction": self.raw(output.mel), "maps": self.model.attention_maps(captured)}

    def _output(self, params, batch, **options):
        if "mel" in self._model_inputs:
            batch = {**batch, "mel": self.normal(batch["mel"])}
        return self._apply(params, batch, **options)


class ParallelSpeech(SpeechTask):
    """Speech in one pass, from phonemes with known durations, such as `models.fastspeech2`.

    The batch holds `phonemes`, `duration` (whose sum is the number of frames), `pitch` and `energy`
    `[b,s]`, and `mel`. Terms of the loss: `mel`, `duration`, `pitch`, `energy`.
    """

    targets = ("mel",)
    needed = ("phonemes", "duration", "pitch", "energy")

    def errors(self, params: Params, batch: Batch, **options: Any) -> dict[str, Error]:
        output = self._output(params, batch, **options)
        valid_bs = batch["phonemes"] != 0
        valid_bt = jnp.arange(self.model.frames) < output.frames[:, None]
        return {
            "mel": mel_error(output.mel, self.normal(batch["mel"]), valid_bt),
            "duration": duration_error(output.log_duration, batch["duration"], valid_bs),
            "pitch": squared_error(output.pitch, batch["pitch"], valid_bs),
            "energy": squared_error(output.energy, batch["energy"], valid_bs),
        }

    def target_frames(self, batch: Batch) -> Array:
        return jnp.sum(batch["duration"], axis=1)

    def speak(self, params: Params, phonemes: Array) -> tuple[Array, Array]:
        output = self.model.apply({"params": params}, phonemes)
        return self.raw(output.mel), output.frames


class StepwiseSpeech(SpeechTask):
    """Speech written step by step, each from the one before, such as `models.transformer_tts`.

    The batch holds `phonemes [b,s]`, `mel` and `frames [b]`. Terms of the loss: `absolute` and
    `squared`, of the frames after the postnet, `coarse_absolute` and `coarse_squared`, of those
    before it, and `end`.
    """

    needed = ("phonemes", "mel", "frames")

    def __init__(
        self,
        model: Any,
        *,
        mel_mean: Any = 0.0,
        mel_deviation: Any = 1.0,
        end_weight: float = 5.0,
        threshold: float = 0.5,
        prenet_dropout: bool = True,
        distortion: bool = True,
        iterations: int = 32,
        rate: int = 22_050,
        seed: int = 0,
    ):
        """Bind a model that writes steps.

        Args:
          model: as in `SpeechTask`, with `synthesise`.
          end_weight: of the last step in the loss of the end, above 0.
          threshold: probability of the end above which synthesis ends.
          prenet_dropout: synthesise with the prenet's dropout, as published models do, from a fixed
            key.
          mel_mean, mel_deviation, distortion, iterations, rate, seed: as in `SpeechTask`.

        Raises:
          RecipeError: the model writes no steps, or a value is out of range.
        """
        super().__init__(
            model, mel_mean=mel_mean, mel_deviation=mel_deviation, distortion=distortion,
            iterations=iterations, rate=rate, seed=seed,
        )  # fmt: skip
        if not end_weight > 0 or not 0 < threshold < 1:
            raise RecipeError(
                f"task.end_weight={end_weight} must be above 0, task.threshold={threshold} "
                "between 0 and 1"
            )
        self.end_weight, self.threshold = end_weight, threshold
        self.prenet_dropout = prenet_dropout

    def errors(self, params: Params, batch: Batch, **options: Any) -> dict[str, Error]:
        output, target = self._output(params, batch, **options), self.normal(batch["mel"])
        valid_bt = jnp.arange(self.model.frames) < output.frames[:, None]
        steps_b = output.frames // self.model.frames_per_step
        return {
            "absolute": mel_error(output.mel, target, valid_bt),
            "squared": mel_error(output.mel, target, valid_bt, squared=True),
            "coarse_absolute": mel_error(output.coarse, target, valid_bt),
            "coarse_squared": mel_error(output.coarse, target, valid_bt, squared=True),
            "end": end_error(output.end, steps_b, weight=self.end_weight),
        }

    def target_frames(self, batch: Batch) -> Array:
        step = self.model.frames_per_step
        return step * jnp.maximum(batch["frames"] // step, 1)

    def speak(self, params: Params, phonemes: Array) -> tuple[Array, Array]:
        key = jax.random.key(self.seed) if self.prenet_dropout else None
        output = self.model.synthesise(params, phonemes, key, self.threshold)
        return self.raw(output.mel), output.frames


def _per_band(name, value, bands):
    """Return float32 `[bands]`, or one number, for all bands."""
    array = np.asarray(value, np.float32)
    if array.shape not in ((), (bands,)) or not np.isfinite(array).all():
        raise RecipeError(f"task.{name}={value!r}: must be a number, or {bands} of them")
    return array
