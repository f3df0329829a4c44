"""The primitives that hide the differences between array libraries."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch

from cur._lib import array as _array
from cur._lib import linalg
from tests.backends import REQUIRED, to_numpy
from tests.families import wilkinson, with_spectrum


@pytest.mark.parametrize("module", REQUIRED)
def test_backends_that_must_be_tested_are_installed(module):
    importlib.import_module(module)  # no skip: a missing backend would pass for a tested one


@pytest.mark.parametrize("is_complex", [False, True])
def test_lu_pivots_are_those_of_textbook_elimination(dense, rng, is_complex):
    for m, k in [(17, 6)] * 5 + [(40, 21), (33, 33)]:
        X = rng.standard_normal((m, k))
        if is_complex:
            X = X + 1j * rng.standard_normal((m, k))
        pivots = to_numpy(linalg.lu_pivots(dense.asarray(X)))
        work, free, expected = X.copy(), np.ones(m, dtype=bool), []
        for j in range(k):
            p = int(np.argmax(np.where(free, np.abs(work[:, j]), -1)))
            expected.append(p)
            free[p] = False
            work = work - np.outer(np.where(free, work[:, j] / work[p, j], 0), work[p])
        assert pivots.tolist() == expected


def test_complex_pivots_are_largest_in_modulus_not_in_the_sum_of_parts(dense):
    # LAPACK would take |1.0 + 0.9i|_1 = 1.9 over |1.5|; the modulus of the first is 1.35
    X = np.array([[1.0 + 0.9j], [1.5 + 0.0j]])
    assert to_numpy(linalg.lu_pivots(dense.asarray(X))).tolist() == [1]


def test_pivots_of_ties_are_the_lowest(dense):
    assert to_numpy(linalg.lu_pivots(dense.asarray(wilkinson(8, 8)))).tolist() == list(range(8))
    assert to_numpy(linalg.lu_pivots(dense.asarray(np.ones((5, 1))))).tolist() == [0]


def test_pivots_of_a_singular_matrix_stay_distinct(dense):
    X = np.zeros((6, 4))
    X[2, 1] = 1.0
    pivots = to_numpy(linalg.lu_pivots(dense.asarray(X))).tolist()
    assert len(set(pivots)) == 4
    assert 2 in pivots


def test_pivots_of_a_wide_singular_matrix_stay_distinct(dense, rng):
    X = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 30))
    X[:, 20:] = 0.0
    assert len(set(to_numpy(linalg.lu_pivots(dense.asarray(X))).tolist())) == 30


def test_qr_and_triangular_solve(dense, rng):
    X = rng.standard_normal((9, 4)).astype(dense.dtype("float64"))
    Q, T = linalg.qr(dense.asarray(X))
    eps = np.finfo(X.dtype).eps
    np.testing.assert_allclose(to_numpy(Q @ T), X, atol=20 * eps)
    np.testing.assert_allclose(to_numpy(_array.adjoint(Q) @ Q), np.eye(4), atol=20 * eps)
    B = rng.standard_normal((4, 3)).astype(X.dtype)
    found = to_numpy(linalg.solve_triangular(T, dense.asarray(B)))
    np.testing.assert_allclose(np.triu(to_numpy(T)) @ found, B, atol=500 * eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("small", [1.0, 0.15, 0.1, 0.06, 0.05, 0.01, 1e-3, 0.0])
@pytest.mark.parametrize("to_library", [np.asarray, torch.from_numpy])
def test_one_cholesky_is_orthogonal_where_it_is_trusted(rng, to_library, dtype, small):
    """A single small singular value is the worst that the Frobenius condition number can hide."""
    X = with_spectrum(900, 256, np.r_[np.ones(255), small], rng).astype(dtype)
    Q, T = (to_numpy(factor) for factor in linalg.qr(to_library(X)))
    assert np.linalg.norm(Q @ T - X) <= 256 * np.finfo(dtype).eps * np.linalg.norm(X)
    assert np.linalg.norm(Q.T @ Q - np.eye(256)) <= 256 * np.finfo(dtype).eps / 2


def test_gaussian_numbers_are_the_same_in_every_library(dense):
    like = dense.asarray(np.zeros((2, 2)))
    drawn = to_numpy(_array.gaussian((3, 2), like, like.dtype, np.random.default_rng(5)))
    expected = np.random.default_rng(5).standard_normal((3, 2))
    np.testing.assert_array_equal(drawn, expected.astype(drawn.dtype))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("longdouble", "float64"),
        ("complex64", "complex64"),
        ("clongdouble", "complex128"),
        ("int8", "float64"),
        ("uint64", "float64"),
        ("bool", "float64"),
    ],
)
def test_working_dtype(dtype, expected):
    assert _array.working_dtype(np.ones((2, 2), dtype=dtype)) == np.dtype(expected)
    if dtype != "float16":
        assert _array.working_dtype(scipy.sparse.csr_array(np.ones((2, 2), dtype=dtype))) == np.dtype(expected)


def test_half_precisions_of_torch_and_jax_become_single():
    torch, jnp = importlib.import_module("torch"), importlib.import_module("jax.numpy")
    for dtype in (torch.float16, torch.bfloat16):
        assert _array.working_dtype(torch.ones((2, 2), dtype=dtype)) == torch.float32
    assert _array.working_dtype(jnp.ones((2, 2), dtype=jnp.bfloat16)) == jnp.float32


def test_adjoint_conjugates(backend):
    A = np.array([[1 + 2j, 3 - 1j, 0.5]])
    X = _array.adjoint(backend.asarray(A))
    X = X @ np.eye(1) if backend.name == "operator" else X
    np.testing.assert_array_equal(to_numpy(X), A.conj().T)


def test_exchanges_become_positions(rng):
    X = rng.standard_normal((12, 5))
    lu, exchanges = scipy.linalg.lu_factor(rng.standard_normal((5, 5)))
    assert lu.shape == (5, 5)
    order = np.arange(5)
    for i, j in enumerate(exchanges):
        order[[i, j]] = order[[j, i]]
    assert linalg._exchange(exchanges, 5, 5).tolist() == order.tolist()
    assert len(linalg.lu_pivots(X)) == 5


DEGENERATE = {
    "ones": lambda m, n, rng: np.ones((m, n)),
    "zeros": lambda m, n, rng: np.zeros((m, n)),
    "repeated columns": lambda m, n, rng: np.repeat(rng.standard_normal((m, 1)), n, axis=1),
    "few columns": lambda m, n, rng: rng.standard_normal((m, 3))[:, rng.integers(0, 3, n)],
    "rank two": lambda m, n, rng: rng.standard_normal((m, 2)) @ rng.standard_normal((2, n)),
    "zeros and ones": lambda m, n, rng: rng.integers(0, 2, (m, n)).astype(float),
    "tiny": lambda m, n, rng: np.full((m, n), 1e-30),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("shape", [(20, 20), (20, 7), (64, 32), (7, 7), (31, 2)])
def test_factors_of_degenerate_matrices_are_finite_and_right(dtype, kind, shape, rng):
    """Of torch above all, whose QR of complex matrices in single precision gives NaN for some."""
    X = (DEGENERATE[kind](*shape, rng) * ((1 + 1j) / 2**0.5 if "complex" in dtype else 1)).astype(dtype)
    T = torch.tensor(X)
    tolerance = 50 * np.finfo(dtype).eps
    size = np.linalg.norm(X.astype("complex128"))
    for Q, R in (linalg.qr(T), linalg.qr(X)):
        Q, R = to_numpy(Q), to_numpy(R)
        np.testing.assert_allclose(Q @ R, X, atol=tolerance * size)
        np.testing.assert_allclose(Q.conj().T @ Q, np.eye(shape[1]), atol=tolerance)
    V, s, Wh = (to_numpy(F) for F in linalg.svd(T))
    np.testing.assert_allclose((V * s) @ Wh, X, atol=tolerance * size)
    np.testing.assert_allclose(to_numpy(linalg.svdvals(T)), s, atol=tolerance * size)


def test_factors_of_matrices_with_nan_are_left_to_the_checks():
    assert np.isnan(to_numpy(linalg.qr(torch.full((3, 2), torch.nan))[0])).all()
