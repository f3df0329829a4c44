"""What the drivers do before they begin: the same matrix in a form in which less is to be done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from cur._lib import promotion
from cur._lib.array import Array, is_sparse, to_numpy
from cur._lib.host import is_host_jax, on_device, on_host
from cur._lib.products import columns_of, largest, rows_of
from cur._lib.validate import check_companion, check_matrix
from cur.factors import CUR, Interpolative
from cur.selection import SELECTORS
from cur.weights import Weight

__all__ = ["economical"]

Driver = TypeVar("Driver", bound=Callable[..., Any])

COMPANIONS = ("importance", "row_weights", "column_weights")
"""Options that are arrays."""


def economical(driver: Driver) -> Driver:
    """Hand a driver a JAX array of the host as NumPy's, and a sparse matrix without its empty rows and columns.

    What JAX would compile is in `cur._lib.host`. Rows and columns without an entry contribute nothing but their length.

    Parameters
    ----------
    driver : callable
        The driver, called as ``driver(A, **options)``.

    Returns
    -------
    callable
        The driver for any matrix, which returns a result that speaks of the matrix as it was given.
    """

    @functools.wraps(driver)
    def entry(A: Array, /, **options: Any) -> Any:
        if is_host_jax(A):
            return _by_numpy(driver, A, options)
        if is_sparse(A):
            kept = _occupied(A, options)
            if kept is not None:
                return _without_empty(driver, A, options, *kept)
        return driver(A, **options)

    return cast(Driver, entry)


def _by_numpy(driver: Callable[..., Any], A: Array, options: dict[str, Any]) -> Any:
    check_matrix(A)
    for name in COMPANIONS:
        value = options.get(name)
        for part in vars(value).values() if isinstance(value, Weight) else (value,):
            if hasattr(part, "shape"):
                check_companion(part, A, name)
    options = options | {name: on_host(options[name]) for name in COMPANIONS if name in options}
    promoted = promotion.promote(A)
    if promotion.is_rounded(A, promoted):
        raise TypeError(
            f"`A` must hold integers that {promoted.dtype} holds, and the largest is about "
            f"{largest(promoted):.3g}; convert `A` to a floating dtype, or pass it as a NumPy array"
        )
    return on_device(driver(to_numpy(promoted), **options), A)


def _occupied(A: Any, options: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Return the rows and columns with entries, where leaving out the others halves the matrix and changes nothing."""
    selector = SELECTORS.get(str(options.get("select")))
    empty = selector is not None and not selector.skips_zeros  # empty rows may be chosen, too
    if A.ndim != 2 or 0 in A.shape or empty or options.get("importance") is not None:
        return None
    for axis, name in enumerate(("row_weights", "column_weights")):
        if options.get(name) is not None and _weight_of(options[name], A.shape[axis], np.arange(1)) is None:
            return None
    m, n = A.shape
    form = A if A.format in ("csr", "csc") else A.tocsr()
    inner = np.zeros(n if form.format == "csr" else m, dtype=bool)
    inner[form.indices[: form.indptr[-1]]] = True
    lines = np.flatnonzero(np.diff(form.indptr)), np.flatnonzero(inner)
    rows, columns = lines if form.format == "csr" else lines[::-1]
    rank, extra = options.get("rank"), options.get("oversample") or 0
    counts = rank if isinstance(rank, (tuple, list)) else (rank or 1,)
    if not all(isinstance(k, (int, np.integer)) for k in (*counts, extra)):
        return None  # an error, which the driver names
    few = max(counts) + extra <= min(len(rows), len(columns)) and 2 * len(rows) * len(columns) <= m * n
    return (rows, columns) if few else None


def _weight_of(weights: Any, size: int, kept: np.ndarray[Any, Any]) -> Any:
    """Return the weights of what is kept; None unless they are a vector of the right length."""
    if isinstance(weights, Weight):
        root = weights.root
        if not isinstance(root, np.ndarray) or weights.size != size:
            return None
        return replace(weights, size=len(kept), root=root[kept])
    whole = isinstance(weights, np.ndarray) and weights.shape == (size,) and bool(np.isfinite(weights).all())
    return weights[kept] if whole and np.isrealobj(weights) and bool((weights >= 0).all()) else None


def _without_empty(
    driver: Callable[..., Any],
    A: Array,
    options: dict[str, Any],
    rows: np.ndarray[Any, Any],
    columns: np.ndarray[Any, Any],
) -> Any:
    changed = {
        name: _weight_of(options[name], A.shape[axis], kept)
        for axis, (name, kept) in enumerate((("row_weights", rows), ("column_weights", columns)))
        if options.get(name) is not None
    }
    result = driver(A.tocsr()[rows][:, columns], **(options | changed))
    A = promotion.as_given(A, promotion.promote(A))
    if isinstance(result, CUR):
        rows, columns = rows[result.rows], columns[result.columns]
        return replace(result, C=columns_of(A, columns), R=rows_of(A, rows), rows=rows, columns=columns)
    if isinstance(result, Interpolative):
        return _padded(result, A, rows if result.side == "rows" else columns)
    return rows[result[0]], columns[result[1]]


def _padded(result: Interpolative, A: Array, kept: np.ndarray[Any, Any]) -> Interpolative:
    """Give the empty rows or columns the coefficients zero."""
    by_rows = result.side == "rows"
    chosen = kept[result.chosen]
    others = np.setdiff1d(np.arange(A.shape[0 if by_rows else 1]), chosen)
    known, k = np.searchsorted(others, kept[result.others]), len(chosen)
    coefficients = np.zeros((len(others), k) if by_rows else (k, len(others)), dtype=result.coefficients.dtype)
    if by_rows:
        coefficients[known] = result.coefficients
    else:
        coefficients[:, known] = result.coefficients
    skeleton = rows_of(A, chosen) if by_rows else columns_of(A, chosen)
    return replace(result, skeleton=skeleton, coefficients=coefficients, chosen=chosen, others=others)
