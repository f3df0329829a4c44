"""Rows in terms of which no other row has a large coefficient: a dominant submatrix, found by exchanges."""

from __future__ import annotations

from cur._array import Array, adjoint, convert, is_dask, namespace, take, to_numpy

__all__ = ["LARGEST", "dominant"]

LARGEST = 1.01
"""Modulus that no coefficient exceeds. Above one, so that exchanges end: each multiplies the volume by more."""


def dominant(basis: Array, rows: Array) -> Array:
    """Exchange rows of a basis until the coefficients of all others, in terms of them, are at most :data:`LARGEST`.

    Errors of the rows that are kept come back in all others, multiplied by the coefficients: smaller ones are what
    rounding asks for, above all to few bits. After pivots of LU some tenth of the rows are exchanged, each in an update
    of the coefficients, ``2 m k`` operations.

    Parameters
    ----------
    basis : array, shape (m, k)
        Orthonormal columns.
    rows : array of int, shape (k,)
        Positions to begin with, at which the basis is regular; pivots of LU.

    Returns
    -------
    array of int, shape (k,)

    References
    ----------
    Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, "How to find a good submatrix", in Matrix Methods:
    Theory, Algorithms and Applications (2010).
    """
    xp, (m, k) = namespace(basis), basis.shape
    coefficients = adjoint(xp.linalg.solve(adjoint(take(basis, rows, axis=0)), adjoint(basis)))
    if is_dask(coefficients):  # thin, and looked at once for every exchange
        coefficients = to_numpy(coefficients)
        xp = namespace(coefficients)
    chosen = to_numpy(rows).copy()
    for _ in range(m):
        i, j = divmod(int(xp.argmax(xp.abs(coefficients))), k)
        pivot = coefficients[i, j]
        if not bool(abs(pivot) > LARGEST):
            break
        # Row i stands for itself from now on, as row chosen[j] did.
        change = coefficients[i, :] - coefficients[int(chosen[j]), :]
        coefficients = coefficients - (coefficients[:, j] / pivot)[:, None] * change[None, :]
        chosen[j] = i
    return convert(chosen, rows)
