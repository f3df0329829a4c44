"""Choosing indices: which rows of a matrix represent it.

Every selector has the signature ``select(basis, count=None, /, *, matrix=None, rng=0)`` and returns `count` distinct
positions of rows, an integer array on the backend of `basis`. `basis` (m x p) has one row per candidate; its columns
span the space to be represented: leading singular vectors, or a sketch. `matrix` (m x n) is the matrix itself, which
only some selectors look at. To choose columns, hand over the basis of the row space and the adjoint of the matrix.

A selector is a function with the decorator `selector`, which gives it a name and says what it reads. Drivers, models
and commands take every name in `SELECTORS`, also those of selectors that are defined elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from cur._lib.array import Array, adjoint, convert, is_dense, is_operator, is_sparse, namespace, take, to_numpy
from cur._lib.host import through_numpy
from cur._lib.linalg import lu_pivots, svd
from cur._lib.promotion import check_promoted, promote
from cur._lib.rows import draw, fill, row_norms
from cur._lib.scale import brought_near_one
from cur._lib.selector import SELECTORS, Selector, selector
from cur._lib.validate import as_generator, check_basis, check_count

__all__ = [
    "SELECTORS",
    "Selector",
    "arp",
    "cmd",
    "deim",
    "ldeim",
    "leverage",
    "lupp",
    "norm",
    "osinsky",
    "oversample",
    "qdeim",
    "selector",
    "uniform",
]

Generator = np.random.Generator | int | None

_quiet = np.errstate(invalid="ignore")
"""OpenBLAS's AVX-512 kernel of float32 matrix times vector now and then raises the flag at lanes it does not use."""


