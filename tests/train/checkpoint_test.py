# SPDX-License-Identifier: Apache-2.0
"""Steps survive meshes, kills and full disks; damaged and foreign ones are never used."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.errors import AttnjaxError, NoUsableCheckpoint, RecipeError
from attnjax.parallel import make_mesh
from attnjax.train.checkpoint import Checkpointer, latest_step, restore_params
from attnjax.train.state import GuardState, TrainState

# When one read fails, the storage layer drops the others of that step without waiting for them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def drop_abandoned_reads():
    """Collect what failed reads left behind here, where the warnings about it are known."""
    yield
    gc.collect()


RECORD = {"recipe": "abc", "version": "1"}


def make_state(mesh, seed=0, width=8):
    """A small tree with every kind of leaf a run has."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((16, width)).astype(np.float32)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    params = {"up": {"kernel": put(kernel, "fsdp", "model"), "bias": put(kernel[0])}}
    return TrainState(
        step=put(jnp.int32(seed)),
        params=params,
        opt_state=({"mu": jax.tree.map(lambda x: x * 2, params)}, (), put(jnp.int32(3))),
        ema=jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
        key=put(jax.random.key(seed)),
        guard=jax.tree.map(put, GuardState.zero()),
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def host(tree):
    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(lambda x: np.asarray(plain(x)), tree)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "model": 2})


class Run:
    """A checkpoint folder with a few saved steps and the messages it gave."""

    def __init__(self, folder, mesh, steps=(10, 20, 30), keep=9, best="", metrics=None):
        self.folder, self.mesh, self.keep, self.best = folder, mesh, keep, best
        self.messages = []
        self.save(steps, metrics or {})

    def open(self):
        return Checkpointer(self.folder, 10, self.keep, self.best, self.messages.append)

    def save(self, steps, metrics=()):
        checkpointer = self.open()
        for step in steps:
            state = make_state(self.mesh, step)
            value = {"val/accuracy": metrics[step]} if step in metrics else None
            checkpointer.save(step, state, {"global_next_index": 8 * step}, RECORD, value)
        checkpointer.close()

    def restore(self):
        self.messages.clear()
        return self.open().restore(abstract(make_state(self.mesh)))

    def steps(self):
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())


@pytest.fixture
def run(tmp_path, mesh):
    return Run(tmp_path / "checkpoints", mesh)


def test_nothing_saved_gives_none(tmp_path, mesh):
    checkpointer = Checkpointer(tmp_path / "a/b", 10, 2)
    assert checkpointer.restore(abstract(make_state(mesh))) is None
    assert latest_step(tmp_path / "a/b") is None
    assert latest_step(tmp_path / "missing") is None
    checkpointer.close()


def test_round_trip_is_bit_equal_and_keeps_shardings(run, mesh):
    state, data, record, step = run.restore()
    expected = make_state(mesh, 30)
    assert (data, record, step) == ({"global_next_index": 240}, RECORD, 30)
    assert_equal(state, expected)
    jax.tree.map(lambda a, b: _assert_same_kind(a, b), state, expected)
    assert latest_step(run.folder) == 30


def _assert_same_kind(a, b):
    assert a.dtype == b.dtype
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_saves_only_when_scheduled_or_forced(tmp_path, mesh):
    checkpointer = Checkpointer(tmp_path, 10, 5)
    state = make_state(mesh)
    assert [s for s in range(25) if checkpointer.should_save(s)] == [10, 20]
    assert not checkpointer.save(7, state, {}, RECORD)
    assert checkpointer.save(7, state, {}, RECORD, force=True)
    assert not checkpointer.save(7, state, {}, RECORD, force=True)
    checkpointer.close()
    assert latest_step(tmp_path) == 7


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "model": 2}, {}])
def test_restores_on_other_meshes_bit_equal(run, sizes):
    count = int(np.prod(list(sizes.values()), initial=1))
    mesh = make_mesh(sizes, jax.devices()[:count])
    expected = make_state(mesh, 30)
    state, *_ = run.open().restore(abstract(expected))
    assert_equal(state, expected)
    jax.tree.map(_assert_same_kind, state, expected)


def test_donated_arrays_are_saved_as_they_were(tmp_path, mesh):
    sharding = NamedSharding(mesh, P("fsdp"))
    state = {"w": jax.device_put(np.arange(1 << 20, dtype=np.float32).reshape(1024, -1), sharding)}
    target = abstract(state)
    expected = host(state)
    advance = jax.jit(lambda s: {"w": s["w"] * 1.5 + 1}, donate_argnums=0, out_shardings=None)
    checkpointer = Checkpointer(tmp_path, 1, 1)
    checkpointer.save(1, state, {}, RECORD)
    for _ in range(5):
        state = advance(state)
    checkpointer.wait()
    restored, *_ = checkpointer.restore(target)
    assert_equal(restored, expected)
    checkpointer.close()


