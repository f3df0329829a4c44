"""Matrices, weights and both together at the ends of the range."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from cur import NumericalError, cur, deim_cur, interpolative, linking, select, selection, stream_cur, weights
from cur._lib.array import to_numpy
from cur.weighted import own_inputs, own_rows, truncation
from tests.families import cast, frobenius, random, remainder, spectral

DRIVERS = {
    "deim_cur": lambda A: deim_cur(A, rank=3),
    "uniform": lambda A: cur(A, rank=3, select="uniform"),
    "cross": lambda A: cur(A, rank=3, link="cross"),
    "interpolative": lambda A: interpolative(A, rank=3),
    "rows": lambda A: interpolative(A, rank=3, side="rows"),
    "stream_cur": lambda A: stream_cur(A, rank=3),
    "blocks": lambda A: stream_cur([A[:5], A[5:8], A[8:]], rank=3),
}
POWERS = {"float32": (-30, -22, 21, 37), "float64": (-290, -165, 160, 307)}


def _slices_are_the_matrix(A, result):
    if hasattr(result, "U"):
        pairs = ((result.C, A[:, to_numpy(result.columns)]), (result.R, A[to_numpy(result.rows)]))
    else:
        chosen = to_numpy(result.chosen)
        pairs = ((result.skeleton, A[:, chosen] if result.side == "columns" else A[chosen]),)
    for ours, theirs in pairs:
        ours = to_numpy(ours)
        assert ours.dtype == theirs.dtype
        assert np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_every_driver_at_every_size(driver, dtype, rng):
    X = random(18, 11, rng) * 10
    X = cast(X if dtype.startswith("f") else X + 1j * random(18, 11, rng), dtype)
    at_one = DRIVERS[driver](X).certificate.relative
    for power in POWERS["float32" if dtype in ("float32", "complex64") else "float64"]:
        A = X * X.dtype.type(10.0**power)
        result = DRIVERS[driver](A)
        _slices_are_the_matrix(A, result)
        error = frobenius(remainder(A, *(to_numpy(f) for f in result.factors)))
        assert error <= result.certificate.value <= (1 + 1e-2) * error
        assert result.certificate.relative == pytest.approx(at_one, rel=0.02)


def test_every_library_at_every_size(backend, rng):
    X = (random(18, 11, rng) * 10).astype(np.float32)
    for power in (-115, -80, 70, 123):
        A = X * np.float32(2.0**power)
        result = deim_cur(backend.asarray(A), rank=3)
        C, R = to_numpy(result.C), to_numpy(result.R)
        assert np.array_equal(C, A[:, to_numpy(result.columns)])
        assert np.array_equal(R, A[to_numpy(result.rows)])
        error = frobenius(remainder(A, C, to_numpy(result.U), R))
        assert error <= result.certificate.value <= 1.6 * error
        chosen = select(backend.asarray(A), rank=3)
        expected = select(backend.asarray(X), rank=3)
        for ours, theirs in zip(chosen, expected, strict=True):
            assert to_numpy(ours).tolist() == to_numpy(theirs).tolist()


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["float32", "float64", "complex128"]),
    st.integers(-300, 300),
    st.tuples(*[st.one_of(st.none(), st.integers(-300, 300))] * 2),
    st.sampled_from([np.float64, np.float32]),
    st.sampled_from(["cur", "interpolative"]),
)
def test_weights_of_any_size(seed, dtype, power, weight_powers, weight_dtype, driver):
    rng = np.random.default_rng(seed)
    least, most = (-36, 37) if dtype == "float32" else (-290, 300)
    A = cast(random(14, 9, rng), dtype)
    A = A * A.dtype.type(10.0 ** np.clip(power, least, most))
    weights, roots = [], []
    for size, exponent in zip(A.shape, weight_powers, strict=True):
        limit = 300 if weight_dtype is np.float64 else 36
        w = (rng.uniform(0.1, 1, size) * 10.0 ** np.clip(exponent or 0, -limit, limit)).astype(weight_dtype)
        weights.append(None if exponent is None else w)
        roots.append(np.ones(size) if exponent is None else np.sqrt(w.astype(np.longdouble)))
    factor = cur if driver == "cur" else interpolative
    result = factor(A, rank=4, row_weights=weights[0], column_weights=weights[1])
    _slices_are_the_matrix(A, result)
    E = roots[0][:, None] * remainder(A, *result.factors) * roots[1]
    error = frobenius(E)
    if 1e-290 < error < 1e300:  # as a double can say
        assert error <= result.certificate.value <= 1.01 * error
        assert result.rank == 4


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
@pytest.mark.parametrize(("dtype", "span"), [("float32", 12), ("float64", 60), ("float64", 120), ("float64", 150)])
def test_weights_that_make_up_for_the_sizes_of_columns(dtype, span, rng):
    """Standardised columns in units of any size: small weights of large columns and large ones of small."""
    A = (random(20, 8, rng) * 10 * np.logspace(-span, span, 8)).astype(dtype)
    w = 1 / (A.astype(np.longdouble) ** 2).sum(0)
    result = interpolative(A, rank=3, column_weights=w.astype(np.float64))
    _slices_are_the_matrix(A, result)
    E = remainder(A, *result.factors) * np.sqrt(w)
    assert frobenius(E) <= result.certificate.value * (1 + 1e-6) <= 1.05 * frobenius(E)


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_products_with_weights_that_vanish_are_refused(rng):
    A = (random(20, 8, rng) * np.logspace(-36, 36, 8)).astype(np.float32)
    w = (1 / (A.astype(np.longdouble) ** 2).sum(0)).astype(np.float64)
    for factor in (deim_cur, interpolative):
        with pytest.raises(NumericalError, match=r"span so many sizes.* range of float32; use double precision"):
            factor(A, rank=3, column_weights=w)
        assert factor(A.astype(np.float64), rank=3, column_weights=w).certificate.value > 0


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_columns_of_every_size_in_one_matrix(rng):
    for dtype, span in (("float32", 30), ("float64", 250)):
        A = (random(16, 9, rng) * np.logspace(span, -span, 9)).astype(dtype)
        for name in DRIVERS:
            _slices_are_the_matrix(A, DRIVERS[name](A))
        for select_by in ("uniform", "norm", "deim"):
            result = cur(A, rank=3, select=select_by)
            assert frobenius(remainder(A, *result.factors)) <= result.certificate.value
            assert result.certificate.value > 0


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.coo_array, aslinearoperator])
def test_sparse_matrices_and_operators_of_any_size(make, rng):
    X = np.where(rng.uniform(size=(30, 20)) < 0.3, rng.standard_normal((30, 20)), 0)
    for power in (-290, -170, 170, 300):
        A = X * 10.0**power
        result = deim_cur(make(A), rank=4)
        factors = [f.toarray() if scipy.sparse.issparse(f) else f for f in result.factors]
        assert np.array_equal(factors[0], A[:, result.columns])
        error = frobenius(remainder(A, *factors))
        assert error <= result.certificate.value <= 1.01 * error


def test_fill_values_of_rasters(rng):
    A = rng.uniform(0, 1, (20, 12)).astype(np.float32)
    A[rng.uniform(size=A.shape) < 0.1] = np.float32(-3.4e38)
    result = deim_cur(A, rank=3)
    _slices_are_the_matrix(A, result)
    assert frobenius(remainder(A, *result.factors)) <= result.certificate.value < np.inf


@pytest.mark.parametrize("value", [1e308, -1.7e308, 1e308 + 1e308j, 5e-320])
def test_entries_at_the_very_ends(value):
    A = np.full((20, 10), value)
    result = interpolative(A, rank=1)
    assert frobenius(remainder(A, *result.factors)) <= result.certificate.value < 1e297
    if abs(value.real) > 1:
        assert deim_cur(A, rank=1).certificate.relative < 1e-14


@pytest.mark.parametrize("dtypes", [*itertools.permutations(["float32", "float64"]), ("complex64", "float64")])
@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_streams_of_several_precisions(dtypes):
    """The coarsest precision counts: products of its entries were rounded to it."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        n, rank = rng.integers(2, 25), rng.integers(1, 8)
        blocks = [
            (rng.standard_normal((rng.integers(1, 60), n)) + rng.choice([0, 3, 100])).astype(rng.choice(dtypes))
            for _ in range(rng.integers(2, 5))
        ]
        if sum(map(len, blocks)) < rank or n < rank:
            continue
        result = stream_cur(blocks, rank=int(rank))
        A = np.concatenate([b.astype(np.complex128 if np.iscomplexobj(b) else np.float64) for b in blocks])
        error = frobenius(remainder(A, *result.factors))
        assert error <= result.certificate.value
        assert error <= result.certificate.projection


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_half_precision_complex_numbers_keep_both_parts():
    torch = pytest.importorskip("torch")
    A = torch.complex(*torch.rand(2, 12, 9, generator=torch.Generator().manual_seed(0)).to(torch.float16))
    for result in (deim_cur(A, rank=3), interpolative(A, rank=3)):
        assert result.factors[0].dtype == torch.complex64
        error = frobenius(remainder(to_numpy(A.to(torch.complex64)), *(to_numpy(f) for f in result.factors)))
        assert error <= result.certificate.value <= 1.01 * error


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_products_of_nothing_are_nothing(rng):
    A = random(9, 5, rng).astype(np.float32)
    assert deim_cur(A * 0, rank=2, column_weights=np.ones(5)).certificate.value == 0.0
    assert deim_cur(A, rank=2, column_weights=np.zeros(5)).certificate.value == 0.0


