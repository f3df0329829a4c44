"""The smallest model within a tolerance: plans are carried out and measured, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cur.integrations.measure.statistics import Statistics
from cur.integrations.plan.budget import SHARE, Forms
from cur.integrations.plan.plan import Plan
from cur.integrations.report.data import LayerReport
from cur.integrations.report.divergence import Divergence
from cur.integrations.sources import Source

__all__ = ["Trial", "within_tolerance"]

_TRIALS = 3

# A plan that uses so much of a tolerance is good enough; the next one aims between this and all of it.
_ENOUGH, _AIM = 0.9, 0.96

# After the last plan but one, if none is good yet, the next one aims lower: then there must be a result.
_LAST_AIM = 0.8


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan that was carried out, and what was measured of it.

    Attributes
    ----------
    plan : Plan
        The plan that was carried out.
    layers : sequence of LayerReport
        The reports on its layers.
    made : Any
        The layers themselves, as the source keeps them.
    divergence : Divergence
        How far the model predicted otherwise than the dense one.
    """

    plan: Plan
    layers: Sequence[LayerReport]
    made: Any
    divergence: Divergence


def within_tolerance(
    source: Source, forms: Forms, statistics: Statistics, compared: Callable[[Path | None], Divergence]
) -> Trial:
    """Carry out at most three plans and return the one of most loss that stays within a tolerance.

    Loss as it is predicted and divergence as it is measured grow about in proportion, so each plan says what the next
    may lose; between one that is within the tolerance and one that is not the logarithms are interpolated.

    Parameters
    ----------
    source : Source
        The model, with the text it is measured on; the layers of the result are its last.
    forms : Forms
        What layers can take, with the tolerance.
    statistics : Statistics
        Statistics that cover the layers.
    compared : callable
        Measures the divergence of the model with the layers in their places.

    Returns
    -------
    Trial
        The plan, its layers and what was measured.

    Raises
    ------
    ValueError
        If none of the plans stays within the tolerance; it says what was reached.
    """
    tol = forms.config.tol
    assert tol is not None
    loss = SHARE * tol
    good: tuple[float, Trial] | None = None
    bad: tuple[float, Divergence] | None = None
    for number in range(1, _TRIALS + 1):
        plan = forms.plan(loss=loss)
        if not plan.entries:
            break
        layers = source.factor(plan, statistics)
        with source.clock.stage("judge"):
            found = source.on_trial(compared)
        source.announce(f"Plan {number}: predicted loss {loss:.3g}, measured divergence {found.said} nats per token.")
        if found.upper <= tol:
            if good is None or loss > good[0]:
                good = loss, Trial(plan, layers, source.made, found)
            if found.upper >= _ENOUGH * tol:
                break
        elif bad is None or loss < bad[0]:
            bad = loss, found
        rate = max(found.upper, 1e-12) / loss
        aim = _LAST_AIM if good is None and number == _TRIALS - 1 else _AIM
        loss = aim * tol / rate
        if good is not None and bad is not None and not good[0] < loss < bad[0]:
            loss = (good[0] * bad[0]) ** 0.5
    if good is None:
        reached = "no plan changes a layer" if bad is None else f"the least that was reached is {bad[1].upper:.3g}"
        raise ValueError(f"`tol` {tol} was not met: {reached}; raise it, or give `size` or `bits`")
    source.made = good[1].made
    return good[1]
