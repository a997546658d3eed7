# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation batches: random access, elastic over processes, prepared ahead.

Batches are made by Grain's random-access `MapDataset`, one batch per element, either in threads of
this process or in worker processes. A batch depends on the recipe, the seed and its position only,
never on worker counts, read-ahead, hash seeds or what was read before.

Worker processes are started afresh by the interpreter, so a script that sets `workers` must guard
its entry point with `if __name__ == "__main__":`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from attnjax import recipe, registry
from attnjax.data import order, records
from attnjax.errors import RecipeError

_ENDLESS = 2**48  # batches; more than any run takes, few enough for index arithmetic
_STATE = "global_next_index"

_log = logging.getLogger(__name__)


def build(data: recipe.Data) -> tuple[Any, Callable]:
    """Construct the source and the pipeline that a recipe names.

    Raises:
      RecipeError: a name or an argument is unknown, or the data are not where they should be.
    """
    parts = []
    for table, leaf in (("source", data.source), ("pipeline", data.pipeline)):
        if "name" not in leaf:
            known = registry.nearest("", registry.TABLES[table])
            raise RecipeError(f"data.{table}.name is missing {known}")
        target = registry.resolve(table, leaf["name"])
        arguments = {k: v for k, v in leaf.items() if k != "name"}
        recipe.check_arguments(target, arguments, f"data.{table}")
        parts.append(target(**arguments))
    return parts[0], parts[1]


def train_iterator(
    data: recipe.Data, seed: int, batch: int, process_index: int = 0, process_count: int = 1
) -> "TrainIterator":
    """Iterate over training batches for ever.

    Args:
      data: the recipe's data section.
      seed: decides order and augmentation.
      batch: examples per step over all processes.
      process_index: which contiguous block of rows of each global batch this process makes.
      process_count: number of processes; divides `batch`.

    Returns:
      An iterator of dicts of numpy arrays `[batch / process_count, ...]`, with `index` int32.

    Raises:
      RecipeError: the batch cannot be divided, or the data cannot be found.
    """
    _check_processes(batch, process_index, process_count)
    source, pipeline = build(data)
    return TrainIterator(
        source,
        pipeline,
        order.Order(len(source), seed, data.repeats),
        batch,
        shard=(process_index, process_count),
        workers=data.workers,
        prefetch=data.prefetch,
    )


def eval_batches(
    data: recipe.Data, batch: int, process_index: int = 0, process_count: int = 1
) -> "EvalBatches":
    """Iterate once over all examples, in the order of the source.

    Every process gets the same number of batches. Rows that fill up the last one have `valid`
    False, `index` -1 and zeros; so have rows whose record is bad in a tolerant source.

    Args:
      data: the evaluation's data section; pipelines are called without randomness.
      batch: examples per step over all processes.
      process_index: which contiguous block of rows this process makes.
      process_count: number of processes; divides `batch`.

    Returns:
      A finite iterator of dicts of numpy arrays, with `index` int32 and `valid` bool.

    Raises:
      RecipeError: the batch cannot be divided, or the data cannot be found.
    """
    _check_processes(batch, process_index, process_count)
    source, pipeline = build(data)
    return EvalBatches(
        source,
        pipeline,
        batch,
        shard=(process_index, process_count),
        workers=data.workers,
        prefetch=data.prefetch,
    )


