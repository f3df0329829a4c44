"""CURing (arXiv 2501.04211): columns and rows chosen by WANDA and DEIM, with the best core between them."""

from __future__ import annotations

from torch import Tensor

from cur import deim_cur, scores

__all__ = ["cur_factors"]


def cur_factors(W: Tensor, x_norm: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``C U`` (m x r) and ``R`` (r x n) of the paper's choice, to be stored in ``r (m + n) + r^2`` numbers.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight.
    x_norm : Tensor, shape (n,)
        Norm of every input feature.
    rank : int
        Rows and columns to keep.
    """
    C, U, R = deim_cur(W, rank=rank, importance=scores.wanda(W, x_norm))
    return C @ U, R
