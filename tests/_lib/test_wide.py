"""Residuals in about twice the working precision, against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cur import NumericalError, cur, deim_cur, interpolative, weights
from cur._lib.array import to_numpy
from cur._lib.products import RUN, frobenius
from cur._lib.wide import Residual, Weights
from cur.weights import diagonal
from tests.families import FAMILIES, cast, remainder
from tests.families import frobenius as exact_norm

STRUCTURED = ("constant", "small_integers", "few_rows", "repeated_columns")


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["float32", "float64", "complex64", "complex128"]),
    st.tuples(*[st.integers(1, 12)] * 4),
    st.integers(-6, 14),
)
def test_the_rounding_is_bounded_however_much_cancels(seed, dtype, sizes, power):
    rng = np.random.default_rng(seed)
    m, n, c, r = sizes
    shapes = [(m, c), (c, r), (r, n)]
    C, U, R = (cast(rng.standard_normal(s) + 1j * rng.standard_normal(s) * ("c" in dtype), dtype) for s in shapes)
    U = U * U.dtype.type(10.0**power)
    A = (C @ (U @ R)).astype(C.dtype)  # nothing but rounding is left
    root = 10.0 ** rng.uniform(-8, 0, n)
    E = Residual(A, C, (U, R), Weights(None, diagonal(root**2), 3), split=dtype in ("float64", "complex128"))
    value = E.norm()
    truth = 8 * exact_norm(remainder(A, C, U, R) * root.astype(np.longdouble))
    assert abs(value - truth) <= E.rounding(value)
    assert E.rounding(value) <= 1e-3 * np.finfo(dtype).eps * np.linalg.norm(C) * np.linalg.norm(U) * np.linalg.norm(R)


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
@pytest.mark.parametrize("family", STRUCTURED)
@pytest.mark.parametrize("select", ["lupp", "norm", "cmd", "uniform", "qdeim"])
def test_roundings_that_agree(family, select):
    """Above the numerical rank U holds what rounding made, and equal entries round alike."""
    for seed, (m, n), rank in ((0, (57, 57), 38), (1, (40, 23), 20), (2, (9, 70), 9)):
        A = FAMILIES[family](m, n, np.random.default_rng(seed))
        scores = np.random.default_rng(seed).uniform(size=(m, n))
        for dtype in ("float64", "float32"):
            X = cast(A, dtype)
            for options in ({}, {"importance": scores.astype(dtype)}):
                result = cur(X, rank=rank, select=select, **options)
                assert exact_norm(remainder(X, *result.factors)) <= result.certificate.value
                one_sided = interpolative(X, rank=min(rank, n), select=select, **options)
                assert exact_norm(remainder(X, *one_sided.factors)) <= one_sided.certificate.value


@pytest.mark.parametrize("tol", [3e-15, 1e-15, 3e-16])
@pytest.mark.parametrize("number", [0.1, 0.7, 1 / 3])
def test_tolerances_at_the_roundoff_are_met_or_refused(tol, number):
    A = np.full((83, 83), number)
    for factor in (cur, interpolative):
        try:
            result = factor(A, tol=tol, select="lupp")
        except NumericalError:
            continue
        assert exact_norm(remainder(A, *result.factors)) <= tol * exact_norm(A.astype(np.longdouble))


def test_long_rows_in_single_precision(backend):
    """Sums over rows in single precision are wrong by as much as the length of the row times the roundoff."""
    if backend.name == "operator":
        pytest.skip("an operator is multiplied, not added up")
    rng = np.random.default_rng(3)
    for A in (rng.standard_normal((3, 60_000)), np.full((2, 150_000), 0.1)):
        for X in (A.astype(np.float32), A.astype(np.float32).T):
            native = backend.asarray(X)
            norm = float(np.linalg.norm(X.astype(np.float64)))
            assert frobenius(native) == pytest.approx(norm, rel=RUN * 2.0**-24)
            result = deim_cur(native, rank=1)
            C, U, R = (to_numpy(f).astype(np.float64) for f in result)
            assert np.linalg.norm(X - C @ (U @ R)) <= result.certificate.value * (1 + 1e-12)


KERNELS = {
    "Runge": lambda x: 1 / (1 + 25 * np.subtract.outer(x, x) ** 2),
    "Gauss": lambda x: np.exp(-8 * np.subtract.outer(x, x) ** 2),
    "Hilbert": lambda x: 1 / (1 + (len(x) - 1) * np.add.outer(x, x)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tols"), [("float64", (1e-7, 1e-8)), ("float32", (1e-2, 3e-4))])
def test_no_rank_is_lost_to_rounding(kernel, dtype, tols):
    A = KERNELS[kernel](np.linspace(0, 1, 240)).astype(dtype)
    size = exact_norm(A.astype(np.longdouble))
    for tol in tols:
        found = deim_cur(A, tol=tol)
        assert found.certificate.relative == pytest.approx(_error(A, found) / size, rel=0.05)
        ranks = range(max(1, int(0.7 * found.rank)), found.rank + 1)
        least = min(k for k in ranks if k == found.rank or _error(A, deim_cur(A, rank=k)) <= tol * size)
        assert found.rank <= max(1.15 * least, least + 1)


def _error(A, result):
    C, U, R = (f.astype(np.longdouble) for f in result.factors)
    return exact_norm(A - C @ (U @ R))


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_larger_ranks_are_not_worse(kernel, dtype):
    A = KERNELS[kernel](np.linspace(0, 1, 200)).astype(dtype)
    size = float(np.linalg.norm(A.astype(np.float64)))
    errors = [_error(A, deim_cur(A, rank=k)) / size for k in range(4, 60, 4)]
    floor = 0.5 * np.sqrt(np.finfo(dtype).eps)
    for j, error in enumerate(errors):
        assert error <= 1.3 * min(errors[: j + 1]) or error <= floor


def test_a_search_stops_where_rounding_is_in_the_way(monkeypatch):
    """Far below the full rank, and with the reason."""
    points = np.random.default_rng(0).random((500, 3))
    A = np.exp(-((points[:, None] - points) ** 2).sum(-1))
    tried = []
    norm = Residual.norm
    monkeypatch.setattr(Residual, "norm", lambda self: tried.append(self.C.shape[1]) or norm(self))
    with pytest.raises(NumericalError, match=r"larger ranks do not lower it, because U divides by the small singular"):
        deim_cur(A, tol=1e-10)
    assert max(tried) <= 2 * 256
    assert interpolative(A, tol=1e-10).certificate.relative <= 1e-10


def test_weights_do_not_hide_the_rounding(rng):
    """The residual is weighted, not the factors: those would lose digits to the size of U."""
    A = np.vander(np.linspace(0, 1, 40), 30)
    w = rng.uniform(0.1, 1, 30)
    F = rng.standard_normal((40, 40)) / 6
    for dtype in ("float64", "float32"):
        X = A.astype(dtype)
        result = cur(X, rank=25, select="lupp", row_weights=weights.factor(F), column_weights=w)
        E = F.T.astype(np.longdouble) @ remainder(X, *result.factors) * np.sqrt(w.astype(np.longdouble))
        assert exact_norm(E) <= result.certificate.value
        assert result.certificate.value <= 1e3 * np.finfo(dtype).eps ** 0.5 * result.certificate.scale