class TrainIterator(Iterator):
    """Endless batches with an elastic state; see `train_iterator`.

    Attributes:
      skipped: rows of this process whose record was bad and replaced, since construction.
      bad_records: indices of those records.
    """

    def __init__(
        self,
        source: Any,
        pipeline: Callable,
        sequence: order.Order,
        batch: int,
        *,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        prefetch: int = 2,
    ):
        self._source, self._pipeline, self._sequence = source, pipeline, sequence
        self._batch = batch
        self._rows = _block(order.global_rows(batch), *shard)
        self._workers, self._prefetch = workers, prefetch
        self._next_index = 0
        self._batches = None
        self._peeked = None
        self._tolerant = getattr(source, "on_error", "raise") == "skip"
        self.skipped = 0
        self.bad_records: set[int] = set()

    @property
    def examples(self) -> int:
        """Number of examples in the source."""
        return len(self._source)

    def __next__(self) -> dict[str, np.ndarray]:
        batch, self._peeked = self.peek(), None
        self._next_index += self._batch
        return batch

    def peek(self) -> dict[str, np.ndarray]:
        """Return the next batch and stay where we are: for shape checks before the first step."""
        if self._peeked is None:
            if self._batches is None:
                self._batches = _read_ahead(self._made(), self._workers, self._prefetch)
            self._peeked = next(self._batches)
            if self._tolerant:
                self._count_replaced(self._peeked["index"])
        return self._peeked

    def _made(self):
        return _TrainBatches(
            self._source, self._pipeline, self._sequence, self._next_index, self._batch, self._rows
        )

    def _count_replaced(self, index):
        # Replacements may happen in another process; the order tells here what should have come.
        for position, actual in zip(self._next_index + self._rows, index, strict=True):
            wanted = self._sequence[position]
            if wanted != actual:
                self.skipped += 1
                if wanted not in self.bad_records:
                    self.bad_records.add(wanted)
                    where = records.locate(self._source, wanted)
                    _log.warning("bad %s replaced by record %d", where, actual)

    def get_state(self) -> dict[str, int]:
        """Return the position of the next batch, the same on every process."""
        return {_STATE: self._next_index}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continue at a position that any process of any process count has reported."""
        position = state[_STATE]
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"{_STATE}={position!r}: must be an integer of at least 0")
        if position != self._next_index:  # else what was read ahead is still what comes next
            self.close()
            self._next_index = position

    def close(self) -> None:
        """Stop threads and worker processes; a later `next` starts them again."""
        self._peeked = None
        _close(self)

    __del__ = close


class EvalBatches(Iterator):
    """One pass over a source, padded to full batches; see `eval_batches`.

    Attributes:
      skipped: rows of this process that a tolerant source could not read.
      bad_records: indices of those records.
    """

    def __init__(
        self,
        source: Any,
        pipeline: Callable,
        batch: int,
        *,
        shard: tuple[int, int] = (0, 1),
        workers: int = 0,
        prefetch: int = 2,
    ):
        self._source = source
        self._made = _EvalBatches(source, pipeline, batch, _block(np.arange(batch), *shard))
        self._workers, self._prefetch = workers, prefetch
        self._batches = None
        self._step = 0
        self.skipped = 0
        self.bad_records: set[int] = set()

    def __len__(self) -> int:
        return len(self._made)

    @property
    def examples(self) -> int:
        """Number of examples in the source."""
        return len(self._source)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._step >= len(self):
            self.close()
            raise StopIteration
        if self._batches is None:
            self._batches = _read_ahead(self._made, self._workers, self._prefetch)
        batch = next(self._batches)
        positions = self._made.positions(self._step)
        for position in positions[~batch["valid"]]:
            if position < len(self._source):
                self.skipped += 1
                self.bad_records.add(int(position))
                where = records.locate(self._source, int(position))
                _log.warning("bad %s left out of the evaluation", where)
        self._step += 1
        return batch

    def close(self) -> None:
        """Stop threads and worker processes."""
        _close(self)

    __del__ = close


class _TrainBatches:
    """Batch k from `start` on, by random access: the source that Grain reads."""

    def __init__(self, source, pipeline, sequence, start, batch, rows):
        self.source, self.pipeline, self.sequence = source, pipeline, sequence
        self.start, self.batch, self.rows = start, batch, rows
        self.random = getattr(pipeline, "random", True)

    def __len__(self):
        return _ENDLESS

    def __getitem__(self, k):
        examples, indices = [], []
        for position in (self.start + k * self.batch + self.rows).tolist():
            example, index = records.read(
                self.source,
                self.pipeline,
                self.sequence[position],
                (lambda: self.sequence.generator(position)) if self.random else _no_generator,
            )
            examples.append(example)
            indices.append(index)
        return _stack(examples) | {"index": np.asarray(indices, np.int32)}


class _EvalBatches:
    """Evaluation batch k: the examples in order, padding beyond the last one."""

    def __init__(self, source, pipeline, batch, rows):
        self.source, self.pipeline, self.batch, self.rows = source, pipeline, batch, rows

    def __len__(self):
        return -(-len(self.source) // self.batch)

    def positions(self, k):
        return k * self.batch + self.rows

    def __getitem__(self, k):
        examples, indices = [], []
        for position in self.positions(k).tolist():
            example, index = None, -1
            if position < len(self.source):
                example, index = records.read(self.source, self.pipeline, position, _no_generator)
                if index != position:
                    example, index = None, -1
            examples.append(example)
            indices.append(index)
        template = next((e for e in examples if e is not None), None)
        if template is None:
            template, _ = records.read(self.source, self.pipeline, 0, _no_generator)
        blank = {name: np.zeros_like(value) for name, value in template.items()}
        index = np.asarray(indices, np.int32)
        stacked = _stack([blank if example is None else example for example in examples])
        return stacked | {"index": index, "valid": index >= 0}


def _no_generator():
    return None


def _stack(examples):
    batch = {}
    for name in examples[0]:
        try:
            array = np.stack([example[name] for example in examples])
        except (KeyError, ValueError) as error:
            shapes = sorted({str(np.shape(e[name])) if name in e else "absent" for e in examples})
            raise RecipeError(
                f"data: {name!r} cannot be batched, shapes differ: {', '.join(shapes)}; "
                "choose a pipeline that brings examples to one size"
            ) from error
        if array.dtype.kind not in "biuf":
            raise RecipeError(
                f"data: {name!r} has type {array.dtype}, which no model can read; "
                "choose a pipeline that drops or encodes it"
            )
        batch[name] = array
    return batch


def _read_ahead(made, workers, prefetch):
    dataset = grain.MapDataset.source(made)
    if workers == 0:
        threads = min(prefetch, os.cpu_count() or 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        return iter(dataset.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():
        # Grain reads its debug flags when it starts workers; notebooks and tests parse none.
        flags.FLAGS.mark_as_parsed()
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(inline).mp_prefetch(options))


def _close(iterator):
    # Also runs for an iterator whose construction failed.
    batches, iterator._batches = getattr(iterator, "_batches", None), None
    if batches is not None:
        batches.close()


def _block(rows, process_index, process_count):
    return np.split(rows, process_count)[process_index]


def _check_processes(batch, process_index, process_count):
    if batch % process_count:
        raise RecipeError(f"batch={batch}: must be a multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise RecipeError(f"process_index={process_index}: must be below {process_count}")
