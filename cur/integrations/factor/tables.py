"""Tables of embeddings and output heads on grids of few bits: rounding their rows, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cur.integrations.factor.rounding import RoundedLayer, grid_integers, step_dtype
from cur.integrations.measure.moments import damped, token_counts, token_shares
from cur.integrations.measure.statistics import Statistics
from cur.integrations.model.finite import finite_weight
from cur.integrations.nn import GridEmbedding, GridLinear, IntegerGrid, WholeLinear, WholeTable, dense_weight, looks_up
from cur.integrations.nn.lookup import Times

__all__ = ["TABLE_GRIDS", "head_losses", "round_rows", "round_table", "table_losses"]

TABLE_GRIDS = (IntegerGrid(), *(IntegerGrid(bits, 64, symmetric=False) for bits in (8, 6, 5, 4)))
"""Grids that are usual for tables and heads: eight bits a row, and 8, 6, 5 and 4 bits in groups of 64."""

# Entries that are rounded at once: some ten arrays of them in double precision are in memory.
_AT_ONCE = 1 << 22

# Rows from which a loss is estimated: half of them those that count most, the others evenly among the rest.
_ROWS = 4096


@torch.no_grad()
def round_table(
    name: str,
    module: nn.Module,
    grid: IntegerGrid,
    statistics: Statistics | None = None,
    *,
    tied: Sequence[str] = (),
    damping: float,
) -> RoundedLayer:
    """Round the rows of a table or of an output head to a grid, a part of them in memory at a time.

    Errors of a head make up for each other under the second moment of its inputs, where the statistics have it, and so
    do those of a table that a head is tied to. Otherwise every entry goes to the nearest number.

    Parameters
    ----------
    name : str
        The name of the layer, in the statistics and in errors.
    module : nn.Module
        The table or the head, unchanged.
    grid : IntegerGrid
        The grid, whose groups lie along the features.
    statistics : Statistics, optional
        Statistics of the inputs of the layer and of what is tied to it, as far as they are known.
    tied : sequence of str
        The names of the layers that read the same weight.
    damping : float
        The share of its mean diagonal that is added to the second moment.

    Returns
    -------
    RoundedLayer
        The rounded layer: a :class:`~cur.integrations.nn.WholeTable` or a :class:`~cur.integrations.nn.WholeLinear`;
        its error, and what it is expected to cost, as a table and as a head together.

    Raises
    ------
    NumericalError
        If the weight is NaN or infinite, or its steps do not fit into its dtype.
    """
    is_table = looks_up(module) is not None
    W = finite_weight(module, name)
    rows = W.T if is_table else W
    heads = [other for other in (name, *tied) if statistics is not None and other in statistics.products]
    G = None if statistics is None or not heads else statistics.second_moment(heads[0]).to(rows.device)
    parts = round_rows(name, rows, grid, None if G is None else damped(G, damping))
    layer: WholeTable | WholeLinear
    if is_table:
        layer = WholeTable.from_rounded(GridEmbedding.from_integers(**parts, grid=grid))
    else:
        _, bias, transposed = dense_weight(module, name)
        layer = WholeLinear.from_rounded(GridLinear.from_integers(**parts, bias=bias, grid=grid), transposed=transposed)
    layer.train(module.training)
    layer.adopt_(module)
    counts = None if statistics is None else token_counts(statistics, (name, *tied), len(rows))
    frequency = torch.ones(len(rows)) if counts is None else counts
    lost = size = 0.0
    for place, w, near in _pairs(rows, layer.W):
        e = w - near
        weight = frequency[place].to(w)[:, None] if is_table else 1.0
        G_own = None if is_table or G is None else G.to(w)
        lost += _square(e, weight, G_own)
        size += _square(w, weight, G_own)
    predicted = None
    if statistics is not None:
        predicted = _predicted(statistics, name, tied, rows, layer, G, counts, is_table)
    return RoundedLayer(layer, math.sqrt(lost / size) if size else 0.0, predicted)


def round_rows(name: str, rows: Tensor, grid: IntegerGrid, columns: Tensor | None) -> dict[str, Any]:
    """Return integers, steps and zeros of many rows, which are rounded for themselves.

    Parameters
    ----------
    name : str
        The name of the layer, for errors.
    rows : Tensor
        The rows, in the dtype of the layer.
    grid : IntegerGrid
        The grid that rows are rounded to.
    columns : Tensor or None
        The weight of the columns, a matrix; None for the nearest numbers.

    Returns
    -------
    dict
        What :meth:`~cur.integrations.nn.rounded.OnGrid.from_integers` takes.

    Raises
    ------
    NumericalError
        If steps do not fit into their dtype.
    """
    steps = step_dtype(rows, grid, rows.dtype)
    parts = [
        grid_integers(name, part.double(), grid, None, columns, rows.dtype, steps=steps)
        for part in rows.split(_at_once(rows))  # type: ignore[no-untyped-call]
    ]
    return {key: None if parts[0][key] is None else torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def head_losses(
    rows: Tensor,
    moment: Tensor,
    shares: Tensor,
    *,
    grids: Sequence[IntegerGrid] = TABLE_GRIDS,
    damping: float = 0.1,
) -> dict[IntegerGrid, float]:
    r"""Return what a rounded output head costs on each of some grids, in nats per token and to second order.

    With logits `z` off by ``dz = dW h`` the divergence is ``E[dz^T (diag(p) - p p^T) dz] / 2``, at most
    ``E[sum_v p_v dz_v^2] / 2``. With probabilities and hidden states taken as independent that is
    ``sum_v s_v dW_v G dW_v^T / 2`` for the second moment `G` of the hidden states, with ``s_v = E[p_v]``; with
    ``s_v = E[p_v (1 - p_v)]``, where it was measured, errors of different rows are taken as independent as well, which
    is nearer.

    Parameters
    ----------
    rows : Tensor, shape (tokens, features)
        The weight of the head.
    moment : Tensor, shape (features, features)
        The second moment of its inputs.
    shares : Tensor, shape (tokens,)
        The mean probability of each token, or what is nearer; else how often tokens come, by :func:`token_shares`.
    grids : sequence of IntegerGrid
        The grids to try.
    damping : float, default 0.1
        The share of its mean diagonal that is added to the moment for rounding.

    Returns
    -------
    dict of IntegerGrid to float
        The loss on each grid, estimated from some of the rows.
    """
    G = moment.to(rows.device).double()
    columns = damped(G, damping)
    return {grid: 0.5 * _estimated(rows, shares, grid, columns, G) for grid in grids}


@torch.no_grad()
def table_losses(
    rows: Tensor,
    gradients: Tensor,
    shares: Tensor,
    *,
    times: float = 1.0,
    columns: Tensor | None = None,
    grids: Sequence[IntegerGrid] = TABLE_GRIDS,
) -> dict[IntegerGrid, float]:
    """Return what a rounded table of embeddings costs on each of some grids, in nats per token and to second order.

    That is ``sum_v s_v dW_v H dW_v^T / 2`` with the second moment `H` of the gradients at its outputs and how often
    each token comes, `s`.

    Parameters
    ----------
    rows : Tensor, shape (tokens, features)
        The rows of the table, one for each token.
    gradients : Tensor, shape (features, features)
        The second moment of the gradients at its outputs.
    shares : Tensor, shape (tokens,)
        How often each token comes, by :func:`token_shares`.
    times : float, default 1.0
        The number that rows are multiplied by.
    columns : Tensor, optional
        The second moment under which rows are rounded, damped: that of the inputs of a head that is tied to the table.
        By default entries go to the nearest number.
    grids : sequence of IntegerGrid
        The grids to try.

    Returns
    -------
    dict of IntegerGrid to float
        The loss on each grid, estimated from some of the rows.
    """
    H = gradients.to(rows.device).double() * times**2
    return {grid: 0.5 * _estimated(rows, shares, grid, columns, H) for grid in grids}


def _estimated(rows: Tensor, shares: Tensor, grid: IntegerGrid, columns: Tensor | None, G: Tensor) -> float:
    """Return the sum over rows of a share times the weighted square of the error, from some of the rows."""
    places, weight = _sample(shares)
    some = rows[places.to(rows.device)]
    made = GridEmbedding.from_integers(**round_rows("the table", some, grid, columns), grid=grid)
    return sum(_square(w - near, weight[place].to(w)[:, None], G.to(w)) for place, w, near in _pairs(some, made))


def _sample(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows that stand for all, and the weight of each."""
    shares = shares.double().cpu()
    order = shares.argsort(descending=True, stable=True)
    if len(order) <= _ROWS:
        return order, shares[order]
    most, rest = order[: _ROWS // 2], order[_ROWS // 2 :]
    step = -(-len(rest) // (_ROWS // 2))
    some = rest[step // 2 :: step]
    own = shares[some]
    scale = float(shares[rest].sum() / own.sum()) if float(own.sum()) else 0.0
    return torch.cat([most, some]), torch.cat([shares[most], own * scale])


def _predicted(
    statistics: Statistics,
    name: str,
    tied: Sequence[str],
    rows: Tensor,
    layer: WholeTable | WholeLinear,
    G: Tensor | None,
    counts: Tensor | None,
    is_table: bool,
) -> float | None:
    """Return what is expected to be lost, as far as all that is needed was measured; else None."""
    shares = torch.full((len(rows),), 1 / len(rows)) if counts is None else token_shares(counts)
    weights: list[Tensor] = []
    if is_table:
        if name not in statistics.output_products:
            return None
        times = layer.times if isinstance(layer, WholeTable) else Times()
        weights.append(statistics.output_moment(name) * times.value**2)
    if tied or not is_table:
        if G is None or counts is None:
            return None
        weights.append(G)
    total = sum(weights[1:], weights[0]).to(rows.device)
    return 0.5 * sum(
        _square(w - near, shares[place].to(w)[:, None], total.to(w)) for place, w, near in _pairs(rows, layer.W)
    )


def _pairs(rows: Tensor, stored: Any) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield parts of the rows, and what the integers stand for, in double precision."""
    size = _at_once(rows)
    for start in range(0, len(rows), size):
        place = slice(start, min(start + size, len(rows)))
        near = stored.on_grid(place).dense(stored.scale.dtype)
        yield place, rows[place].double(), near.double()


def _square(E: Tensor, weight: Tensor | float, G: Tensor | None) -> float:
    return float((weight * E * (E if G is None else E @ G)).sum().clamp(min=0))


def _at_once(rows: Tensor) -> int:
    return max(_AT_ONCE // max(rows.shape[1], 1), 1)
