# SPDX-License-Identifier: Apache-2.0
"""The fourteen masks against their definitions, in every form, and the reference's counts."""

import numpy as np
import pytest

from attnjax.benchmarks.long_context import block_sparse
from attnjax.benchmarks.long_context.patterns import (
    HETEROGENEOUS,
    PATTERNS,
    RANDOM,
    REGULAR,
    SPARSE,
    STATIC,
    Setting,
    draw,
    predicate,
)
from attnjax.ops import attention, mask
from attnjax.ops.mask import EMPTY, FULL, PARTIAL

DRAWS = 50
SMALL = Setting(window=7, piece=4, distribution="pile")


@pytest.fixture(scope="module")
def tiny_documents(tmp_path_factory):
    """Documents of a few tokens, so that short sequences have several."""
    path = tmp_path_factory.mktemp("lengths") / "tiny.json"
    path.write_text('{"[0,5)": 2, "[5,17)": 2, "[17,40)": 1}')
    return Setting(window=7, piece=4, distribution=str(path))


def definition(drawn, setting):
    """Bool `[t, t]` by the sentences of the paper, one element after the other."""
    t, w = drawn.total, setting.window
    ends = np.cumsum(drawn.lengths)
    of = np.searchsorted(ends, np.arange(t), side="right")
    start = ends[of] - np.asarray(drawn.lengths)[of]
    first = 2 * w if setting.compat_2w else w
    q, k = np.arange(t)[:, None], np.arange(t)
    same, causal = of[:, None] == of, k <= q
    inside_q, inside_k = q - start[:, None], k - start
    match drawn.pattern:
        case "full":
            return np.ones((t, t), bool)
        case "causal":
            return causal
        case "full_document":
            return same
        case "causal_document":
            return same & causal
        case "sliding_window":
            return abs(q - k) <= w
        case "sliding_window_causal":
            return (q - k >= 0) & (q - k <= w)
        case "share_question":
            return (same & causal) | ((of == 0) & (of[:, None] > 0))
        case "causal_blockwise":
            return causal & (same | (of[:, None] == of[-1]))
        case "prefix_lm_causal":
            return (k < drawn.prefix) | causal
        case "prefix_lm_document":
            return same & ((inside_k < drawn.prefix) | causal)
        case "global_sliding_window":
            return (abs(q - k) <= w) | (q < first) | (k < first)
        case "block_causal_document":
            return same & (inside_k // setting.piece <= inside_q // setting.piece)
    raise AssertionError(drawn.pattern)


def expanded(kinds, partial, block_q, block_k):
    """Bool `[t, t]` from a block map, with the elements of `partial` on PARTIAL tiles."""
    t = partial.shape[0]
    kinds = np.repeat(np.repeat(kinds, block_q, 0)[:t], block_k, 1)[:, :t]
    return np.where(kinds == PARTIAL, partial, kinds == FULL)


@pytest.mark.parametrize("pattern", STATIC)
def test_every_form_agrees(pattern, tiny_documents):
    """Slices, predicate, block map and columns expand to the definition; area is its sum."""
    rng = np.random.default_rng(STATIC.index(pattern))
    for _ in range(DRAWS):
        t = int(rng.integers(1, 90))
        drawn = draw(pattern, t, tiny_documents, rng)
        expected = definition(drawn, tiny_documents)
        assert sum(drawn.lengths) == t
        from_slices = mask.slices(drawn.mask.slices(t, t))
        np.testing.assert_array_equal(from_slices.dense(t, t), expected)
        np.testing.assert_array_equal(drawn.mask.dense(t, t), expected)
        function = predicate(drawn, tiny_documents)
        dense = function(np.arange(t)[:, None], np.arange(t))
        np.testing.assert_array_equal(np.broadcast_to(dense, (t, t)), expected)
        np.testing.assert_array_equal(drawn.mask.columns(t, t).dense(t), expected)
        block_q, block_k = rng.integers(1, 20, 2)
        kinds = drawn.mask.block_map(t, t, block_q, block_k)
        np.testing.assert_array_equal(expanded(kinds, expected, block_q, block_k), expected)
        assert drawn.mask.area(t, t) == expected.sum()


def test_groups_of_patterns():
    assert len(PATTERNS) == 14
    assert (len(REGULAR), len(HETEROGENEOUS), len(SPARSE)) == (6, 6, 2)
    assert set(PATTERNS) - set(RANDOM) == {
        "full", "causal", "sliding_window", "sliding_window_causal", "global_sliding_window",
    }  # fmt: skip


def test_reference_counts():
    """Areas that the reference's generators have at 2,048 tokens with a window of 256."""
    rng, setting = np.random.default_rng(0), Setting(window=256)
    for name, area in (
        ("full", 4_194_304), ("causal", 2_098_176), ("sliding_window", 984_832),
        ("sliding_window_causal", 493_440),
    ):  # fmt: skip
        assert draw(name, 2048, setting, rng).mask.area(2048, 2048) == area
    # Its draws: a prefix of 975, and one document of two blocks.
    assert mask.prefix_lm(975).area(2048, 2048) == 2_573_001
    assert mask.block_causal_document([2048], 1024).area(2048, 2048) == 3_145_728


def test_draws_stay_in_their_ranges():
    rng, t = np.random.default_rng(5), 20_000
    for _ in range(20):
        drawn = draw("prefix_lm_causal", t, Setting(), rng)
        assert 1 <= drawn.prefix <= 32 * 1024
        drawn = draw("prefix_lm_document", t, Setting(), rng)
        assert 1 <= drawn.prefix <= drawn.lengths[0]
        drawn = draw("block_causal_document", t, Setting(), rng)
        assert all(x % 1024 == 0 and 1 <= x // 1024 <= 8 for x in drawn.lengths[:-1])


def test_wider_global_window():
    rng = np.random.default_rng(0)
    for twice in (False, True):
        setting = Setting(window=5, compat_2w=twice)
        drawn = draw("global_sliding_window", 60, setting, rng)
        np.testing.assert_array_equal(drawn.mask.dense(60, 60), definition(drawn, setting))


def test_window_of_the_benchmark():
    drawn = draw("sliding_window_causal", 4096, Setting(), np.random.default_rng(0))
    assert drawn.mask.dense(4096, 4096)[2000].sum() == 1025


@pytest.mark.parametrize("selection", block_sparse.SELECTIONS)
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_kept_fraction(selection, ratio):
    kept = block_sparse.keep(3, 8, 12, ratio, np.random.default_rng(0), selection=selection)
    per_row = kept.sum(axis=2)
    if selection == "row":
        assert (per_row == max(1, int(12 * ratio))).all()
    else:
        assert (kept.sum(axis=(1, 2)) == max(1, int(96 * ratio))).all()
        assert ratio == 1 or len(set(per_row.ravel().tolist())) > 1


def test_largest_scores_are_kept():
    rng = np.random.default_rng(4)
    kept = block_sparse.keep(2, 5, 6, 0.3, rng)
    scores = np.random.default_rng(4).random((2, 5, 6))
    for scores_ij, kept_ij in zip(scores, kept, strict=True):
        assert scores_ij[kept_ij].min() > scores_ij[~kept_ij].max()


@pytest.mark.parametrize("is_per_head", [False, True])
@pytest.mark.parametrize("pattern", SPARSE)
def test_grouped_heads_share_a_map(pattern, is_per_head):
    setting = Setting(heads=6, kv_heads=2, block=16, ratio=0.4, is_per_head=is_per_head)
    drawn = draw(pattern, 200, setting, np.random.default_rng(1))
    dense = drawn.mask.dense_bnts(200, 200)[0]
    assert dense.shape[0] == 6
    for head in range(6):
        np.testing.assert_array_equal(dense[head], dense[head // 3 * 3])
    assert (dense[0] != dense[3]).any()
    # Counted without the dense mask, and its tiles found.
    np.testing.assert_array_equal(drawn.mask.area(200, 200), dense.sum((1, 2))[None])
    kinds = drawn.mask.block_map(200, 200, 32, 24)[0]
    for head in range(6):
        np.testing.assert_array_equal(expanded(kinds[head], dense[head], 32, 24), dense[head])


def test_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        sizes = block_sparse.random_sizes(1000, 64, 20, rng)
        assert sizes.sum() == 1000 and sizes.min() >= 20 and len(sizes) == 16
    assert len(set(sizes.tolist())) > 3
    assert block_sparse.random_sizes(64, 16, 16, rng).tolist() == [16] * 4


@pytest.mark.parametrize("pattern", SPARSE)
def test_tiles_visited_are_proportional_to_the_ratio(pattern):
    """Work follows the kept fraction exactly: tiles of the size of blocks are EMPTY or FULL."""
    visited = {}
    for ratio in (0.1, 0.2, 0.5, 0.8, 1.0):
        setting = Setting(block=64, minimum=64, ratio=ratio)
        drawn = draw(pattern, 2560, setting, np.random.default_rng(0))
        kinds = drawn.mask.block_map(2560, 2560, 64, 64)
        assert set(np.unique(kinds)) <= {EMPTY, FULL}
        visited[ratio] = int((kinds != EMPTY).sum())
    assert visited == {ratio: int(1600 * ratio) for ratio in visited}


@pytest.mark.parametrize("pattern", SPARSE)
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_everything_kept_is_dense(pattern, implementation):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 160, heads, 8)).astype("f4") for heads in (4, 2, 2))
    setting = Setting(heads=4, kv_heads=2, block=32, ratio=1.0)
    drawn = draw(pattern, 160, setting, rng)
    assert drawn.mask.dense_bnts(160, 160).all()
    ours = attention(q, k, v, mask=drawn.mask, implementation=implementation)
    dense = attention(q, k, v, implementation=implementation)
    np.testing.assert_allclose(ours, dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"selection": "best"}, "selection 'best'"),
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads=2"),
        ({"block": 0}, "block=0"),
        ({"minimum": 200}, "do not fit"),
        ({"distribution": "pyle"}, "distribution 'pyle'"),
    ],
)
def test_refusals(change, message):
    pattern = "share_question" if "distribution" in change else "variable_block_sparse"
    with pytest.raises(ValueError, match=message):
        draw(pattern, 256, Setting(**change), np.random.default_rng(0))


def test_unknown_pattern():
    with pytest.raises(ValueError, match="choose from"):
        draw("causl", 8, SMALL, np.random.default_rng(0))
    drawn = draw("uniform_block_sparse", 64, Setting(block=16), np.random.default_rng(0))
    with pytest.raises(NotImplementedError, match="no function of positions"):
        predicate(drawn, SMALL)
