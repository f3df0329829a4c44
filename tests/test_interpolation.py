"""The one-sided driver, and indices alone. The matrices of SciPy's interpolative tests, with tolerances that hold."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from benchmarks.bounds import run_case
from cur import RankWarning, cur, interpolative, select, selection
from cur.selection import SELECTORS
from tests.backends import to_numpy, use
from tests.families import DTYPES, FAMILIES, cast, frobenius, geometric, hilbert, random, remainder


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-10, 1e-12])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "operator"])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_hilbert_matrices_keep_the_tolerance(tol, dtype, kind, side):
    A = hilbert(300, 280).astype(dtype)
    if dtype == "complex128":
        A = A * (1 + 1j)
    make = {"dense": np.asarray, "sparse": scipy.sparse.csr_array, "operator": scipy.sparse.linalg.aslinearoperator}
    result = interpolative(make[kind](A), tol=tol, side=side)
    B = to_numpy(result.toarray())
    assert np.linalg.norm(A - B) <= tol * np.linalg.norm(A)
    assert result.certificate.relative <= tol
    assert result.rank <= 1 + np.count_nonzero(np.linalg.svd(A)[1] > 0.02 * tol * np.linalg.norm(A))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_certificate_and_identity_for_every_family(family, dtype, rng):
    for shape in ((30, 20), (6, 25), (1, 6), (6, 1), (1, 1)):
        A = cast(FAMILIES[family](*shape, rng), dtype)
        for side in ("rows", "columns"):
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RankWarning)
                result = interpolative(A, rank=max(1, min(shape) // 2), side=side)
            E = remainder(A, *result.factors)
            assert frobenius(E) <= result.certificate.value
            axis = 0 if side == "rows" else 1
            np.testing.assert_array_equal(result.skeleton, np.take(A, result.chosen, axis=axis))
            np.testing.assert_array_equal(np.take(result.projection, result.chosen, axis=axis), np.eye(result.rank))


def test_coefficients_are_least_squares(rng):
    A = random(30, 20, rng)
    result = interpolative(A, rank=6)
    expected = np.linalg.lstsq(result.skeleton, A[:, result.others])[0]
    np.testing.assert_allclose(result.coefficients, expected, rtol=1e-8, atol=1e-12)


def test_sides_are_transposes(rng):
    A = random(30, 30, rng)
    rows, columns = interpolative(A, rank=6, side="rows"), interpolative(A.T.copy(), rank=6)
    assert rows.chosen.tolist() == columns.chosen.tolist()
    np.testing.assert_allclose(rows.coefficients, columns.coefficients.T)


def test_every_library(backend, rng):
    A = FAMILIES["complex_geometric"](30, 20, rng)
    A = A.astype(backend.dtype("complex128"))
    for side in ("rows", "columns"):
        result = interpolative(backend.asarray(A), rank=5, side=side)
        E = remainder(A, *(to_numpy(f) for f in result.factors))
        assert frobenius(E) <= result.certificate.value
        if backend.name.startswith("jax"):
            continue  # compiles for every rank that is tried
        kept = interpolative(backend.asarray(A), tol=1e-3, side=side)
        assert np.linalg.norm(A - to_numpy(kept.toarray())) <= 1.00001e-3 * np.linalg.norm(A)


def test_full_rank_and_rank_one(rng):
    A = random(8, 5, rng)
    np.testing.assert_allclose(interpolative(A, rank=5).toarray(), A, atol=1e-13)
    assert interpolative(A, rank=5).coefficients.shape == (5, 0)
    outer = np.outer(A[:, 0], A[0])
    np.testing.assert_allclose(interpolative(outer, rank=1).toarray(), outer, atol=1e-14)


def test_select_gives_the_indices_of_the_driver(backend, rng):
    A = FAMILIES["geometric"](30, 20, rng)
    rows, columns = select(backend.asarray(A), rank=(6, 4), rng=2)
    expected = select(A, rank=(6, 4), rng=2)
    assert len(to_numpy(rows)) == 6
    assert len(to_numpy(columns)) == 4
    if backend.precise:
        assert to_numpy(rows).tolist() == expected[0].tolist()
        assert to_numpy(columns).tolist() == expected[1].tolist()


def test_rank_must_be_one_number(rng):
    with pytest.raises(ValueError, match="`rank` must be one number for a one-sided factorization"):
        interpolative(random(8, 5, rng), rank=(2, 3))
    with pytest.raises(ValueError, match="`side` must be one of 'rows', 'columns'; got 'left'"):
        interpolative(random(8, 5, rng), rank=2, side="left")


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_select_gives_the_indices_of_the_driver_at_every_scale(name, dtype, rng):
    A = (geometric(60, 40, rng) * (1 + 1j if dtype == "complex64" else 1)).astype(dtype)
    expected = [to_numpy(i).tolist() for i in select(A, rank=5, select=name)]
    kinds = ("numpy", "torch", "array-api-strict", "dask", "sparse", "operator")
    kinds = kinds if name in ("deim", "norm") else kinds[:1]
    powers = {"float32": (-90, 90), "float64": (-900, 900), "complex64": (-90, -70)}[dtype]
    for power in powers:
        B = A * A.real.dtype.type(2.0**power)
        with np.errstate(under="ignore"):
            driver = cur(B, rank=5, select=name)
        assert [driver.rows.tolist(), driver.columns.tolist()] == expected
        for kind in kinds:
            if kind == "operator" and "entries" in SELECTORS[name].reads:
                continue  # it shows no entries
            with use(kind) as backend:
                found = select(backend.asarray(B), rank=5, select=name, subspace="randomised")
            assert [to_numpy(i).tolist() for i in found] == expected, (kind, power)


@pytest.mark.parametrize("name", ["norm", "cmd"])
@pytest.mark.parametrize("kind", ["numpy", "torch", "array-api-strict", "dask", "sparse"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_selectors_by_norms_at_every_scale(name, kind, dtype, rng):
    A = (FAMILIES["outliers"](30, 20, rng).T).astype(dtype)
    basis = np.linalg.qr(random(20, 3, rng))[0]
    expected = getattr(selection, name)(basis, 3, matrix=A).tolist()
    for power in (-1000, -600, 600, 990) if dtype == "float64" else (-100, -75, 75, 100):
        with use(kind) as backend:
            found = getattr(selection, name)(backend.companion(basis), 3, matrix=backend.asarray(np.ldexp(A, power)))
        assert to_numpy(found).tolist() == expected, power


def test_the_bound_on_columns_holds_where_coefficients_are_cut():
    """It speaks of the best coefficients in exact arithmetic; those of nearly dependent columns are cut."""
    case = {
        "family": "cauchy", "shape": (60, 45), "dtype": "float64", "scale": 240, "rank": 22, "driver": "interpolative",
        "select": "qdeim", "link": "optimal", "subspace": "exact", "norm": "fro", "weights": [None, None], "cuts": 1,
        "seed": 1297747576,
    }  # fmt: skip
    for scale in (0, 240):
        found = run_case(case | {"scale": scale})
        assert found
        for _, bound, error, _ in found:
            assert error <= bound
