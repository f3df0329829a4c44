"""Steps and zeros of a grid: by the largest entries, and by what rounding loses with a shorter range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FACTORS", "STORED", "Store", "least", "ranges", "stored"]

Matrix = np.ndarray[Any, Any]

FACTORS = np.linspace(1.0, 0.4, 25)
"""Parts of the range of a group that are tried. Finer ones changed the loss by less than a percent."""

CHUNK = 1 << 14
"""Entries at once, which stay in the cache of the processor while all factors are tried."""

STORED = ("bfloat16", "float16", "float32", "float64")
"""The dtypes in which steps are stored."""


def stored(name: str) -> tuple[Callable[[Matrix], Matrix], float, float]:
    """Return what rounds to the numbers of a dtype, its smallest normal number and its largest.

    Parameters
    ----------
    name : str
        One of :data:`STORED`; NumPy has no bfloat16, whose numbers are single ones of eight digits.

    Returns
    -------
    round : callable
        Maps non-negative doubles to doubles that the dtype holds: to the nearest, or upwards below its normal numbers.
    smallest, largest : float
        The range of normal numbers.
    """
    info = np.finfo("float32" if name == "bfloat16" else name)
    smallest = float(info.smallest_normal)
    least = 2.0**-133 if name == "bfloat16" else float(info.smallest_subnormal)
    largest = float(np.uint32(0x7F7F0000).view(np.float32)) if name == "bfloat16" else float(info.max)

    def rounded(X: Matrix) -> Matrix:
        with np.errstate(over="ignore", under="ignore"):
            Y = _bfloat16(X) if name == "bfloat16" else X.astype(name)
        return np.where(np.less(X, smallest), np.ceil(np.minimum(X, smallest) / least) * least, Y.astype(np.float64))

    return rounded, smallest, largest


def _bfloat16(X: Matrix) -> Matrix:
    """Round to nearest, ties to even, by the bits of single precision."""
    bits = X.astype(np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return kept.astype(np.uint32).view(np.float32)


@dataclass(frozen=True, eq=False)
class Store:
    """What steps are stored in, for a matrix that was divided by a power of two.

    Attributes
    ----------
    name : str
        The dtype of the steps.
    exponent : int
        The power of two by which the matrix is larger.
    working : str
        The dtype of what the grid represents.
    """

    name: str
    exponent: int
    working: str

    @classmethod
    def of(cls, name: str, working: str, exponent: int) -> Store:
        """Return the one that was asked for, or one no wider than the dtype of the matrix.

        Parameters
        ----------
        name : str
            The dtype of steps that was asked for.
        working : str
            The dtype in which the matrix is computed.
        exponent : int
            The power of two by which the matrix is larger.

        Returns
        -------
        Store
            What rounds and checks steps.
        """
        return cls(working if name == "float64" else name, exponent, working)

    @property
    def exact(self) -> bool:
        """Whether integers times steps are numbers of the working dtype."""
        return self.name in ("float16", "bfloat16")

    def round(self, steps: Matrix) -> Matrix:
        """Return steps as they are stored.

        Parameters
        ----------
        steps : array
            Positive steps of any size.

        Returns
        -------
        array
            The steps that the dtype holds, none of them zero.
        """
        true: Matrix = stored(self.name)[0](np.ldexp(steps, self.exponent))
        return np.ldexp(true, -self.exponent)

    def form(self, values: Matrix) -> Matrix:
        """Return products of integers and steps as the working dtype holds them.

        Parameters
        ----------
        values : array
            The products, in double precision.

        Returns
        -------
        array
            The rounded products.
        """
        true = np.ldexp(values, self.exponent).astype(self.working).astype(np.float64)
        return np.ldexp(true, -self.exponent)

    def check(self, steps: Matrix, levels: int) -> None:
        """Refuse a matrix whose steps the dtype does not reach.

        Parameters
        ----------
        steps : array
            The steps before they are rounded.
        levels : int
            The largest difference of two integers.

        Raises
        ------
        ValueError
            If the largest step, or the largest number of the grid, is outside of the range of its dtype.
        """
        _, smallest, largest = stored(self.name)
        most = math.ldexp(float(steps.max()), self.exponent)
        if not smallest <= most <= largest:
            raise ValueError(
                f"`dtype` must reach the steps of `A`, the largest of which is {most:.3g}; {self.name} reaches from "
                f"{smallest:.3g} to {largest:.3g}; take a wider one, or scale `A`"
            )
        if not 1.01 * most * levels <= float(np.finfo(self.working).max):
            raise ValueError(
                f"`A` has entries so large that its grid leaves the range of {self.working}; divide it by its largest "
                "entry first"
            )


def ranges(W: Matrix, group: int, low: int, high: int) -> tuple[Matrix, Matrix | None]:
    """Return steps and lower ends of the grids that reach all entries, one for each group of a row.

    Parameters
    ----------
    W : array, shape (m, n)
        The matrix, in double precision.
    group : int
        The length of a group.
    low, high : int
        The range of integers; symmetric, or from 0.

    Returns
    -------
    steps : array, shape (m, n / group)
        Positive: a group of zeros has the smallest of the others.
    ends : array or None
        The smaller of 0 and the smallest entry of the group; None for a symmetric range.
    """
    X = W.reshape(len(W), -1, group)
    top, bottom = X.max(axis=2), X.min(axis=2)
    if low < 0:
        return _positive(np.maximum(top, -bottom) / high), None
    bottom = np.minimum(bottom, 0.0)
    return _positive((np.maximum(top, 0.0) - bottom) / (high - low)), bottom


def _positive(steps: Matrix) -> Matrix:
    live = steps > 0
    return np.where(live, steps, steps[live].min() if live.any() else 1.0)


def least(
    W: Matrix,
    ranges: tuple[Matrix, Matrix | None],
    weights: Matrix,
    low: int,
    high: int,
    round_step: Callable[[Matrix], Matrix],
    factors: Matrix = FACTORS,
) -> tuple[Matrix, Matrix | None]:
    """Return stored steps and zeros: of several parts of each range the one with which nearest rounding loses least.

    Parameters
    ----------
    W : array, shape (m, n)
        The matrix, in double precision.
    ranges : tuple of arrays
        Steps and lower ends of the whole ranges.
    weights : array, shape (n,)
        What the square of an error counts in each column.
    low, high : int
        The range of integers.
    round_step : callable
        Rounds steps to the dtype in which they are stored.
    factors : array
        The parts that are tried, the first of which is taken where no other is better.

    Returns
    -------
    steps : array, shape (m, g)
    zeros : array or None, shape (m, g)
    """
    whole, ends = ranges
    m, g = whole.shape
    group = W.shape[1] // g
    steps, zeros = np.empty((m, g)), None if ends is None else np.empty((m, g))
    rows = max(1, CHUNK // W.shape[1])
    for start in range(0, m, rows):
        at = slice(start, start + rows)
        X = W[at].reshape(-1, g, group)
        best = np.full((len(X), g), np.inf)
        for factor in factors:
            step = round_step(whole[at] * factor)
            zero = None
            q = X / step[:, :, None]
            if ends is not None and zeros is not None:
                zero = np.clip(np.rint(-ends[at] * factor / step), low, high)
                q += zero[:, :, None]
            np.rint(q, out=q)
            np.clip(q, low, high, out=q)
            if zero is not None:
                q -= zero[:, :, None]
            q *= step[:, :, None]
            q -= X
            q *= q
            lost = np.einsum("rgk,gk->rg", q, weights.reshape(g, group))
            better = lost < best
            best = np.where(better, lost, best)
            steps[at] = np.where(better, step, steps[at])
            if zero is not None and zeros is not None:
                zeros[at] = np.where(better, zero, zeros[at])
    return steps, zeros
