"""The importance and the link that an entry of a plan names, formed from what was measured of its layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cur.integrations.measure.moments import Measured, Moments
from cur.integrations.plan.methods import CUREntry
from cur.scores import IMPORTANCES, LINKS

__all__ = ["guide", "link_weights"]


def guide(W: Tensor, entry: CUREntry, moments: Moments) -> Tensor | None:
    """Return the matrix whose singular subspaces choose rows and columns; None for the weighted weight itself."""
    importance = IMPORTANCES[entry.importance]
    if importance.link == entry.link:  # the weights of the factorization are those of the choice
        return None
    score: Tensor = importance.score(W, Measured(moments, entry.name, W))
    return score


def link_weights(W: Tensor, entry: CUREntry, moments: Moments) -> Any:
    """Return the weights of the columns under which the core is the best one."""
    return LINKS[entry.link].weights(W, Measured(moments, entry.name, W))
