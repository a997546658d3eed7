# SPDX-License-Identifier: Apache-2.0
"""Document lengths: the distribution drawn, the total reached, files read strictly."""

import numpy as np
import pytest

from attnjax.benchmarks.long_context.lengths import (
    HISTOGRAMS,
    Histogram,
    Sampler,
    load,
    sampler,
)

SIGMAS = 4.5
"""Of a binomial count; one false alarm in 100,000 (the seed is fixed)."""


def test_shipped_histograms_are_those_of_the_paper():
    assert {name: len(h.edges) for name, h in HISTOGRAMS.items()} == {
        "pile": 8, "short": 18, "long": 12,
    }  # fmt: skip
    assert HISTOGRAMS["pile"].edges[:2] == ((0, 128), (128, 256))
    assert HISTOGRAMS["short"].edges[-1] == (20480, 65536)
    assert HISTOGRAMS["long"].edges[-1] == (2**21, 2**22)
    # Worked out by hand: the weights of "long" sum to 1.31.
    assert HISTOGRAMS["long"].probabilities[6] == pytest.approx(0.4 / 1.31)


def test_lengths_follow_the_histogram():
    histogram = Histogram(((0, 4), (4, 8), (10, 20)), (2.0, 1.0, 1.0))
    rng, count = np.random.default_rng(0), 20_000
    drawn = np.array([histogram.draw(rng) for _ in range(count)])
    # Both ends are included; 0 becomes 1, which so has two of five chances in its interval.
    expected = np.zeros(21)
    expected[1:5] += 0.5 / 5
    expected[1] += 0.5 / 5
    expected[4:9] += 0.25 / 5
    expected[10:21] += 0.25 / 11
    assert expected.sum() == pytest.approx(1)
    found = np.bincount(drawn, minlength=21) / count
    assert (abs(found - expected) <= SIGMAS * np.sqrt(expected / count) + 1e-12).all()


@pytest.mark.parametrize("name", ["pile", "short", "long", "pile:mixture", "long:mixture:capped"])
def test_lengths_fill_the_total(name):
    rng = np.random.default_rng(1)
    for total in (1, 1000, 65_536, 300_001):
        lengths = sampler(name).draw(total, rng)
        assert sum(lengths) == total and min(lengths) >= 1
        if "capped" in name:
            assert max(lengths) <= max(1, total // 4)


def test_only_the_last_length_is_cut_off():
    fixed = Sampler(Histogram(((6, 7),), (1.0,)))
    lengths = fixed.draw(1000, np.random.default_rng(0))
    assert set(lengths[:-1]) == {6, 7} and lengths[-1] <= 7


def test_long_documents_take_their_share():
    short = Sampler(Histogram(((10, 20),), (1.0,)), long_share=0.6)
    lengths = np.array(short.draw(1_000_000, np.random.default_rng(2)))
    is_long = lengths > 20
    # The last document of each kind may be cut off.
    assert abs(lengths[is_long].sum() - 600_000) <= 20
    assert lengths.max() <= 30 * 1024
    assert np.sort(lengths[is_long])[1] >= 8 * 1024
    places = np.flatnonzero(is_long) / len(lengths)
    assert 0.2 < places.mean() < 0.8


def test_same_seed_same_lengths():
    draw = lambda seed: sampler("pile:mixture").draw(65_536, np.random.default_rng(seed))
    assert draw(42) == draw(42) != draw(43)


def test_files_of_both_kinds(tmp_path):
    (tmp_path / "a.json").write_text('{\n  "[0,10)": 3,\n  "[10, 30)": 1.0\n}')
    (tmp_path / "a.csv").write_text(
        "range,number,percentage,cumulative-percentage\n"
        '"[0,10)",300,75.0%,75.0%\n"[10, 30)",100,25.0,100\n'
    )
    for name in ("a.json", "a.csv"):
        made = load(tmp_path / name)
        assert made.edges == ((0, 10), (10, 30))
        np.testing.assert_allclose(made.probabilities, [0.75, 0.25])
    assert sampler(f"{tmp_path}/a.csv:mixture").long_share == 0.6


HEAD = "range,number,percentage,cumulative\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n"[0,10)": 1,\n}', "a.json:3: no JSON"),
        ("a.json", "[1]", "a.json:1: must be one object"),
        ("a.json", '{"[0,1)": {"[1,2)": 1}}', "a.json:1: probability"),
        ("a.json", '{\n"[0,10)": 1,\n"(10,20]": 1}', r"a.json:3: range '\(10,20\]'"),
        ("a.json", '{\n"[0,10)": 1,\n"[5,20)": 1}', r"a.json:3: \[5,20\) must increase from 10"),
        ("a.json", '{\n"[0,10)": 1,\n"[0,10)": 1}', r"a.json:3: \[0,10\) must increase"),
        ("a.json", '{\n"[9,3)": 1}', r"a.json:2: \[9,3\)"),
        ("a.json", '{"[0,10)": "x"}', "a.json:1: probability 'x'"),
        ("a.json", '{"[0,10)": -1}', "a.json:1: probability -1"),
        ("a.json", '{"[0,10)": true}', "a.json:1: probability True"),
        ("a.json", '{"[0,10)": NaN}', "a.json:1: probability nan"),
        ("a.json", '{"[0,10)": 0}', "a.json:1: weights"),
        ("a.json", "{}", "a.json:1: no interval"),
        ("a.csv", "", "a.csv:1: columns"),
        ("a.csv", "range,count,percentage,cumulative\n", "a.csv:1: columns"),
        ("a.csv", HEAD, "a.csv:1: no interval"),
        ("a.csv", HEAD + "[0,10),1,100,100\n", "a.csv:2: 5 fields"),
        ("a.csv", HEAD + '"[0,10)",x,100,100\n', "a.csv:2: number 'x'"),
        ("a.csv", HEAD + '"[0,10)",1,50,50\n"[10,20)",1,60,100\n', "a.csv:3: percentage 60"),
        ("a.csv", HEAD + '"[0,10)",1,50,50\n"[10,20)",1,50,90\n', "a.csv:3: cumulative"),
        ("a.csv", HEAD + '"[0,10)",1,50,150\n', "a.csv:2: cumulative '150' must be"),
        ("a.txt", "", "a .json or a .csv"),
    ],
)  # fmt: skip
def test_malformed_files_name_their_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sampler("pyle"), "choose from"),
        (lambda: sampler("pile:longer"), "option 'longer'"),
        (lambda: sampler("none.json"), "cannot be read"),
        (lambda: Histogram(((0, 3),), (1.0, 2.0)), "one weight per interval"),
        (lambda: Histogram(((5, 8), (3, 9)), (1.0, 2.0)), r"\[3,9\)"),
        (lambda: Sampler(HISTOGRAMS["pile"], cap=0.0), "cap=0.0"),
        (lambda: Sampler(HISTOGRAMS["pile"], long_share=1.5), "long_share=1.5"),
        (lambda: Sampler(HISTOGRAMS["pile"], long_range=(5, 3)), "long_range"),
        (lambda: sampler("pile").draw(0, np.random.default_rng(0)), "total=0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
