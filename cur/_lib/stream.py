"""Reading a matrix that comes as blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cur._lib import array as _array
from cur._lib import promotion
from cur._lib.products import thin
from cur._lib.promotion import check_promoted
from cur._lib.validate import check_finite_norm, check_matrix

BLOCK_BYTES = 1 << 26
"""Size of the blocks that a whole array is cut into."""


def read_blocks(source: Any) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Yield dense blocks of rows on the host, checked: in the working dtype, and as given where that lost digits.

    Parameters
    ----------
    source : array, callable or iterable
        A whole matrix (`numpy.memmap`, Dask, sparse, ...), which is cut into blocks; a callable that returns an
        iterator of blocks; or the blocks themselves.
    """
    width = None
    for position, block in enumerate(_parts(source)):
        name = f"blocks[{position}]"
        if _array.is_operator(block):
            raise TypeError(f"`{name}` must give its rows; a LinearOperator does not; multiply it with an identity")
        given, block = block, check_promoted(block, name)
        if width is not None and block.shape[1] != width:
            raise ValueError(
                f"`{name}` must have as many columns as the blocks before, {width}; got shape {tuple(block.shape)}; "
                "check how the rows were cut"
            )
        width = block.shape[1]
        host = _array.to_numpy(thin(block))
        if not np.isfinite(host).all():
            check_finite_norm(np.nan, host, name)
        rounded = promotion.is_rounded(given, block)
        yield host, _array.to_numpy(thin(promotion.as_given(given, block))) if rounded else host
    if width is None:
        raise ValueError(
            "`blocks` must yield at least one block of rows; it ended at once; check whether it was read before"
        )


def _parts(source: Any) -> Iterable[Any]:
    if callable(source) and not _array.is_operator(source):  # SciPy's operators can be called
        parts: Iterable[Any] = source()
        return parts
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return _cut(source)
    if hasattr(source, "to_numpy"):  # a table, whose iterator gives the names of its columns
        check_matrix(source, "blocks")
    try:
        parts = iter(source)
    except TypeError:
        raise TypeError(
            "`blocks` must be a matrix, an iterable of blocks of rows, or a callable that returns one; "
            f"got {type(source).__name__}"
        ) from None
    return parts


def _cut(A: Any) -> Iterator[Any]:
    if _array.is_operator(A):
        raise TypeError("`blocks` must give its rows; a LinearOperator does not; use subspace.randomised for it")
    if A.shape is None or len(A.shape) != 2 or 0 in A.shape:
        raise ValueError(f"`blocks` must be a matrix with rows and columns; got shape {A.shape and tuple(A.shape)}")
    if _array.is_dense(A) or _array.is_dask(A) or _array.is_sparse(A):
        check_matrix(A, "blocks")
    m, n = A.shape
    step = max(1, BLOCK_BYTES // (8 * n))
    if _array.is_sparse(A):
        A = A.tocsr()
    # the standard leaves slices that end beyond the array undefined
    return (A[i : min(i + step, m), :] for i in range(0, m, step))
