"""PIFA (arXiv 2501.19090): a matrix of rank r as r of its rows and the coefficients of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from cur import deim

__all__ = ["pivot_rows"]


def pivot_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store ``left @ right`` in ``r (m + n - r)`` numbers, without loss.

    Returns
    -------
    pivots : Tensor of int, shape (r,)
        Independent rows, chosen by the row pivots of an LU factorization.
    rows : Tensor, shape (r, n)
        The product at these rows.
    coefficients : Tensor, shape (m, r)
        Of all rows; the identity at the pivots.
    """
    pivots = torch.as_tensor(deim(torch.linalg.qr(left).Q))
    kept = left[pivots]
    coefficients = torch.linalg.solve(kept, left, left=False)
    coefficients[pivots] = torch.eye(len(pivots), dtype=left.dtype)
    return pivots, kept @ right, coefficients
