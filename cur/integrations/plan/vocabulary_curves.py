"""What the tables of tokens and the output head can take: to stay as they are, or few bits a row.

Kept whole on a grid with a step ``s``, each row loses for itself. A table loses ``sum_v p_v dW_v H dW_v^T / 2`` in nats
per token, with the second moment ``H`` of the gradients at its outputs and the share ``p`` of each token; a head about
``sum_v p_v dW_v G dW_v^T / 2`` with the second moment ``G`` of its inputs, and both where they share a weight. Errors
are foreseen as those of other layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cur.integrations.measure.moments import token_counts, token_shares
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.finite import finite_weight
from cur.integrations.model.targets import is_excluded
from cur.integrations.model.vocabulary import vocabulary
from cur.integrations.nn import WholeLinear, WholeTable, looks_up
from cur.integrations.nn.lookup import times_of
from cur.integrations.plan.config import BudgetConfig
from cur.integrations.plan.grid_errors import GRIDS, expected_errors, pivots
from cur.integrations.plan.methods import ROUNDING_DAMPING
from cur.integrations.plan.rate_distortion import LayerCurve, unit

__all__ = ["priced_vocabulary", "vocabulary_curves"]

_LEAST_BITS = 4
"""With fewer, tokens that the calibration text does not have lose more than is foreseen."""


def priced_vocabulary(model: nn.Module, config: BudgetConfig) -> dict[str, tuple[str, ...]]:
    """Return the tables and heads that share a budget of the whole model, with what is tied to each.

    Parameters
    ----------
    model : nn.Module
        The dense model, whose tables they are.
    config : BudgetConfig
        The configuration. Budgets of bits are for targeted layers alone; without gradients nothing says what a table
        is worth.
    """
    if not config.rounds or config.bits is not None or not config.gradients:
        return {}
    found = vocabulary(model)
    return {
        name: tied
        for name, tied in found.items()
        if not any(is_excluded(each, config.exclude) for each in (name, *tied))
    }


def vocabulary_curves(model: nn.Module, statistics: Statistics, config: BudgetConfig) -> list[LayerCurve]:
    """Compute what tables and heads are expected to lose on each grid, as far as what is needed was measured.

    Parameters
    ----------
    model : nn.Module
        The dense model, which is not changed.
    statistics : Statistics
        Statistics of the model.
    config : BudgetConfig
        The configuration, which has the budget.

    Returns
    -------
    list of LayerCurve
        A curve for each table or head; by the name of the first of those that share a weight.
    """
    curves = []
    for name, tied in priced_vocabulary(model, config).items():
        module = model.get_submodule(name)
        is_table = looks_up(module) is not None
        W = finite_weight(module, name)
        rows = W.T if is_table else W  # of the whole vocabulary, so in the precision that it has
        errors = _errors(name, tied, rows, statistics, module)
        if errors is None:
            continue
        errors[[grid.bits < _LEAST_BITS for grid in GRIDS]] = np.inf  # not offered
        kind = WholeTable if is_table else WholeLinear
        shape = int(W.shape[0]), int(W.shape[1])
        costs = np.array([shape[0] * shape[1]])
        rounded = unit(0.0, gradients=True) * errors
        curves.append(LayerCurve(name, shape, np.zeros(1), costs, kind, rounded, tied))
    return curves


def _errors(
    name: str, tied: tuple[str, ...], rows: Tensor, statistics: Statistics, module: nn.Module
) -> np.ndarray | None:
    """Return the squares of the weighted errors on each grid; None if something was not measured."""
    counts = token_counts(statistics, (name, *tied), len(rows))
    if counts is None:
        return None
    place: dict[str, Any] = {"dtype": torch.float64, "device": rows.device}
    shares = token_shares(counts).to(**place)
    is_table = looks_up(module) is not None
    read = [each for each in (*tied, name) if statistics.counts.get(each)]
    heads = [each for each in read if each in statistics.products and each not in statistics.lookups]
    if (tied or not is_table) and not heads:
        return None
    G = statistics.second_moment(heads[0]).to(**place) if heads else None
    counted = [] if G is None else [G]
    if is_table:
        # of an encoder-decoder the table itself is not called, but others that share its weight are
        called = [each for each in (name, *tied) if statistics.output_counts.get(each)]
        if not called:
            return None
        times = times_of(module)
        counted.append(statistics.output_moment(called[0]).to(**place) * (1.0 if times is None else times.value) ** 2)
    total = sum(counted[1:], counted[0])
    columns = total.diagonal() if G is None else pivots(G, ROUNDING_DAMPING, name, counted=total)
    found: np.ndarray = expected_errors(rows, shares, columns)
    return found
