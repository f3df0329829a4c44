"""Triangular factors of semidefinite matrices."""

from __future__ import annotations

import numpy as np
import pytest

from cur._lib.semidefinite import unit_lower


@pytest.mark.parametrize("n", [1, 5, 32, 33, 90])
@pytest.mark.parametrize("rank", ["full", "half", "zero"])
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_the_product_of_the_factors(n, rank, spread, rng):
    count = {"full": 2 * n, "half": max(n // 2, 1), "zero": 0}[rank]
    X = rng.standard_normal((n, count)) * np.exp(spread * rng.standard_normal(n))[:, None]
    X[n // 2] = 0
    G = X @ X.T
    L, pivots, missed = unit_lower(G)
    np.testing.assert_array_equal(L, np.tril(L))
    np.testing.assert_array_equal(np.diag(L), 1)
    assert (pivots >= 0).all()
    assert pivots[n // 2] == 0
    assert np.linalg.norm(L * pivots @ L.T - G) <= missed
    if rank != "half":  # there what is dropped is of the size of the roundoff of the largest entries
        assert missed <= 1e-13 * n * np.trace(G)
    live = min(count, n - 1) if n > 1 else 0
    assert np.count_nonzero(pivots) <= max(live, 0) + (0 if rank != "half" else n // 10)


def test_zero_pivots_are_zero(rng):
    x = rng.standard_normal(6)
    L, pivots, _ = unit_lower(np.outer(x, x))
    assert np.count_nonzero(pivots) == 1
    np.testing.assert_array_equal(L[:, 1:], np.eye(6)[:, 1:])


@pytest.mark.parametrize(
    "G", [np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 2.0], [2.0, 1.0]]), np.diag([1.0, -1.0]), -np.eye(3)]
)
def test_negative_eigenvalues_are_found(G):
    assert unit_lower(G) is None


def test_rounding_of_the_precision_it_was_computed_in_is_no_negative_eigenvalue(rng):
    X = rng.standard_normal((40, 10)).astype(np.float32)
    G = X @ X.T
    L, pivots, missed = unit_lower(G.astype(float), 2.0**-24)
    assert np.count_nonzero(pivots) == 10
    assert np.linalg.norm(L * pivots @ L.T - G) <= missed < 1e-3
