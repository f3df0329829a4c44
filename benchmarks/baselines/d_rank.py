"""D-Rank (arXiv 2509.25622): the ranks of whitened SVDs by their effective ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cur import ranks

__all__ = ["by_effective_rank", "dynamic_ranks", "effective_rank"]

# Halvings of the interval of the multiplier: down to the rounding of a double.
_HALVINGS = 60


def effective_rank(singular_values: Tensor) -> float:
    """Return the exponential of the entropy of the squares of singular values."""
    return ranks.effective_rank((singular_values**2).numpy())


def dynamic_ranks(effective: list[float], shapes: list[tuple[int, int]], budget: float) -> list[int]:
    """Return the ranks of two factors, which take ``r (m + n)`` numbers each, at most as many as break even.

    Parameters
    ----------
    effective : list of float
        Effective rank of each whitened matrix.
    shapes : list of (int, int)
        Their shapes.
    budget : float
        Numbers to store in all.
    """
    costs = [np.arange(1, m * n // (m + n) + 1) * (m + n) for m, n in shapes]
    return [option + 1 for option in by_effective_rank(effective, shapes, costs, budget)]


def by_effective_rank(
    effective: Sequence[float],
    shapes: Sequence[tuple[int, int]],
    costs: Sequence[np.ndarray[Any, Any]],
    budget: float,
) -> tuple[int, ...]:
    """Give matrices ranks in proportion to ``sqrt(effective / (m + n))``, as many as a budget allows.

    With two factors, which take ``r (m + n)`` numbers, this minimises the sum of ``effective / rank`` (Lagrange). Ranks
    are rounded down; one that would exceed the options of a matrix is cut to the last, and the others share what this
    saves. Each matrix is a group of its own, as D-Rank has it for models with grouped queries; its transfer of a
    hand-set share from queries and keys to values is left out.

    Parameters
    ----------
    effective : sequence of float
        Effective rank of each matrix: the exponential of the entropy of its squared singular values.
    shapes : sequence of (int, int)
        Their shapes.
    costs : sequence of arrays
        For each the costs of the ranks 1, 2, ..., non-decreasing; a last option may be to leave it whole.
    budget : float
        Largest sum of costs.

    Returns
    -------
    tuple of int
        The option of each matrix, from 0 on; the first options if even they exceed the budget.

    References
    ----------
    "Layer-wise dynamic rank for compressing large language models", arXiv 2509.25622 (2025).

    Examples
    --------
    >>> costs = np.arange(1, 51) * 200
    >>> by_effective_rank([4.0, 16.0], [(100, 100), (100, 100)], [costs, costs], 30 * 200)
    (9, 19)
    """
    wish = np.sqrt(np.asarray(effective, dtype=np.float64) / [m + n for m, n in shapes])
    last = np.array([len(cost) - 1 for cost in costs])

    def options(multiplier: float) -> np.ndarray[Any, Any]:
        return np.clip((multiplier * wish).astype(np.int64) - 1, 0, last)

    def spent(multiplier: float) -> float:
        return float(sum(cost[option] for cost, option in zip(costs, options(multiplier), strict=True)))

    low, high = 0.0, float((last.max() + 2) / wish[wish > 0].min()) if (wish > 0).any() else 0.0
    if spent(high) <= budget:
        low = high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return tuple(int(option) for option in options(low))
