from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cur import interpolative, weights
from cur.weighted.truncation import square_errors, weighted_svd

SHAPES = [(12, 7), (7, 12), (9, 9), (5, 1), (1, 5)]


def spd(n: int, rng: np.random.Generator, spread: float = 3.0) -> np.ndarray[Any, Any]:
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (Q * np.logspace(0, -spread, n)) @ Q.T


def root(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values, Q = np.linalg.eigh(weights)
    return (Q * np.sqrt(values)) @ Q.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["neither", "rows", "columns", "both"])
def test_no_matrix_of_the_same_rank_is_nearer(shape: tuple[int, int], sides: str) -> None:
    rng = np.random.default_rng(1)
    A = rng.standard_normal(shape)
    H = spd(shape[0], rng) if sides in ("rows", "both") else None
    G = spd(shape[1], rng) if sides in ("columns", "both") else None
    left = np.eye(shape[0]) if H is None else root(H)
    right = np.eye(shape[1]) if G is None else root(G)
    s = np.linalg.svd(left @ A @ right, compute_uv=False)
    found = weighted_svd(A, row_weights=H, column_weights=G)
    assert found.shape == shape
    np.testing.assert_allclose(found.singular_values, s, atol=1e-7 * s[0])
    for rank in range(1, min(shape) + 1):
        B = found.truncate(rank).toarray()
        assert np.linalg.matrix_rank(B) <= rank
        # Eckart and Young: the tail of the singular values is the least possible, and it is attained.
        error = np.linalg.norm(left @ (A - B) @ right)
        tail = np.sqrt((s[rank:] ** 2).sum())
        assert error == pytest.approx(tail, abs=1e-7 * s[0])
        assert found.square_errors[rank] == pytest.approx(tail**2, abs=1e-13 * s[0] ** 2)
    alone = square_errors(A, row_weights=H, column_weights=G)
    np.testing.assert_allclose(alone, found.square_errors, atol=1e-13 * s[0] ** 2)
    np.testing.assert_allclose(found.truncate(min(shape)).toarray(), A, atol=1e-10)


def test_it_beats_the_plain_one_in_the_weighted_norm_and_loses_in_the_plain_one() -> None:
    rng = np.random.default_rng(2)
    A, H, G = rng.standard_normal((20, 15)), spd(20, rng), spd(15, rng)
    weighted = weighted_svd(A, row_weights=H, column_weights=G).truncate(5).toarray()
    plain = weighted_svd(A).truncate(5).toarray()

    def error(B: np.ndarray[Any, Any]) -> float:
        return float(np.linalg.norm(root(H) @ (A - B) @ root(G)))

    assert error(weighted) < 0.8 * error(plain)
    assert np.linalg.norm(A - plain) < 0.95 * np.linalg.norm(A - weighted)


def test_own_rows_cannot_do_better() -> None:
    rng = np.random.default_rng(3)
    A, H, G = rng.standard_normal((20, 15)), spd(20, rng), spd(15, rng)
    best = weighted_svd(A, row_weights=H, column_weights=G).square_errors
    for rank in (1, 4, 9):
        own = interpolative(A, rank=rank, side="rows", row_weights=H, column_weights=G)
        error = np.linalg.norm(root(H) @ (A - own.toarray()) @ root(G))
        assert best[rank] <= error**2 * (1 + 1e-12)


def test_vectors_and_weights_stand_for_matrices() -> None:
    rng = np.random.default_rng(4)
    A, h, g = rng.standard_normal((8, 6)), rng.random(8) + 0.1, rng.random(6) + 0.1
    expected = weighted_svd(A, row_weights=np.diag(h), column_weights=np.diag(g)).truncate(3).toarray()
    pairs: list[tuple[Any, Any]] = [
        (h, g),
        (weights.diagonal(h), weights.matrix(np.diag(g))),
        (weights.matrix(np.diag(h)), weights.diagonal(g)),
    ]
    for H, G in pairs:
        found = weighted_svd(A, row_weights=H, column_weights=G).truncate(3).toarray()
        np.testing.assert_allclose(found, expected, atol=1e-10)
        turned = weighted_svd(A.T, row_weights=G, column_weights=H).truncate(3).toarray()
        np.testing.assert_allclose(turned, expected.T, atol=1e-10)


def test_a_direction_of_weight_zero_costs_nothing() -> None:
    rng = np.random.default_rng(5)
    A, g = rng.standard_normal((6, 4)), np.array([1.0, 0.0, 2.0, 0.0])
    found = weighted_svd(A, column_weights=g)
    np.testing.assert_allclose(found.square_errors[2:], 0, atol=1e-12)
    B = found.truncate(2).toarray()
    np.testing.assert_allclose(B[:, g > 0], A[:, g > 0], atol=1e-10)
    assert not B[:, g == 0].any()


def test_complex_matrices() -> None:
    rng = np.random.default_rng(6)
    A = rng.standard_normal((7, 5)) + 1j * rng.standard_normal((7, 5))
    F = rng.standard_normal((5, 5)) + 1j * rng.standard_normal((5, 5))
    found = weighted_svd(A, column_weights=F @ F.conj().T)
    s = np.linalg.svd(A @ F, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, s, atol=1e-6 * s[0])
    np.testing.assert_allclose(found.truncate(5).toarray(), A, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_tensors_stay_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    A, H = rng.standard_normal((9, 6)), spd(9, rng)
    tensors = (torch.as_tensor(X, dtype=getattr(torch, dtype)) for X in (A, H))
    W, weights = tensors
    B = weighted_svd(W.requires_grad_(True), row_weights=weights).truncate(3).toarray()
    assert B.dtype == W.dtype
    assert not B.requires_grad
    expected = weighted_svd(A, row_weights=H).truncate(3).toarray()
    np.testing.assert_allclose(B.numpy(), expected, atol=1e-3 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"row_weights": np.eye(3)}, r"`row_weights` must have one weight per row of `A`, shape \(4, 4\)"),
        ({"column_weights": np.eye(4)}, "`column_weights` must have one weight per column of `A`, 3"),
        ({"row_weights": np.full((4, 4), np.nan)}, "`row_weights` must be finite"),
        ({"row_weights": np.triu(np.ones((4, 4)))}, "`row_weights` must be symmetric"),
        ({"row_weights": -np.eye(4)}, "`row_weights` must have no negative eigenvalue"),
        ({"column_weights": -np.eye(3)}, "`column_weights` must have no negative eigenvalue"),
    ],
)
def test_weights_that_are_none(weights: dict[str, Any], message: str) -> None:
    A = np.arange(12.0).reshape(4, 3) ** 2
    with pytest.raises(ValueError, match=message):
        weighted_svd(A, **weights)


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="`A` must be finite"):
        weighted_svd(np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match="`rank` must be between 1 and 2"):
        weighted_svd(np.eye(2)).truncate(3)
    scipy_sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match="`A` must be a dense array"):
        weighted_svd(scipy_sparse.eye_array(3))
