# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation batches: determinism, elasticity, workers, padding."""

import numpy as np
import pytest

from attnjax.data import iterator, order
from attnjax.data.pipelines import Arrays
from attnjax.errors import RecipeError
from attnjax.recipe import Data

DIGITS = Data(
    source={"name": "digits"}, pipeline={"name": "small_images", "shift": 0.1, "rotation": 10.0}
)


class Counting:
    """Examples that are their own index."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"value": np.float64(index), "text": b"not a number"}


class Drawing:
    """A pipeline that returns what it draws, with PIL and PyTorch nowhere near."""

    random = True

    def __call__(self, example, rng):
        return {"draw": rng.random()}


def train(size=100, batch=8, seed=0, shard=(0, 1), repeats=1, pipeline=None, **options):
    source = Counting(size)
    return iterator.TrainIterator(
        source,
        pipeline or Arrays(),
        order.Order(size, seed, repeats),
        batch,
        shard=shard,
        **options,
    )


def take(it, count):
    return [next(it) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_contract_of_a_batch():
    it = iterator.train_iterator(DIGITS, seed=0, batch=16)
    batch = next(it)
    it.close()
    assert {name: (v.dtype, v.shape) for name, v in batch.items()} == {
        "image": (np.float32, (16, 48, 48, 3)),
        "label": (np.int32, (16,)),
        "index": (np.int32, (16,)),
    }


def test_same_seed_same_batches_and_another_seed_other_batches():
    a, b, c = (iterator.train_iterator(DIGITS, seed, 16) for seed in (1, 1, 2))
    first = take(a, 4)
    assert_same(first, take(b, 4))
    assert not np.array_equal(first[0]["index"], next(c)["index"])
    for it in (a, b, c):
        it.close()


@pytest.mark.parametrize("prefetch", [1, 5])
def test_read_ahead_does_not_change_batches(prefetch):
    it = iterator.train_iterator(Data(DIGITS.source, DIGITS.pipeline, prefetch=prefetch), 0, 8)
    reference = iterator.train_iterator(DIGITS, 0, 8)
    assert_same(take(it, 5), take(reference, 5))
    it.close()
    reference.close()


def test_epochs_are_complete_and_differ():
    it = train(size=24, batch=8)
    epochs = [np.concatenate([b["index"] for b in take(it, 3)]) for _ in range(2)]
    it.close()
    assert all(sorted(e) == list(range(24)) for e in epochs)
    assert not np.array_equal(*epochs)


def test_state_continues_anywhere_without_replay():
    reads = []

    class Watched(Counting):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    def make():
        return iterator.TrainIterator(
            Watched(10_000), Arrays(), order.Order(10_000, 0), 8, prefetch=1
        )

    it = make()
    expected = take(it, 60)[50:]
    state = it.get_state()
    it.close()
    assert state == {"global_next_index": 480}
    reads.clear()
    other = make()
    other.set_state({"global_next_index": 400})
    got = take(other, 10)
    other.close()
    assert_same(got, expected)
    assert len(reads) <= 8 * 12
    assert other.get_state() == state


def test_set_state_after_batches_were_read():
    it = train()
    first = take(it, 3)
    it.set_state({"global_next_index": 0})
    assert_same(take(it, 3), first)
    it.close()


def test_peek_does_not_advance():
    it, other = train(), train()
    peeked = it.peek()
    assert it.get_state() == {"global_next_index": 0}
    it.set_state({"global_next_index": 0})
    got = take(it, 3)
    assert got[0] is peeked
    assert_same(got, take(other, 3))
    it.close()
    other.close()


@pytest.mark.parametrize("state", [{"global_next_index": -1}, {"global_next_index": "5"}])
def test_a_state_that_is_no_position_is_refused(state):
    with pytest.raises(ValueError, match="global_next_index"):
        train().set_state(state)


def test_elastic_four_then_two_then_one_process():
    """The global batches of an uninterrupted run come back, row by row, over any process count."""
    reference = take(train(pipeline=Drawing(), repeats=3), 9)
    state, got = {"global_next_index": 0}, []
    for count in (4, 2, 1):
        shards = [train(shard=(p, count), pipeline=Drawing(), repeats=3) for p in range(count)]
        for it in shards:
            it.set_state(state)
        for _ in range(3):
            parts = [next(it) for it in shards]
            got.append({k: np.concatenate([part[k] for part in parts]) for k in parts[0]})
        states = [it.get_state() for it in shards]
        assert all(s == states[0] for s in states)
        state = states[0]
        for it in shards:
            it.close()
    assert_same(got, reference)


def test_repeated_augmentation_in_batches():
    """Positions of a global batch are contiguous in the sequence; copies are drawn apart."""
    it = train(size=256, batch=64, repeats=3, pipeline=Drawing())
    batches = take(it, 8)
    it.close()
    for e in range(2):
        rows = np.concatenate([b["index"] for b in batches[4 * e : 4 * e + 4]])
        counts = np.bincount(rows, minlength=256)
        assert counts.sum() == 256 and np.sum(counts == 3) == 85 and counts.max() == 3
    draws = np.concatenate([b["draw"] for b in batches])
    assert len(np.unique(draws)) == draws.size


def deit_shard(permutation, rank, replicas, repeats=3):
    """The indices one replica sees in an epoch: DeiT's repeated-augmentation sampler, by its rule.

    Every index stands three times in a row, the list is padded to equal shards, strided over the
    replicas, and cut to floor(floor(N / 256) * 256 / replicas).
    """
    size = len(permutation)
    listed = [i for i in permutation for _ in range(repeats)]
    listed += listed[: -len(listed) % replicas]
    return listed[rank::replicas][: size // 256 * 256 // replicas]


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_processes_see_the_shards_of_repeated_augmentation(replicas):
    """Two epochs over several processes: strided, disjoint shards of equal size."""
    size, batch = 600, 64
    plain = order.Order(size, seed=5)
    steps = size // 256 * 256 // batch
    shards = [train(size, batch, 5, (p, replicas), repeats=3) for p in range(replicas)]
    for epoch in range(2):
        permutation = [plain[epoch * size + i] for i in range(size)]
        expected = [deit_shard(permutation, rank, replicas) for rank in range(replicas)]
        found = [np.concatenate([b["index"] for b in take(it, steps)]).tolist() for it in shards]
        # Which process stands for which rank does not matter; which examples it sees does.
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected))
        seen = np.bincount(np.concatenate(found), minlength=size)
        assert seen.sum() == 512 and (np.sort(seen)[::-1][:170] == 3).all()
    for it in shards:
        it.close()


def test_worker_processes_make_the_same_batches_as_threads():
    reference = iterator.train_iterator(DIGITS, 0, 8)
    data = Data(DIGITS.source, DIGITS.pipeline, workers=2, prefetch=1)
    it = iterator.train_iterator(data, 0, 8)
    expected = take(reference, 7)
    try:
        assert_same(take(it, 5), expected[:5])
        it.set_state({"global_next_index": 40})  # where it is: workers go on
        assert_same(take(it, 2), expected[5:])
    finally:
        it.close()
        reference.close()


@pytest.mark.parametrize(("batch", "count"), [(10, 4), (8, 3)])
def test_an_indivisible_batch_is_refused(batch, count):
    for make in (
        lambda: iterator.train_iterator(DIGITS, 0, batch, 0, count),
        lambda: iterator.eval_batches(DIGITS, batch, 0, count),
    ):
        with pytest.raises(RecipeError, match=f"batch={batch}"):
            make()


def test_unknown_names_and_arguments_are_refused():
    for data, message in (
        (Data({"name": "digit"}), "did you mean 'digits'"),
        (Data({}), "source.name is missing"),
        (Data({"name": "digits", "splt": "test"}), "source.splt"),
        (Data({"name": "digits"}, {"name": "small_images", "size": 4.5}), "pipeline.size"),
    ):
        with pytest.raises(RecipeError, match=message):
            iterator.train_iterator(data, 0, 4)


class Ragged(Counting):
    def __getitem__(self, index):
        return {"value": np.zeros(1 + index % 2)}


def test_what_cannot_be_batched_is_named():
    for source, pipeline, message in (
        (Ragged(8), Arrays(), "'value' cannot be batched"),
        (Counting(8), lambda example, rng: example, "'text' has type"),
    ):
        it = iterator.TrainIterator(source, pipeline, order.Order(8, 0), 8)
        with pytest.raises(RecipeError, match=message):
            next(it)
        it.close()


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 8), (9, 4)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_example_once(size, batch, count):
    processes = [
        iterator.EvalBatches(Counting(size), Arrays(), batch, shard=(p, count))
        for p in range(count)
    ]
    lists = [list(p) for p in processes]
    assert {len(part) for part in lists} == {-(-size // batch)}
    rows = []
    for parts in zip(*lists, strict=True):
        whole = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        assert whole["index"].shape == (batch,) and whole["valid"].dtype == bool
        assert np.all(whole["index"][~whole["valid"]] == -1)
        assert np.all(whole["value"][~whole["valid"]] == 0)
        np.testing.assert_array_equal(
            whole["value"][whole["valid"]], whole["index"][whole["valid"]]
        )
        rows += whole["index"][whole["valid"]].tolist()
    assert rows == list(range(size))


def test_evaluation_of_digits_is_the_same_twice():
    data = Data({"name": "digits", "split": "test"}, {"name": "small_images", "shift": 0.1})
    first, second = (list(iterator.eval_batches(data, 100)) for _ in range(2))
    assert_same(first, second)
    assert sum(int(b["valid"].sum()) for b in first) == 360
    assert len(iterator.eval_batches(data, 100)) == 4