def test_weight_objects_of_any_size(rng):
    A = random(12, 8, rng)
    F = rng.standard_normal((8, 8))
    for power in (-140, 140):
        for dtype in ("float32", "float64"):
            weight = weights.factor(F * 10.0**power)
            result = deim_cur(A.astype(dtype), rank=3, column_weights=weight)
            E = remainder(A.astype(dtype), *result.factors) @ (F * np.longdouble(10.0) ** power)
            assert frobenius(E) <= result.certificate.value <= 1.01 * frobenius(E)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("driver", ["deim_cur", "uniform", "cross", "interpolative", "rows", "lanczos", "tol"])
def test_operators_whose_products_leave_the_range(dtype, driver, rng):
    """Entries are numbers of the dtype, and sums of a few of them are none."""
    factor = {
        **DRIVERS,
        "lanczos": lambda A: cur(A, rank=3, subspace="lanczos"),
        "tol": lambda A: cur(A, tol=0.5, norm=2),
    }[driver]
    X = rng.uniform(0.5, 1, (30, 18))
    X = X if dtype.startswith("f") else X * np.exp(1j * random(30, 18, rng)) / 2
    ends = (-37, 0) if dtype in ("float32", "complex64") else (-305, 0)
    for power in ends:
        A = (X * (1.0 if power == 0 else 10.0**power)).astype(dtype)
        A = A * np.finfo(dtype).max if power == 0 else A
        result = factor(aslinearoperator(A))
        error = remainder(A, *result.factors)
        error = frobenius(error) if result.certificate.norm == "fro" else spectral(error)
        assert error <= result.certificate.value <= 1.6 * error
        if driver != "tol":
            _slices_are_the_matrix(A, result)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_adjoint_of_an_operator_at_the_end_of_the_range_is_compared(dtype, rng):
    A = rng.uniform(0.5, 1, (30, 18)).astype(dtype) * np.finfo(dtype).max
    op = LinearOperator(A.shape, matvec=lambda x: A @ x, rmatvec=lambda y: 0.9 * (A.T @ y), dtype=dtype)
    for factor in (deim_cur, interpolative):
        with pytest.raises(ValueError, match="`A` must have the adjoint of its own products"):
            factor(op, rank=3)
    A[3, 4] = np.inf
    with pytest.raises(ValueError, match="`A` must be finite; a product with this LinearOperator holds NaN or inf"):
        deim_cur(aslinearoperator(A), rank=3)