# Damage


def flip(path: pathlib.Path, position=0.5, bit=3):
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * position), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


def data_files(folder):
    """Data files of one step, largest first: those with array chunks."""
    files = [f for f in (folder / "state").rglob("*") if f.is_file() and f.parent.name == "d"]
    return sorted(files, key=lambda f: f.stat().st_size, reverse=True)


def assert_fell_back(run, words, step=20):
    state, data, _, used = run.restore()
    assert used == step
    assert data == {"global_next_index": 8 * step}
    assert_equal(state, make_state(run.mesh, step))
    assert len(run.messages) == 1, run.messages
    for word in words:
        assert word in run.messages[0]
    # The damaged step is out of the way of the same step of the continued run.
    assert 30 not in run.steps()
    assert (run.folder / "30.damaged").is_dir()
    run.save([30])
    assert run.restore()[3] == 30
    assert not run.messages


@pytest.mark.parametrize("position", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_flipped_bit_in_chunks(run, position):
    # Chunks are written once per process and once more when merged: damage every copy.
    for file in data_files(run.folder / "30"):
        flip(file, position)
    assert_fell_back(run, ["step 30", str(run.folder / "30" / "state")])


def test_flipped_bit_in_an_array_names_the_array(tmp_path, mesh):
    sharding = NamedSharding(mesh, P())
    noise = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    states = {s: {"params": {"big": jax.device_put(noise + s, sharding)}} for s in (1, 2)}
    messages = []
    checkpointer = Checkpointer(tmp_path, 1, 5, on_message=messages.append)
    for step, state in states.items():
        checkpointer.save(step, state, {}, RECORD)
    checkpointer.wait()
    flip(data_files(tmp_path / "2")[0], 0.5)
    messages.clear()
    state, _, _, step = checkpointer.restore(abstract(states[1]))
    assert step == 1
    assert "params/big" in messages[0] and "checksum" in messages[0]
    checkpointer.close()


def test_flipped_bit_in_index(run):
    flip(run.folder / "30" / "state" / "manifest.ocdbt")
    assert_fell_back(run, ["step 30", str(run.folder / "30" / "state")])


def test_flipped_bit_in_metadata(run):
    flip(run.folder / "30" / "state" / "_METADATA", 0.02)
    assert_fell_back(run, ["step 30", str(run.folder / "30" / "state")])


def test_flipped_bit_in_json(run):
    flip(run.folder / "30" / "run" / "metadata")
    assert_fell_back(run, ["step 30", str(run.folder / "30" / "run" / "metadata")])


@pytest.mark.slow
def test_any_flipped_bit_is_refused_or_harmless(run):
    """Every file, many positions: an exact restore or a fallback, never a third outcome."""
    rng = np.random.default_rng(0)
    outcomes = {"fallback": 0, "exact": 0}
    for file in sorted(f for f in (run.folder / "30").rglob("*") if f.is_file()):
        for position in rng.uniform(0, 1, 24):
            original = file.read_bytes()
            flip(file, position, int(rng.integers(8)))
            state, _, _, step = run.restore()
            assert_equal(state, make_state(run.mesh, step))
            if step == 20:
                (run.folder / "30.damaged").rename(run.folder / "30")
            outcomes["fallback" if step == 20 else "exact"] += 1
            file.write_bytes(original)
    print(outcomes)
    assert outcomes["fallback"] > outcomes["exact"] / 4
    assert run.restore()[3] == 30


@pytest.mark.parametrize("kind", ["truncated", "removed", "emptied"])
@pytest.mark.parametrize("part", ["chunk", "index", "json"])
def test_truncated_or_removed_files(run, kind, part):
    folder = run.folder / "30"
    files = {
        "chunk": data_files(folder),
        "index": [folder / "state" / "manifest.ocdbt"],
        "json": [folder / "run" / "metadata"],
    }[part]
    for file in files:
        data = file.read_bytes()
        file.unlink()
        if kind != "removed":
            file.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"")
    assert_fell_back(run, ["step 30"])


def test_several_damaged_steps_and_then_none(run):
    flip(run.folder / "30" / "run" / "metadata")
    flip(run.folder / "20" / "run" / "metadata")
    assert run.restore()[3] == 10
    assert "step 30" in run.messages[0] and "step 20" in run.messages[0]
    flip(run.folder / "10" / "run" / "metadata")
    for _ in range(2):  # Refusing must not make a second start begin from scratch.
        with pytest.raises(NoUsableCheckpoint, match="step 10") as error:
            run.restore()
        assert error.value.exit_code == 4


def test_exchanged_steps_are_refused(run):
    (run.folder / "30").rename(run.folder / "x")
    (run.folder / "20").rename(run.folder / "30")
    (run.folder / "x").rename(run.folder / "20")
    assert run.restore()[3] == 10


