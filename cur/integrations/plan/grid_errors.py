r"""What rounding a layer to grids of few bits is expected to cost, before any of it is done.

Nearest plane under damped second moments ``H + a I = A A^T`` and ``G + b I = B B^T`` leaves errors ``E`` of which the
entries of ``A^T E B`` are about independent and uniform between half a step up and down, times the pivots. In the norm
of ``H`` and ``G`` themselves that is ``1/12 sum_ij s_ij^2 p_i q_j`` for steps ``s``, where ``p_i`` is the square of the
pivot ``A_ii`` times ``(A^-1 H A^-T)_ii``, and ``q_j`` likewise: what lies in directions that only the damping has costs
nothing. Steps are those of whole ranges; for few bits ranges are shortened, by which less is lost (`SHORTENED`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cur._lib.errors import NumericalError
from cur.integrations.measure.moments import damped
from cur.integrations.nn import IntegerGrid

__all__ = ["FACTORS", "GRIDS", "SHORTENED", "expected_errors", "pivots"]

GRIDS = (
    *(IntegerGrid(bits, group, symmetric=False) for bits in (2, 3, 4, 5, 6, 8) for group in (128, 64, 32)),
    IntegerGrid(),
)
"""The grids that a budget of bytes chooses among."""

SHORTENED = {2: 0.57, 3: 0.77, 4: 0.93}
"""What is lost where ranges are shortened, relative to whole ranges, by bits; about the same for more. Measured on
layers of SmolLM2-135M by ``benchmarks/frontier.py forms``, where they are 0.39 to 0.78, 0.59 to 1.01 and 0.78 to
1.06."""

FACTORS = 6.0
"""What rounding two factors of a weight loses, relative to rounding the whole weight to the same grid: each entry of a
factor has a part in many of the weight. Measured as above: 2.5 to 10."""


def expected_errors(W: Tensor, rows: Tensor | None, columns: Tensor, grids: Sequence[IntegerGrid] = GRIDS) -> Any:
    """Return the squares of the weighted errors that rounding a weight to some grids is expected to leave.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        The weight, in double precision.
    rows, columns : Tensor, shape (m,) and (n,)
        The results of :func:`pivots` for the second moments of output gradients and of inputs; None for the identity.
    grids : sequence of IntegerGrid, optional
        The grids. By default all that a budget chooses among.

    Returns
    -------
    ndarray, shape (grids,)
        The squares of the errors, ``tr(H E G E^T)``.
    """
    m, n = W.shape
    outputs = torch.ones(m, dtype=W.dtype, device=W.device) if rows is None else rows

    @functools.cache
    def lost(group: int, symmetric: bool) -> float:
        # the sum for steps that are the whole range of a group
        more = -n % group
        X = torch.nn.functional.pad(W, (0, more)).reshape(m, -1, group)
        inputs = torch.nn.functional.pad(columns, (0, more)).reshape(-1, group).sum(1)
        top, bottom = X.amax(2).clamp(min=0), X.amin(2).clamp(max=0)
        span = 2 * torch.maximum(top, -bottom) if symmetric else top - bottom
        return float(outputs @ span.square() @ inputs) / 12

    found = []
    for grid in grids:
        levels = 2**grid.bits - (2 if grid.symmetric else 1)
        found.append(lost(grid.group or n, grid.symmetric) / levels**2 * SHORTENED.get(grid.bits, 1.0))
    return np.array(found)


def pivots(moment: Tensor, damping: float, name: str) -> Tensor:
    """Return what the square of a rounding error of half a unit counts in each direction of nearest plane.

    Parameters
    ----------
    moment : Tensor, shape (n, n) or (n,)
        The second moment, in double precision.
    damping : float
        The share of its mean diagonal that is added to it when weights are rounded.
    name : str
        The name of the layer, for errors.

    Returns
    -------
    Tensor, shape (n,)
        The squares of the pivots of the damped moment, less what belongs to the damping.

    Raises
    ------
    NumericalError
        If the damped moment is not positive definite.
    """
    if moment.ndim == 1:
        return moment
    mean = float(moment.diagonal().mean())
    if mean == 0:  # no input, or no gradient, ever came
        return moment.diagonal().clone()
    L, failed = torch.linalg.cholesky_ex(damped(moment, damping))
    if int(failed):
        raise NumericalError(f"a second moment of {name} is not positive definite with damping {damping}")
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    found: Tensor = L.diagonal().square() * (1 - damping * mean * inverse.square().sum(1)).clamp(min=0)
    return found
