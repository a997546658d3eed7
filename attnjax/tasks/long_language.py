# SPDX-License-Identifier: Apache-2.0
"""Language modelling whose evaluation reads texts of any length through a cache of blocks."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric
from attnjax.ops.landmark_cache import RETRIEVALS
from attnjax.registry import nearest
from attnjax.tasks.language import LanguageModelling
from attnjax.typing import Array, Batch, Params


class LongLanguageModelling(LanguageModelling):
    """`LanguageModelling` of a model with landmarks, or of one without to compare it with.

    Evaluation texts may have another length than those of training. A model with landmarks reads
    them chunk by chunk and retrieves blocks; other models read them whole.
    """

    free_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"tokens": (1,), "scored": (1,)}

    def __init__(
        self,
        model: Any,
        *,
        chunk: int = 64,
        blocks: int = 64,
        top_k: int = 2,
        retrieval: str = RETRIEVALS[0],
        scored: bool = False,
        logits_chunk: int = 0,
        bytes_per_token: float = 1.0,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module such as `models.landmark.Landmark`.
          chunk: tokens that are read at once; a multiple of the model's block compiles faster.
          blocks: most blocks that the cache keeps.
          top_k: blocks that a query retrieves.
          retrieval: a member of `ops.landmark_cache.RETRIEVALS`.
          scored, logits_chunk, bytes_per_token: as in `LanguageModelling`.

        Raises:
          RecipeError: a value is out of range, or the model reads no chunks.
        """
        for name, value, least in (("chunk", chunk, 1), ("blocks", blocks, 1), ("top_k", top_k, 0)):
            if value < least:
                raise RecipeError(f"task.{name}={value}: must be at least {least}")
        if retrieval not in RETRIEVALS:
            raise RecipeError(f"task.retrieval={retrieval!r}: {nearest(retrieval, RETRIEVALS)}")
        if not hasattr(model, "has_landmarks"):
            raise RecipeError(f"task long_language: {type(model).__name__} knows no landmarks")
        super().__init__(
            model, scored=scored, logits_chunk=logits_chunk, bytes_per_token=bytes_per_token
        )
        self.chunk, self.blocks, self.top_k, self.retrieval = chunk, blocks, top_k, retrieval
        if model.has_landmarks:
            self._try()

    def _try(self):
        """Refuse chunks that need more positions than there are, before any work."""
        tokens = jax.ShapeDtypeStruct((1, self.chunk), jnp.int32)
        try:
            jax.eval_shape(self._read_empty, jax.random.key(0), tokens)
        except ValueError as error:
            raise RecipeError(f"task.chunk={self.chunk}, top_k={self.top_k}: {error}") from error

    def _read_empty(self, key, tokens):
        # A full block less one in front is the longest there is.
        params = self.model.init(key, tokens)["params"]
        cache = self.model.empty_cache(1, self.blocks)
        tail = jnp.zeros((1, self.model.block), jnp.int32)
        for part in (tail[:, : self.model.block - 1], tokens):
            if part.shape[1]:
                _, cache = self._read(params, part, cache)
        return cache

    def _read(self, params, tokens, cache):
        return self.model.apply(
            {"params": params}, tokens, cache, top_k=self.top_k, retrieval=self.retrieval,
            method="read",
        )  # fmt: skip

    def _hidden(self, params, tokens, segments, **options):
        if "train" in options or not self.model.has_landmarks:
            return super()._hidden(params, tokens, segments, **options)
        (b, t), parts = tokens.shape, []
        cache = self.model.empty_cache(b, self.blocks)
        start = 0
        if self.chunk % self.model.block == 0 and t >= 2 * self.chunk:
            # Chunks of whole blocks leave nothing behind: one program reads all of them.
            count = t // self.chunk
            start = count * self.chunk
            chunks = tokens[:, :start].reshape(b, count, self.chunk).swapaxes(0, 1)

            def step(cache, chunk):
                hidden, cache = self._read(params, chunk, cache)
                return cache, hidden

            cache, hidden = jax.lax.scan(step, cache, chunks)
            parts.append(hidden.swapaxes(0, 1).reshape(b, start, -1))
        for at in range(start, t, self.chunk):
            hidden, cache = self._read(params, tokens[:, at : at + self.chunk], cache)
            parts.append(hidden)
        return jnp.concatenate(parts, axis=1), {}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return the states of `LanguageModelling`, and `exact_match` of all that is scored."""
        losses, counts, _ = self._compare(params, batch)
        hits_bt = losses.best == jnp.roll(batch["tokens"], -1, axis=1)
        exact_b: Array = jnp.all(hits_bt | ~counts, axis=1)
        states = self._states(losses, counts, batch)
        return states | {"exact_match": Mean.of(exact_b, valid=jnp.any(counts, axis=1))}
