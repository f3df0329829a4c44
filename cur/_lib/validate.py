"""Argument checks: each bad input gets one sentence with the parameter, the rule, the value and the remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import numpy as np

from cur._lib import array as _array

__all__ = [
    "as_generator",
    "as_integer",
    "check_basis",
    "check_choice",
    "check_companion",
    "check_count",
    "check_damping",
    "check_dense",
    "check_finite_norm",
    "check_finite_product",
    "check_matrix",
    "check_plain",
    "check_power_iterations",
    "check_probability",
    "check_rank",
    "check_rank_or_tol",
    "check_tol",
]


def check_matrix(A: Any, name: str = "A") -> None:
    """Accept a non-empty two-dimensional numeric array of a known library, a sparse matrix or a linear operator.

    Parameters
    ----------
    A : object
        What was given as a matrix.
    name : str, default "A"
        The argument's name in errors.

    Raises
    ------
    TypeError
        If it is of an unknown kind, masked, traced, or holds no numbers.
    ValueError
        If it has not two dimensions, a side of length zero, or chunks of unknown size.
    """
    known = _array.is_sparse(A) or _array.is_operator(A) or _array.is_dense(A) or _array.is_dask(A)
    if not known:
        raise TypeError(
            f"`{name}` must be an array (NumPy, torch, CuPy, JAX, Dask, ...), a scipy.sparse matrix or a "
            f"LinearOperator; got {type(A).__name__}; {_remedy(A)}"
        )
    check_plain(A, name)
    if A.ndim != 2:
        raise ValueError(
            f"`{name}` must have two dimensions, rows and columns; got shape {tuple(A.shape)}; "
            "reshape it, for example to (1, n) or (n, 1)"
        )
    if 0 in A.shape:
        raise ValueError(f"`{name}` must have at least one row and one column; got shape {tuple(A.shape)}")
    if any(math.isnan(side) for side in A.shape):
        raise ValueError(
            f"`{name}` must have a known shape; got {tuple(A.shape)}; call its compute_chunk_sizes() first"
        )
    _check_numeric(A, name)


def _remedy(A: Any) -> str:
    """Return what makes an array of an object that is none."""
    if hasattr(A, "to_numpy"):  # pandas, polars, xarray
        return "pass its .to_numpy()"
    if isinstance(A, (list, tuple, np.matrix)):
        return "convert it with numpy.asarray"
    if hasattr(A, "shape") and hasattr(A, "dtype") and hasattr(A, "__getitem__"):  # h5py, zarr, netCDF
        return "read it into memory with numpy.asarray, or let stream_cur read it in blocks"
    return "convert it to one of these"


def check_plain(A: Any, name: str) -> None:
    """Refuse arrays of a known library whose entries are masked, absent, or multiplied in another way.

    Parameters
    ----------
    A : array
        The array, of a known library.
    name : str
        The argument's name in errors.

    Raises
    ------
    TypeError
        If it is a sparse tensor, a masked array, a ``numpy.matrix``, a lazy array of other chunks than NumPy's, or one
        without values.
    """
    if _array.is_sparse_tensor(A):
        raise TypeError(f"`{name}` must be dense, or sparse of SciPy; got a tensor of layout {A.layout}; convert it")
    chunk = A._meta if _array.is_dask(A) else A
    if isinstance(chunk, (np.ma.MaskedArray, np.matrix)):
        remedy = "with numpy.asarray" if isinstance(chunk, np.matrix) else "with filled(), which fills the gaps"
        raise TypeError(
            f"`{name}` must be a plain array; got {type(chunk).__name__}, whose products mean something else; convert "
            f"it {remedy}"
        )
    if _array.is_dask(A) and not isinstance(chunk, np.ndarray):
        raise TypeError(
            f"`{name}` must have chunks of NumPy arrays; got {type(chunk).__name__}; convert them with map_blocks"
        )
    if _array.is_abstract(A):
        raise TypeError(
            f"`{name}` must hold values, which decide what is chosen; got one that is traced (jit, vmap, func) or has "
            "a shape only (meta); call this function outside of the transformation, on arrays that were computed"
        )


def check_dense(A: Any, name: str, dimensions: tuple[int, ...] = (2,), what: str = "a matrix") -> None:
    """Accept a plain dense numeric array in memory that is not empty.

    Parameters
    ----------
    A : object
        What was given as an array.
    name : str
        The argument's name in errors.
    dimensions : tuple of int, default (2,)
        The numbers of dimensions that are allowed.
    what : str, default "a matrix"
        A description of such an array, for errors.

    Raises
    ------
    TypeError
        If it is not dense, not plain, or holds no numbers.
    ValueError
        If it is empty or has another number of dimensions.
    """
    if not _array.is_dense(A):
        raise TypeError(f"`{name}` must be a dense array; got {type(A).__name__}; {_remedy(A)}")
    check_plain(A, name)
    if A.ndim not in dimensions or 0 in A.shape:
        raise ValueError(f"`{name}` must be {what}, and not empty; got shape {tuple(A.shape)}; reshape it")
    _check_numeric(A, name)


def _check_numeric(A: Any, name: str) -> None:
    if not _is_numeric(A):
        raise TypeError(
            f"`{name}` must hold real or complex numbers; got dtype {A.dtype}; convert it with astype(float)"
        )


def _is_numeric(A: Any) -> bool:
    dtype = A.dtype
    if not isinstance(A, np.ndarray) and (_array.is_dense(A) or _array.is_dask(A)):
        xp = _array.namespace(A)
        try:
            return bool(xp.isdtype(dtype, ("numeric", "bool"))) or dtype in _half_precisions(xp)
        except TypeError:  # dtypes outside the standard, such as NumPy's object
            return dtype in _half_precisions(xp)
    return np.dtype(dtype).kind in "biufc"


def _half_precisions(xp: Any) -> tuple[Any, ...]:
    return tuple(getattr(xp, name) for name in ("float16", "bfloat16") if hasattr(xp, name))


def check_basis(basis: Any) -> None:
    """Accept a dense two-dimensional floating array with at least one column.

    Parameters
    ----------
    basis : object
        What was given as a basis.

    Raises
    ------
    TypeError
        If it is no dense array of floating-point numbers.
    ValueError
        If it has not two dimensions, is empty, or not finite.
    """
    check_dense(basis, "basis")
    xp = _array.namespace(basis)
    if not xp.isdtype(basis.dtype, ("real floating", "complex floating")):
        raise TypeError(f"`basis` must hold floating-point numbers; got dtype {basis.dtype}")
    if not bool(xp.all(xp.isfinite(basis))):
        raise ValueError("`basis` must be finite; it holds NaN or inf; look where it was computed")


def as_integer(value: Any, name: str) -> int:
    """Return an integer of any kind as Python's.

    Parameters
    ----------
    value : object
        What was given as an integer.
    name : str
        The argument's name in errors.

    Raises
    ------
    TypeError
        If it is none, or a truth value.

    Examples
    --------
    >>> as_integer(np.int64(3), "bits")
    3
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be an integer; got {value!r}")
    try:
        index: int = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer; got {value!r} of type {type(value).__name__}") from None
    return int(index)