# Things that are no checkpoints


def test_foreign_things_are_never_chosen_and_never_fatal(run):
    (run.folder / "99").mkdir()
    (run.folder / "98.orbax-checkpoint-tmp-123").mkdir()
    (run.folder / "97").write_text("not a folder")
    (run.folder / "40").write_text("not a folder")
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / "050").mkdir()
    (run.folder / "60").mkdir()
    (run.folder / "60" / "thesis.tex").write_text("mine")
    assert run.restore()[3] == 30
    assert latest_step(run.folder) == 30
    run.save([40, 60])
    assert run.restore()[3] == 60
    assert (run.folder / "40.foreign").read_text() == "not a folder"
    assert (run.folder / "60.foreign" / "thesis.tex").read_text() == "mine"
    assert (run.folder / "notes.txt").read_text() == "mine"


def test_committed_but_empty_folder_is_refused(run):
    (run.folder / "50").mkdir()
    (run.folder / "50" / "commit_success.txt").write_text("")
    assert run.restore()[3] == 30
    assert "step 50" in run.messages[0]


def test_unfinished_step_is_ignored_with_one_warning(run):
    (run.folder / "30" / "commit_success.txt").unlink()
    assert run.restore()[3] == 20
    assert len(run.messages) == 1 and "30" in run.messages[0]
    run.save([30])
    assert run.restore()[3] == 30
    assert not (run.folder / "30.foreign").exists()


def test_only_an_unfinished_step_means_a_fresh_start(tmp_path, mesh):
    run = Run(tmp_path, mesh, steps=(10,))
    (run.folder / "10" / "commit_success.txt").unlink()
    assert run.restore() is None


# Mismatch


def test_dtype_shape_and_structure_mismatch_are_listed(run, mesh):
    target = abstract(make_state(mesh))
    kernel = target.params["up"]["kernel"]
    half = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16, sharding=kernel.sharding)
    wide = jax.ShapeDtypeStruct((16, 10), jnp.float32, sharding=kernel.sharding)
    for change, words in (
        ({"up": {**target.params["up"], "kernel": half}}, ["float32[16,8]", "bfloat16[16,8]"]),
        ({"up": {**target.params["up"], "kernel": wide}}, ["float32[16,8]", "float32[16,10]"]),
        ({"up": {**target.params["up"], "extra": half}}, ["params/up/extra", "saved nothing"]),
        ({"up": {"kernel": kernel}}, ["params/up/bias", "wanted nothing"]),
        ({f"layer_{i}": {"kernel": kernel} for i in range(20)}, ["and 12 more"]),
    ):
        with pytest.raises(RecipeError) as error:
            run.open().restore(TrainState(**{**vars(target), "params": change}))
        message = str(error.value)
        assert all(word in message for word in words), message
        assert message.count("params/") <= 10
        assert "\n" not in message
    assert run.steps() == [10, 20, 30]


def test_other_key_type_is_a_mismatch(run, mesh):
    target = abstract(make_state(mesh))
    other = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    other = jax.ShapeDtypeStruct((), other.dtype, sharding=target.key.sharding)
    with pytest.raises(RecipeError, match="key: saved key<fry>"):
        run.open().restore(TrainState(**{**vars(target), "key": other}))


# Parameters only


def test_restore_params_prefers_the_average_and_takes_other_prefixes(run, mesh):
    expected = make_state(mesh, 30)
    params, step = restore_params(run.folder, abstract(expected.ema))
    assert step == 30
    assert_equal(params, expected.ema)
    params, step = restore_params(run.folder, abstract(expected.params), ("params",), step=10)
    assert step == 10
    assert_equal(params, make_state(mesh, 10).params)
    with pytest.raises(RecipeError, match="bfloat16"):
        restore_params(run.folder, abstract(expected.params))
    with pytest.raises(NoUsableCheckpoint, match="step 11"):
        restore_params(run.folder, abstract(expected.ema), step=11)


def test_restore_params_falls_back_and_changes_nothing(run, mesh):
    flip(run.folder / "30" / "run" / "metadata")
    before = sorted(str(p) for p in run.folder.rglob("*"))
    params, step = restore_params(run.folder, abstract(make_state(mesh).ema))
    assert step == 20
    assert_equal(params, make_state(mesh, 20).ema)
    assert before == sorted(str(p) for p in run.folder.rglob("*"))


# Retention


def test_keeps_the_newest_and_the_best(tmp_path, mesh):
    best = {10: 0.1, 20: 0.9, 30: 0.5, 40: float("nan"), 50: 0.2}
    run = Run(tmp_path, mesh, best, keep=2, best="val/accuracy", metrics=best)
    assert run.steps() == [20, 40, 50]
    run.save([60, 70], {70: 0.95})  # A new process reads the old metrics from the folder.
    assert run.steps() == [60, 70]
    run.save([80, 90], {80: 0.3})
    assert run.steps() == [70, 80, 90]


