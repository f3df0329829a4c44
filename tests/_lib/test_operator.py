"""Operators: their precision, and whether their adjoint is one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import cur
from cur import subspace
from cur._lib.operator import CheckedOperator, checked
from tests.families import frobenius, geometric, random, remainder

DTYPES = ("float32", "float64", "complex64", "complex128")
DRIVERS = {
    "deim_cur": lambda op: cur.deim_cur(op, rank=3),
    "tol": lambda op: cur.deim_cur(op, tol=1e-2),
    "lupp": lambda op: cur.cur(op, rank=3, select="lupp"),
    "uniform": lambda op: cur.cur(op, rank=3, select="uniform"),
    "lanczos": lambda op: cur.cur(op, rank=3, subspace="lanczos"),
    "cross": lambda op: cur.cur(op, rank=3, link="cross"),
    "weighted": lambda op: cur.cur(op, rank=3, column_weights=np.linspace(0.1, 1, op.shape[1])),
    "interpolative": lambda op: cur.interpolative(op, rank=3),
    "interpolative rows": lambda op: cur.interpolative(op, rank=3, side="rows"),
    "select": lambda op: cur.select(op, rank=3, select="deim"),
    "subspace": lambda op: subspace.randomised(op, 3),
}


def matrix(m, n, dtype, rng):
    A = geometric(m, n, rng)
    return (A + 0.5j * geometric(m, n, rng) if "complex" in dtype else A).astype(dtype)


def operator(A, adjoint=None, dtype=None):
    adjoint = A.conj().T if adjoint is None else adjoint
    return LinearOperator(A.shape, matvec=lambda x: A @ x, rmatvec=lambda y: adjoint @ y, dtype=dtype or A.dtype)


WRONG = {
    "a factor": lambda A: 0.9 * A.conj().T,
    "a sign": lambda A: -A.conj().T,
    "a conjugate": lambda A: A.T,
    "nothing": lambda A: 0 * A.conj().T,
    "another matrix": lambda A: A.conj().T[::-1],
    "a shift": lambda A: A.conj().T + 0.1 * abs(A).max(),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_a_wrong_adjoint_is_noticed(driver, dtype, fault, scale, rng):
    if fault == "a conjugate" and "complex" not in dtype:
        pytest.skip("real matrices are their own conjugates")
    A = (matrix(41, 23, dtype, rng) * scale).astype(dtype)
    with pytest.raises(ValueError, match=r"`A` must have the adjoint of its own products.*missing factor or conj"):
        DRIVERS[driver](operator(A, WRONG[fault](A).astype(dtype)))


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_missing_adjoint_is_named(driver, rng):
    A = random(30, 20, rng)
    with pytest.raises(TypeError, match=r"`A` must have an adjoint.*has none; give it rmatvec"):
        DRIVERS[driver](LinearOperator(A.shape, matvec=lambda x: A @ x, dtype=float))


def test_importance_is_checked_as_well(rng):
    A = random(30, 20, rng)
    with pytest.raises(ValueError, match="`importance` must have the adjoint of its own products"):
        cur.cur(operator(A), rank=2, importance=operator(A, 1.1 * A.T))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 4), (400, 250), (3000, 40)])
@pytest.mark.parametrize("kind", ["plain", "centred", "shifted", "solved", "sparse"])
def test_honest_operators_pass(dtype, shape, kind, rng):
    """With the rounding that real ones have: cancellation of a thousandfold in single precision, and of a million in
    double, or inner solutions of a few digits less than the dtype has."""
    m, n = shape
    single = np.finfo(dtype).bits == 32
    A = matrix(m, n, dtype, rng)
    if kind == "plain":
        op = operator(A)
    elif kind == "centred":  # principal components of data with a large mean
        mean = (1e3 if single else 1e6) * np.abs(A).max() * np.ones(n, dtype)
        data = A + mean
        mean = data.mean(axis=0)
        op = LinearOperator(
            A.shape,
            matvec=lambda x: data @ x.ravel() - np.ones(m, dtype) * (mean @ x.ravel()),
            rmatvec=lambda y: data.conj().T @ y.ravel() - mean.conj() * y.sum(),
            dtype=dtype,
        )
    elif kind == "shifted":
        shift = A.dtype.type((1e2 if single else 1e5) * np.linalg.norm(A, 2))
        E = np.eye(m, n, dtype=dtype)
        both = A + shift * E
        op = LinearOperator(
            A.shape,
            matvec=lambda x: both @ x - shift * (E @ x),
            rmatvec=lambda y: both.conj().T @ y - shift * (E.T @ y),
            dtype=dtype,
        )
    elif kind == "solved":
        noise = np.finfo(dtype).eps * 100
        op = LinearOperator(
            A.shape,
            matvec=lambda x: (A @ x.ravel()) * (1 + noise * rng.standard_normal(m)).astype(dtype),
            rmatvec=lambda y: (A.conj().T @ y.ravel()) * (1 + noise * rng.standard_normal(n)).astype(dtype),
            dtype=dtype,
        )
    else:
        op = aslinearoperator(scipy.sparse.csr_array(A))
    for seed in range(5):
        Q = np.linalg.qr(random(m, min(m, n, 12), np.random.default_rng(seed)).astype(dtype))[0]
        found = checked(op)
        found.rmatmat(Q)
        found.rmatmat(
            np.linalg.qr(np.asarray(op @ random(n, min(m, n, 3), np.random.default_rng(seed)).astype(dtype)))[0]
        )
        found.rmatvec(random(m, 1, np.random.default_rng(seed))[:, 0].astype(dtype))
        found.H.matvec(np.eye(m, 1, dtype=dtype)[:, 0])


@pytest.mark.parametrize("driver", DRIVERS)
def test_checking_costs_one_product(driver, rng):
    A = random(60, 40, rng)
    columns = {"forward": 0, "adjoint": 0}

    def counted(name, M):
        def multiply(X):
            columns[name] += X.shape[1] if X.ndim == 2 else 1
            return M @ X

        return multiply

    op = LinearOperator(
        A.shape,
        matvec=counted("forward", A),
        rmatvec=counted("adjoint", A.T),
        matmat=counted("forward", A),
        rmatmat=counted("adjoint", A.T),
        dtype=float,
    )
    DRIVERS[driver](op)
    with_check = dict(columns)

    class Unchecked(CheckedOperator):
        def __init__(self, operator):
            super(CheckedOperator, self).__init__(operator.dtype, operator.shape)
            self.operator, self.name = operator, "A"

        def _compare(self, Y, Z):
            pass

    columns.update(forward=0, adjoint=0)
    DRIVERS[driver](Unchecked(op))
    assert with_check["forward"] <= columns["forward"] + 1
    assert with_check["adjoint"] == columns["adjoint"]


@pytest.mark.parametrize("declared", ["bool", "int8", "int64", "uint16", "float16", "longdouble", "clongdouble"])
@pytest.mark.parametrize("as_importance", [False, True])
def test_every_declared_dtype(declared, as_importance, rng):
    A = rng.integers(0, 2, (20, 12)).astype(declared)
    op = aslinearoperator(A)
    if as_importance:
        like = (random(20, 12, rng) * (1 + 1j)) if declared == "clongdouble" else random(20, 12, rng).astype(np.float32)
        result, A = cur.cur(aslinearoperator(like), rank=4, importance=op), like
    else:
        result = cur.cur(op, rank=4)
    assert frobenius(remainder(A, *result.factors)) <= result.certificate.value


@pytest.mark.parametrize(
    ("declared", "given", "found"),
    [("float64", "float32", "float32"), ("float32", "float64", "float32"), ("float64", "complex128", "complex128")],
)
def test_products_decide_where_the_declared_dtype_promises_more(declared, given, found, rng):
    """A certificate for double precision would be false for products in single."""
    A = matrix(30, 20, given, rng)
    op = LinearOperator(
        A.shape,
        matvec=lambda x: A @ x.astype(given),
        rmatvec=lambda y: A.conj().T @ y.astype(given),
        dtype=declared,
    )
    result = cur.deim_cur(op, rank=8)
    assert result.certificate.dtype == found
    assert frobenius(remainder(A, *result.factors)) <= result.certificate.value


def test_products_of_half_precision_are_refused(rng):
    A = random(30, 20, rng).astype(np.float16)
    op = LinearOperator(A.shape, matvec=lambda x: A @ x.astype(A.dtype), dtype=A.dtype)
    with pytest.raises(TypeError, match="`A` must have products of single precision at least; this float16"):
        cur.deim_cur(op, rank=2)


def test_what_is_made_of_a_checked_operator_is_checked_once(rng):
    A = checked(aslinearoperator(random(12, 9, rng)))
    for made in (A, A.H, 2.0 * A, aslinearoperator(np.eye(12)) @ A, A + A):
        assert checked(made) is made


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.float64])
def test_operators_of_subnormal_numbers_are_believed(dtype, rng):
    """Below the normal numbers rounding is absolute: both products are right, and differ."""
    info = np.finfo(dtype)
    for peak in (8, 64, 1024, 1 / float(info.eps)):
        A = rng.standard_normal((50, 30))
        A = (A / np.abs(A).max() * peak).astype(dtype) * info.smallest_subnormal
        op = scipy.sparse.linalg.aslinearoperator(A)
        made = checked(op)
        made.rmatmat(np.eye(50, dtype=dtype))
        made.rmatmat(rng.standard_normal((50, 3)).astype(dtype))
