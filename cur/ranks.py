"""How many numbers a factorization stores, and which rank pays.

At rank r an m x n matrix stored as C, U, R takes ``r (m + n) + r**2`` numbers; folded into two factors ``r (m + n)``;
as r of its rows and the coefficients of the others ``r (m + n - r)``, which is below ``m n`` for every ``r < min(m,
n)``. `allocate` shares a budget among many matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cur._lib.validate import check_choice

__all__ = ["LAYOUTS", "allocate", "break_even", "combinations", "effective_rank", "energy", "parameters", "rank_for"]

LAYOUTS = ("cur", "folded", "interpolative")


def parameters(m: int, n: int, rank: int, *, layout: str = "cur") -> int:
    """Count the numbers that an m x n matrix of the given rank takes.

    Parameters
    ----------
    m, n : int
        The numbers of rows and columns of the matrix.
    rank : int
        The rank of the factorization.
    layout : {"cur", "folded", "interpolative"}, default "cur"
        How the factors are stored.

    Returns
    -------
    int
        The count.

    Raises
    ------
    ValueError
        If the layout is unknown.

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

    Parameters
    ----------
    m, n : int
        The numbers of rows and columns of the matrix.
    budget : float
        The largest count of numbers that may be stored.
    layout : {"cur", "folded", "interpolative"}, default "cur"
        How the factors are stored.

    Returns
    -------
    int
        The rank, at most the smaller side.

    Raises
    ------
    ValueError
        If the layout is unknown.

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

    Parameters
    ----------
    m, n : int
        The numbers of rows and columns of the matrix.
    layout : {"cur", "folded", "interpolative"}, default "cur"
        How the factors are stored.

    Returns
    -------
    int
        The rank; 0 if there is none.

    Raises
    ------
    ValueError
        If the layout is unknown.

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
        The singular values, non-increasing.
    fraction : float
        The share of the sum of squares to hold, above 0 and at most 1.

    Returns
    -------
    int
        The rank, at least 1.

    Raises
    ------
    ValueError
        If `fraction` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import ranks
    >>> ranks.energy(np.array([2.0, 1.0, 0.1]), 0.9)
    2
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

    Parameters
    ----------
    singular_values : array, shape (k,)
        The singular values, in any order.

    Returns
    -------
    float
        The effective rank, between 1 and k; 0 for the zero matrix.

    References
    ----------
    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import ranks
    >>> round(ranks.effective_rank(np.ones(3)), 6)
    3.0
    """
    s = np.asarray(singular_values, dtype=np.float64)
    s = s[s > 0]
    if not s.size:
        return 0.0
    p = s / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def allocate(
    errors: Sequence[np.ndarray[Any, Any]], costs: Sequence[np.ndarray[Any, Any]], budget: float, /
) -> tuple[int, ...]:
    r"""Choose one option for each matrix so that the sum of errors is small and the sum of costs within the budget.

    An option may be a rank, or to keep the matrix whole. For a multiplier t every matrix takes the option that
    minimises ``error + t * cost``; such a choice is the best of all choices that cost no more than it does (Everett).
    Costs need be neither convex nor monotonic, since all options are compared. The smallest t within the budget is
    found by bisection, and what is left over is spent on the exchanges that save most error for their cost.

    Parameters
    ----------
    errors : sequence of arrays
        The errors of the options of each matrix, in one unit for all matrices, one that may be added up
        (squares of norms, not norms).
    costs : sequence of arrays
        The costs of the same options.
    budget : float
        The largest sum of costs.

    Returns
    -------
    tuple of int
        The option of each matrix.

    Raises
    ------
    ValueError
        If shapes do not match, a value is not finite, or even the cheapest options exceed the budget.

    References
    ----------
    Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation of resources",
    Operations Research 11 (1963).

    Examples
    --------
    >>> squares = [np.array([4.0, 1.0, 0.0]), np.array([9.0, 8.0, 0.0])]
    >>> allocate(squares, [np.array([0, 1, 2]), np.array([0, 1, 2])], 3)
    (1, 2)
    """
    E, K = _padded(errors, costs)
    everyone = np.arange(len(E))

    # in units of the largest values, so that multipliers neither overflow nor vanish
    unit_error, unit_cost = (float(np.abs(X[np.isfinite(X)]).max()) or 1.0 for X in (E, K))

    def at(multiplier: float) -> np.ndarray[Any, Any]:
        value = E / unit_error + multiplier * (K / unit_cost)
        # of equal values the cheapest: the multiplier 0 must not spend on nothing
        choice: np.ndarray[Any, Any] = np.where(value == value.min(axis=1, keepdims=True), K, np.inf).argmin(axis=1)
        return choice

    def spent(choice: np.ndarray[Any, Any]) -> float:
        return float(K[everyone, choice].sum())

    least = sum(float(np.min(cost)) for cost in costs)
    if least > budget:
        raise ValueError(
            f"`budget` must be at least {least:g}, the sum of the smallest costs; got {budget:g}; "
            "raise it, or offer cheaper options"
        )
    choice = at(0.0)
    if spent(choice) > budget:
        high = 1.0
        while spent(at(high)) > budget:
            high *= 4.0
        low = high / 4.0
        while spent(at(low)) <= budget:
            low, high = low / 4.0, low
        while high - low > 1e-12 * high:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if spent(at(middle)) > budget else (low, middle)
        choice = at(high)
    return tuple(int(option) for option in _fill(E, K, choice, budget - spent(choice)))


def combinations(
    errors: Sequence[np.ndarray[Any, Any]], costs: Sequence[np.ndarray[Any, Any]], /
) -> np.ndarray[Any, Any]:
    """Return the choices for several matrices that are best together for some multiplier, as :func:`allocate` has it.

    Each matrix goes along the lower convex hull of its own options, from the cheapest to the best, and the steps of all
    are taken in the order of what they save for their cost.

    Parameters
    ----------
    errors : sequence of arrays
        The errors of the options of each matrix, in one unit for all, as for :func:`allocate`.
    costs : sequence of arrays
        The costs of the same options.

    Returns
    -------
    array of int, shape (k, matrices)
        Options, from the cheapest combination on.

    Raises
    ------
    ValueError
        If there are not as many costs as errors.

    Examples
    --------
    >>> squares = [np.array([4.0, 1.0, 0.0]), np.array([9.0, 0.0])]
    >>> combinations(squares, [np.array([0, 1, 2]), np.array([0, 2])]).tolist()
    [[0, 0], [0, 1], [1, 1], [2, 1]]
    """
    steps = []
    start = []
    for index, (error, cost) in enumerate(zip(errors, costs, strict=True)):
        hull = _hull(np.asarray(error, dtype=np.float64), np.asarray(cost, dtype=np.float64))
        start.append(hull[0])
        steps += [
            ((error[last] - error[option]) / (cost[option] - cost[last]), index, option)
            for last, option in itertools.pairwise(hull)
        ]
    choices = [start]
    # the hulls are convex: sorted by rate, the steps of each matrix stay in their order
    for _, index, option in sorted(steps, key=lambda step: -step[0]):
        choices.append([*choices[-1][:index], option, *choices[-1][index + 1 :]])
    return np.asarray(choices)


def _hull(error: np.ndarray[Any, Any], cost: np.ndarray[Any, Any]) -> list[int]:
    """Return the options on the lower left convex hull, from the cheapest to that of least error."""
    hull: list[int] = []
    for option in np.lexsort((error, cost)).tolist():
        if hull and error[option] >= error[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (error[a] - error[b]) * (cost[option] - cost[b]) > (error[b] - error[option]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(option)
    return hull


def _fill(
    E: np.ndarray[Any, Any], K: np.ndarray[Any, Any], choice: np.ndarray[Any, Any], left: float
) -> np.ndarray[Any, Any]:
    """Spend what is left of a budget: again and again the exchange that saves most error for its cost."""
    everyone = np.arange(len(E))
    choice = choice.copy()
    while True:
        saved = E[everyone, choice][:, None] - E
        added = K - K[everyone, choice][:, None]
        useful = (saved > 0) & (added <= left)
        rate = np.where(useful, np.inf, 0.0)  # what saves error at no cost comes first
        np.divide(saved, added, out=rate, where=useful & (added > 0))
        item, option = np.unravel_index(int(rate.argmax()), rate.shape)
        if rate[item, option] <= 0.0:
            return choice
        left -= float(added[item, option])
        choice[item] = option


def _padded(
    errors: Sequence[np.ndarray[Any, Any]], costs: Sequence[np.ndarray[Any, Any]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return errors and costs as two arrays with one row per matrix; options that are not there have infinite error."""
    if len(errors) == 0 or len(errors) != len(costs):
        raise ValueError(
            f"`errors` and `costs` must have one array per matrix, at least one; got {len(errors)} and {len(costs)}"
        )
    width = max(len(one) for one in errors)
    E, K = np.full((len(errors), width), np.inf), np.zeros((len(errors), width))
    for index, (error, cost) in enumerate(zip(errors, costs, strict=True)):
        if np.ndim(error) != 1 or np.shape(error) != np.shape(cost) or len(error) == 0:
            raise ValueError(
                "`errors` and `costs` of a matrix must be vectors of one length, at least 1; "
                f"got shapes {np.shape(error)} and {np.shape(cost)} at position {index}"
            )
        E[index, : len(error)], K[index, : len(cost)] = error, cost
        if not (np.isfinite(error).all() and np.isfinite(cost).all()):
            raise ValueError(f"`errors` and `costs` must be finite; they are not at position {index}")
    return E, K
