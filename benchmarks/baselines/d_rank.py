"""D-Rank (arXiv 2509.25622): the ranks of whitened SVDs by their effective ranks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dynamic_ranks", "effective_rank"]


def effective_rank(singular_values: Tensor) -> float:
    """Return the exponential of the entropy of the squares of singular values."""
    shares = singular_values**2 / (singular_values**2).sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def dynamic_ranks(effective: list[float], shapes: list[tuple[int, int]], budget: float) -> list[int]:
    """Minimise ``sum of effective / rank`` for ranks r stored in ``r (m + n)`` numbers each, within a budget in all.

    By a multiplier ``rank = sqrt(effective / (m + n))`` times a constant. A rank that would exceed the break-even is
    cut to it, and the others share what this saves. Each layer is a group of its own, as the paper has it for models
    with grouped queries; its transfer of a hand-set share from queries and keys to values is left out.

    Parameters
    ----------
    effective : list of float
        Effective rank of each whitened matrix.
    shapes : list of (int, int)
        Their shapes.
    budget : float
        Numbers to store in all.
    """
    price = torch.tensor([m + n for m, n in shapes], dtype=torch.float64)
    limit = torch.tensor([(m * n) // (m + n) for m, n in shapes], dtype=torch.float64)
    wish = (torch.tensor(effective, dtype=torch.float64) / price).sqrt()
    ranks, free = torch.zeros_like(limit), torch.ones_like(limit, dtype=torch.bool)
    while bool(free.any()):
        left = budget - float((ranks * price)[~free].sum())
        ranks = torch.where(free, wish * left / float((wish * price)[free].sum()), ranks)
        over = free & (ranks > limit)
        if not bool(over.any()):
            break
        ranks, free = torch.where(over, limit, ranks), free & ~over
    return [max(int(rank), 1) for rank in ranks]