def check_count(count: Any, *, default: int, most: int, what: str, least: int = 1, name: str = "count") -> int:
    """Return the number of indices to choose, between `least` and `most`.

    Parameters
    ----------
    count : object
        What was given as a number; None for the default.
    default : int
        The number where none is given, or `most` where that is less.
    most : int
        The largest number that is allowed.
    what : str
        A description of what `most` counts, for errors.
    least : int, default 1
        The smallest number that is allowed.
    name : str, default "count"
        The argument's name in errors.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is out of range.

    Examples
    --------
    >>> check_count(None, default=5, most=3, what="rows"), check_count(2, default=5, most=3, what="rows")
    (3, 2)
    """
    if count is None:
        return min(default, most)
    count = as_integer(count, name)
    if not least <= count <= most:
        raise ValueError(f"`{name}` must be between {least} and {most}, the number of {what}; got {count}")
    return int(count)


def check_damping(value: Any) -> None:
    """Require a finite number that is not negative.

    Parameters
    ----------
    value : object
        What was given as `damping`.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`damping` must be a number; got {value!r} of type {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"`damping` must be non-negative and finite; got {value!r}; 0.01 is usual")


def check_power_iterations(value: Any) -> None:
    """Require a non-negative integer, or None for the default.

    Parameters
    ----------
    value : object
        What was given as `power_iterations`.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is negative.
    """
    if value is not None and as_integer(value, "power_iterations") < 0:
        raise ValueError(f"`power_iterations` must not be negative; got {value!r}; 0, 1 or 2 are usual")


def check_probability(value: Any) -> None:
    """Require a chance of failure that a sketch can have.

    Parameters
    ----------
    value : object
        What was given as `failure_probability`.

    Raises
    ------
    ValueError
        If it is no number between 0 and 1, or below 1e-300.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0.0 < value < 1.0:
        raise ValueError(
            f"`failure_probability` must be a number between 0 and 1, both excluded; got {value!r}; 1e-6 is usual"
        )
    if value < 1e-300:  # a search shares it out, and the shares would vanish
        raise ValueError(f"`failure_probability` must be at least 1e-300; got {value!r}; 1e-6 is usual")


