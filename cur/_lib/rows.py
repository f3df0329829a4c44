"""Rows of a matrix: their norms, and positions of them that are drawn or filled in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse.linalg

from cur._lib.array import Array, is_sparse, namespace, to_numpy

__all__ = ["draw", "fill", "row_norms"]


def draw(weights: np.ndarray[Any, Any], count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw distinct positions in proportion to `weights`; those of weight zero only when nothing else is left.

    Parameters
    ----------
    weights : ndarray, shape (m,)
        The weights of the positions, not negative; only their ratios count.
    count : int
        The number of positions to draw, at most m.
    rng : Generator
        The source of chance.

    Returns
    -------
    ndarray of int, shape (count,)
        The positions, in the order in which they were drawn.

    Examples
    --------
    >>> import numpy as np
    >>> draw(np.array([0.0, 3.0, 0.0]), 2, np.random.default_rng(0)).tolist()
    [1, 0]
    """
    total = weights.sum()
    if not total > 0:
        return fill([], count, len(weights))
    p = weights / total  # may underflow to zero where the weight does not
    drawn = rng.choice(len(weights), min(count, int(np.count_nonzero(p))), replace=False, p=p)
    return fill(drawn.tolist(), count, len(weights))


def fill(chosen: list[int], count: int, m: int) -> np.ndarray[Any, Any]:
    """Complete a choice by the lowest free positions: what is left of the basis is zero, and any row serves.

    Parameters
    ----------
    chosen : list of int
        The positions that were chosen, at most `count`.
    count : int
        The number of positions that are wanted.
    m : int
        The number of positions there are.

    Returns
    -------
    ndarray of int, shape (count,)
        The positions that were chosen, and then the lowest of the others.

    Examples
    --------
    >>> fill([1], 3, 5).tolist()
    [1, 0, 2]
    """
    free = np.setdiff1d(np.arange(m), chosen)
    return np.concatenate([np.asarray(chosen, dtype=np.int64), free[: count - len(chosen)]])


def row_norms(matrix: Array) -> np.ndarray[Any, Any]:
    """Return the norms of the rows, relative to each other, at any scale.

    Parameters
    ----------
    matrix : matrix, shape (m, n)
        The matrix, dense or sparse.

    Examples
    --------
    >>> import numpy as np
    >>> row_norms(np.array([[3.0, 4.0], [0.0, 2.0]])).tolist()
    [5.0, 2.0]
    """
    norms = _plain_norms(matrix)
    info = namespace(matrix).finfo(matrix.dtype)
    low, high = math.sqrt(float(info.smallest_normal)) / float(info.eps), math.sqrt(float(info.max))
    if low < float(norms.max()) < high:
        return norms
    xp = namespace(matrix)
    # squares leave the range
    largest = float(abs(matrix).max() if is_sparse(matrix) else xp.max(xp.abs(matrix)))
    if not 0.0 < largest < math.inf:
        return norms
    return _plain_norms(matrix * (1 / max(largest, float(info.smallest_normal))))


def _plain_norms(matrix: Array) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        if is_sparse(matrix):
            return np.asarray(scipy.sparse.linalg.norm(matrix, axis=1), dtype=np.float64)
        xp = namespace(matrix)
        return to_numpy(xp.sqrt(xp.sum(xp.abs(matrix) ** 2, axis=1))).astype(np.float64)
