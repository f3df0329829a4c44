"""The matrix between columns and rows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from cur import linking
from cur.linking import Orthogonal
from tests.backends import to_numpy
from tests.families import graded, orthonormal, random, repeated_columns, with_spectrum


def test_optimal_core_in_every_library(backend, rng):
    if backend.name == "operator":
        pytest.skip("an operator has no slices; the drivers make them")
    A = random(20, 14, rng)
    M = backend.asarray(A)
    rows, columns = [3, 1, 8, 17], [0, 9, 4]
    C, R = backend.asarray(A[:, columns]), backend.asarray(A[rows])
    U = to_numpy(linking.optimal(M, C, R))
    expected = np.linalg.pinv(A[:, columns]) @ A @ np.linalg.pinv(A[rows])
    np.testing.assert_allclose(U, expected, rtol=1e-9 if backend.precise else 1e-3, atol=1e-5)


def test_stable_where_pseudo_inverses_are_not(rng):
    """Columns of condition 1e12: a core from explicit pseudo-inverses loses eight digits more."""
    A = with_spectrum(60, 40, np.logspace(0, -12, 40), rng)
    C, R = A[:, :30], A[:30]
    U = linking.optimal(A, C, R)
    best = A - np.linalg.qr(C)[0] @ np.linalg.qr(C)[0].T @ A
    assert np.linalg.norm(A - C @ U @ R) <= 2 * np.linalg.norm(best) + 1e-7
    assert np.linalg.norm(U) < 1e17


def test_dependent_columns_do_not_blow_up(rng):
    A = repeated_columns(20, 15, rng)
    U = linking.optimal(A, A, A)  # all columns and all rows, of rank 5
    assert np.linalg.norm(A - A @ U @ A) <= 1e-12
    assert np.linalg.norm(U) <= 10 / np.linalg.svd(A)[1][4]


@pytest.mark.parametrize("square", [False, True])
def test_cutoff_of_one_side_reaches_the_unit_roundoff(square, rng):
    X = graded(30, 12, rng)
    loose, fine = Orthogonal(X), Orthogonal(X, cutoff=12 * 2.0**-53)
    error = [np.linalg.norm(X - X @ Q.left_divide(Q.Q.T @ X)) for Q in (loose, fine)]
    assert error[1] < 1e-12 < error[0] < 1e-6
    assert np.isfinite(Orthogonal(np.zeros((5, 3))).left_divide(np.eye(3))).all()


def test_cross_of_tall_wide_square_and_singular_blocks(dense, rng):
    for shape in ((5, 5), (7, 4), (4, 7)):
        B = rng.standard_normal(shape)
        X = to_numpy(linking.cross(dense.asarray(B)))
        np.testing.assert_allclose(X, np.linalg.pinv(B), rtol=1e-9 if dense.precise else 1e-2, atol=1e-5)
    assert not to_numpy(linking.cross(dense.asarray(np.zeros((3, 2))))).any()
    twice = np.ones((3, 2))
    X = to_numpy(linking.cross(dense.asarray(twice)))
    np.testing.assert_allclose(X, np.linalg.pinv(twice), atol=1e-6)


def test_cross_of_a_sparse_block(rng):
    B = rng.standard_normal((4, 4))
    np.testing.assert_allclose(linking.cross(scipy.sparse.csr_array(B)), np.linalg.inv(B), rtol=1e-8)


@pytest.mark.parametrize("is_complex", [False, True])
def test_weighted_core_is_the_formula_and_the_minimiser(is_complex, rng):
    A = random(16, 12, rng) + (1j * random(16, 12, rng) if is_complex else 0)
    F = rng.standard_normal((16, 16)) + (1j * rng.standard_normal((16, 16)) if is_complex else 0)
    H, g = F @ F.conj().T, rng.uniform(0.1, 2, 12)
    G = np.diag(g)
    C, R = A[:, :4], A[:5]
    U = linking.weighted(A, C, R, H, g)
    Ch, Rh = C.conj().T, R.conj().T
    formula = np.linalg.pinv(Ch @ H @ C) @ Ch @ H @ A @ G @ Rh @ np.linalg.pinv(R @ G @ Rh)
    np.testing.assert_allclose(U, formula, rtol=1e-6)

    def error(U):
        E = A - C @ U @ R
        return np.trace(E.conj().T @ H @ E @ G).real

    for _ in range(10):
        assert error(U + 1e-4 * rng.standard_normal(U.shape)) > error(U)


def test_weighted_core_of_sparse_matrices(rng):
    A = random(16, 12, rng)
    F = orthonormal(16, 16, rng) * rng.uniform(0.5, 2, 16)
    S = scipy.sparse.csr_array(A)
    found = linking.weighted(S, S[:, :4], S[:5], F @ F.T, None)
    np.testing.assert_allclose(found, linking.weighted(A, A[:, :4], A[:5], F @ F.T, None), rtol=1e-8)


def test_slices_of_another_library_are_refused(rng):
    torch = pytest.importorskip("torch")
    A = random(8, 6, rng)
    for matrix, C, R in ((A, torch.tensor(A[:, :2]), A[:2]), (torch.tensor(A), torch.tensor(A[:, :2]), A[:2])):
        name = "C" if matrix is A else "R"
        for function in (linking.optimal, lambda *args: linking.weighted(*args, None, None)):
            with pytest.raises(TypeError, match=f"`{name}` must be an array of the same library as `A`"):
                function(matrix, C, R)
