from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cur import interpolative
from cur.weighted.rows import own_rows
from cur.weighted.truncation import weighted_svd


def spd(n: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (Q * np.logspace(0, -3, n)) @ Q.T


def root(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values, Q = np.linalg.eigh(weights)
    return (Q * np.sqrt(values)) @ Q.T


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (4, 1), (1, 4)])
def test_every_rank_is_what_the_curve_says(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    A, H, G = rng.standard_normal(shape), spd(shape[0], rng), spd(shape[1], rng)
    left, right = root(H), root(G)
    found = own_rows(A, row_weights=H, column_weights=G)
    best = weighted_svd(A, row_weights=H, column_weights=G).square_errors
    scale = best[0]
    assert found.square_errors[0] == pytest.approx(scale)
    for rank in range(1, min(shape) + 1):
        result = found.truncate(rank)
        rows = np.asarray(result.chosen)
        np.testing.assert_array_equal(rows, found.order[:rank])
        np.testing.assert_array_equal(result.skeleton, A[rows])
        np.testing.assert_allclose(result.toarray()[rows], A[rows], atol=1e-12)
        error = np.linalg.norm(left @ (A - result.toarray()) @ right) ** 2
        assert found.square_errors[rank] == pytest.approx(error, abs=1e-10 * scale)
        assert error >= best[rank] - 1e-10 * scale
        # No other coefficients of these rows are better: those of least squares in the weighted space.
        X = A @ right @ np.linalg.pinv(A[rows] @ right)
        assert error <= np.linalg.norm(left @ (A - X @ A[rows]) @ right) ** 2 + 1e-10 * scale


def test_the_weights_choose_the_rows() -> None:
    rng = np.random.default_rng(1)
    A = rng.standard_normal((10, 6))
    heavy = np.ones(10)
    heavy[[3, 8]] = 1e4
    assert set(own_rows(A, row_weights=heavy).order[:2].tolist()) == {3, 8}


def test_it_is_as_good_as_the_driver_for_one_rank() -> None:
    rng = np.random.default_rng(2)
    errors = []
    for _ in range(10):
        A, H, G = rng.standard_normal((30, 20)), spd(30, rng), spd(20, rng)
        one = own_rows(A, row_weights=H, column_weights=G).square_errors[8]
        other = interpolative(A, rank=8, side="rows", row_weights=H, column_weights=G)
        errors.append(one / np.linalg.norm(root(H) @ (A - other.toarray()) @ root(G)) ** 2)
    assert np.exp(np.mean(np.log(errors))) < 1.25


def test_a_matrix_of_low_rank_is_kept_exactly() -> None:
    rng = np.random.default_rng(3)
    A = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 9))
    found = own_rows(A)
    assert found.square_errors[3] <= 1e-20 * found.square_errors[0]
    for rank in (3, 5, 9):
        np.testing.assert_allclose(found.truncate(rank).toarray(), A, atol=1e-10)


def test_torch_tensors_stay_tensors() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    A, G = rng.standard_normal((9, 6)), spd(6, rng)
    expected = own_rows(A, column_weights=G)
    found = own_rows(torch.as_tensor(A), column_weights=torch.as_tensor(G))
    assert found.order.tolist() == expected.order.tolist()
    np.testing.assert_allclose(found.truncate(4).toarray().numpy(), expected.truncate(4).toarray(), atol=1e-10)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="`rank` must be between 1 and 2"):
        own_rows(np.eye(2)).truncate(0)
    with pytest.raises(ValueError, match="`A` must be finite"):
        own_rows(np.array([[1.0, np.nan]]))
