"""Numbers that double precision has no room for: long integers and extended precision."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import scipy.sparse

from cur import cur, deim_cur, interpolative, stream_cur
from tests.backends import to_numpy, use
from tests.families import frobenius, remainder, spectral

DRIVERS = {
    "deim_cur": lambda A: deim_cur(A, rank=5),
    "weighted": lambda A: deim_cur(A, rank=5, column_weights=np.ones(9)),
    "norm": lambda A: cur(A, rank=6, select="norm", norm=2),
    "interpolative": lambda A: interpolative(A, rank=5),
    "rows": lambda A: interpolative(A, rank=5, side="rows"),
    "stream_cur": lambda A: stream_cur(A, rank=5),
}
LIBRARIES = {
    "numpy": np.asarray,
    "csr": scipy.sparse.csr_array,
    "coo": scipy.sparse.coo_array,
    "dask": lambda A: importlib.import_module("dask.array").from_array(A, chunks=7),
}


def numbers(dtype, rng):
    """Few rows that come again and again, so that nothing but rounding is left of the matrix."""
    if np.dtype(dtype).kind in "iu":
        most = np.iinfo(dtype).max
        few = rng.integers(most // 2, most, (5, 9), dtype=dtype, endpoint=True)
    else:
        few = rng.standard_normal((5, 9)).astype(dtype) / np.longdouble(3)
        few = few * (1 + 1j / np.longdouble(7)) if np.dtype(dtype).kind == "c" else few
    return few[rng.integers(0, 5, 20)]


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["int64", "uint64", "longdouble", "clongdouble"])
def test_the_certificate_is_that_of_the_matrix_as_given(dtype, library, driver):
    for seed in range(4):
        A = numbers(dtype, np.random.default_rng(seed))
        result = DRIVERS[driver](LIBRARIES[library](A))
        factors = [to_numpy(f) for f in result.factors]
        size = spectral if result.certificate.norm == 2 else frobenius
        assert size(remainder(A, *factors)) <= result.certificate.value
        if driver != "norm":  # a stream by Pythagoras
            assert result.certificate.relative < (1e-6 if driver == "stream_cur" else 1e-13)
        pairs = (
            [(result.skeleton, A[:, result.chosen] if result.side == "columns" else A[result.chosen])]
            if hasattr(result, "skeleton")
            else [(result.C, A[:, result.columns]), (result.R, A[result.rows])]
        )
        for ours, theirs in pairs:
            ours = to_numpy(ours)
            assert ours.dtype == A.dtype
            np.testing.assert_array_equal(ours, theirs)
        other = result.interpolative() if hasattr(result, "U") else result.cur()
        assert np.isfinite(other.norm())
        assert result.folded().norm(2) == pytest.approx(result.norm(2))


def test_numbers_that_are_doubles_stay_doubles(rng):
    A = rng.integers(0, 9, (12, 8))
    for dtype in ("int64", "longdouble"):
        result = deim_cur(A.astype(dtype), rank=3)
        assert result.C.dtype == result.U.dtype == np.float64
        assert result.certificate == deim_cur(A.astype(np.float64), rank=3).certificate


@pytest.mark.filterwarnings("ignore::cur.RankWarning")
def test_tensors_multiply_numbers_of_one_dtype(rng):
    torch = importlib.import_module("torch")
    A = numbers("int64", rng)
    result = deim_cur(torch.tensor(A), rank=5)
    assert result.C.dtype == torch.float64
    assert frobenius(remainder(A, *(to_numpy(f) for f in result.factors))) <= result.certificate.value


def test_integers_that_single_precision_of_jax_rounds_are_refused(rng):
    A = rng.integers(2**24, 2**30, (12, 8)).astype(np.int32)
    with use("jax") as backend, pytest.raises(TypeError, match="`A` must hold integers that float32 holds"):
        deim_cur(backend.asarray(A), rank=3)
