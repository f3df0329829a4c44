"""Weights of rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from scipy.linalg import sqrtm

from cur import cur, interpolative, select, weights
from cur.weighted import own_inputs, own_rows
from cur.weighted.truncation import weighted_svd
from tests.backends import to_numpy
from tests.families import orthonormal, random


def weighted_norm(E, H=None, G=None):
    H = np.eye(E.shape[0]) if H is None else H
    G = np.eye(E.shape[1]) if G is None else G
    return np.sqrt(max(np.trace(E.conj().T @ H @ E @ G).real, 0.0))


def moments(n, rank, rng, *, is_complex=False):
    F = rng.standard_normal((n, rank)) * np.exp(rng.standard_normal((n, 1)))
    if is_complex:
        F = F + 1j * rng.standard_normal((n, rank))
    return F @ F.conj().T / rank


@pytest.mark.parametrize("kind", ["vector", "matrix", "singular", "zeros in a vector", "zero"])
def test_weighted_certificate_holds_in_every_library(backend, kind, rng):
    A = random(24, 16, rng)
    w = {
        "vector": rng.uniform(0.1, 3, 16),
        "matrix": moments(16, 40, rng),
        "singular": moments(16, 5, rng),
        "zeros in a vector": np.where(np.arange(16) < 6, 0.0, 1.0),
        "zero": np.zeros((16, 16)),
    }[kind]
    result = cur(backend.asarray(A), rank=4, column_weights=backend.companion(w))
    G = np.diag(w) if w.ndim == 1 else w
    E = A - to_numpy(result.C) @ to_numpy(result.U) @ to_numpy(result.R)
    error = weighted_norm(E, G=G)
    certificate = result.certificate
    # single precision weighs with a matrix that differs from G by its own rounding
    slack = 1.0 if backend.precise else 1.001
    assert error <= slack * certificate.value
    if certificate.projection is not None:
        assert error <= slack * certificate.projection
    if kind in ("vector", "matrix") and backend.name != "operator":
        assert certificate.value <= 1.05 * error


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_one_sided_factorizations_take_both_weights(side, is_complex, rng):
    A = random(24, 16, rng) + (1j * random(24, 16, rng) if is_complex else 0)
    H, G = moments(24, 50, rng, is_complex=is_complex), moments(16, 40, rng, is_complex=is_complex)
    result = interpolative(A, rank=5, side=side, row_weights=H, column_weights=G)
    error = weighted_norm(A - result.toarray(), H, G)
    assert error <= result.certificate.value <= 1.05 * error


def test_weighted_beats_unweighted_in_the_weighted_norm_and_only_there(rng):
    A, G = random(40, 30, rng), moments(30, 6, rng)
    with_weights, without = cur(A, rank=8, column_weights=G), cur(A, rank=8)
    E1, E2 = A - with_weights.toarray(), A - without.toarray()
    assert weighted_norm(E1, G=G) < 0.8 * weighted_norm(E2, G=G)
    assert np.linalg.norm(E1) > np.linalg.norm(E2)


def test_a_vector_is_its_diagonal_matrix_and_its_factor(rng):
    A, w = random(24, 16, rng), rng.uniform(0.1, 3, 16)
    forms = (w, np.diag(w), weights.factor(np.diag(np.sqrt(w))), weights.diagonal(w))
    # a sketch would mix the columns otherwise for each form
    results = [cur(A, rank=5, column_weights=form, row_weights=np.ones(24), subspace="exact") for form in forms]
    for other in results[1:]:
        assert other.rows.tolist() == results[0].rows.tolist()
        assert other.columns.tolist() == results[0].columns.tolist()
        np.testing.assert_allclose(other.U, results[0].U, rtol=1e-6)
        assert other.certificate.value == pytest.approx(results[0].certificate.value)


def test_unit_weights_change_nothing(rng):
    A = random(24, 16, rng)
    plain, weighted = cur(A, rank=5), cur(A, rank=5, column_weights=np.ones(16), row_weights=np.ones(24))
    assert plain.rows.tolist() == weighted.rows.tolist()
    np.testing.assert_allclose(plain.U, weighted.U, rtol=1e-10)


def test_columns_of_weight_zero_are_not_chosen(rng):
    w = np.where(np.arange(16) % 2, 1.0, 0.0)
    assert (cur(random(24, 16, rng), rank=5, column_weights=w).columns % 2 == 1).all()


def test_u_minimises_the_weighted_error_also_when_the_core_asked_for_is_plain(rng):
    A, G = random(24, 16, rng), moments(16, 40, rng)
    weighted = cur(A, rank=4, column_weights=G)
    plain = cur(A, rank=4, column_weights=G, link="optimal")
    assert weighted.columns.tolist() == plain.columns.tolist()

    def errors(result):
        return weighted_norm(A - result.toarray(), G=G), np.linalg.norm(A - result.toarray())

    assert errors(weighted)[0] < errors(plain)[0] <= plain.certificate.value
    assert errors(plain)[1] < errors(weighted)[1]
    for _ in range(10):
        E = A - weighted.C @ (weighted.U + 1e-4 * rng.standard_normal((4, 4))) @ weighted.R
        assert weighted_norm(E, G=G) > errors(weighted)[0]


def test_tolerance_is_that_of_the_weighted_norm(rng):
    A, G = random(40, 30, rng), moments(30, 6, rng)
    result = cur(A, tol=0.1, column_weights=G)
    assert weighted_norm(A - result.toarray(), G=G) <= 0.1 * weighted_norm(A, G=G) * (1 + 1e-9)
    assert result.rank < cur(A, tol=0.1).rank


@pytest.mark.parametrize("make", [weights.matrix, lambda G: weights.factor(np.real(sqrtm(G)))])
def test_a_weight_applies_its_root(make, dense, rng):
    G = moments(9, 30, rng)
    A = random(6, 9, rng)
    weight = make(G)
    np.testing.assert_allclose(np.linalg.norm(weight.apply(A, 1)), weighted_norm(A, G=G), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(weight.apply(A.T, 0)), weighted_norm(A.T, H=G), rtol=1e-9)
    if make is weights.matrix:
        other = weights.matrix(dense.asarray(G))
        found = np.linalg.norm(to_numpy(other.apply(dense.asarray(A), 1)))
        assert found == pytest.approx(weighted_norm(A, G=G), rel=1e-5)


def test_wide_and_narrow_factors(rng):
    for p in (3, 9, 50):
        F, A = rng.standard_normal((9, p)), random(6, 9, rng)
        assert np.linalg.norm(weights.factor(F).apply(A, 1)) == pytest.approx(np.linalg.norm(A @ F), rel=1e-7)


def test_damping_adds_a_multiple_of_the_mean_eigenvalue(rng):
    G, A = moments(9, 4, rng), random(6, 9, rng)
    damped = G + 0.1 * np.trace(G) / 9 * np.eye(9)
    found = np.linalg.norm(weights.matrix(G, damping=0.1).apply(A, 1))
    assert found == pytest.approx(weighted_norm(A, G=damped))
    with pytest.raises(ValueError, match="`damping` must be non-negative; got -1"):
        weights.matrix(G, damping=-1)


def test_weighted_bases_interpolate(rng):
    """(B1) in weighted coordinates: eta of the weighted problem is that of the oblique projector."""
    G = moments(9, 30, rng)
    weight = weights.matrix(G)
    W = orthonormal(9, 3, rng)
    columns = np.array([1, 4, 8])
    F = weight.vectors * weight.roots
    selected = np.linalg.inv(F)[:, columns]
    projector = selected @ np.linalg.inv(W.T @ selected) @ W.T
    smallest = np.linalg.svd(weight.interpolate(W, columns))[1][-1]
    assert np.linalg.norm(projector, 2) == pytest.approx(1 / smallest)


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        (np.ones(15), ValueError, "`column_weights` must have one weight per column of `A`, 16; got 15"),
        (np.ones((15, 15)), ValueError, "`column_weights` must have one weight per column of `A`, 16; got 15"),
        (np.ones((16, 3)), ValueError, "`column_weights` must be a square matrix.*use `cur.weights.factor`"),
        (np.ones((2, 2, 2)), ValueError, "`column_weights` must be a vector or a square matrix"),
        (-np.ones(16), ValueError, "`column_weights` must be non-negative; its smallest entry is -1"),
        (-np.eye(16), ValueError, "`column_weights` must have no negative eigenvalue; its smallest is -1"),
        (np.diag([-1.0] + [1.0] * 15), ValueError, "no negative eigenvalue; its smallest is -1 beside 1"),
        (np.triu(np.ones((16, 16))), ValueError, r"`column_weights` must be symmetric \(Hermitian\).*symmetrise"),
        (np.full(16, np.nan), ValueError, "`column_weights` must be finite; it holds NaN or inf"),
        (np.full((16, 16), np.inf), ValueError, "`column_weights` must be finite; it holds NaN or inf"),
        (1j * np.ones(16), TypeError, "`column_weights` must be real, as a diagonal"),
        (np.eye(16) * (1 + 0j), TypeError, "`column_weights` must be real for a real `A`.*convert `A` to complex"),
        ([1.0] * 16, TypeError, "`column_weights` must be an array.*got list"),
    ],
)
def test_bad_weights(weights, error, text, rng):
    A = random(24, 16, rng)
    with pytest.raises(error, match=text):
        cur(A, rank=2, column_weights=weights)
    with pytest.raises(error, match=text.replace("column", "row")):
        cur(A.T, rank=2, row_weights=weights)
    with pytest.raises(error, match=text.replace("column", "row")):
        interpolative(A.T, rank=2, row_weights=weights, side="rows")


@pytest.mark.parametrize("made", ["float16", "float32", "float64", "int64", "uint8", "bool"])
@pytest.mark.parametrize("used", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("kind", ["diagonal", "matrix", "factor"])
def test_weights_of_any_dtype_serve_matrices_of_any_other(dense, made, used, kind, rng):
    """And the factors come in the dtype of the matrix."""
    if dense.name.startswith("jax") and (made, used) not in (("int64", "float32"), ("float16", "complex64")):
        pytest.skip("two pairs are enough for what JAX compiles")
    if dense.name == "array-api-strict" and made == "float16":
        pytest.skip("the standard has no half precision")
    A = random(24, 16, rng).astype(dense.dtype(used))
    w = (rng.integers(0, 2 if made == "bool" else 5, 16)).astype(float)
    given = {"diagonal": w, "matrix": np.diag(w), "factor": np.diag(w)}[kind]
    X = dense.asarray(given.astype(np.float32 if made == "float16" and dense.name == "jax" else made))
    weight = getattr(weights, kind)(X)
    for result in (
        cur(dense.asarray(A), rank=4, column_weights=weight),
        interpolative(dense.asarray(A), rank=4, column_weights=weight),
    ):
        assert all(str(f.dtype).endswith(A.dtype.name) for f in result.factors)
        E = A - np.linalg.multi_dot([to_numpy(f) for f in result.factors])
        G = np.diag(w**2 if kind == "factor" else w)
        # what a matrix of half or single precision is damped by
        assert weighted_norm(E, G=G) <= result.certificate.value * 1.001


@pytest.mark.parametrize("kind", ["diagonal", "matrix", "factor"])
def test_weights_of_another_library_are_refused(kind, rng):
    torch = pytest.importorskip("torch")
    A, w = random(24, 16, rng), np.linspace(0.1, 1, 16)
    given = w if kind == "diagonal" else np.diag(w)
    pairs = (
        (A, torch.tensor(given)),
        (torch.tensor(A), given),
        (scipy.sparse.csr_array(A), torch.tensor(given)),
    )
    for matrix, other in pairs:
        for driver in (cur, interpolative, select):
            with pytest.raises(TypeError, match="`column_weights` must be an array of the same library as `A`"):
                driver(matrix, rank=2, column_weights=getattr(weights, kind)(other))


@pytest.mark.parametrize("make", [weights.diagonal, weights.matrix, weights.factor, "driver"])
def test_what_is_no_plain_array_of_weights(make, rng):
    A = random(24, 16, rng)
    w = np.linspace(0, 1, 16)
    given = w if make in (weights.diagonal, "driver") else np.diag(w)
    function = (lambda x: cur(A, rank=3, column_weights=x)) if make == "driver" else make
    name = "column_weights" if make == "driver" else "weights"
    with pytest.raises(TypeError, match=f"`{name}` must be a plain array; got MaskedArray"):
        function(np.ma.masked_greater(given, 0.5))
    with pytest.raises(TypeError, match=f"`{name}` must be an array .*; got list; convert it with numpy.asarray"):
        function(given.tolist())
    with pytest.raises(TypeError, match=f"`{name}` must hold real or complex numbers"):
        function(given.astype(str))
    with pytest.raises(ValueError, match=f"`{name}` must be .* and not empty"):
        function(given[:0])


def test_weights_beyond_the_range_of_the_matrix(rng):
    A = random(24, 16, rng).astype(np.float32)
    plain = cur(A, rank=3).certificate.value
    assert cur(A, rank=3, column_weights=np.full(16, 1e80)).certificate.value == pytest.approx(1e40 * plain, rel=1e-3)
    assert cur(A, rank=3, row_weights=np.eye(24) * 1e78).certificate.value == pytest.approx(1e39 * plain, rel=1e-3)
    with pytest.raises(
        ValueError, match=r"`column_weights` has entries beyond the range of .*float32.*divide it by its"
    ):
        weighted_svd(A, column_weights=np.full(16, 1e80))


def test_weights_of_complex_entries_keep_them(rng):
    A, G = random(24, 16, rng), moments(16, 40, rng, is_complex=True)
    for function in (weighted_svd, own_rows, own_inputs):
        with pytest.raises(TypeError, match="`column_weights` must be real for a real `A`"):
            function(A, column_weights=G)
    for function in (weighted_svd, own_rows, own_inputs):
        with pytest.raises(TypeError, match="`row_weights` must be real for a real `A`"):
            function(A, row_weights=moments(24, 40, rng, is_complex=True))
