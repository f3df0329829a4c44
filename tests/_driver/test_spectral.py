"""Bounds of the 2-norm from products alone, and the certificates made of them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import cur
from cur._driver import spectral as _spectral
from cur._driver.spectral import norm_bounds
from tests.backends import to_numpy
from tests.families import FAMILIES, cast, random, with_spectrum


def bounds_of(X, *, failure=1e-6, seed=0):
    return norm_bounds(
        lambda V: X.conj().T @ (X @ V),
        X.shape[1],
        is_complex=np.iscomplexobj(X),
        failure=failure,
        rng=np.random.default_rng(seed),
    )


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FAMILIES)), st.sampled_from([(40, 30), (5, 60), (60, 1)]))
def test_the_norm_is_between_the_bounds(seed, family, shape):
    for size in (1.0, 1e-120, 1e120):
        X = size * FAMILIES[family](*shape, np.random.default_rng(seed))
        lower, upper = bounds_of(X, seed=seed)
        true = size * np.linalg.norm(X / size, 2)
        assert lower * (1 - 1e-12) <= true <= upper * (1 + 1e-12)
        assert upper <= _spectral.GAIN * lower * (1 + 1e-12)


@pytest.mark.parametrize("spectrum", [np.ones(800), 1 - np.arange(800) / 800, 1 / np.arange(1.0, 801)])
def test_flat_spectra_take_more_steps_and_end(spectrum):
    lower, upper = bounds_of(np.diag(spectrum))
    assert lower <= 1 + 1e-12 <= upper + 2e-12 <= _spectral.GAIN * 1.001


@pytest.mark.parametrize("failure", [0.5, 0.1])
def test_it_fails_as_often_as_it_says(failure, monkeypatch):
    """One start, and a direction that only luck finds: the worst that a matrix can be."""
    monkeypatch.setattr(_spectral, "STARTS", 1)
    squares = np.full(1000, 0.9998)
    squares[0] = 1.0
    failures = 0
    for seed in range(300):
        _, upper = norm_bounds(
            lambda V: squares[:, None] * V,
            1000,
            is_complex=False,
            failure=failure,
            rng=np.random.default_rng(seed),
        )
        failures += upper < 1 - 1e-12
    assert 0.5 * failure <= failures / 300 <= failure + 3 * np.sqrt(failure / 300)


def test_a_complex_start_is_needed_for_a_complex_matrix(rng):
    X = FAMILIES["complex_random"](50, 40, rng)
    lower, upper = bounds_of(X)
    assert lower <= np.linalg.norm(X, 2) * (1 + 1e-12) <= upper * (1 + 1e-12)


KINDS = {
    "sparse": scipy.sparse.csr_array,
    "operator": scipy.sparse.linalg.aslinearoperator,
    "numpy": np.asarray,
}


@pytest.mark.parametrize("family", ["random", "slow_decay", "geometric", "flat", "step", "outliers", "complex_random"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", ["deim", "norm"])
def test_certificates_in_the_2_norm_are_close_to_the_error(family, kind, select, rng):
    if kind == "operator" and select == "norm":
        pytest.skip("an operator shows no entries")
    A = FAMILIES[family](320, 290, rng)
    result = cur.cur(KINDS[kind](A), rank=12, norm=2, select=select)
    E = A - to_numpy(result.toarray())
    error, size = np.linalg.norm(E, 2), np.linalg.norm(A, 2)
    known = result.certificate
    assert error <= known.value <= 1.02 * error + 1e-11 * np.linalg.norm(A)
    assert 0.98 * size <= known.scale <= size * (1 + 1e-12)
    assert known.kind in ("probabilistic", "bound")
    assert known.failure_probability <= 1e-6
    assert (known.failure_probability > 0) == (known.kind == "probabilistic")
    assert known.value <= cur.cur(KINDS[kind](A), rank=12, select=select).certificate.value * (1 + 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_in_single_precision(dense, dtype, rng):
    A = cast(random(70, 300, rng) if dtype == "float32" else FAMILIES["complex_random"](70, 300, rng), dtype)
    result = cur.cur(dense.asarray(A), rank=10, norm=2, column_weights=dense.asarray(np.ones(300, dtype="float32")))
    error = np.linalg.norm(A.astype(np.complex128) - to_numpy(result.toarray()), 2)
    assert error <= result.certificate.value <= 1.05 * error


@pytest.mark.parametrize("kind", ["sparse", "operator"])
def test_tolerances_in_the_2_norm_cost_hardly_more_than_for_a_dense_matrix(kind, rng):
    A = with_spectrum(120, 90, 0.93 ** np.arange(90), rng)
    for tol in (0.3, 1e-2):
        result = cur.deim_cur(KINDS[kind](A), tol=tol, norm=2)
        assert np.linalg.norm(A - to_numpy(result.toarray()), 2) <= tol * np.linalg.norm(A, 2)
        assert result.rank <= cur.deim_cur(A, tol=tol, norm=2, subspace="randomised").rank + 3


@pytest.mark.parametrize("family", ["random", "step", "complex_random", "rank_deficient", "zero"])
@pytest.mark.parametrize("shape", [(300, 50), (40, 130)])
def test_streams_have_certificates_in_the_2_norm(family, shape, rng):
    A = FAMILIES[family](*shape, rng)
    result = cur.stream_cur([A[:13], A[13:]], rank=5 if family != "zero" else 1, norm=2)
    error, size = np.linalg.norm(A - result.toarray(), 2), np.linalg.norm(A, 2)
    known = result.certificate
    assert known.norm == 2
    assert error <= known.value <= 1.02 * error + 1e-11 * size
    assert 0.98 * size <= known.scale <= size * (1 + 1e-12)
    assert known.kind in ("probabilistic", "bound")
    assert known.failure_probability == (1e-6 if known.kind == "probabilistic" else 0)
