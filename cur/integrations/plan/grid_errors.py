r"""What rounding a layer to grids of few bits is expected to cost, before any of it is done.

Nearest plane under damped second moments ``H + a I = A A^T`` and ``G + b I = B B^T`` leaves errors ``E`` of which the
entries of ``A^T E B`` are about independent and uniform between half a step up and down, times the pivots. In the norm
of ``H`` and ``G`` themselves that is ``1/12 sum_ij s_ij^2 p_i q_j`` for steps ``s``, where ``p_i`` is the square of the
pivot ``A_ii`` times ``(A^-1 H A^-T)_ii``, and ``q_j`` likewise: what lies in directions that only the damping has costs
nothing. Steps are those of whole ranges. For few bits ranges are shortened, by which some rows tell how much less is
lost; and what entries make up for each other takes them beyond the ends of a grid, which costs a part more (`BEYOND`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cur._lib.errors import NumericalError
from cur._lib.steps import FACTORS as PARTS
from cur._lib.steps import least
from cur.integrations.measure.moments import damped
from cur.integrations.nn import IntegerGrid

__all__ = ["BEYOND", "FACTORS", "GRIDS", "expected_errors", "pivots"]

GRIDS = (
    *(IntegerGrid(bits, group, symmetric=False) for bits in (2, 3, 4, 5, 6, 8) for group in (128, 64, 32)),
    IntegerGrid(),
)
"""The grids that a budget of bytes chooses among."""

BEYOND = {2: 1.5, 3: 1.25, 4: 1.12}
"""What is lost by bits, relative to nearest rounding of entries by themselves, with shortened ranges; 1.06 for more
bits. Measured on layers of SmolLM2-135M and on random matrices by ``benchmarks/frontier.py forms``."""

_ROWS, _TRIED = 16, PARTS[::3]
"""Rows that tell what shortened ranges save, and the parts of ranges that are tried."""

FACTORS = 6.0
"""What rounding two factors of a weight loses, relative to rounding the whole weight to the same grid: each entry of a
factor has a part in many of the weight. Measured as above: 2 to 11 and in the middle 7, but several hundred in the
first block, where rounding a whole weight loses next to nothing."""


def expected_errors(W: Tensor, rows: Tensor | None, columns: Tensor, grids: Sequence[IntegerGrid] = GRIDS) -> Any:
    """Return the squares of the weighted errors that rounding a weight to some grids is expected to leave.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        The weight, in any precision.
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
    outputs = torch.ones(m, dtype=torch.float64, device=W.device) if rows is None else rows
    ends = {
        (group, symmetric): _Ranges.of(W, outputs, columns, group, symmetric) for group, symmetric in _kinds(grids, n)
    }
    return np.array([ends[grid.group or n, grid.symmetric].lost(grid) for grid in grids])


def _kinds(grids: Sequence[IntegerGrid], n: int) -> set[tuple[int, bool]]:
    return {(grid.group or n, grid.symmetric) for grid in grids}


@dataclass(frozen=True, eq=False)
class _Ranges:
    """The ranges of the groups of a weight, and what an error of a twelfth of their squares is worth.

    Attributes
    ----------
    whole : float
        The sum of the squares of all ranges, as they count, over 12.
    X : array, shape (r, groups, group)
        Some rows, in the proportion in which they count.
    span, bottom : array, shape (r, groups)
        The ranges of their groups, and where these begin.
    inputs : array, shape (groups, group)
        What each column counts.
    """

    whole: float
    X: Any
    span: Any
    bottom: Any
    inputs: Any

    @classmethod
    def of(cls, W: Tensor, outputs: Tensor, columns: Tensor, group: int, symmetric: bool) -> _Ranges:
        m, n = W.shape
        more = -n % group
        X = (nn.functional.pad(W, (0, more)) if more else W).reshape(m, -1, group)
        inputs = nn.functional.pad(columns, (0, more)).reshape(-1, group)
        top, bottom = (end.to(outputs) for end in (X.amax(2).clamp(min=0), X.amin(2).clamp(max=0)))
        span = 2 * torch.maximum(top, -bottom) if symmetric else top - bottom
        each = outputs * (span.square() @ inputs.sum(1))
        reached = each.cumsum(0) / each.sum().clamp(min=torch.finfo(each.dtype).tiny)
        places = (torch.arange(min(_ROWS, m), dtype=each.dtype, device=each.device) + 0.5) / min(_ROWS, m)
        some = torch.searchsorted(reached, places).clamp(max=m - 1)
        parts = (X[some].to(outputs), span[some], bottom[some], inputs)
        return cls(float(each.sum()) / 12, *(part.cpu().numpy() for part in parts))

    def lost(self, grid: IntegerGrid) -> float:
        levels = 2**grid.bits - (2 if grid.symmetric else 1)
        found: float = self.whole / levels**2 * BEYOND.get(grid.bits, 1.06)
        return found * self._shortened(levels) if grid.bits in BEYOND and not grid.symmetric else found

    def _shortened(self, levels: int) -> float:
        """Return what nearest rounding loses with the best ranges, relative to uniform errors on whole ones."""
        span = np.where(self.span > 0, self.span, 1.0)
        X, inputs = self.X.reshape(len(self.X), -1), self.inputs.ravel()
        steps, zeros = least(X, (span / levels, self.bottom), inputs, 0, levels, lambda step: step, _TRIED)
        assert zeros is not None
        q = np.clip(np.rint(self.X / steps[:, :, None] + zeros[:, :, None]), 0, levels)
        lost = (((q - zeros[:, :, None]) * steps[:, :, None] - self.X) ** 2 * self.inputs).sum((1, 2))
        uniform = (self.span**2 @ self.inputs.sum(1)) / 12 / levels**2
        live = uniform > 0
        return float((lost[live] / uniform[live]).mean()) if live.any() else 1.0


def pivots(moment: Tensor, damping: float, name: str, *, counted: Tensor | None = None) -> Tensor:
    """Return what the square of a rounding error of half a unit counts in each direction of nearest plane.

    Parameters
    ----------
    moment : Tensor, shape (n, n) or (n,)
        The second moment, in double precision.
    damping : float
        The share of its mean diagonal that is added to it when weights are rounded.
    name : str
        The name of the layer, for errors.
    counted : Tensor, optional
        The moment under which errors count, where that is another than the one they are rounded under.

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
    squares = L.diagonal().square()
    left = 1 - damping * mean * inverse.square().sum(1) if counted is None else ((inverse @ counted) * inverse).sum(1)
    found: Tensor = squares * left.clamp(min=0)
    return found