def test_keeps_only_the_newest_without_a_metric(tmp_path, mesh):
    assert Run(tmp_path, mesh, range(10, 60, 10), keep=1).steps() == [50]


def test_nothing_is_removed_before_the_new_step_is_complete(tmp_path, mesh, monkeypatch):
    """A slow save must leave both the newest complete and the best step alone until it commits."""
    from orbax.checkpoint._src.path import atomicity

    metrics = {10: 0.9, 20: 0.1}
    run = Run(tmp_path, mesh, (10, 20), keep=1, best="val/accuracy", metrics=metrics)
    finalize = atomicity.CommitFileTemporaryPath.finalize
    seen = []

    async def slowly(self):
        time.sleep(0.2)
        seen.append(
            {s for s in run.steps() if (run.folder / str(s) / "commit_success.txt").exists()}
        )
        await finalize(self)

    monkeypatch.setattr(atomicity.CommitFileTemporaryPath, "finalize", slowly)
    run.save([30], {30: 0.95})
    assert len(seen) >= 2 and all(complete == {10, 20} for complete in seen)
    assert run.steps() == [30]


def test_failed_save_removes_nothing(tmp_path, mesh, monkeypatch):
    from orbax.checkpoint._src.path import atomicity

    run = Run(tmp_path, mesh, (10,), keep=1)

    async def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomicity.CommitFileTemporaryPath, "finalize", fail)
    checkpointer = run.open()
    checkpointer.save(20, make_state(mesh, 20), {}, RECORD)
    with pytest.raises(AttnjaxError, match="No space left") as error:
        checkpointer.wait()
    assert str(run.folder) in str(error.value)
    monkeypatch.undo()
    checkpointer.close()
    assert run.restore()[3] == 10
    run.save([20])
    assert run.restore()[3] == 20


# Disk and processes


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnjaxError, match=r"cannot create .*file/checkpoints"):
        Checkpointer(tmp_path / "file" / "checkpoints", 1, 1)


PROGRAM = """
import json, os, pathlib, resource, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from attnjax.errors import AttnjaxError
from attnjax.train.checkpoint import Checkpointer
folder = sys.argv[1]
def state(step):
    rng = np.random.default_rng(step)
    noise = rng.standard_normal((64, 512)).astype(np.float32)
    return {"w": jnp.asarray(noise), "s": jnp.int32(step)}
"""


def start(body, folder, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(body), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        **kwargs,
    )


def restore_plain(folder):
    """Restore what PROGRAM saved and check that it is exactly one of its states."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "w": jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=sharding),
        "s": jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding),
    }
    restored = Checkpointer(folder, 1, 2, on_message=lambda _: None).restore(target)
    if restored is None:
        return None
    state, _, _, step = restored
    expected = np.random.default_rng(step).standard_normal((64, 512)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(state["w"]), expected)
    assert int(state["s"]) == step
    return step


def test_file_size_limit_names_the_path_and_spares_older_steps(tmp_path):
    process = start(
        """
        checkpointer = Checkpointer(folder, 1, 2)
        checkpointer.save(1, state(1), {}, {})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            checkpointer.save(2, state(2), {}, {})
            checkpointer.wait()
        except AttnjaxError as error:
            print(error)
        try:
            checkpointer.close()
        except AttnjaxError:
            pass
        """,
        tmp_path,
    )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "cannot write checkpoints to" in output and str(tmp_path) in output, output
    assert restore_plain(tmp_path) == 1


def kill_at_random_moments(folder, rng, kills):
    """Kill a process that saves all the time; after each kill the newest step must be exact."""
    newest = 0
    for _ in range(kills):
        process = start(
            """
            from attnjax.train.checkpoint import latest_step
            first = (latest_step(folder) or 0) + 1
            checkpointer = Checkpointer(folder, 1, 2)
            print("ready", flush=True)
            for step in range(first, 10_000):
                checkpointer.save(step, state(step), {"next": step}, {})
            """,
            folder,
        )
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(rng.uniform(0.05, 1.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        step = restore_plain(folder)
        assert (step or 0) >= newest
        newest = step or 0
    return newest


def test_killed_while_saving(tmp_path):
    assert kill_at_random_moments(tmp_path, np.random.default_rng(0), 2) > 0


@pytest.mark.slow
def test_killed_while_saving_many_times(tmp_path):
    assert kill_at_random_moments(tmp_path, np.random.default_rng(1), 20) > 0


def test_run_file_is_plain_json(run):
    body = json.loads((run.folder / "30" / "run" / "metadata").read_text())["body"]
    assert body["record"] == RECORD and body["step"] == 30
    assert body["arrays"]["params/up/kernel"] == "float32[16,8]"
