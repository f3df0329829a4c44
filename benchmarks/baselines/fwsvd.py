"""FWSVD (arXiv 2207.00112): truncated SVD of the rows weighted by their Fisher information."""

from __future__ import annotations

from torch import Tensor

from benchmarks.baselines.svd import nearest

__all__ = ["fisher_weighted"]


def fisher_weighted(W: Tensor, fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the minimiser of ``||D (W - left right)||_F``, ``D`` the roots of the rows' Fisher information.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight.
    fisher : Tensor, shape (m,)
        Sum over each row of the mean squares of the gradients of its weights.
    rank : int
        Rank.
    """
    # A row that no gradient reached would be divided by zero; it gets a weight that nothing else feels.
    D = fisher.clamp(min=1e-12 * float(fisher.mean())).sqrt()[:, None]
    left, right = nearest(D * W, rank)
    return left / D, right
