"""Singular values of weights, for plans and reports."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["EXACT_UP_TO", "singular_values", "spectrum"]

EXACT_UP_TO = 2048
"""Smaller side up to which all singular values of a layer are a matter of seconds."""

# Points of a spectrum that a report keeps.
_POINTS = 48


def singular_values(X: Tensor) -> Tensor:
    """Return the singular values of a matrix, non-increasing, float64.

    By the eigenvalues of the smaller Gram matrix, in a fraction of the time: what is below the root of the unit
    roundoff times the largest is lost, which no choice of ranks notices.

    Parameters
    ----------
    X : Tensor
        The matrix, of any floating dtype.
    """
    X = X.to(torch.float64)
    gram = X @ X.mT if X.shape[0] <= X.shape[1] else X.mT @ X
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().flip(0)
    return values


def spectrum(X: Tensor, x_norm: Tensor) -> tuple[tuple[int, float], ...]:
    """Return some singular values by number, relative to the largest; none for matrices too large for an SVD.

    Of the matrix with its columns multiplied by `x_norm`.

    Parameters
    ----------
    X : Tensor
        The weight of the layer.
    x_norm : Tensor
        The norm of each input feature, which weighs the columns.
    """
    if min(X.shape) > EXACT_UP_TO:
        return ()
    values = singular_values(X.to(torch.float64) * x_norm.to(X.device))
    if float(values[0]) == 0:
        return ()
    numbers = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(int))
    return tuple((int(number), float(values[number - 1] / values[0])) for number in numbers)
