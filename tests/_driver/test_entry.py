"""Sparse matrices are factored without their empty rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

import cur
from cur.selection import SELECTORS


def padded(rng, form="csr", dtype="float64"):
    """A sparse matrix among empty rows and columns, and where it is."""
    rows, columns = np.sort(rng.choice(200, 40, replace=False)), np.sort(rng.choice(900, 60, replace=False))
    inner = rng.standard_normal((40, 60)) * (rng.uniform(size=(40, 60)) < 0.4) * np.logspace(0, -2, 60)
    inner[np.arange(40), np.arange(40)] = 1.0
    inner[0, 40:] = 0.5
    if np.dtype(dtype).kind == "c":
        inner = inner * (1 + 1j)
    A = scipy.sparse.lil_array((200, 900), dtype=dtype)
    A[np.ix_(rows, columns)] = inner
    return A.asformat(form), scipy.sparse.csr_array(inner.astype(dtype)), rows, columns


def dense(X):
    return X.toarray() if scipy.sparse.issparse(X) else np.asarray(X)


@pytest.mark.parametrize("select", [name for name, s in SELECTORS.items() if s.skips_zeros and not s.dense])
@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_the_factorization_is_that_of_what_is_left(select, form, dtype, rng):
    A, inner, rows, columns = padded(rng, form, dtype)
    for options in (
        {"rank": 6},
        {"rank": (7, 5), "norm": 2},
        {"tol": 0.3},
        {"rank": 4, "link": "cross", "oversample": 2},
    ):
        found, expected = cur.cur(A, select=select, **options), cur.cur(inner, select=select, **options)
        assert found.rows.tolist() == rows[expected.rows].tolist()
        assert found.columns.tolist() == columns[expected.columns].tolist()
        np.testing.assert_array_equal(found.U, expected.U)
        np.testing.assert_array_equal(dense(found.C), A.toarray()[:, found.columns])
        np.testing.assert_array_equal(dense(found.R), A.toarray()[found.rows])
        assert found.certificate == expected.certificate
        E = A.toarray() - dense(found.C) @ found.U @ dense(found.R)
        assert np.linalg.norm(E, "fro" if found.certificate.norm == "fro" else 2) <= found.certificate.value


def test_weights_go_with_their_rows_and_columns(rng):
    A, inner, rows, columns = padded(rng)
    h, g = rng.uniform(1, 2, 200), rng.uniform(1, 2, 900)
    for given in ((h, g), tuple(cur.weights.diagonal(w) for w in (h, g))):
        found = cur.deim_cur(A, rank=5, row_weights=given[0], column_weights=given[1])
        expected = cur.deim_cur(inner, rank=5, row_weights=h[rows], column_weights=g[columns])
        assert found.rows.tolist() == rows[expected.rows].tolist()
        assert found.certificate == expected.certificate
    with pytest.raises(ValueError, match="`row_weights` must have one weight per row of `A`, 200; got 40"):
        cur.deim_cur(A, rank=5, row_weights=np.ones(40))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_one_sided(side, rng):
    A, inner, rows, columns = padded(rng)
    found, expected = cur.interpolative(A, rank=8, side=side), cur.interpolative(inner, rank=8, side=side)
    kept = rows if side == "rows" else columns
    assert found.chosen.tolist() == kept[expected.chosen].tolist()
    whole = np.zeros(A.shape)
    whole[np.ix_(rows, columns)] = expected.toarray()
    np.testing.assert_array_equal(found.toarray(), whole)
    assert found.certificate == expected.certificate


def test_indices_alone(rng):
    A, inner, rows, columns = padded(rng)
    found, expected = cur.select(A, rank=(3, 5)), cur.select(inner, rank=(3, 5))
    assert found[0].tolist() == rows[expected[0]].tolist()
    assert found[1].tolist() == columns[expected[1]].tolist()


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_ranks_beyond_what_is_left_are_still_possible(rng):
    A, *_ = padded(rng)
    assert len(cur.cur(A, rank=45, select="norm").rows) == 45
    assert cur.deim_cur(scipy.sparse.csr_array((50, 30)), rank=2).rank == 1
    with pytest.raises(ValueError, match="the smaller side of the 200 x 900 matrix; got 201"):
        cur.deim_cur(A, rank=201)
