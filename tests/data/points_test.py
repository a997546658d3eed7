# SPDX-License-Identifier: Apache-2.0
"""Clouds of points: PCD files and their faults, the PCN layout, shapes, sampling and mirrors."""

import json

import numpy as np
import pytest

from attnjax.data import points
from attnjax.data.records import BadRecord, read
from attnjax.errors import RecipeError

HEADER = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS {fields}
SIZE {size}
TYPE {type}
COUNT {count}
WIDTH {rows}
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS {rows}
DATA {data}
"""
PLAIN = dict(fields="x y z", size="4 4 4", type="F F F", count="1 1 1")


def write(path, cloud, data="ascii", **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = HEADER.format(**{**PLAIN, "rows": len(cloud), "data": data, **changes}).encode()
    if data == "ascii":
        body = "".join(" ".join(map(str, row)) + "\n" for row in cloud.tolist()).encode()
    else:
        body = cloud.tobytes()
    path.write_bytes(header + body)
    return path


def draw(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)


def test_both_forms_are_read(tmp_path):
    cloud = draw(7)
    for data in ("ascii", "binary"):
        np.testing.assert_array_equal(
            points.read_pcd(write(tmp_path / f"{data}.pcd", cloud, data)), cloud
        )
    # Other fields among x, y and z, of other types and counts.
    dtype = np.dtype([("z", "<f8"), ("rgb", "<u1", 3), ("y", "<f4"), ("_", "<i2"), ("x", "<f4")])
    records = np.zeros(7, dtype)
    for i, name in enumerate("xyz"):
        records[name] = cloud[:, i]
    more = dict(fields="z rgb y _ x", size="8 1 4 2 4", type="F U F I F", count="1 3 1 1 1")
    path = write(tmp_path / "more.pcd", records, "binary", **more)
    np.testing.assert_array_equal(points.read_pcd(path), cloud)
    rows = np.concatenate([cloud[:, 2:], np.full((7, 3), 9), cloud[:, 1:2], cloud[:, :1]], axis=1)
    more = dict(fields="z rgb y x", size="4 1 4 4", type="F U F F", count="1 3 1 1")
    path = write(tmp_path / "text.pcd", rows.astype(np.float32), **more)
    np.testing.assert_array_equal(points.read_pcd(path), cloud)


FAULTS = [
    ("ascii", dict(fields="x y w"), "FIELDS x y w lack z"),
    ("ascii", dict(fields="x y z x"), "FIELDS, SIZE, TYPE and COUNT differ in length"),
    ("ascii", dict(size="4 4 3"), "no number of TYPE F and SIZE 3"),
    ("ascii", dict(type="F F D"), "no number of TYPE D and SIZE 4"),
    ("ascii", dict(rows=8), "7 lines of points, the header says 8"),
    ("ascii", dict(rows="many"), "POINTS 'many' is no number above 0"),
    ("ascii", dict(rows=0), "POINTS '0' is no number above 0"),
    ("ascii", dict(count="1 1 2"), "point 0 has 3 of 4 numbers"),
    ("ascii", dict(fields=""), "the header has no FIELDS"),
    ("binary", dict(rows=8), "84 bytes of points, the header says 96"),
    ("binary", dict(rows=99_999_999), "84 bytes of points, the header says 1199999988"),
    ("binary_compressed", {}, "DATA binary_compressed is not supported; choose ascii or binary"),
]


@pytest.mark.parametrize(("data", "changes", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faulty_files_are_refused(tmp_path, data, changes, message):
    path = write(tmp_path / "a.pcd", draw(7), data, **changes)
    with pytest.raises(ValueError, match=f"a.pcd: {message}"):
        points.read_pcd(path)


def test_numbers_that_are_none_are_refused(tmp_path):
    cloud = draw(7)
    cloud[3, 1] = np.inf
    for data in ("ascii", "binary"):
        with pytest.raises(ValueError, match="point 3 is not finite"):
            points.read_pcd(write(tmp_path / "a.pcd", cloud, data))
    path = write(tmp_path / "a.pcd", draw(7))
    path.write_text(path.read_text().replace("\n", " ", 1))  # the first comment swallows VERSION
    assert len(points.read_pcd(path)) == 7
    path.write_text(path.read_text().rsplit(" ", 1)[0] + " 1.2.3\n")
    with pytest.raises(ValueError, match=r"point 6: .*could not convert string to float"):
        points.read_pcd(path)
    for content in (b"", b"\x00" * 9000, b"VERSION 0.7\nFIELDS x y z\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.pcd: no line 'DATA'"):
            points.read_pcd(path)
    with pytest.raises(ValueError, match=r"no file .*none.pcd"):
        points.read_pcd(tmp_path / "none.pcd")


@pytest.fixture
def pcn(tmp_path):
    """Two taxonomies; three training models with eight partial clouds, one test model."""
    models = {"train": [["a1", "a2"], ["b1"]], "val": [[], []], "test": [[], ["b2"]]}
    entries = [
        {"taxonomy_id": f"0{i}", "taxonomy_name": "x", **{s: models[s][i] for s in models}}
        for i in range(2)
    ]
    (tmp_path / "PCN.json").write_text(json.dumps(entries))
    for split, count in (("train", 8), ("test", 1)):
        for i, names in enumerate(models[split]):
            for name in names:
                write(tmp_path / split / "complete" / f"0{i}" / f"{name}.pcd", draw(20), "binary")
                for j in range(count):
                    folder = tmp_path / split / "partial" / f"0{i}" / name
                    write(folder / f"{j:02d}.pcd", draw(5 + j, j))
    return tmp_path


def test_layout_of_pcn(pcn):
    train = points.Pcn(str(pcn))
    assert len(train) == 24 and train.taxonomies == ["00", "01"]
    for index, (file, label) in {
        0: ("00/a1/00", 0),
        9: ("00/a2/01", 0),
        23: ("01/b1/07", 1),
    }.items():
        example = train[index]
        assert train.locate(index).endswith(f"train/partial/{file}.pcd")
        assert example["label"] == label and example["complete"].shape == (20, 3)
        np.testing.assert_array_equal(example["partial"], draw(5 + index % 8, index % 8))
    assert len(points.Pcn(str(pcn), "train", renderings=2)) == 6
    test = points.Pcn(str(pcn), "test")
    assert len(test) == 1 and test.locate(0).endswith("test/partial/01/b2/00.pcd")
    # The flat layout, one file for each model.
    flat = write(pcn / "test/partial/01/b2.pcd", draw(9))
    assert test.locate(0) == str(flat) and test[0]["partial"].shape == (9, 3)


def test_wrong_pcn_is_refused(pcn):
    make = lambda **arguments: points.Pcn(**{"root": str(pcn), **arguments})
    for arguments, message in (
        (dict(split="testing"), "source.split='testing': did you mean 'test'"),
        (dict(renderings=9), "source.renderings=9: must be from 1 to 8"),
        (dict(root=str(pcn / "train")), r"no file .*train/PCN.json"),
        (dict(split="val"), "no model of split 'val'"),
        (dict(on_error="ignore"), "source.on_error='ignore'"),
    ):
        with pytest.raises(RecipeError, match=message):
            make(**arguments)
    entries = json.loads((pcn / "PCN.json").read_text())
    for broken, message in (
        ("[", "is not valid JSON"),
        ("{}", "expected a list of objects"),
        (json.dumps([{**entries[0], "train": None}]), "entry 0 has none of train"),
        (json.dumps([entries[0], {**entries[1], "train": ["../../x"]}]), "entry 1 has none of"),
    ):
        (pcn / "PCN.json").write_text(broken)
        with pytest.raises(RecipeError, match=message):
            make()


def test_bad_records_name_their_file(pcn):
    source = points.Pcn(str(pcn))
    write(pcn / "train/partial/00/a2/01.pcd", draw(5), rows=6)
    with pytest.raises(BadRecord, match=r"record 9 \(.*00/a2/01.pcd\).*5 lines of points"):
        read(source, lambda x, _: x, 9, lambda: None)
    tolerant = points.Pcn(str(pcn), on_error="skip")
    assert read(tolerant, lambda x, _: x, 9, lambda: None)[1] == 10


def distance(name, p):
    """How far points are from the surface, sizes estimated from the points themselves."""
    norm = np.linalg.norm(p, axis=1)
    if name == "sphere":
        return np.ptp(norm)
    if name == "torus":
        _, axes = np.linalg.eigh(p.T @ p / len(p))
        turned = p @ axes
        around = np.linalg.norm(turned[:, 1:], axis=1)  # the axis has the least extent
        ring = (around.max() + around.min()) / 2
        return np.ptp(np.hypot(around - ring, turned[:, 0]))
    return 0.0


@pytest.mark.parametrize("name", points.SHAPES)
def test_shapes_are_closed_symmetric_and_seen_from_one_side(name):
    source = points.ParametricShapes("test", size=64, points=200, complete_points=4000)
    label = points.SHAPES.index(name)
    examples = [x for x in (source[i] for i in range(64)) if x["label"] == label]
    assert len(examples) > 6
    for example in examples[:4]:
        complete, partial, view = (example[k] for k in ("complete", "partial", "view"))
        assert complete.shape == (4000, 3) and partial.shape == (200, 3)
        assert complete.dtype == partial.dtype == np.float32
        assert np.linalg.norm(complete, axis=1).max() <= 0.5 + 1e-6
        # All four are symmetric about their centre, and the seen half is off it.
        assert np.linalg.norm(complete.mean(axis=0)) < 0.03
        assert (partial @ view).mean() > 0.03
        # Every partial point lies on the surface: near points of a dense sample.
        gap = np.linalg.norm(partial[:, None] - complete[None], axis=-1).min(axis=1)
        assert gap.max() < 0.1 and np.median(gap) < 0.02
        assert distance(name, complete) < 0.02
        if name == "sphere":
            assert (partial @ view).min() > -1e-6


def test_shapes_depend_on_seed_split_and_index_alone():
    make = lambda split="train", seed=0: points.ParametricShapes(
        split, seed, size=4, points=10, complete_points=20
    )
    first = make()[2]
    for key, value in make()[2].items():
        np.testing.assert_array_equal(value, first[key])
    for other in (make()[1], make("test")[2], make(seed=1)[2]):
        assert np.abs(other["complete"] - first["complete"]).max() > 1e-3
    with pytest.raises(RecipeError, match=r"source.points=0"):
        points.ParametricShapes(points=0)


def test_clouds_are_brought_to_one_size():
    pipeline = points.PointClouds(points=8, complete_points=6)
    few, many, complete = draw(3), draw(20), draw(6, 1)
    for partial in (few, many):
        found = pipeline({"partial": partial, "complete": complete, "label": 1})
        assert set(found) == {"partial", "complete"}
        assert found["partial"].shape == (8, 3)
        rows = [int(np.flatnonzero((partial == row).all(axis=1))[0]) for row in found["partial"]]
        counts = np.bincount(rows, minlength=len(partial))
        assert counts.max() - counts.min() <= 1
        np.testing.assert_array_equal(found["complete"], complete)
        again = pipeline({"partial": partial, "complete": complete})
        np.testing.assert_array_equal(again["partial"], found["partial"])


def test_both_clouds_are_mirrored_alike():
    pipeline = points.PointClouds(points=6, complete_points=6)
    cloud, seen = draw(6), set()
    for seed in range(40):
        found = pipeline({"partial": cloud, "complete": cloud}, np.random.default_rng(seed))
        sign = np.sign(found["complete"] / cloud)
        assert (sign == sign[0]).all() and sign[0, 1] == 1
        seen.add(tuple(sign[0]))
        assert {tuple(x) for x in found["partial"]} == {tuple(x) for x in found["complete"]}
    assert len(seen) == 4
    plain = points.PointClouds(points=6, complete_points=6, mirror=False)
    found = plain({"partial": cloud, "complete": cloud}, np.random.default_rng(0))
    np.testing.assert_array_equal(found["complete"], cloud)


def test_clouds_that_do_not_fit_are_refused():
    pipeline = points.PointClouds(points=6, complete_points=6)
    with pytest.raises(ValueError, match="complete cloud has 5 points"):
        pipeline({"partial": draw(6), "complete": draw(5)})
    with pytest.raises(ValueError, match=r"partial cloud has shape \(0, 3\)"):
        pipeline({"partial": draw(0), "complete": draw(6)})
    with pytest.raises(RecipeError, match=r"pipeline.points=0"):
        points.PointClouds(points=0)
