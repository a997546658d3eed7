# SPDX-License-Identifier: Apache-2.0
"""Language modelling whose evaluation reads texts of any length through a cache of blocks."""

from typing import Any

import jax
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric
from attnjax.nn.text import RETRIEVAL
from attnjax.ops.landmark_cache import RETRIEVALS
from attnjax.ops.landmark_tape import normal_slots, tape_length
from attnjax.registry import nearest
from attnjax.tasks.language import LanguageModelling
from attnjax.typing import Array, Batch, Params


class LongLanguageModelling(LanguageModelling):
    """`LanguageModelling` of a model with landmarks, or of one without to compare it with.

    Evaluation texts may have another length than those of training. A model with landmarks reads
    them chunk by chunk and retrieves blocks; other models read them whole. Where the data says in
    `holder [b,t]` int32 which block of tokens holds the answer to a scored token, -1 elsewhere, it
    is counted how often the last layer retrieves it.
    """

    extras = ("holder",)

    def __init__(
        self,
        model: Any,
        *,
        chunk: int = 64,
        blocks: int = 64,
        top_k: int = 2,
        retrieval: str = RETRIEVALS[0],
        miss_cutoff: float = 0.0,
        scored: bool = False,
        logits_chunk: int = 0,
        bytes_per_token: float = 1.0,
        tokens_per_word: float = 0.0,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module such as `models.landmark.Landmark`.
          chunk: tokens that are read at once; a multiple of the model's block compiles faster.
          blocks: most blocks that the cache keeps.
          top_k: blocks that a query retrieves.
          retrieval: a member of `ops.landmark_cache.RETRIEVALS`.
          miss_cutoff: where a context-miss token has a smaller share, nothing is retrieved.
          scored, logits_chunk, bytes_per_token, tokens_per_word: as in `LanguageModelling`.

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
            model, scored=scored, logits_chunk=logits_chunk, bytes_per_token=bytes_per_token,
            tokens_per_word=tokens_per_word,
        )  # fmt: skip
        if not 0 <= miss_cutoff <= 1:
            raise RecipeError(f"task.miss_cutoff={miss_cutoff}: must be in [0, 1]")
        self.chunk, self.blocks = chunk, blocks
        self.options = {"top_k": top_k, "retrieval": retrieval, "miss_cutoff": miss_cutoff}
        if model.has_landmarks:
            self._try()

    def _try(self):
        """Refuse chunks that need more positions than there are, before any work."""
        tokens = jax.ShapeDtypeStruct((1, self.chunk), jnp.int32)
        try:
            jax.eval_shape(self._read_empty, jax.random.key(0), tokens)
        except ValueError as error:
            top_k = self.options["top_k"]
            raise RecipeError(f"task.chunk={self.chunk}, top_k={top_k}: {error}") from error

    def _read_empty(self, key, tokens):
        # Chunks of whole blocks leave nothing behind; else a block less one may be in front.
        params = self.model.init(key, tokens)["params"]
        cache = self.model.empty_cache(1, self.blocks)
        tail = self.model.block - 1 if self.chunk % self.model.block else 0
        for part in (jnp.zeros((1, tail), jnp.int32), tokens):
            if part.shape[1]:
                _, cache, _ = self._read(params, part, cache)
        return cache

    def _read(self, params, tokens, cache):
        """Return hidden states `[b,t,d]`, the cache afterwards, and what was retrieved."""
        phase = cache.tail_key.shape[2]
        (hidden, cache), captured = self.model.apply(
            {"params": params}, tokens, cache, **self.options, method="read", mutable=[RETRIEVAL]
        )
        (seen,) = captured[RETRIEVAL]["layers"]["attention"]["seen"]
        return hidden, cache, self._summary(seen, tokens.shape, phase)

    def _summary(self, seen, shape, phase):
        """Reduce what the layers retrieved for a chunk to arrays `[b, t, ...]` of its tokens."""
        every = self.model.block
        length = tape_length(shape[1], every, phase)
        slots = normal_slots(length, every, phase)

        def of_tokens(x_lbnmk):
            wide = (*x_lbnmk.shape[:3], length, *x_lbnmk.shape[4:])
            return jnp.moveaxis(jnp.broadcast_to(x_lbnmk, wide)[:, :, :, slots], 3, 1)

        blocks_ltbnk = of_tokens(seen.blocks)
        measures = {"blocks": blocks_ltbnk[-1].swapaxes(0, 1)}
        if seen.miss_share is not None:
            looks_ltbn = jnp.any(blocks_ltbnk >= 0, axis=-1)
            is_cut_ltbn = of_tokens(seen.miss_share) < self.options["miss_cutoff"]
            counts = lambda x_ltbn: jnp.sum(x_ltbn, axis=(0, 3), dtype=jnp.float32).swapaxes(0, 1)
            looks_ltbn = jnp.broadcast_to(looks_ltbn, is_cut_ltbn.shape)
            measures["looks"] = counts(looks_ltbn)
            measures["cut"] = counts(looks_ltbn & is_cut_ltbn)
        return measures

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
                hidden, cache, measures = self._read(params, chunk, cache)
                return cache, (hidden, measures)

            cache, read = jax.lax.scan(step, cache, chunks)
            flat = lambda x: x.swapaxes(0, 1).reshape(b, start, *x.shape[3:])
            parts.append(jax.tree.map(flat, read))
        for at in range(start, t, self.chunk):
            hidden, cache, measures = self._read(params, tokens[:, at : at + self.chunk], cache)
            parts.append((hidden, measures))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return the states of `LanguageModelling`, and `exact_match` of all that is scored.

        With a `holder` in the batch also `retrieved`: how often a head of the last layer retrieves
        the block with the answer. With a context-miss token also `dropped`: how often its share is
        below the cutoff, over layers, heads and tokens with a block to retrieve.
        """
        losses, counts, seen = self._compare(params, batch)
        hits_bt = losses.best == jnp.roll(batch["tokens"], -1, axis=1)
        exact_b: Array = jnp.all(hits_bt | ~counts, axis=1)
        states = self._states(losses, counts, batch)
        states["exact_match"] = Mean.of(exact_b, valid=jnp.any(counts, axis=1))
        if "blocks" in seen and "holder" in batch:
            holder_bt = jnp.roll(batch["holder"], -1, axis=1)
            found_bt = jnp.any(seen["blocks"] == holder_bt[..., None, None], axis=(2, 3))
            states["retrieved"] = Mean.of(found_bt, valid=counts & (holder_bt >= 0))
        if "cut" in seen:
            rate_bt = seen["cut"] / jnp.maximum(seen["looks"], 1)
            valid_bt = seen["looks"] > 0
            if "valid" in batch:
                valid_bt &= batch["valid"][:, None]
            states["dropped"] = Mean.of(rate_bt, valid=valid_bt)
        return states
