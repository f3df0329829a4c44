"""Rows in terms of which no other row has a large coefficient: a dominant submatrix, found by exchanges."""

from __future__ import annotations

from cur._lib.array import Array, adjoint, convert, detach, is_dask, namespace, take, to_numpy

__all__ = ["LARGEST", "dominant"]

LARGEST = 1.01
"""Modulus that no coefficient exceeds, up to rounding; above one, so that each exchange multiplies the volume."""


def dominant(basis: Array, rows: Array) -> Array:
    """Exchange rows of a basis until the coefficients of all others, in terms of them, are at most :data:`LARGEST`.

    Errors of the rows that are kept come back in all others, multiplied by the coefficients: smaller ones are what
    rounding asks for, above all to few bits. After pivots of LU some tenth of the rows are exchanged, each in an update
    of the coefficients, ``2 m k`` operations.

    Parameters
    ----------
    basis : array, shape (m, k)
        The basis, of orthonormal columns.
    rows : array of int, shape (k,)
        Positions to begin with, at which the basis is regular; pivots of LU.

    Returns
    -------
    array of int, shape (k,)
        The positions of the rows that are kept, in the places of those that they were exchanged for.

    References
    ----------
    Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, "How to find a good submatrix", in Matrix Methods:
    Theory, Algorithms and Applications (2010).

    Examples
    --------
    >>> import numpy as np
    >>> basis = np.linalg.qr(np.array([[1.0], [4.0], [-2.0]]))[0]
    >>> dominant(basis, np.array([0])).tolist()
    [1]
    """
    # Thin, and looked at once for every exchange; which rows are chosen has no derivative.
    basis, chosen = to_numpy(basis) if is_dask(basis) else detach(basis), to_numpy(rows).copy()
    xp, (m, k) = namespace(basis), basis.shape
    coefficients = adjoint(xp.linalg.solve(adjoint(take(basis, convert(chosen, basis), axis=0)), adjoint(basis)))
    for _ in range(m):  # far more than it takes
        i, j = divmod(int(xp.argmax(xp.abs(coefficients))), k)
        pivot = coefficients[i, j]
        if not bool(abs(pivot) > LARGEST) or i in chosen:
            break
        # Row i stands for itself from now on, as row chosen[j] did.
        change = coefficients[i, :] - coefficients[int(chosen[j]), :]
        coefficients = coefficients - (coefficients[:, j] / pivot)[:, None] * change[None, :]
        chosen[j] = i
    return convert(chosen, rows)
