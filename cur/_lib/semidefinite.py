"""Triangular factors of positive semidefinite matrices, without pivoting, singular ones included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["unit_lower"]

Matrix = np.ndarray[Any, Any]

UNIT = 2.0**-53
BLOCK = 32


def unit_lower(G: Matrix, u: float = UNIT) -> tuple[Matrix, Matrix, float] | None:
    """Factor ``G = L diag(p) L^T``, from the first row and column to the last.

    A pivot that is rounding only, beside the diagonal entry that it comes from, becomes 0 and so does what stands below
    it: in that direction the matrix vanishes. The comparison is with the entry itself, since the factorization does
    not care how large entries are beside each other.

    Parameters
    ----------
    G : array, shape (n, n)
        Symmetric, in double precision.
    u : float
        The unit roundoff of the precision in which the matrix was computed.

    Returns
    -------
    lower : array, shape (n, n)
        Unit lower triangular.
    pivots : array, shape (n,)
        Non-negative.
    missed : float
        A bound on the Frobenius norm of the difference of both sides.

    or None where the matrix has a negative eigenvalue beyond rounding.
    """
    n = len(G)
    diagonal = G.diagonal()
    most = float(diagonal.max())
    noise = 100 * n * u * max(most, 0.0)
    L, pivots = np.zeros((n, n)), np.zeros(n)
    dropped = 0.0
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        panel = G[start:, start:stop] - (L[start:, :start] * pivots[:start]) @ L[start:stop, :start].T
        for j in range(stop - start):
            column = panel[j + 1 :, j]
            pivot = float(panel[j, j])
            if pivot <= 4 * n * u * diagonal[start + j]:
                peaks = np.maximum(diagonal[start + j + 1 :], 0.0)
                if pivot < -noise or bool((column**2 > 4 * noise * (peaks + noise)).any()):
                    return None
                dropped += pivot**2 + 2 * float(column @ column)
                column[:] = 0.0
            else:
                pivots[start + j] = pivot
                column /= pivot
                panel[j + 1 :, j + 1 :] -= (pivot * column[: stop - start - j - 1]) * column[:, None]
            panel[: j + 1, j] = 0.0
            panel[j, j] = 1.0
        L[start:, start:stop] = panel
    rounding = (n + 2) * UNIT * float(np.sum(np.maximum(diagonal, 0.0)))
    return L, pivots, math.sqrt(dropped) + rounding
