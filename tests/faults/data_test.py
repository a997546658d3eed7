# SPDX-License-Identifier: Apache-2.0
"""Faults 11 and 20: surroundings that must not matter, and records that cannot be read."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from attnjax.data import iterator
from attnjax.data.records import BadRecord
from attnjax.recipe import Data

PROGRAM = """
import hashlib
from attnjax.data import eval_batches, train_iterator
from attnjax.recipe import Data

def main():
    digest = hashlib.sha256()
    source = {{"name": "synthetic_images", "pixels": 40, "size": 500}}
    data = Data(source, {{"name": "image_train", "size": 24}}, {workers}, {prefetch}, repeats=3)
    it = train_iterator(data, 5, 16, 1, 2)
    batches = [next(it) for _ in range(4)]
    it.close()
    evaluation = Data({{"name": "digits", "split": "test"}}, {{"name": "image_eval", "size": 24}})
    batches += list(eval_batches(evaluation, 90))[:2]
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode() + batch[name].tobytes())
    print(digest.hexdigest())

if __name__ == "__main__":
    main()
"""

SURROUNDINGS = [
    (0, 1, {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"}),
    (2, 3, {"PYTHONHASHSEED": "12345", "TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8"}),
]


def test_batches_do_not_depend_on_surroundings(tmp_path):
    digests = set()
    for workers, prefetch, variables in SURROUNDINGS:
        script = tmp_path / f"batches_{workers}.py"
        script.write_text(PROGRAM.format(workers=workers, prefetch=prefetch))
        environment = os.environ | variables
        environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
        run = subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.strip().splitlines()[-1])
    assert len(digests) == 1


@pytest.fixture
def damaged(tmp_path):
    """Twelve images of one class, the sixth of them truncated, and the same ones undamaged."""
    for kind in ("damaged", "sound"):
        folder = tmp_path / kind / "train" / "a"
        folder.mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / f"{i:02d}.png")
    bad = tmp_path / "damaged" / "train" / "a" / "05.png"
    bad.write_bytes(bad.read_bytes()[:40])
    return tmp_path


def data(folder, kind, on_error="raise", workers=0):
    source = {"name": "image_folder", "root": str(folder / kind), "on_error": on_error}
    return Data(source, {"name": "image_train", "size": 8}, workers=workers)


def epoch(section, batches=6):
    it = iterator.train_iterator(section, 0, 4)
    try:
        return [next(it) for _ in range(batches)], it
    finally:
        it.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_strict_source_names_the_file_and_the_record(damaged, workers):
    with pytest.raises(BadRecord, match=r"record 5 \(.*damaged/train/a/05\.png\): ") as caught:
        epoch(data(damaged, "damaged", workers=workers))
    assert "\n" not in str(caught.value)
    with pytest.raises(BadRecord, match=r"05\.png"):
        list(
            iterator.eval_batches(
                Data(data(damaged, "damaged").source, {"name": "image_eval", "size": 8}), 4
            )
        )


def test_a_tolerant_source_replaces_counts_and_keeps_the_order(damaged, caplog):
    sound, _ = epoch(data(damaged, "sound"))
    batches, it = epoch(data(damaged, "damaged", "skip"))
    assert it.skipped == 2 and it.bad_records == {5}
    assert "05.png" in caplog.text
    for whole, holed in zip(sound, batches, strict=True):
        bad = whole["index"] == 5
        assert (holed["index"][bad] == 6).all()
        for name in whole:
            np.testing.assert_array_equal(whole[name][~bad], holed[name][~bad])


def test_a_tolerant_run_is_resumable_and_the_same_in_workers(damaged):
    expected, _ = epoch(data(damaged, "damaged", "skip"))
    it = iterator.train_iterator(data(damaged, "damaged", "skip", workers=1), 0, 4)
    it.set_state({"global_next_index": 8})
    got = [next(it) for _ in range(4)]
    it.close()
    for left, right in zip(expected[2:], got, strict=True):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    assert it.bad_records == {5}  # counted in the process that asks, not in the worker


def test_evaluation_leaves_a_bad_record_out(damaged):
    section = data(damaged, "damaged", "skip")
    batches = iterator.eval_batches(Data(section.source, {"name": "image_eval", "size": 8}), 5)
    rows = list(batches)
    seen = np.concatenate([b["index"][b["valid"]] for b in rows])
    assert seen.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert batches.skipped == 1 and batches.bad_records == {5}


def test_a_source_that_cannot_be_read_at_all_stops_even_when_tolerant(damaged):
    folder = damaged / "damaged" / "train" / "a"
    for file in folder.iterdir():
        file.write_bytes(b"nothing")
    with pytest.raises(BadRecord, match="12 bad records in a row"):
        epoch(data(damaged, "damaged", "skip"))
