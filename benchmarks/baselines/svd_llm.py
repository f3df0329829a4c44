"""SVD-LLM (arXiv 2403.07378): truncated SVD under the second moments of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["whitened"]


def whitened(W: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of ``W S``, with ``S S^T`` the second moment, times ``S^-1``, at all ranks.

    Truncated at any rank it minimises ``||(W - left right) X||_F`` over the inputs ``X`` of the moment, and the loss is
    the root of the sum of the squares of the singular values that are cut off: the paper's Theorem 3.2.

    Parameters
    ----------
    W : Tensor, shape (m, n)
        Weight.
    moment : Tensor, shape (n, n)
        ``E[x x^T]`` of the inputs, positive definite.

    Returns
    -------
    left : Tensor, shape (m, k)
    singular_values : Tensor, shape (k,)
    right : Tensor, shape (k, n)
        ``left diag(singular_values) right`` is ``W``.
    """
    S = torch.linalg.cholesky(moment)
    U, s, V = torch.linalg.svd(W @ S, full_matrices=False)
    return U, s, torch.linalg.solve_triangular(S, V, upper=False, left=False)
