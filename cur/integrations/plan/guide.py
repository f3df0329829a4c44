"""The importance and the link that an entry of a plan names, formed from what was measured of its layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cur.integrations.measure.moments import Measured, Moments
from cur.integrations.plan.methods import CUREntry
from cur.scores import IMPORTANCES, LINKS

__all__ = ["guide", "link_weights"]


def guide(W: Tensor, entry: CUREntry, moments: Moments) -> Tensor | None:
    """Return the matrix whose singular subspaces choose rows and columns; None for the weighted weight itself.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        The weight of the layer.
    entry : CUREntry
        The entry of the plan, which names the importance and the link.
    moments : Moments
        The statistics of the model, with what the importance needs.

    Raises
    ------
    ValueError
        If the statistics lack what the importance needs of the layer.
    """
    importance = IMPORTANCES[entry.importance]
    if importance.link == entry.link:  # the weights of the factorization are those of the choice
        return None
    score: Tensor = importance.score(W, Measured(moments, entry.name, W))
    return score


def link_weights(W: Tensor, entry: CUREntry, moments: Moments) -> Any:
    """Return the weights of the columns under which the core is the best one.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        The weight of the layer.
    entry : CUREntry
        The entry of the plan, which names the link.
    moments : Moments
        The statistics of the model, with what the link needs.

    Returns
    -------
    Tensor, Weight or None
        The weights, as `cur.cur` takes them for `column_weights`.

    Raises
    ------
    ValueError
        If the statistics lack what the link needs of the layer.
    """
    return LINKS[entry.link].weights(W, Measured(moments, entry.name, W))
