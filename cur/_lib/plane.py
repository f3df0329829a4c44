"""Nearest plane of a lattice under weights of rows and columns, by blocks and wavefronts of array products.

With unit lower triangular `K` and `L` the loss of ``E = W - Q`` is ``|K^T E L|^2``, entry by entry times the pivots of
both weights. Entry (i, j) of ``K^T E L`` depends on entries of `E` that lie below and to the right, so it is made small
by ``Q_ij`` once these are known (the page on the mathematics has the derivation). Blocks on one antidiagonal of the
blocks know nothing of each other, nor do entries on one antidiagonal within a block: the steps that have to follow one
another are about twice as many as rows and columns together, and each is a few operations on short arrays. What
blocks owe each other are matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cur._lib.grid import Grid, integers_near
from cur._lib.threads import one_thread

__all__ = ["Found", "Triangle", "nearest_plane", "square"]

Matrix = np.ndarray[Any, Any]

BLOCK = 48
"""Side of a block: the work within one grows with it, and products between small blocks are slow. Seconds for
1536 x 576 on one core: 0.55 with 16, 0.37 with 32, 0.35 with 48, 0.37 with 64."""

STRIP = 128
"""Rows or columns at once of a product with a triangle, whose zeros are left out but for those within a strip."""

PANEL = 64
"""Columns at once where rows do not depend on each other."""


@dataclass(frozen=True, eq=False)
class Triangle:
    """A weight ``L diag(pivots) L^T`` with a unit lower triangular `L`.

    Attributes
    ----------
    pivots : array, shape (n,)
        The pivots, none of them negative.
    lower : array or None, shape (n, n)
        `L`; None for the identity.
    """

    pivots: Matrix
    lower: Matrix | None = None


@dataclass
class Found:
    """Integers, and what they lose.

    Attributes
    ----------
    integers : array of int16, shape (m, n)
        The integers of the grid that were chosen.
    loss : float
        The square of the weighted error, as it follows from the differences that were rounded.
    clipped : int
        How many entries the range of the grid moved away from their nearest integer.
    """

    integers: Matrix
    loss: float = 0.0
    clipped: int = 0

    def put(self, at: tuple[slice, slice], wanted: Matrix, target: Matrix, value: Matrix, weight: Matrix) -> None:
        """Record a block.

        Parameters
        ----------
        at : tuple of slice
            Where the block lies.
        wanted : array
            Integers before they are brought into the range of the grid.
        target, value : array
            What was to be rounded, and what it was rounded to.
        weight : array
            The product of the pivots of row and column.
        """
        self.integers[at] = wanted
        self.loss += float(np.sum(weight * (target - value) ** 2))


def square(E: Matrix, rows: Triangle, columns: Triangle, limit: float = math.inf) -> float:
    """Return the square of the weighted norm of a matrix, by products with the triangles.

    Parameters
    ----------
    E : array, shape (m, n)
        The matrix, in double precision.
    rows, columns : Triangle
        The weights of rows and columns.
    limit : float
        A square beyond which no more than that matters.

    Returns
    -------
    float
        The square, or what there is of it once it is larger than `limit`.
    """
    m, n = E.shape
    total = 0.0
    # the first strips have the largest pivots
    for start in range(0, n, STRIP):
        at = slice(start, min(start + STRIP, n))
        X = E[:, at] if columns.lower is None else E[:, start:] @ columns.lower[start:, at]
        for top in range(0, m, STRIP) if rows.lower is not None else (0,):
            band = slice(top, min(top + STRIP, m) if rows.lower is not None else m)
            Y = X[band] if rows.lower is None else rows.lower[top:, band].T @ X[top:]
            total += float(rows.pivots[band] @ (Y * Y) @ columns.pivots[at])
        if total > limit:
            break
    return total


def nearest_plane(W: Matrix, grid: Grid, rows: Triangle, columns: Triangle) -> Found:
    """Round a matrix to a grid, each entry with what later ones of its row and column leave.

    Parameters
    ----------
    W : array, shape (m, n)
        The matrix, in double precision.
    grid : Grid
        The grid that is rounded to.
    rows, columns : Triangle
        The weights of rows and columns.

    Returns
    -------
    Found
        The integers, their loss, and how many were brought into the range.
    """
    with one_thread():
        if rows.lower is None:
            return _columns(W, grid, rows.pivots, columns)
        if columns.lower is None:
            found = _columns(W.T, replace(grid, turned=not grid.turned), columns.pivots, rows)
            return replace(found, integers=np.ascontiguousarray(found.integers.T))
        return _both(W, grid, rows, columns)


def _columns(W: Matrix, grid: Grid, weights: Matrix, columns: Triangle) -> Found:
    """Round where rows do not depend on each other: column by column, from the last, all rows at once."""
    m, n = W.shape
    found = Found(np.empty((m, n), dtype=np.int16))
    L = columns.lower
    E = np.empty((0 if L is None else n, m))
    for stop in range(n, 0, -PANEL):
        start = max(stop - PANEL, 0)
        at = slice(0, m), slice(start, stop)
        w = np.ascontiguousarray(W[at].T)
        steps, zeros = (None if X is None else np.ascontiguousarray(X.T) for X in grid.part(*at))
        assert steps is not None
        if L is None:
            target = w
            q = integers_near(target, steps, zeros)
        else:
            target = w + L[stop:, start:stop].T @ E[stop:]
            inside = np.ascontiguousarray(L[start:stop, start:stop].T)
            errors = E[start:stop]
            q = np.empty_like(w)
            for j in range(stop - start - 1, -1, -1):
                target[j] += inside[j, j + 1 :] @ errors[j + 1 :]
                z = None if zeros is None else zeros[j]
                q[j] = integers_near(target[j], steps[j], z)
                errors[j] = w[j] - grid.value(q[j], steps[j], z)
        value = grid.value(q, steps, zeros)
        kept = np.clip(q, grid.low, grid.high)
        found.clipped += int(np.count_nonzero(kept != q))
        weight = columns.pivots[start:stop, None] * weights[None, :]
        found.put(at, kept.T, target, value, weight)
    return found


def _both(W: Matrix, grid: Grid, rows: Triangle, columns: Triangle) -> Found:
    """Round where rows and columns depend on each other: antidiagonal by antidiagonal of blocks, from the last."""
    m, n = W.shape
    K, L = (np.tril(np.asarray(side.lower), -1) for side in (rows, columns))
    found = Found(np.empty((m, n), dtype=np.int16))
    E, V = np.empty((m, n)), np.empty((m, n))  # V = E L
    bands, strips = _pieces(m), _pieces(n)
    for far in range(len(bands) + len(strips) - 1):
        first = max(0, far - len(strips) + 1)
        places = [(bands[b], strips[far - b]) for b in range(first, min(far + 1, len(bands)))]
        wave = Wave(places, W, grid, K, L)
        for p, (at, (i, j)) in enumerate(zip(places, wave.inside, strict=True)):
            below, right = slice(at[0].stop, m), slice(at[1].stop, n)
            wave.row_part[p, i, j] = E[at[0], right] @ L[right, at[1]]
            wave.rest[p, j, i] += V[below, at[1]].T @ K[below, at[0]]
        wave.run(grid)
        target = wave.row_part + wave.rest.transpose(0, 2, 1)
        value = grid.value(wave.q, wave.steps, wave.zeros)
        kept = np.clip(wave.q, grid.low, grid.high)
        found.clipped += int(np.count_nonzero(kept != wave.q))
        for p, (at, (i, j)) in enumerate(zip(places, wave.inside, strict=True)):
            E[at] = W[at] - value[p, i, j]
            V[at] = wave.row_part[p, i, j] + E[at]
            weight = rows.pivots[at[0], None] * columns.pivots[None, at[1]]
            found.put(at, kept[p, i, j], target[p, i, j], value[p, i, j], weight)
    return found


def _pieces(size: int) -> list[slice]:
    """Cut a range into pieces of the length of a block, from the end."""
    return [slice(max(stop - BLOCK, 0), stop) for stop in range(size, 0, -BLOCK)]


class Wave:
    """Blocks that do not depend on each other, rounded together, antidiagonal by antidiagonal from the last.

    A block at the edge may be smaller: it lies at the end of its place, and zeros before it round to zero.
    """

    def __init__(self, places: list[tuple[slice, slice]], W: Matrix, grid: Grid, K: Matrix, L: Matrix) -> None:
        count = len(places)
        height = max(rows.stop - rows.start for rows, _ in places)
        width = max(columns.stop - columns.start for _, columns in places)
        self.shape = height, width
        self.W = np.zeros((count, height, width))
        self.q = np.zeros_like(self.W)
        self.steps = np.ones_like(self.W)
        self.zeros = None if grid.zeros is None else np.zeros_like(self.W)
        # what later columns add to a row, and the matrix with what later rows add to a column, transposed
        self.row_part = np.zeros_like(self.W)
        self.rest = np.zeros((count, width, height))
        # the triangles without their diagonals, the last row first: as entries of an antidiagonal need them
        self.K = np.zeros((count, height, height))
        self.L = np.zeros((count, width, width))
        self.inside = []
        for p, (rows, columns) in enumerate(places):
            i = slice(height - (rows.stop - rows.start), height)
            j = slice(width - (columns.stop - columns.start), width)
            self.inside.append((i, j))
            self.W[p, i, j] = W[rows, columns]
            self.rest[p, j, i] = W[rows, columns].T
            steps, zeros = grid.part(rows, columns)
            self.steps[p, i, j] = steps
            if self.zeros is not None:
                self.zeros[p, i, j] = zeros
            self.K[p, : i.stop - i.start, i] = K[rows, rows][::-1]
            self.L[p, : j.stop - j.start, j] = L[columns, columns][::-1]

    def run(self, grid: Grid) -> None:
        """Round all entries.

        Parameters
        ----------
        grid : Grid
            The grid that is rounded to.
        """
        height, width = self.shape
        count = len(self.W)
        down, across = max(height - 1, 1), max(width - 1, 1)
        W, all_steps, row_part, q = (X.reshape(count, -1) for X in (self.W, self.steps, self.row_part, self.q))
        all_zeros = None if self.zeros is None else self.zeros.reshape(count, -1)
        rest = self.rest.reshape(count, -1)
        for k in range(height + width - 2, -1, -1):
            # rows top to bottom of the antidiagonal i + j = k, columns left to right
            top, bottom = max(0, k - width + 1), min(height - 1, k)
            left, right = k - bottom, k - top
            at = slice(k + top * (width - 1), k + bottom * (width - 1) + 1, across)
            turned = slice(k + left * (height - 1), k + right * (height - 1) + 1, down)
            steps, zeros = all_steps[:, at], None if all_zeros is None else all_zeros[:, at]
            part = row_part[:, at]
            wanted = integers_near(part + rest[:, turned][:, ::-1], steps, zeros)
            q[:, at] = wanted
            error = W[:, at] - grid.value(wanted, steps, zeros)
            if right:
                rows_of_L = self.L[:, width - 1 - right : width - left, :right]
                self.row_part[:, top : bottom + 1, :right] += error[:, :, None] * rows_of_L
            if bottom:
                rows_of_K = self.K[:, height - 1 - bottom : height - top, :bottom]
                self.rest[:, left : right + 1, :bottom] += (part + error)[:, ::-1, None] * rows_of_K
