"""Grids: the numbers that integers of a few bits stand for, with a step for each group of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Grid", "integers_near", "nearest"]

Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers ``(q - zero) step`` for integers `q` in a range.

    Attributes
    ----------
    steps : array, shape (m, g)
        The step of each group of a row, positive.
    zeros : array or None, shape (m, g)
        The integers that stand for 0, as floating-point numbers; None where all are 0.
    group : int
        The length of a group along the rows.
    low, high : int
        The range of integers.
    form : callable or None
        What rounds the numbers to those that are used; None where they are exact.
    turned : bool
        Whether the grid is that of the transposed matrix.
    """

    steps: Matrix
    zeros: Matrix | None
    group: int
    low: int
    high: int
    form: Callable[[Matrix], Matrix] | None = None
    turned: bool = False

    def part(self, rows: slice, columns: slice) -> tuple[Matrix, Matrix | None]:
        """Return step and zero of each entry of a block.

        Parameters
        ----------
        rows, columns : slice
            Where the block lies, with both ends.

        Returns
        -------
        steps : array
        zeros : array or None
        """
        if self.turned:
            rows, columns = columns, rows
        owner = np.arange(columns.start, columns.stop) // self.group
        parts = [None if X is None else X[rows][:, owner] for X in (self.steps, self.zeros)]
        steps, zeros = (X.T if self.turned and X is not None else X for X in parts)
        assert steps is not None
        return steps, zeros

    def equals(self, other: Grid) -> bool:
        """Tell whether another grid of this matrix has the same steps and zeros.

        Parameters
        ----------
        other : Grid
            The other grid, with the same range and groups.

        Returns
        -------
        bool
            Whether all numbers agree.
        """
        pairs = ((self.steps, other.steps), (self.zeros, other.zeros))
        return all(X is Y or np.array_equal(np.asarray(X), np.asarray(Y)) for X, Y in pairs)

    def value(self, integers: Matrix, steps: Matrix, zeros: Matrix | None) -> Matrix:
        """Return the numbers that integers stand for.

        Parameters
        ----------
        integers : array
            Integers, as floating-point numbers, brought into the range first.
        steps, zeros : array
            The step and the zero of each of them.

        Returns
        -------
        array
        """
        q: Matrix = np.minimum(np.maximum(integers, self.low), self.high)
        if zeros is not None:
            q = q - zeros
        q = q * steps
        return q if self.form is None else self.form(q)


def integers_near(t: Matrix, steps: Matrix, zeros: Matrix | None) -> Matrix:
    """Return the integers, of any size, that stand for what is nearest.

    Parameters
    ----------
    t : array
        Numbers to be rounded, in double precision.
    steps, zeros : array
        The step and the zero of each of them.

    Returns
    -------
    array
        Integers, as floating-point numbers; ties go to even ones.
    """
    x = t / steps
    if zeros is not None:
        x += zeros
    return np.rint(x, out=x)


def nearest(W: Matrix, grid: Grid) -> tuple[Matrix, int]:
    """Round each entry to the nearest number of a grid.

    Parameters
    ----------
    W : array, shape (m, n)
        The matrix, in double precision.
    grid : Grid
        The grid that is rounded to.

    Returns
    -------
    integers : array of int16, shape (m, n)
        The integers.
    clipped : int
        How many entries lie outside of the range.
    """
    integers = np.empty(W.shape, dtype=np.int16)
    clipped = 0
    rows = max(1, (1 << 16) // W.shape[1])
    for start in range(0, W.shape[0], rows):
        at = slice(start, min(start + rows, W.shape[0])), slice(0, W.shape[1])
        q = integers_near(W[at], *grid.part(*at))
        inside = np.clip(q, grid.low, grid.high)
        clipped += int(np.count_nonzero(inside != q))
        integers[at] = inside
    return integers, clipped