def check_rank_or_tol(rank: Any, tol: Any) -> None:
    """Require exactly one of `rank` and `tol`.

    Parameters
    ----------
    rank : object
        What was given as `rank`; None if it was not.
    tol : object
        What was given as `tol`; None if it was not.

    Raises
    ------
    TypeError
        If both are given, or neither.
    """
    if rank is None and tol is None:
        raise TypeError(
            "one of `rank` and `tol` must be given: `rank=k` for a size, `tol=1e-3` for an accuracy; got neither"
        )
    if rank is not None and tol is not None:
        raise TypeError(f"only one of `rank` and `tol` may be given; got rank={rank!r} and tol={tol!r}; leave one out")


def check_rank(rank: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the numbers of rows and columns to choose.

    Parameters
    ----------
    rank : object
        What was given as `rank`: one number for both, or a pair (rows, columns).
    shape : tuple of int
        The shape of the matrix.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If it is not between 1 and the smaller side, or the pair is none.

    Examples
    --------
    >>> check_rank(2, (5, 4)), check_rank((3, 2), (5, 4))
    ((2, 2), (3, 2))
    """
    if isinstance(rank, (tuple, list)):
        if len(rank) != 2:
            raise ValueError(f"`rank` must be an integer or a pair (rows, columns); got {rank!r}")
        pair = (as_integer(rank[0], "rank[0]"), as_integer(rank[1], "rank[1]"))
    else:
        pair = (as_integer(rank, "rank"),) * 2
    most = min(shape)
    if min(pair) < 1 or max(pair) > most:
        raise ValueError(
            f"`rank` must be between 1 and {most}, the smaller side of the {shape[0]} x {shape[1]} matrix; got {rank!r}"
        )
    return pair


def check_tol(tol: Any) -> float:
    """Return a relative tolerance in (0, 1).

    Parameters
    ----------
    tol : object
        What was given as `tol`.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is not between 0 and 1, both excluded.
    """
    if isinstance(tol, bool) or not isinstance(tol, (int, float, np.integer, np.floating)):
        raise TypeError(f"`tol` must be a number; got {tol!r} of type {type(tol).__name__}")
    value = float(tol)
    if not 0.0 < value < 1.0:
        raise ValueError(
            f"`tol` must be between 0 and 1, the error relative to the norm of `A`; got {tol!r}; "
            "for the numerical rank choose a small one such as 1e-12"
        )
    return value


def check_choice(value: Any, choices: Collection[Any], name: str) -> None:
    """Require one of the listed values.

    Parameters
    ----------
    value : object
        The value that was given.
    choices : collection
        The values that are allowed.
    name : str
        The argument's name in errors.

    Raises
    ------
    ValueError
        If the value is none of them.
    """
    plain = value is None or isinstance(value, (str, int, float, np.number))  # arrays are compared entry by entry
    if not plain or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_companion(B: Any, A: Any, name: str) -> None:
    """Require that `B` lives in the library and on the device of `A`.

    Parameters
    ----------
    B : array
        The array that goes with the matrix, such as its weights.
    A : matrix
        The matrix; beside a sparse, a lazy one or an operator the array has to be NumPy's.
    name : str
        The array's name in errors.

    Raises
    ------
    TypeError
        If the array is of another library.
    ValueError
        If it is on another device.
    """
    if not _array.is_dense(B) and not _array.is_dense(A):
        return
    # sparse, lazy and abstract matrices keep their thin factors in NumPy
    if not _array.is_dense(B) or _array.namespace(A if _array.is_dense(A) else np.empty(0)) is not _array.namespace(B):
        raise TypeError(
            f"`{name}` must be an array of the same library as `A`; got {type(B).__name__} beside {type(A).__name__}; "
            "convert one of them"
        )
    if _array.is_dense(A) and _array.take_device(A) != _array.take_device(B):
        raise ValueError(
            f"`{name}` must live on the device of `A`; got {_array.take_device(B)} beside {_array.take_device(A)}; "
            "move one of them"
        )


def check_finite_norm(value: float, A: Any, name: str = "A") -> None:
    """Turn a non-finite norm into the error that says why it is not finite.

    Parameters
    ----------
    value : float
        The norm of the matrix, as computed.
    A : matrix
        The matrix, whose entries are looked at if the norm is not finite.
    name : str, default "A"
        The matrix's name in errors.

    Raises
    ------
    ValueError
        If the norm is not finite; the text says how many entries are to blame, and where the first is.
    """
    if math.isfinite(value):
        return
    where = ", or entries so large that its norm overflows"
    if _array.is_dense(A):
        xp = _array.namespace(A)
        bad = _array.to_numpy(xp.sum(xp.astype(~xp.isfinite(A), xp.int32), axis=1))
        if not bad.any():
            raise ValueError(
                f"`{name}` has entries so large that its norm overflows {A.dtype}; divide it by its largest entry first"
            )
        where = f", {int(bad.sum())} of them, the first in row {int(np.argmax(bad > 0))}"
    raise ValueError(f"`{name}` must be finite; it holds NaN or inf{where}; replace or drop these entries first")


def check_finite_product(Y: Any, name: str = "A") -> None:
    """Require that a product with an operator is finite: nobody has seen its entries.

    Parameters
    ----------
    Y : ndarray
        The product with the operator.
    name : str, default "A"
        The operator's name in errors.

    Raises
    ------
    ValueError
        If the product holds NaN or inf.
    """
    if not np.isfinite(Y).all():
        raise ValueError(
            f"`{name}` must be finite; a product with this LinearOperator holds NaN or inf; check the operator, "
            "or scale it if its entries are so large that products overflow"
        )


def as_generator(rng: Any) -> np.random.Generator:
    """Return NumPy's generator for a seed, a generator, or None (fresh entropy).

    Parameters
    ----------
    rng : object
        What was given as `rng`; a generator is returned as it is, and goes on from where it is.

    Raises
    ------
    TypeError
        If it is no seed, generator or None.
    """
    if isinstance(rng, bool):
        raise TypeError(f"`rng` must be a seed, a numpy.random.Generator or None; got {rng!r}")
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise TypeError(
            f"`rng` must be a non-negative integer seed, a numpy.random.Generator or None; got {rng!r}"
        ) from None
