from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from cur import NumericalError
from cur.weighted.inputs import own_inputs
from tests.backends import Backend, to_numpy


def moment(n: int, rng: np.random.Generator, condition: float = 1e3) -> np.ndarray[Any, Any]:
    X = rng.standard_normal((n, 2 * n)) * np.geomspace(1, condition**-0.5, n)[:, None]
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return Q @ X @ X.T @ Q.T


def error(A: Any, H: Any, G: Any, kept: Any, B: Any) -> float:
    D = A.copy()
    D[:, kept] -= B
    return float(np.trace(H @ D @ G @ D.T))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (1, 4), (4, 1), (3, 250)])
def test_every_count_is_what_the_curve_says(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    A, H, G = rng.standard_normal(shape), moment(shape[0], rng), moment(shape[1], rng)
    found = own_inputs(A, row_weights=H, column_weights=G)
    ridge = np.finfo(float).eps ** 0.5 * np.trace(G) / shape[1] / 2**0.5
    np.testing.assert_allclose(found.moment, G + ridge * np.eye(shape[1]), rtol=1e-9)
    G, scale = found.moment, found.square_errors[0]
    assert scale == pytest.approx(float(np.trace(H @ A @ G @ A.T)))
    assert (np.diff(found.square_errors) <= 0).all()
    for count in {1, (shape[1] + 1) // 2, shape[1]}:
        kept, B = found.kept(count), found.truncate(count)
        assert (np.diff(kept) > 0).all()
        assert found.square_errors[count] == pytest.approx(error(A, H, G, kept, B), abs=1e-9 * scale)
        # No other coefficients are better: those of least squares.
        other = B + 1e-3 * rng.standard_normal(B.shape)
        assert error(A, H, G, kept, other) > error(A, H, G, kept, B)


def test_with_independent_inputs_the_largest_columns_stay() -> None:
    A = np.diag([1.0, 5.0, 3.0, 4.0])
    found = own_inputs(A, column_weights=np.array([1.0, 1.0, 9.0, 0.25]))
    assert found.order.tolist() == [2, 1, 3, 0]  # 9, 5, 2, 1
    G = np.diagonal(found.moment)  # with the ridge
    shares = [9 * G[2], 25 * G[1], 16 * G[3], G[0]]
    np.testing.assert_allclose(found.square_errors, [*np.cumsum(shares[::-1])[::-1], 0], rtol=1e-12)
    np.testing.assert_allclose(G, [1, 1, 9, 0.25], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.truncate(2), A[:, [1, 2]], rtol=1e-12)


def test_it_is_nearly_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(10):
        A, H, G = rng.standard_normal((4, 10)), moment(4, rng), moment(10, rng)
        found = own_inputs(A, row_weights=H, column_weights=G)
        best = np.inf
        for kept in map(list, combinations(range(10), 6)):
            B = np.linalg.solve(G[np.ix_(kept, kept)], (A @ G)[:, kept].T).T
            best = min(best, error(A, H, G, kept, B))
        ratios.append(found.square_errors[6] / best)
    assert np.median(ratios) < 1.1
    assert max(ratios) < 3


def test_an_input_that_others_give_goes_first() -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((6, 100))
    X[2] = X[0] - 2 * X[5]
    found = own_inputs(100 * rng.standard_normal((3, 6)), column_weights=X @ X.T)
    assert found.order[-1] in (0, 2, 5)
    # What is left is the ridge on the input that went, and on those that give it.
    ridge = float(np.max(np.diagonal(found.moment) - np.sum(X**2, axis=1)))
    assert found.square_errors[5] < 10 * ridge * float(np.sum(found.matrix**2))


def test_moments_of_few_tokens() -> None:
    rng = np.random.default_rng(4)
    A, X = rng.standard_normal((20, 200)), rng.standard_normal((200, 50))
    G = X @ X.T
    found = own_inputs(A, column_weights=G)
    for count in (20, 40, 60):
        got = error(A, np.eye(20), G, found.kept(count), found.truncate(count))
        assert got == pytest.approx(found.square_errors[count], rel=1e-4, abs=1e-6 * found.square_errors[0])
    assert found.square_errors[60] < 1e-6 * found.square_errors[0] < found.square_errors[40]


def test_of_two_that_repeat_each_other_one_stays() -> None:
    rng = np.random.default_rng(5)
    Z = rng.standard_normal((150, 600))
    X = np.concatenate([Z, Z + 1e-4 * rng.standard_normal(Z.shape)])
    found = own_inputs(rng.standard_normal((40, 300)), column_weights=X @ X.T)
    assert sorted(found.kept(150) % 150) == list(range(150))
    assert found.square_errors[150] < 1e-6 * found.square_errors[0]


def test_inputs_that_never_count() -> None:
    A = np.arange(6.0).reshape(2, 3)
    found = own_inputs(A, column_weights=np.zeros(3))
    np.testing.assert_array_equal(found.square_errors, np.zeros(4))
    np.testing.assert_array_equal(found.truncate(2), A[:, :2])


def test_on_every_library(backend: Backend, rng: np.random.Generator) -> None:
    if not backend.is_dense:
        pytest.skip("not for matrices that are not dense")
    A, H, G = rng.standard_normal((4, 9)), moment(4, rng), moment(9, rng)
    expected = own_inputs(A, row_weights=H, column_weights=G)
    found = own_inputs(backend.asarray(A), row_weights=backend.companion(H), column_weights=backend.companion(G))
    np.testing.assert_array_equal(to_numpy(found.order), expected.order)
    tolerance = 1e-8 if backend.precise else 1e-2
    np.testing.assert_allclose(to_numpy(found.truncate(5)), expected.truncate(5), rtol=tolerance, atol=tolerance)


def test_a_count_out_of_range_and_a_weight_that_is_none() -> None:
    found = own_inputs(np.ones((2, 3)))
    with pytest.raises(ValueError, match="between 1 and 3"):
        found.kept(4)
    with pytest.raises(NumericalError, match="negative eigenvalue"):
        own_inputs(np.ones((2, 2)), column_weights=np.array([[1.0, 2.0], [2.0, 1.0]]))
