"""`tol` is kept, certified, and not by a wasteful rank."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from cur import NumericalError, cur, interpolative
from cur.bounds import sketch_factor
from tests.backends import to_numpy
from tests.families import FAMILIES, hilbert, kahan, lehmer, with_spectrum

KINDS = {
    "dense": np.asarray,
    "sparse": scipy.sparse.csr_array,
    "operator": scipy.sparse.linalg.aslinearoperator,
}
MATRICES = {
    "geometric": lambda rng: with_spectrum(120, 90, 0.8 ** np.arange(90), rng),
    "slow": lambda rng: with_spectrum(120, 90, np.arange(1.0, 91) ** -2.0, rng),
    "step": lambda rng: with_spectrum(120, 90, np.r_[np.ones(20), np.full(70, 1e-8)], rng),
    "hilbert": lambda rng: hilbert(120, 90),
    "lehmer": lambda rng: lehmer(120, 90),
    "kahan": lambda rng: kahan(90, 90),
    "deficient": lambda rng: FAMILIES["rank_deficient"](120, 90, rng),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("driver", [cur, interpolative])
def test_tolerance_is_kept(name, kind, driver, rng):
    A = MATRICES[name](rng)
    total = np.linalg.norm(A)
    for tol in (1e-2, 1e-4, 1e-6):
        for seed in range(3):
            result = driver(KINDS[kind](A), tol=tol, rng=seed)
            assert np.linalg.norm(A - to_numpy(result.toarray())) <= tol * total
            assert result.certificate.relative <= tol


def smallest_nested_rank(A, rows, columns, tol):
    """The smallest k for which the first k of these indices reach `tol`."""
    for k in range(1, len(rows) + 1):
        Q, P = np.linalg.qr(A[:, columns[:k]])[0], np.linalg.qr(A[rows[:k]].T)[0]
        if np.linalg.norm(A - Q @ (Q.T @ A @ P) @ P.T) <= tol * np.linalg.norm(A):
            return k
    raise AssertionError("not reached")


@pytest.mark.parametrize("name", ["geometric", "slow", "lehmer"])
@pytest.mark.parametrize("kind", KINDS)
def test_rank_is_not_wasted(name, kind, rng):
    A = MATRICES[name](rng)
    for tol in (1e-2, 1e-4):
        result = cur(KINDS[kind](A), tol=tol)
        least = smallest_nested_rank(A, result.rows, result.columns, tol)
        # the sketch of an operator inflates the error by up to a quarter, worth some ranks where decay is slow
        assert result.rank <= least + max(1, 0.03 * least) + (0 if kind != "operator" else 0.2 * least)


@pytest.mark.parametrize("select", ["qdeim", "osinsky", "lupp", "norm"])
def test_other_selectors_keep_it_too(select, rng):
    A = MATRICES["geometric"](rng)
    result = cur(A, tol=1e-3, select=select)
    assert np.linalg.norm(A - result.toarray()) <= 1e-3 * np.linalg.norm(A)
    if select in ("qdeim", "osinsky"):
        smaller = cur(A, rank=result.rank - 2, select=select)
        assert smaller.certificate.relative > 1e-3


@pytest.mark.parametrize("subspace", ["exact", "randomised"])
def test_in_the_2_norm(subspace, rng):
    A = MATRICES["slow"](rng)
    for tol in (1e-1, 1e-2, 1e-3):
        result = cur(A, tol=tol, norm=2, subspace=subspace)
        assert result.certificate.norm == 2
        assert np.linalg.norm(A - result.toarray(), 2) <= tol * np.linalg.norm(A, 2)
        assert result.rank <= cur(A, tol=tol / 3).rank


def test_zero_matrix_takes_rank_one():
    for kind in KINDS.values():
        result = cur(kind(np.zeros((8, 6))), tol=1e-3)
        assert result.rank == 1
        assert not to_numpy(result.toarray()).any()


def test_single_precision_keeps_what_it_can(rng):
    A = MATRICES["geometric"](rng).astype(np.float32)
    result = cur(A, tol=1e-2)
    assert np.linalg.norm(A.astype(float) - result.toarray()) <= 1e-2 * np.linalg.norm(A)
    with pytest.raises(NumericalError, match=r"`tol`=1e-09 cannot be certified in float32: at rank .* do not lower it"):
        cur(A, tol=1e-9)


@pytest.mark.parametrize("link", ["cross", "optimal"])
def test_either_core(link, rng):
    A = MATRICES["geometric"](rng)
    result = cur(A, tol=1e-3, link=link)
    assert np.linalg.norm(A - result.toarray()) <= 1e-3 * np.linalg.norm(A)


def test_every_library(backend, rng):
    A = with_spectrum(30, 24, 0.5 ** np.arange(24), rng)
    result = cur(backend.asarray(A), tol=1e-2)
    assert np.linalg.norm(A - to_numpy(result.toarray())) <= 1e-2 * np.linalg.norm(A)
    assert 5 <= result.rank <= 12


def test_a_tolerance_that_were_not_checked_would_be_missed(rng):
    """The estimate that others stop at, the first singular value left out, is not the error of the factorization."""
    A = MATRICES["slow"](rng)
    s = np.linalg.svd(A)[1]
    tol = 1e-3
    naive = int(np.argmax(s <= tol * s[0]))
    assert np.linalg.norm(A - cur(A, rank=naive).toarray()) > tol * np.linalg.norm(A)


def test_the_whole_search_fails_as_rarely_as_one_sketch(rng, monkeypatch):
    """The first certificate that passes is taken: trying again and again must not make a wrong one likelier."""
    shares = []

    def recorded(count, failure):
        shares.append(failure)
        return sketch_factor(count, failure)

    monkeypatch.setattr("cur._driver.certify.sketch_factor", recorded)
    A = with_spectrum(500, 450, 0.9 ** np.arange(450), rng)
    result = cur(scipy.sparse.linalg.aslinearoperator(A), tol=1e-2, failure_probability=1e-4)
    assert len(shares) > 1
    assert 2 * sum(shares) < 1e-4  # the norm of the matrix has as much
    assert result.certificate.failure_probability == 1e-4


@pytest.mark.parametrize("select", ["deim", "uniform", "norm", "lupp"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("driver", [cur, interpolative])
def test_a_tolerance_out_of_reach_says_why_and_what_to_do(select, dtype, driver, rng):
    """Nothing that is of no help: a wider dtype than double, the driver or the selector that failed."""
    A = with_spectrum(30, 30, 0.3 ** np.arange(30), rng).astype(dtype)
    if driver is interpolative and dtype in ("float64", "complex128"):
        assert driver(A, tol=1e-18, select=select).rank == 30  # with all columns nothing is left to round
        return
    with pytest.raises(NumericalError) as caught:
        driver(A, tol=1e-18, select=select)
    text = str(caught.value)
    assert text.startswith(f"`tol`=1e-18 cannot be certified in {dtype}: at rank ")
    assert "larger ranks do not lower it" in text
    assert "; use a larger `tol`" in text
    assert ("double precision" in text) == (dtype in ("float32", "complex64"))
    assert ("select='deim'" in text) == (select != "deim")
    assert ("`interpolative`" in text) == ("U divides by" in text) == (driver is cur)
