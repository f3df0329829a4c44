"""D-Rank (arXiv 2509.25622): the ranks of whitened SVDs by their effective ranks."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cur import ranks
from cur.integrations.plan.effective_rank import by_effective_rank

__all__ = ["dynamic_ranks", "effective_rank"]


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
