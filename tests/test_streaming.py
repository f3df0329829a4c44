"""CUR of a matrix that is read as blocks of rows."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from cur import RankWarning, stream_cur
from tests.families import FAMILIES, frobenius, geometric, remainder


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(1, 8),
)
@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_any_cut_of_any_family_is_certified(seed, family, heights, rank):
    A = FAMILIES[family](sum(heights), 12, np.random.default_rng(seed))
    ends = list(itertools.accumulate(heights, initial=0))
    result = stream_cur([A[i:j] for i, j in itertools.pairwise(ends)], rank=min(rank, *A.shape))
    np.testing.assert_array_equal(result.C, A[:, result.columns])
    np.testing.assert_array_equal(result.R, A[result.rows])
    E = remainder(A, *result.factors)
    assert frobenius(E) <= result.certificate.value
    if result.certificate.projection is not None:
        assert frobenius(E) <= result.certificate.projection


def test_sources_agree(tmp_path, rng):
    da = pytest.importorskip("dask.array")
    A = geometric(60, 12, rng)
    A.tofile(tmp_path / "A.bin")
    mapped = np.memmap(tmp_path / "A.bin", dtype=A.dtype, shape=A.shape, mode="r")
    expected = stream_cur(A, rank=5)
    for source in (mapped, da.from_array(A, chunks=(20, 5)), scipy.sparse.coo_array(A), [A], lambda: iter([A])):
        result = stream_cur(source, rank=5)
        assert result.rows.tolist() == expected.rows.tolist()
        assert result.columns.tolist() == expected.columns.tolist()


def test_memory_does_not_grow_with_the_rows(rng):
    """But for C, and what the second pass needs of its size."""
    row = rng.standard_normal((50, 300))

    def blocks(count):
        return lambda: (row * (1 + i % 7) for i in range(count))

    def peak(count):
        tracemalloc.start()
        stream_cur(blocks(count), rank=4)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(20)
    extra = peak(200) - peak(20)
    assert extra < 180 * 50 * 4 * 8 * 10 < 180 * 50 * 300 * 8 / 5


def test_rank_above_the_numerical_rank_warns(rng):
    A = FAMILIES["rank_deficient"](60, 20, rng)
    with pytest.warns(RankWarning, match="rank 15 was asked for, but the numerical rank is 10") as caught:
        result = stream_cur([A[:25], A[25:]], rank=15)
    assert [w.filename for w in caught] == [__file__]
    assert result.rank == 10


def test_long_columns_in_single_precision_keep_their_rank(rng):
    A = (rng.standard_normal((200_000, 4)) * [1, 1e-1, 1e-3, 1e-4]).astype(np.float32)
    assert stream_cur(A, rank=4).rank == 4


def test_what_cannot_be_read_twice_is_refused():
    with pytest.raises(TypeError):
        stream_cur(iter([np.ones((3, 2))]), rank=1)


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([], "it ended at once"),
        ([np.ones((2, 3)), np.ones((2, 4))], r"`blocks\[1\]` must have as many columns as the blocks before, 3"),
        ([np.ones((2, 3)), np.full((2, 3), np.inf)], r"`blocks\[1\]` must be finite"),
    ],
)
def test_bad_streams(blocks, text):
    with pytest.raises(ValueError, match=text):
        stream_cur(blocks, rank=1)


def test_blocks_that_change_between_the_passes(rng):
    passes = iter([[np.ones((4, 3))], [np.ones((5, 3))]])
    with pytest.raises(ValueError, match="blocks"):
        stream_cur(lambda: iter(next(passes)), rank=1)
