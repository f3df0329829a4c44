"""The matrices that guide the choice of rows and columns, and the weights of the core."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cur import importance as scores
from cur.integrations.measure.moments import Moments, x_norm
from cur.integrations.plan.methods import CUREntry

__all__ = ["guide", "link_weights"]


def guide(W: Tensor, entry: CUREntry, moments: Moments) -> Tensor | None:
    """Return the matrix whose singular subspaces choose rows and columns; None for the weighted weight itself."""
    if entry.importance == "weights" and entry.link == "optimal":
        return None
    if entry.importance == entry.link:  # the weights of the factorization are those of the choice
        return None
    if entry.importance == "covariance":
        root = moments.input_weight(entry.name, W)
        score: Tensor = root.apply(W, 1) @ root.vectors.mT
    elif entry.importance == "wanda":
        score = scores.wanda(W, x_norm(moments.statistics, entry.name).to(W))
    elif entry.importance == "activation":
        score = W * x_norm(moments.statistics, entry.name).to(W)
    else:
        score = W.abs() if entry.importance == "magnitude" else W
    return score


def link_weights(W: Tensor, entry: CUREntry, moments: Moments) -> Any:
    """Return the weights of the columns under which the core is the best one."""
    if entry.link == "activation":
        return x_norm(moments.statistics, entry.name).to(W) ** 2
    return moments.input_weight(entry.name, W) if entry.link == "covariance" else None