@selector("deim", reads="basis", nested=True, skips_zeros=True)
def deim(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Choose rows by the discrete empirical interpolation method.

    The j-th index is where the residual of the j-th basis vector, interpolated at the indices so far, is largest. That
    residual is the Schur complement column of Gaussian elimination, so DEIM is the first `count` row pivots of LU with
    partial pivoting on the basis: one LU of an m x count matrix, ``m count**2`` operations.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; its columns span the space to be represented, the most important first.
    count : int, optional
        The number of rows to choose, at most p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, optional
        The source of chance, which has no part in this selector: all are called alike.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions in the order of choice. The first j of them are the choice for the first j columns.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    References
    ----------
    Chaturantabut and Sorensen, SIAM J. Sci. Comput. 32 (2010); Sorensen and Embree, SIAM J. Sci. Comput. 38 (2016).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import deim
    >>> V = np.linalg.qr(np.vander(np.linspace(0, 1, 6), 3))[0]
    >>> deim(V).tolist()
    [5, 2, 0]
    """
    basis, count = _checked(basis, count)
    return lu_pivots(basis[:, :count])


@selector("lupp", reads="sketch", nested=True, skips_zeros=True)
def lupp(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Choose rows by LU with partial pivoting on a sketch of the matrix: the fastest choice.

    The same elimination as `deim`, meant for a sketch ``matrix @ Gaussian`` that was never made orthonormal, so that no
    QR and no SVD is paid. In `cur.cur` the columns are then pivots of LU on the chosen rows, and the matrix is read
    once.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; a sketch of the matrix.
    count : int, optional
        The number of rows to choose, at most p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, optional
        The source of chance, which has no part in this selector: all are called alike.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    References
    ----------
    Dong and Martinsson, "Simpler is better: a comparative study of randomized algorithms for computing the CUR
    decomposition", Adv. Comput. Math. 49 (2023).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> A = 1.0 / (np.arange(1, 9)[:, None] + np.arange(8))
    >>> sketch = A @ np.random.default_rng(0).standard_normal((8, 2))
    >>> selection.lupp(sketch).tolist()
    [2, 0]
    """
    return deim(basis, count)


@selector("qdeim", reads="basis", skips_zeros=True)
def qdeim(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Choose rows by QR with column pivoting on the adjoint of the basis; ``m count**2`` operations.

    The next row is the one farthest from the span of the rows so far. Unlike `deim`, the choice does not depend on
    which orthonormal basis of the space is given.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; its columns span the space to be represented, the most important first.
    count : int, optional
        The number of rows to choose, at most p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, optional
        The source of chance, which has no part in this selector: all are called alike.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    References
    ----------
    Drmac and Gugercin, SIAM J. Sci. Comput. 38 (2016).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> A = 1.0 / (np.arange(1, 9)[:, None] + np.arange(8))
    >>> V = np.linalg.svd(A)[0][:, :2]
    >>> selection.qdeim(V).tolist()
    [0, 2]
    """
    basis, count = _checked(basis, count)
    return _pivot_rows(basis[:, :count], count, lambda weights: int(np.argmax(weights)))


@selector("arp", reads="basis", draws=True, skips_zeros=True)
def arp(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Choose rows by adaptive randomised pivoting.

    The steps of `qdeim`, with the next row drawn with probability proportional to its squared distance from the span of
    the rows so far. In expectation the squared error of interpolation is at most ``count + 1`` times that of the basis.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; its columns span the space to be represented, the most important first.
    count : int, optional
        The number of rows to choose, at most p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, default 0
        The seed of what is drawn; None draws fresh entropy.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    References
    ----------
    Cortinovis and Kressner, "Adaptive randomized pivoting for column subset selection, DEIM, and low-rank
    approximation" (2024), Theorem 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> V = np.linalg.qr(np.vander(np.linspace(0, 1, 6), 3))[0]
    >>> len(set(selection.arp(V, rng=1).tolist()))
    3
    """
    basis, count = _checked(basis, count)
    generator = as_generator(rng)
    return _pivot_rows(basis[:, :count], count, lambda weights: draw(weights, 1, generator)[0])


@selector("osinsky", reads=("basis", "entries"), dense=True, skips_zeros=True)
@_quiet
def osinsky(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Choose rows so that the squared error is certainly at most ``count + 1`` times the best.

    `arp` without chance: each step takes the row with the smallest ratio of its squared residual in `matrix` to its
    squared distance from the span of the rows so far, which is never worse than the expectation. Dense matrices only;
    ``m n count`` operations and one copy of `matrix`.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; its columns span the space to be represented, the most important first.
    count : int, optional
        The number of rows to choose, at most p; p by default.
    matrix : array, shape (m, n)
        The matrix itself, dense, of which `basis` holds the leading left singular vectors.
    rng : Generator, int or None, optional
        The source of chance, which has no part in this selector: all are called alike.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, `count` is out of range, or `matrix` is
        missing or not dense.

    References
    ----------
    Osinsky, "Close to optimal column approximation using a single SVD", Linear Algebra Appl. 725 (2025).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> A = 1.0 / (np.arange(1, 9)[:, None] + np.arange(8))
    >>> V = np.linalg.svd(A)[0][:, :2]
    >>> selection.osinsky(V, matrix=A).tolist()
    [3, 0]
    """
    basis, count = _checked(basis, count)
    matrix, _, _ = brought_near_one(_required(matrix, "osinsky"))
    if is_sparse(matrix):
        raise TypeError(
            "`matrix` must be a dense array for `osinsky`, which updates all of it; use `arp` for sparse ones"
        )
    xp = namespace(basis)
    V = basis[:, :count]
    E = matrix - V @ (adjoint(V) @ matrix)
    info = np.finfo(to_numpy(V[:1, :1]).dtype)
    # Of each row by itself: among very many rows all but a few are small. But squares that are rounded below the normal
    # numbers would give a row with the ratio zero, or none of the others; no rows so small are needed for the bound.
    floor = np.maximum(info.eps * to_numpy(xp.sum(xp.abs(V) ** 2, axis=1)), info.smallest_normal / info.eps)
    chosen: list[int] = []
    for _ in range(count):
        distance = np.array(to_numpy(xp.sum(xp.abs(V) ** 2, axis=1)))
        residual = to_numpy(xp.sum(xp.abs(E) ** 2, axis=1))
        distance[chosen] = 0.0
        # a row within the span of the chosen ones, up to rounding, cannot serve as a pivot
        usable = distance > floor
        if not usable.any():
            return convert(fill(chosen, count, basis.shape[0]), basis)
        ratio = np.full(distance.shape, np.inf)
        np.divide(residual, distance, out=ratio, where=usable, dtype=np.float64)
        i = int(np.argmin(ratio))
        chosen.append(i)
        v = V[i : i + 1, :]
        c = V @ adjoint(v) / float(distance[i])
        E = E - c @ E[i : i + 1, :]
        V = V - c @ v
    return convert(np.asarray(chosen), basis)


@selector("ldeim", reads="basis", beyond_basis=True, skips_zeros=True)
def ldeim(
    basis: Array,
    count: int | None = None,
    /,
    *,
    matrix: Array | None = None,
    rng: Generator = 0,
    vectors: int | None = None,
) -> Array:
    """Choose rows by DEIM on the first basis vectors, then by the largest leverage of what that leaves of them.

    After the `vectors` steps of `deim`, the remaining indices are those with the largest row norms of the residuals of
    these vectors, each interpolated at the indices before it.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; its columns span the space to be represented, the most important first.
    count : int, optional
        The number of rows to choose, also more than p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, optional
        The source of chance, which has no part in this selector: all are called alike.
    vectors : int, optional
        How many basis vectors are used, at most p and `count`. By default half of `count`, as the authors do,
        or p where that is less. With `count` the method is `deim`.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` or `vectors` is out of range.

    References
    ----------
    Gidisu and Hochstenbach, "A hybrid DEIM and leverage scores based method for CUR index selection" (2022).

    Examples
    --------
    >>> import numpy as np
    >>> from cur.selection import deim, ldeim
    >>> V = np.linalg.qr(np.vander(np.linspace(0, 1, 8), 4))[0]
    >>> deim(V).tolist(), ldeim(V).tolist(), ldeim(V, vectors=4).tolist()
    ([7, 5, 2, 0], [7, 5, 6, 4], [7, 5, 2, 0])
    """
    basis, count = _checked(basis, count, beyond=True)
    p = basis.shape[1]
    usable = min(p, count)
    vectors = check_count(
        vectors,
        default=-(-count // 2),
        most=usable,
        what="the basis vectors" if p < count else "the indices to choose",
        name="vectors",
    )
    first = deim(basis, vectors)
    if vectors == count:
        return first
    V, xp = basis[:, :vectors], namespace(basis)
    residual = V @ convert(_interpolation(to_numpy(take(V, first, axis=0))), basis, basis.dtype)
    scores = np.array(to_numpy(xp.sum(xp.abs(residual) ** 2, axis=1)))
    taken = to_numpy(first)
    scores[taken] = -1.0
    rest = np.argsort(-scores, kind="stable")[: count - vectors]
    return convert(np.concatenate([taken, rest]), basis)


def _interpolation(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the matrix T for which column j of ``V T`` is that of V, interpolated at its first j rows, less that.

    `block` has the interpolated rows in the order of their pivots, so that it is L U without exchanges. Then
    ``V U^-1`` has the residuals as columns, each divided by its pivot.
    """
    U = np.array(block)
    for j in range(len(U)):
        pivot = U[j, j]
        if pivot == 0:  # nothing is left to interpolate
            U[j] = 0
            U[j, j] = 1
            continue
        U[j + 1 :] -= np.outer(U[j + 1 :, j] / pivot, U[j])
        U[j] /= pivot
    return np.asarray(scipy.linalg.solve_triangular(U, np.eye(len(U), dtype=U.dtype), unit_diagonal=True))


@selector("leverage", reads="basis", beyond_basis=True, draws=True, skips_zeros=True)
def leverage(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Draw rows, without duplicates, with probability proportional to their leverage ``||basis[i, :]||**2``.

    Parameters
    ----------
    basis : array, shape (m, p)
        One row per candidate; its columns span the space to be represented, the most important first.
    count : int, optional
        The number of rows to choose, also more than p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, default 0
        The seed of what is drawn; None draws fresh entropy.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    References
    ----------
    Mahoney and Drineas, "CUR matrix decompositions for improved data analysis", PNAS 106 (2009).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> V = np.eye(6)[:, :2]  # only two rows have any
    >>> sorted(selection.leverage(V).tolist())
    [0, 1]
    """
    basis, count = _checked(basis, count, beyond=True)
    return convert(draw(row_norms(basis) ** 2, count, as_generator(rng)), basis)


@selector("norm", reads="entries", nested=True, beyond_basis=True, skips_zeros=True)
def norm(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Take the rows of `matrix` with the largest Euclidean norms; one pass over the matrix.

    Parameters
    ----------
    basis : array, shape (m, p)
        Any array of one row per candidate: only its number of rows and its library matter.
    count : int, optional
        The number of rows to choose, also more than p; p by default.
    matrix : matrix, shape (m, n)
        The matrix itself, whose rows are looked at.
    rng : Generator, int or None, optional
        The source of chance, which has no part in this selector: all are called alike.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, `count` is out of range, or `matrix` is
        missing or shows no entries.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> A = np.diag([1.0, 5.0, 3.0, 0.0])
    >>> selection.norm(np.ones((4, 1)), 2, matrix=A).tolist()
    [1, 2]
    """
    basis, count = _checked(basis, count, beyond=True)
    norms = row_norms(_required(matrix, "norm"))
    return convert(np.argsort(-norms, kind="stable")[:count], basis)


@selector("cmd", reads="entries", nested=True, beyond_basis=True, draws=True, skips_zeros=True)
def cmd(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Draw rows with probability proportional to their squared norms in `matrix`, keeping each drawn row once.

    The compact matrix decomposition for large sparse matrices: one pass for the norms, no basis. Rows drawn again would
    be copies, which the optimal core does not need; drawing goes on until `count` different ones are there.

    Parameters
    ----------
    basis : array, shape (m, p)
        Any array of one row per candidate: only its number of rows and its library matter.
    count : int, optional
        The number of rows to choose, also more than p; p by default.
    matrix : matrix, shape (m, n)
        The matrix itself, whose rows are looked at.
    rng : Generator, int or None, default 0
        The seed of what is drawn; None draws fresh entropy.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, `count` is out of range, or `matrix` is
        missing or shows no entries.

    References
    ----------
    Sun, Xie, Zhang and Faloutsos, "Less is more: compact matrix decomposition for large sparse graphs", SDM 2007.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> A = np.diag([1.0, 5.0, 3.0, 0.0])
    >>> sorted(selection.cmd(np.ones((4, 1)), 3, matrix=A).tolist())
    [0, 1, 2]
    """
    basis, count = _checked(basis, count, beyond=True)
    return convert(draw(row_norms(_required(matrix, "cmd")) ** 2, count, as_generator(rng)), basis)


@selector("uniform", reads=(), nested=True, beyond_basis=True, draws=True)
def uniform(basis: Array, count: int | None = None, /, *, matrix: Array | None = None, rng: Generator = 0) -> Array:
    """Draw rows uniformly at random, without duplicates: the baseline that any other choice should beat.

    Parameters
    ----------
    basis : array, shape (m, p)
        Any array of one row per candidate: only its number of rows and its library matter.
    count : int, optional
        The number of rows to choose, also more than p; p by default.
    matrix : array, optional
        The matrix, which this selector does not look at: all are called alike.
    rng : Generator, int or None, default 0
        The seed of what is drawn; None draws fresh entropy.

    Returns
    -------
    array of int, shape (count,)
        Distinct positions of rows, in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> sorted(selection.uniform(np.ones((3, 1)), 3).tolist())
    [0, 1, 2]
    """
    basis, count = _checked(basis, count, beyond=True)
    return convert(as_generator(rng).permutation(basis.shape[0])[:count], basis)


@through_numpy
def oversample(basis: Array, indices: Array, count: int, /) -> Array:
    """Add `count` rows to `indices` where the chosen rows of the basis are weakest.

    The trailing right singular vectors of ``basis[indices, :]`` are the directions in which a cross core would blow up;
    the rows added are pivots of LU on the remaining rows of the basis in those directions, so that
    ``gamma = 1 / smin(basis[indices, :])`` falls.

    Parameters
    ----------
    basis : array, shape (m, p)
        The basis, of orthonormal columns.
    indices : array of int, shape (k,), k >= p
        The rows chosen so far.
    count : int
        The number of rows to add, at most ``m - k``.

    Returns
    -------
    array of int, shape (k + count,)
        The rows chosen so far, and then those added.

    Raises
    ------
    TypeError, ValueError
        If the basis is no finite matrix of floating-point numbers, or `count` is out of range.

    References
    ----------
    Park and Nakatsukasa, "Accuracy and stability of CUR decompositions with oversampling", SIAM J. Matrix Anal. Appl.
    46 (2025).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import selection
    >>> V = np.linalg.qr(np.vander(np.linspace(0, 1, 6), 2))[0]
    >>> selection.oversample(V, np.array([0, 1]), 1).tolist()
    [0, 1, 5]
    """
    basis = _prepared(basis)
    m, p = basis.shape
    chosen = [int(i) for i in (to_numpy(indices) if is_dense(indices) else indices)]
    count = check_count(count, default=0, most=m - len(chosen), what="the rows that are left", least=0)
    xp = namespace(basis)
    while count > 0:
        rest = np.setdiff1d(np.arange(m), chosen)
        step = min(count, p)
        Y = svd(take(basis, convert(np.asarray(chosen), basis), axis=0), full_matrices=True)[2]
        weakest = adjoint(Y)[:, p - step :]
        # the weakest direction first, since pivots for it matter most
        candidates = xp.flip(take(basis, convert(rest, basis), axis=0) @ weakest, axis=1)
        added = lu_pivots(candidates[:, : min(step, len(rest))])
        chosen.extend(int(i) for i in rest[to_numpy(added)])
        count -= step
    return convert(np.asarray(chosen), basis)


@_quiet
def _pivot_rows(V: Array, count: int, choose: Callable[[np.ndarray[Any, Any]], int]) -> Array:
    """Pivoted Gram-Schmidt on the rows of `V`; `choose` picks from the squared distances."""
    xp = namespace(V)
    distance = to_numpy(xp.sum(xp.abs(V) ** 2, axis=1)).astype(np.float64)
    # what `count` subtractions leave of a row in the span; of each row by itself, as in `osinsky`
    floor = count * np.finfo(to_numpy(V[:1, :1]).dtype).eps * distance
    chosen: list[int] = []
    Q = V[:0, :]
    for _ in range(count):
        distance[chosen] = 0.0
        distance[distance <= floor] = 0.0
        if not distance.any():
            return convert(fill(chosen, count, V.shape[0]), V)
        i = choose(distance)
        chosen.append(i)
        q = V[i : i + 1, :]
        for _ in range(2):  # once more is enough for orthogonality to working precision
            q = q - (q @ adjoint(Q)) @ Q
        q = q / xp.linalg.vector_norm(q)
        Q = xp.concat([Q, q], axis=0)
        distance -= to_numpy(xp.abs((V @ adjoint(q))[:, 0]) ** 2)
    return convert(np.asarray(chosen), V)


def _checked(basis: Array, count: int | None, *, beyond: bool = False) -> tuple[Array, int]:
    """Return a checked basis and count, at most its width unless rows `beyond` that can be chosen."""
    basis = _prepared(basis)
    most, what = (basis.shape[0], "the rows") if beyond else (min(basis.shape), "the basis vectors and rows")
    return basis, check_count(count, default=basis.shape[1], most=most, what=what)


def _prepared(basis: Array) -> Array:
    """Return a checked basis, of which squares stay in the range: choices do not depend on its size."""
    check_basis(basis)
    return brought_near_one(promote(basis))[0]


def _required(matrix: Array | None, name: str) -> Array:
    if matrix is None:
        raise TypeError(f"`matrix` must be given for `{name}`, which looks at the rows themselves; pass `matrix=A`")
    if is_operator(matrix):
        raise TypeError(f"`matrix` must have entries for `{name}`, and a LinearOperator gives products only; use `arp`")
    return check_promoted(matrix, "matrix")
