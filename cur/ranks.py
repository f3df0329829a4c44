"""How many numbers a factorization stores, and which rank pays.

At rank r an m x n matrix stored as C, U, R takes ``r (m + n) + r**2`` numbers; folded into two factors ``r (m + n)``;
as r of its rows and the coefficients of the others ``r (m + n - r)``, which is below ``m n`` for every ``r < min(m,
n)``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cur._validate import check_choice

__all__ = ["LAYOUTS", "break_even", "effective_rank", "energy", "parameters", "rank_for"]

LAYOUTS = ("cur", "folded", "interpolative")


def parameters(m: int, n: int, rank: int, *, layout: str = "cur") -> int:
    """Count the numbers that an m x n matrix of the given rank takes.

    Examples
    --------
    >>> parameters(4096, 4096, 256), parameters(4096, 4096, 256, layout="interpolative")
    (2162688, 2031616)
    """
    check_choice(layout, LAYOUTS, "layout")
    if layout == "interpolative":
        return rank * (m + n - rank)
    return rank * (m + n) + (rank * rank if layout == "cur" else 0)


def rank_for(m: int, n: int, budget: float, *, layout: str = "cur") -> int:
    """Return the largest rank whose parameters do not exceed `budget` numbers; 0 if even rank 1 does.

    Examples
    --------
    >>> [rank_for(4096, 4096, 0.8 * 4096**2, layout=layout) for layout in LAYOUTS]
    [1399, 1638, 2264]
    """
    check_choice(layout, LAYOUTS, "layout")
    if layout == "folded":
        r = int(budget // (m + n))
    else:
        sign = 1 if layout == "cur" else -1  # r^2 + s r - b <= 0, or r^2 - s r + b >= 0 for r <= min(m, n)
        discriminant = (m + n) ** 2 + 4 * sign * budget
        r = int(2 * budget / (m + n + math.sqrt(discriminant))) if discriminant >= 0 else min(m, n)
    r = min(max(r, 0), min(m, n))
    while r < min(m, n) and parameters(m, n, r + 1, layout=layout) <= budget:
        r += 1
    while r > 0 and parameters(m, n, r, layout=layout) > budget:
        r -= 1
    return r


def break_even(m: int, n: int, *, layout: str = "cur") -> int:
    """Return the largest rank that takes fewer numbers than the m x n matrix itself.

    Examples
    --------
    >>> break_even(4096, 4096), break_even(576, 576)
    (1696, 238)
    """
    return rank_for(m, n, m * n - 1, layout=layout)


def energy(singular_values: np.ndarray[Any, Any], fraction: float, /) -> int:
    """Return the smallest rank whose singular values hold the given fraction of the sum of squares.

    Parameters
    ----------
    singular_values : array, shape (k,)
        Non-increasing.
    fraction : float
        In (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"`fraction` must be in (0, 1]; got {fraction!r}")
    squares = np.asarray(singular_values, dtype=np.float64) ** 2
    total = squares.sum()
    if total == 0:
        return 1
    # the tail is summed from its small end: a cumulative sum from the front loses what rounding hides
    tails = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
    return int(np.argmax(tails <= (1.0 - fraction) * total)) + 1


def effective_rank(singular_values: np.ndarray[Any, Any], /) -> float:
    """Return the exponential of the entropy of the normalised singular values.

    References
    ----------
    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    s = np.asarray(singular_values, dtype=np.float64)
    s = s[s > 0]
    if not s.size:
        return 0.0
    p = s / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))
