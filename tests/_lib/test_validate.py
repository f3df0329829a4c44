"""Bad input: each has its own error with parameter, rule, value and remedy."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from cur import cur, deim_cur, interpolative, select
from cur.selection import SELECTORS
from tests.backends import use
from tests.families import random

DRIVERS = (deim_cur, cur, interpolative)
A = random(12, 9, np.random.default_rng(0))


def holding(value, where=(3, 4)):
    bad = A.copy()
    bad[where] = value
    return bad


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("driver", [*DRIVERS, select])
def test_nan_and_inf(backend, driver, value):
    with pytest.raises(ValueError, match=r"`A` must be finite; .*NaN or inf") as caught:
        driver(backend.asarray(holding(value)), rank=2)
    if backend.is_dense:
        assert "1 of them, the first in row 3; replace or drop these entries first" in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "error", "text"),
    [
        (0, ValueError, "`rank` must be between 1 and 9, the smaller side of the 12 x 9 matrix; got 0"),
        (-2, ValueError, "`rank` must be between 1 and 9, .*; got -2"),
        (10, ValueError, "`rank` must be between 1 and 9, .*; got 10"),
        (2.0, TypeError, "`rank` must be an integer; got 2.0 of type float"),
        ("2", TypeError, "`rank` must be an integer; got '2' of type str"),
        (True, TypeError, "`rank` must be an integer; got True"),
        (np.True_, TypeError, r"`rank` must be an integer; got np.True_"),
        ((2, 0), ValueError, r"`rank` must be between 1 and 9.*got \(2, 0\)"),
        ((2, 2.5), TypeError, r"`rank\[1\]` must be an integer; got 2.5"),
        ((1, 2, 3), ValueError, r"`rank` must be an integer or a pair \(rows, columns\); got \(1, 2, 3\)"),
    ],
)
@pytest.mark.parametrize("driver", [*DRIVERS, select])
def test_rank(driver, rank, error, text):
    with pytest.raises(error, match=text):
        driver(A, rank=rank)


def test_numpy_integers_are_ranks():
    assert cur(A, rank=np.int64(2)).rank == 2


@pytest.mark.parametrize(
    ("tol", "error", "text"),
    [
        (0, ValueError, "`tol` must be between 0 and 1, the error relative to the norm of `A`; got 0"),
        (-1e-3, ValueError, "`tol` must be between 0 and 1.*got -0.001"),
        (1.0, ValueError, "`tol` must be between 0 and 1.*got 1.0"),
        (np.nan, ValueError, "`tol` must be between 0 and 1.*got nan"),
        ("1e-3", TypeError, "`tol` must be a number; got '1e-3' of type str"),
        (True, TypeError, "`tol` must be a number; got True"),
    ],
)
@pytest.mark.parametrize("driver", DRIVERS)
def test_tol(driver, tol, error, text):
    with pytest.raises(error, match=text):
        driver(A, tol=tol)


@pytest.mark.parametrize("driver", DRIVERS)
def test_exactly_one_of_rank_and_tol(driver):
    with pytest.raises(TypeError, match=r"one of `rank` and `tol` must be given.*got neither"):
        driver(A)
    with pytest.raises(
        TypeError, match=r"only one of `rank` and `tol` may be given; got rank=2 and tol=0.1; leave one"
    ):
        driver(A, rank=2, tol=0.1)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        (np.ones((0, 3)), ValueError, r"`A` must have at least one row and one column; got shape \(0, 3\)"),
        (np.ones((3, 0)), ValueError, r"got shape \(3, 0\)"),
        (scipy.sparse.csr_array((0, 3)), ValueError, r"got shape \(0, 3\)"),
        (np.ones(3), ValueError, r"`A` must have two dimensions, rows and columns; got shape \(3,\); reshape it"),
        (np.ones((2, 2, 2)), ValueError, r"got shape \(2, 2, 2\)"),
        (np.float64(1.0), ValueError, r"`A` must have two dimensions.*got shape \(\)|`A` must be an array"),
        ([[1.0, 2.0]], TypeError, "`A` must be an array .*; got list; convert it with numpy.asarray"),
        (((1.0,),), TypeError, "got tuple; convert it with numpy.asarray"),
        (None, TypeError, "got NoneType; convert it to one of these"),
        (np.ones((3, 3), dtype=object), TypeError, "`A` must hold real or complex numbers; got dtype object"),
        (np.array([["a", "b"]]), TypeError, "`A` must hold real or complex numbers; got dtype <U1"),
        (np.zeros((2, 2), dtype="M8[s]"), TypeError, r"`A` must hold real or complex numbers; got dtype datetime64"),
        (np.ma.masked_array(A, mask=A > 0), TypeError, "`A` must be a plain array; got MaskedArray"),
    ],
)
@pytest.mark.parametrize("driver", [*DRIVERS, select])
def test_what_is_no_matrix(driver, matrix, error, text):
    with pytest.raises((error, TypeError) if isinstance(matrix, np.float64) else error, match=text):
        driver(matrix, rank=1)


def test_other_kinds_of_sparse_and_lazy_matrices():
    torch = pytest.importorskip("torch")
    da = pytest.importorskip("dask.array")
    with pytest.raises(
        TypeError, match=r"`A` must be dense, or sparse of SciPy; got a tensor of layout torch\.sparse_coo"
    ):
        cur(torch.eye(3).to_sparse(), rank=1)
    X = da.from_array(A, chunks=(4, 4))
    with pytest.raises(ValueError, match=r"`A` must have a known shape; got \(nan, 9\); .*compute_chunk_sizes"):
        cur(X[X[:, 0] > 0], rank=1)


def test_mixed_libraries():
    torch = pytest.importorskip("torch")
    T = torch.tensor(A)
    for matrix, other in ((A, T), (T, A), (scipy.sparse.csr_array(A), T), (A, scipy.sparse.csr_array(A))):
        with pytest.raises(TypeError, match=r"`importance` must be an array of the same library as `A`; got .* beside"):
            cur(matrix, rank=2, importance=other)
    for matrix, other in ((A, torch.ones(9)), (T, np.ones(9)), (scipy.sparse.csr_array(A), torch.ones(9))):
        with pytest.raises(TypeError, match="`column_weights` must be an array of the same library as `A`"):
            cur(matrix, rank=2, column_weights=other)


def test_mixed_devices():
    xp = pytest.importorskip("array_api_strict")
    with use("array-api-strict") as backend:
        X = backend.asarray(A)
    text = "must live on the device of `A`; got .*CPU_DEVICE.* beside .*device1.*; move one of them"
    with pytest.raises(ValueError, match="`importance` " + text):
        cur(X, rank=2, importance=xp.asarray(A))
    with pytest.raises(ValueError, match="`column_weights` " + text):
        cur(X, rank=2, column_weights=xp.ones(9))


def test_importance_of_another_shape_or_not_finite():
    with pytest.raises(ValueError, match=r"`importance` must have the shape of `A`, \(12, 9\); got \(9, 12\)"):
        cur(A, rank=2, importance=A.T)
    with pytest.raises(ValueError, match=r"`importance` must have the shape of `A`, \(12, 9\); got \(9, 12\)"):
        interpolative(A, rank=2, importance=A.T, side="rows")
    with pytest.raises(
        ValueError, match="`importance` must be finite; it holds NaN or inf, 1 of them, the first in row 3"
    ):
        cur(A, rank=2, importance=holding(np.nan))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"select": "best"}, ValueError, "`select` must be one of 'deim', .*; got 'best'"),
        ({"link": "weak"}, ValueError, "`link` must be one of 'optimal', 'weighted', 'cross'; got 'weak'"),
        ({"subspace": "krylov"}, ValueError, "`subspace` must be one of 'auto', .*; got 'krylov'"),
        ({"subspace": "krylov", "select": "norm"}, ValueError, "`subspace` must be one of"),
        ({"norm": 1}, ValueError, "`norm` must be one of 'fro', 2; got 1"),
        ({"oversample": -1}, ValueError, "`oversample` must be between 0 and 12, the number of the rows; got -1"),
        ({"oversample": 1.5}, TypeError, "`oversample` must be an integer; got 1.5"),
        ({"oversample": 2, "select": "lupp"}, ValueError, "`oversample` with this selector needs `link='cross'`"),
        ({"power_iterations": -1}, ValueError, "`power_iterations` must not be negative; got -1"),
        ({"power_iterations": 0.5}, TypeError, "`power_iterations` must be an integer; got 0.5"),
        ({"failure_probability": 0}, ValueError, "`failure_probability` must be a number between 0 and 1"),
        ({"failure_probability": 1.0}, ValueError, "`failure_probability` must be a number between 0 and 1"),
        ({"rng": -1}, TypeError, "`rng` must be a non-negative integer seed, .*; got -1"),
        ({"rng": "today"}, TypeError, "`rng` must be a non-negative integer seed, .*; got 'today'"),
        ({"rng": True}, TypeError, "`rng` must be a seed, a numpy.random.Generator or None; got True"),
    ],
)
def test_options(options, error, text):
    with pytest.raises(error, match=text):
        cur(A, rank=2, **options)


def test_cross_cores_need_at_least_as_many_rows_as_columns():
    with pytest.raises(ValueError, match=r"`rank` must ask for at least as many rows as columns with link='cross'"):
        cur(A, rank=(2, 3), link="cross")


@pytest.mark.parametrize("name", [name for name, known in SELECTORS.items() if "entries" in known.reads])
def test_selectors_that_an_operator_cannot_serve(name):
    with pytest.raises(
        TypeError, match=f"`select='{name}'` looks at the entries.*use 'deim', 'lupp', .* or 'leverage'"
    ):
        cur(scipy.sparse.linalg.aslinearoperator(A), rank=2, select=name)


def test_selectors_of_dense_matrices_refuse_sparse_ones():
    with pytest.raises(TypeError, match="`select='osinsky'` takes dense arrays, got a sparse matrix; use 'deim', "):
        cur(scipy.sparse.csr_array(A), rank=2, select="osinsky")


def test_deim_cur_has_one_selector():
    assert list(inspect.signature(deim_cur).parameters) == list(inspect.signature(cur).parameters)
    assert deim_cur(A, rank=2, select="deim").rows.tolist() == deim_cur(A, rank=2).rows.tolist()
    with pytest.raises(TypeError, match=r"`select` is fixed to 'deim' in deim_cur; use cur\.cur"):
        deim_cur(A, rank=2, select="lupp")


def test_scores_of_any_size_guide_the_choice():
    B = np.abs(A) + 1
    for power in (-300, -200, 200, 300):
        np.testing.assert_array_equal(
            cur(A, rank=2, importance=B * 2.0**power).columns, cur(A, rank=2, importance=B).columns
        )


def test_chances_too_small_to_be_shared_out():
    with pytest.raises(ValueError, match="`failure_probability` must be at least 1e-300; got 5e-324"):
        cur(A, rank=2, failure_probability=5e-324)
