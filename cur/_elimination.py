"""Gaussian elimination with partial pivoting for the pivots alone, in the operations of the array API standard."""

from __future__ import annotations

from cur._array import Array, namespace, take_device

BLOCK = 16
"""Columns eliminated one by one before the others are brought up to date by one product."""


def eliminate(X: Array) -> Array:
    """Return the positions of the first `k` row pivots of LU on an `m x k` matrix.

    Left-looking and in blocks, so that most of the work is matrix products. Chosen rows stay where they are, and ties
    go to the lowest of the free ones.
    """
    xp = namespace(X)
    m, k = X.shape
    device = take_device(X)
    free = xp.ones((m,), dtype=xp.bool, device=device)
    positions = xp.arange(m, device=device)
    Xt = X.T
    Lt = Xt[:0, :]  # transposed, so that columns are contiguous
    pivots = positions[:0]
    for start in range(0, k, BLOCK):
        panel = xp.asarray(Xt[start : min(start + BLOCK, k), :], copy=True)
        if start:
            upper = xp.linalg.solve(xp.take(Lt, pivots, axis=1).T, xp.take(panel, pivots, axis=1).T)
            panel -= upper.T @ Lt
        chosen, multipliers = [], []
        for _ in range(panel.shape[0]):
            column = panel[0, :]
            p = xp.reshape(xp.argmax(xp.where(free, xp.abs(column), -1.0)), (1,))
            entries = xp.take(panel, p, axis=1)
            pivot = entries[0, :]
            here = positions == p
            # a column without a pivot is zero where rows are free: the first free row is as good as any
            multiplier = xp.where(free, column / xp.where(pivot == 0, xp.ones_like(pivot), pivot), 0.0)
            multiplier = xp.where(here, 1.0, multiplier)
            free = free & ~here
            panel = panel[1:, :]
            panel -= entries[1:, :] * multiplier[None, :]
            chosen.append(p)
            multipliers.append(multiplier)
        Lt = xp.concat([Lt, xp.stack(multipliers)], axis=0)
        pivots = xp.concat([pivots, *chosen])
    return pivots