def _relative(E, power):
    return frobenius(np.asarray(E, dtype=np.longdouble) / np.longdouble(10) ** power)


LOW_LEVEL = {
    "optimal": lambda A: _missed(A, linking.optimal(A, A[:, :3], A[:3])),
    "weighted": lambda A: _missed(A, linking.weighted(A, A[:, :3], A[:3], None, np.linspace(1, 3, 9))),
    "cross": lambda A: _missed(A, linking.cross(A[:3, :3])),
    "weighted_svd": lambda A: A - truncation.weighted_svd(A, column_weights=GRADED).truncate(3).toarray(),
    "singular values": lambda A: truncation.weighted_svd(A.T, row_weights=GRADED).singular_values,
    "own_rows": lambda A: A - own_rows(A, row_weights=np.ones(14)).truncate(3).toarray(),
    "own_inputs": lambda A: own_inputs(A, column_weights=GRADED).truncate(3),
    "as columns": lambda A: A - interpolative(A, rank=3).cur().toarray(),
}
GRADED = np.diag(np.linspace(1, 3, 9))


def _missed(A, U):
    return A - A[:, :3].astype(np.longdouble) @ U.astype(np.longdouble) @ A[:3]


@pytest.mark.parametrize("name", LOW_LEVEL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_low_level_functions_at_every_size(name, dtype, rng):
    X = random(14, 9, rng)
    expected = _relative(LOW_LEVEL[name](X.astype(dtype)), 0)
    for power in (-33, -22, 22, 37) if dtype is np.float32 else (-300, -165, 165, 307):
        A = (X * np.longdouble(10) ** power).astype(dtype)
        assert _relative(LOW_LEVEL[name](A), power) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", selection.SELECTORS)
def test_what_is_chosen_does_not_depend_on_the_size_of_a_basis(name, rng):
    choose_by = selection.SELECTORS[name].choose
    V, A = np.linalg.qr(rng.standard_normal((20, 4)))[0], random(20, 9, rng)
    expected = choose_by(V, 4, matrix=A).tolist()
    for power in (-300, -170, 170, 300):
        basis = V if name == "osinsky" else V * 10.0**power  # which projects on the basis
        assert choose_by(basis, 4, matrix=A * 10.0**-power).tolist() == expected


@pytest.mark.parametrize("power", [-200, 200])
def test_weights_of_any_size_for_all_ranks(power, rng):
    """Choices and factors do not depend on the size of weights; what would leave the range is refused."""
    A, G = random(14, 9, rng), GRADED * 10.0**power
    w = np.linspace(1, 2, 14)
    for function in (truncation.weighted_svd, own_rows):
        for large in ({"column_weights": G}, {"column_weights": np.diag(G)}, {"row_weights": w * 10.0**power}):
            at_one = {key: value / 10.0**power for key, value in large.items()}
            ours, theirs = (function(A, **given).truncate(3).toarray() for given in (large, at_one))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    found = own_inputs(A, column_weights=weights.diagonal(np.diag(G)), row_weights=w * 10.0**power)
    expected = own_inputs(A, column_weights=np.diag(GRADED), row_weights=w)
    np.testing.assert_allclose(found.truncate(4), expected.truncate(4), atol=1e-8)
    A = A.astype(np.float32)
    for function in (truncation.weighted_svd, own_rows, own_inputs):
        with pytest.raises(ValueError, match="`column_weights` has entries beyond the range of float32"):
            function(A, column_weights=G)
    with pytest.raises(ValueError, match="`row_weights` has entries beyond the range of float32"):
        truncation.weighted_svd(A, row_weights=w * 10.0**power)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("shape", [(2000, 2), (40, 3), (7, 30)])
def test_operators_of_the_least_numbers_are_not_zero(dtype, shape):
    """A product in which every term vanishes says nothing of the size of the operator."""
    A = np.full(shape, np.finfo(dtype).smallest_subnormal, dtype)
    for seed in range(3):
        result = interpolative(aslinearoperator(A), rank=1, rng=seed)
        assert frobenius(remainder(A, *result.factors)) <= result.certificate.value
        try:
            result = cur(aslinearoperator(A), rank=1, select="lupp", rng=seed)
        except NumericalError:
            continue
        assert frobenius(remainder(A, *result.factors)) <= result.certificate.value
    zero = deim_cur(aslinearoperator(np.zeros(shape, dtype)), rank=1)
    assert zero.certificate.value == 0.0


@pytest.mark.parametrize("make", [np.asarray, aslinearoperator, scipy.sparse.csr_array])
def test_tolerances_of_matrices_whose_norm_is_beyond_the_range(make, rng):
    A = rng.uniform(0.1, 1, (30, 20)) * np.finfo(float).max
    assert np.isinf(deim_cur(make(A), rank=2).certificate.scale)
    expected = cur(make(A / np.finfo(float).max), tol=0.3)
    found = cur(make(A), tol=0.3)
    assert found.rank == expected.rank
    assert found.certificate.relative == pytest.approx(expected.certificate.relative, rel=1e-3)


@pytest.mark.parametrize("size", [1e18, 1e-18])
def test_an_operator_that_looks_smaller_than_it_is(size):
    """The product that shows its size is nearly orthogonal to what it does."""
    x = np.random.default_rng(0).standard_normal((2, 1))
    v = np.array([[-x[1, 0], x[0, 0]]]) + 1e-3 * x.T
    A = (size * np.ones((2000, 1)) @ v / np.linalg.norm(v)).astype(np.float32)
    result = cur(aslinearoperator(A), rank=1)
    error = np.linalg.norm(A.astype(float) - result.toarray().astype(float))
    assert error <= result.certificate.value < 1e-3 * np.linalg.norm(A.astype(float))
