"""Nearest plane on a given grid: its loss, what blocks leave to each other, and the square of a weighted norm."""

from __future__ import annotations

import numpy as np
import pytest

from cur._lib.grid import Grid, nearest
from cur._lib.plane import Triangle, nearest_plane, square


def triangle(n: int, rng: np.random.Generator) -> Triangle:
    return Triangle(rng.uniform(0.1, 1, n), np.tril(rng.standard_normal((n, n)) / n, -1) + np.eye(n))


def product(E: np.ndarray, rows: Triangle, columns: Triangle) -> np.ndarray:
    K, L = (np.eye(len(side.pivots)) if side.lower is None else side.lower for side in (rows, columns))
    return np.sqrt(rows.pivots)[:, None] * (K.T @ E @ L) * np.sqrt(columns.pivots)


def grids(m: int, n: int, rng: np.random.Generator) -> list[Grid]:
    steps, zeros = rng.uniform(0.2, 0.5, (m, 2)), rng.integers(0, 16, (m, 2)).astype(float)
    return [Grid(steps, zeros, n // 2, 0, 15), Grid(steps, None, n // 2, -7, 7)]


@pytest.mark.parametrize("shape", [(1, 2), (5, 4), (48, 64), (49, 96), (97, 130), (150, 2), (3, 200)])
@pytest.mark.parametrize("sides", ["both", "rows", "columns", "neither"])
def test_the_loss_is_that_of_the_integers(shape, sides, rng):
    m, n = shape
    rows = triangle(m, rng) if sides in ("both", "rows") else Triangle(rng.uniform(0.1, 1, m))
    columns = triangle(n, rng) if sides in ("both", "columns") else Triangle(rng.uniform(0.1, 1, n))
    W = rng.standard_normal(shape)
    for grid in grids(m, n, rng):
        found = nearest_plane(W, grid, rows, columns)
        whole = slice(0, m), slice(0, n)
        steps, zeros = grid.part(*whole)
        M = product(W - grid.value(found.integers.astype(float), steps, zeros), rows, columns)
        assert found.loss == pytest.approx(np.sum(M * M))
        assert square(W - grid.value(found.integers.astype(float), steps, zeros), rows, columns) == pytest.approx(
            found.loss
        )
        half = np.sqrt(rows.pivots)[:, None] * np.sqrt(columns.pivots) * steps / 2
        beyond = np.count_nonzero(np.abs(M) > half * (1 + 1e-9))
        assert beyond == found.clipped
        assert found.integers.min() >= grid.low
        assert found.integers.max() <= grid.high
        if sides == "neither":
            np.testing.assert_array_equal(found.integers, nearest(W, grid)[0])
            assert found.clipped == nearest(W, grid)[1]


def test_the_bound_is_reached_in_the_middle_between_two_numbers(rng):
    """A smaller bound would be wrong."""
    rows, columns = Triangle(rng.uniform(0.1, 1, 6)), Triangle(rng.uniform(0.1, 1, 4))
    grid = Grid(np.full((6, 1), 0.5), None, 4, -7, 7)
    W = (rng.integers(-6, 6, (6, 4)) + 0.5) * 0.5
    found = nearest_plane(W, grid, rows, columns)
    assert found.clipped == 0
    assert found.loss == pytest.approx(0.25 * 0.5**2 * rows.pivots.sum() * columns.pivots.sum())


def test_numbers_that_are_rounded_once_more_are_fed_back(rng):
    rows, columns = triangle(60, rng), triangle(70, rng)
    W = rng.standard_normal((60, 70))
    steps = rng.uniform(0.02, 0.03, (60, 1)).astype(np.float32).astype(float)

    def single(X: np.ndarray) -> np.ndarray:
        return X.astype(np.float16).astype(float)

    grid = Grid(steps, None, 70, -127, 127, form=single)
    found = nearest_plane(W, grid, rows, columns)
    E = W - single(found.integers * steps)
    assert found.loss == pytest.approx(np.sum(product(E, rows, columns) ** 2))


def test_a_square_beyond_the_limit_is_not_computed_to_the_end(rng):
    rows, columns = triangle(20, rng), triangle(300, rng)
    E = rng.standard_normal((20, 300))
    whole = square(E, rows, columns)
    assert square(E, rows, columns, limit=whole * 1.01) == whole
    assert whole / 100 < square(E, rows, columns, limit=whole / 100) < whole
