"""Which entries of a matrix an index means, as NumPy reads it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cur._lib import array as _array

__all__ = ["positions"]

Positions = np.ndarray[Any, Any]


def positions(key: Any, shape: tuple[int, int]) -> tuple[Positions, Positions, bool, tuple[int, ...]]:
    """Return the rows and columns that ``A[key]`` reads of an m x n matrix, how they meet, and its shape.

    Parameters
    ----------
    key : object
        What stands between the brackets: integers, slices, arrays of positions or masks, for one dimension or for both.
    shape : tuple of int
        The shape (m, n) of the matrix.

    Returns
    -------
    rows, columns : ndarray of int, one-dimensional
        The positions that are read, not negative.
    crossed : bool
        Whether every row meets every column; else the i-th row meets the i-th column alone.
    shape : tuple of int
        The shape of ``A[key]``, whose entries these are in order.

    Raises
    ------
    IndexError
        If there are more than two indices, one is out of range, or those of rows and columns do not go together.

    Examples
    --------
    >>> rows, columns, crossed, shape = positions((slice(2), [0, -1]), (5, 4))
    >>> rows.tolist(), columns.tolist(), crossed, shape
    ([0, 1], [0, 3], True, (2, 2))
    >>> positions(([1, 2], [3, 0]), (5, 4))[2:]
    (False, (2,))
    """
    (i, i_sliced), (j, j_sliced) = (_along(k, n) for k, n in zip(_pair(key), shape, strict=True))
    if i_sliced or j_sliced:
        return i.ravel(), j.ravel(), True, i.shape + j.shape
    try:
        together = np.broadcast_shapes(i.shape, j.shape)
    except ValueError:
        raise IndexError(
            f"indices of rows and columns must go together one by one, as in NumPy; got shapes {i.shape} and "
            f"{j.shape}; use numpy.ix_ for a block"
        ) from None
    # the open mesh of numpy.ix_, or a single row or column: no row is read twice
    if i.size == 1 or j.size == 1 or (i.ndim == j.ndim == 2 and i.shape[1] == 1 == j.shape[0]):
        return i.ravel(), j.ravel(), True, together
    i, j = np.broadcast_arrays(i, j)
    return i.ravel(), j.ravel(), False, together


def _pair(key: Any) -> tuple[Any, Any]:
    """Return the indices of both dimensions."""
    whole = slice(None)
    keys = [k for k in (key if isinstance(key, tuple) else (key,)) if k is not Ellipsis]
    if len(keys) == 1 and _is_mask(keys[0]):
        keys = list(np.nonzero(_host(keys[0])))
    if len(keys) > 2 or any(k is None for k in keys):
        raise IndexError(f"a factorization has two dimensions; got {len(keys)} indices, {key!r}")
    if len(keys) == 1 and isinstance(key, tuple) and key[0] is Ellipsis:
        return whole, keys[0]
    return (*keys, *[whole] * (2 - len(keys)))


def _is_mask(key: Any) -> bool:
    host = _host(key)
    return isinstance(host, np.ndarray) and host.dtype == bool and host.ndim == 2


def _host(key: Any) -> Any:
    return _array.to_numpy(key) if _array.is_dense(key) else key


def _along(key: Any, n: int) -> tuple[Positions, bool]:
    """Return positions along a dimension of `n`, and whether they keep a dimension of their own."""
    return np.asarray(np.arange(n)[_host(key)]), isinstance(key, slice)
