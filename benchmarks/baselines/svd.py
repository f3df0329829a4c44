"""Truncated SVD: the nearest matrix of a rank, whatever the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest"]


def nearest(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``left`` (m x r) and ``right`` (r x n), the minimiser of ``||W - left right||_F`` (Eckart and Young)."""
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * s[:rank], V[:rank]
