"""Matrices brought to the form and the dtype to compute in."""

from __future__ import annotations

from typing import Any

import numpy as np

from cur._lib import array as _array
from cur._lib.operator import checked
from cur._lib.products import largest
from cur._lib.validate import check_matrix

__all__ = ["as_given", "check_promoted", "is_rounded", "promote"]


def promote(A: Any, name: str = "A", dtype: Any | None = None) -> Any:
    """Bring a checked matrix, cut out of differentiation, to the form and the dtype to compute in.

    Of SciPy's sparse formats only two can all that is asked of a matrix: products, slices and entries. `dtype` is that
    of a matrix it goes with, by default its own `working_dtype`.

    Parameters
    ----------
    A : matrix
        The matrix, as `check_matrix` accepts it.
    name : str, default "A"
        The argument's name in errors.
    dtype : dtype, optional
        The dtype of a matrix it goes with. By default its own `working_dtype`.

    Returns
    -------
    matrix
        The matrix itself, where it has that form and dtype; a sparse one as CSR or CSC, an operator with its adjoint
        checked.

    Raises
    ------
    TypeError, ValueError
        If an operator does not fit the dtype, or gives products that are not finite.
    """
    if _array.is_operator(A):
        return checked(A, name, dtype)
    if isinstance(A, np.ndarray) and dtype is None and A.dtype.char in "fdFD":
        return A  # the usual case, and small matrices take no longer than such questions
    A, dtype = _array.detach(A), _array.working_dtype(A) if dtype is None else dtype
    with np.errstate(over="ignore"):  # what is beyond the range becomes infinite, which is told of
        if _array.is_sparse(A):
            A = A if A.dtype == dtype else A.astype(dtype)
            return A if A.format in ("csr", "csc") else A.tocsr()
        return A if A.dtype == dtype else _array.namespace(A).astype(A, dtype)


def is_rounded(A: Any, promoted: Any) -> bool:
    """Tell whether a matrix lost digits when it was promoted: integers that are too long, or extended precision.

    Parameters
    ----------
    A : matrix
        The matrix as it was given.
    promoted : matrix
        The matrix that :func:`promote` made of it.

    Returns
    -------
    bool
        False for operators, of which only products are known.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[2**53 + 1]])
    >>> is_rounded(A, promote(A)), is_rounded(A - 2**53, promote(A - 2**53))
    (True, False)
    """
    if _array.is_operator(A) or A.dtype == promoted.dtype:
        return False
    dtype = np.dtype(A.dtype) if _array.is_sparse(A) or isinstance(A, np.ndarray) or _array.is_dask(A) else None
    if dtype is not None and dtype.char in "gG":
        if isinstance(A, np.ndarray):
            return not np.array_equal(A, promoted, equal_nan=True)
        return True
    if dtype is None and not _array.namespace(A).isdtype(A.dtype, "integral"):
        return False
    if dtype is not None and dtype.kind not in "iu":
        return False
    return bool(largest(promoted) * _array.unit_roundoff(promoted.dtype, promoted) >= 0.5)


def as_given(A: Any, promoted: Any) -> Any:
    """Return the matrix that rows and columns are taken from: the promoted one, where nothing of it was lost.

    Of other libraries too, which multiply arrays of one dtype only.

    Parameters
    ----------
    A : matrix
        The matrix as it was given.
    promoted : matrix
        The matrix that :func:`promote` made of it.
    """
    own = isinstance(A, np.ndarray) or _array.is_sparse(A) or _array.is_dask(A)
    return promote(A, dtype=A.dtype) if own and is_rounded(A, promoted) else promoted


def check_promoted(A: Any, name: str = "A", dtype: Any | None = None) -> Any:
    """Return a checked matrix in the form and dtype to compute in.

    Parameters
    ----------
    A : matrix
        What was given as a matrix.
    name : str, default "A"
        The argument's name in errors.
    dtype : dtype, optional
        The dtype of a matrix it goes with. By default its own `working_dtype`.

    Raises
    ------
    TypeError
        If it is no matrix of numbers, or complex beside a real dtype.
    ValueError
        If it has not two dimensions, or a side of length zero.
    """
    check_matrix(A, name)
    if "complex" in str(A.dtype) and dtype is not None and "complex" not in str(dtype):
        raise TypeError(f"`{name}` must be real for a real `A`; got dtype {A.dtype}; convert `A` to complex")
    return promote(A, name, dtype)
