"""ASVD (arXiv 2312.05821): truncated SVD of the columns scaled by the size of their inputs."""

from __future__ import annotations

from torch import Tensor

from benchmarks.baselines.svd import nearest

__all__ = ["activation_scaled"]


def activation_scaled(W: Tensor, magnitude: Tensor, rank: int, *, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the truncated SVD of ``W S``, times ``S^-1``, where ``S = diag(magnitude^alpha)``.

    The paper's search of a rank for each layer, which scores the model once for every layer and ratio, is left out.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight.
    magnitude : Tensor, shape (n,)
        Mean magnitude of every input feature.
    rank : int
        Rank.
    alpha : float, default 0.5
        As in the paper.
    """
    S = magnitude.clamp(min=1e-6 * float(magnitude.mean())) ** alpha
    left, right = nearest(W * S, rank)
    return left, right / S
