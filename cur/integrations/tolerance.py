"""The smallest model within a tolerance: plans are carried out and measured, before anything is written."""

from __future__ import annotations

import math
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

# Where two of three plans were too far off, the last one aims lower: then there must be a result.
_LAST_AIM = 0.7

# How fast the measured divergence may grow with the predicted loss, as a power of it, and how far one plan may lead.
_POWERS, _FARTHEST = (0.25, 2.0), 30.0


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

    Divergence as it is measured is taken to grow as a power of the loss as it is predicted: in proportion after the
    first plan, and as the plans so far say after the second.

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
    allowed = SHARE * tol
    best: tuple[float, Trial] | None = None
    least = math.inf
    found: list[tuple[float, float]] = []
    earlier: Plan | None = None
    for number in range(1, _TRIALS + 1):
        plan = forms.plan(loss=allowed)
        if not plan.entries or (earlier is not None and plan.entries == earlier.entries):
            break  # nothing else can be had
        earlier = plan
        layers = source.factor(plan, statistics)
        with source.clock.stage("judge"):
            measured = source.on_trial(compared)
        loss = sum(entry.predicted or 0.0 for entry in plan.entries)
        source.announce(
            f"Plan {number}: predicted loss {loss:.3g}, measured divergence {measured.said} nats per token."
        )
        least = min(least, measured.upper)
        if measured.upper <= tol:
            if best is None or loss > best[0]:
                best = loss, Trial(plan, layers, source.made, measured)
            if measured.upper >= _ENOUGH * tol:
                break
        found.append((loss, measured.upper))
        aim = _LAST_AIM if best is None and number == _TRIALS - 1 else _AIM
        allowed = _next(found, aim * tol)
    if best is None:
        reached = "no plan changes a layer" if least == math.inf else f"the least that was reached is {least:.3g}"
        raise ValueError(
            f"`tol` {tol} was not met: {reached}; raise it, measure on more text (--held-out-windows), which makes the "
            "interval narrower, or give `size` or `bits`"
        )
    source.made = best[1].made
    return best[1]


def _next(found: Sequence[tuple[float, float]], aim: float) -> float:
    """Return the loss at which the divergence is expected to be what is aimed at, from those that were measured."""
    loss, upper = found[-1]
    if not math.isfinite(upper) or upper <= 0 or loss <= 0:
        return loss / _FARTHEST
    power = 1.0
    others = [(x, y) for x, y in found[:-1] if x > 0 and y > 0 and math.isfinite(y) and x != loss and y != upper]
    if others:
        x, y = others[-1]
        power = min(max(math.log(upper / y) / math.log(loss / x), _POWERS[0]), _POWERS[1])
    step = (aim / upper) ** (1 / power)
    return float(loss * min(max(step, 1 / _FARTHEST), _FARTHEST))
