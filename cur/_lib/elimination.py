"""Gaussian elimination with partial pivoting for the pivots alone, in the operations of the array API standard."""

from __future__ import annotations

from cur._lib.array import Array, namespace, take_device

BLOCK = 8
"""Columns eliminated one by one; at 4096 x 256, 4 took longer, and 16 and 32 as long."""


def eliminate(X: Array) -> Array:
    """Return the positions of the first `k` row pivots of LU on an `m x k` matrix.

    By halves, so that nearly all of the work is matrix products. Chosen rows stay where they are, and ties go to the
    lowest of the free ones.

    References
    ----------
    Toledo, SIAM J. Matrix Anal. Appl. 18 (1997), for the recursion.
    """
    xp = namespace(X)
    free = xp.ones((X.shape[0],), dtype=xp.bool, device=take_device(X))
    # transposed, so that columns are contiguous
    return _eliminate(xp.asarray(X.T, copy=True), free)[0]


def _eliminate(columns: Array, free: Array) -> tuple[Array, Array, Array]:
    """Return pivots, multipliers and the rows that are still free; `columns` are the rows of the argument."""
    if columns.shape[0] <= BLOCK:
        return _eliminate_block(columns, free)
    xp = namespace(columns)
    half = columns.shape[0] // 2
    pivots, L, free = _eliminate(columns[:half, :], free)
    later = columns[half:, :]
    upper = xp.linalg.solve(xp.take(L, pivots, axis=1).T, xp.take(later, pivots, axis=1).T)
    later -= upper.T @ L
    later_pivots, later_L, free = _eliminate(later, free)
    return xp.concat([pivots, later_pivots]), xp.concat([L, later_L]), free


def _eliminate_block(panel: Array, free: Array) -> tuple[Array, Array, Array]:
    xp = namespace(panel)
    is_complex = xp.isdtype(panel.dtype, "complex floating")
    positions = xp.arange(panel.shape[1], device=take_device(panel))
    # rows chosen before hold rounding; as zeros they are never chosen again, and their multipliers are zero
    panel = xp.where(free, panel, xp.zeros_like(panel))
    pivots, multipliers = [], []
    for _ in range(panel.shape[0]):
        column, panel = panel[0, :], panel[1:, :]
        p = int(xp.argmax(xp.abs(column)))
        has_pivot = bool(column[p] != 0)
        if not has_pivot:  # the first free row is as good as any
            p = int(xp.argmax(xp.astype(free, xp.int8)))
        here = positions == p
        free = free & ~here
        multiplier = column / column[p] if has_pivot else xp.zeros_like(column)
        if is_complex or not has_pivot:  # a real number divided by itself is 1
            multiplier = xp.where(here, xp.ones_like(column), multiplier)
        panel -= panel[:, p : p + 1] * multiplier[None, :]
        pivots.append(p)
        multipliers.append(multiplier)
    return xp.asarray(pivots, dtype=positions.dtype, device=take_device(panel)), xp.stack(multipliers), free
