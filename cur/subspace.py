"""Leading singular subspaces: exact, randomised, Lanczos, and in one pass over a stream of row blocks.

Each returns a `Subspace`: orthonormal `V` and `W`, singular values, and enough of the norm of the matrix to bound what
the bases leave out, ``||A - V V^H A||_F`` and ``||A - A W W^H||_F``, without another pass.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse.linalg

from cur._lib.array import (
    Array,
    adjoint,
    gaussian,
    is_dask,
    is_operator,
    is_sparse,
    namespace,
    to_numpy,
    unit_roundoff,
    working_dtype,
)
from cur._lib.errors import NumericalError
from cur._lib.host import through_numpy
from cur._lib.linalg import lu_pivots, qr, svd, svdvals
from cur._lib.products import adjoint_product, frobenius, largest, product, pythagorean_rounding
from cur._lib.promotion import check_promoted, promote
from cur._lib.scale import brought_near_one, times_power
from cur._lib.stream import read_blocks
from cur._lib.validate import as_generator, check_count, check_finite_norm

__all__ = ["RowSpace", "Subspace", "exact", "lanczos", "randomised", "sketch", "stream"]

OVERSAMPLING = 10
"""Extra sketch columns of the randomised methods; 5 to 10 suffice (Halko, Martinsson and Tropp, SIAM Review 2011)."""


FLAT = 0.85
"""Ratio of the last to the middle singular value of a sketch above which a spectrum is flat.

Random sparse matrices have 0.87 to 0.98 at ranks up to a fiftieth of the shorter side, graphs with hubs 0.65 to 0.71,
and singular values that fall as ``i**-0.35``, as those of layers of language models, less than 0.79.
"""


FLAT_ITERATIONS = 4
"""Power iterations by default for sparse matrices and operators of flat spectrum.

Without, DEIM of a random sparse matrix kept a third of the energy that `lupp` keeps; two iterations were not enough
(20,000 x 5,000 with 5 entries a row, rank 60: 0.40, 0.98, 1.01 and 1.40 percent with 0, 1, 2 and 4, `lupp` 1.29).
"""


@dataclass(frozen=True, eq=False)
class Subspace:
    """Bases of a leading left and right singular subspace.

    Attributes
    ----------
    V : array, shape (m, k)
        The left basis, of orthonormal columns, the most important first.
    W : array, shape (n, k)
        The right basis, of orthonormal columns, the most important first.
    s : ndarray of float64
        Singular values, on the host: of the matrix (all of them) if `is_exact`, else of ``V^H A``, lower estimates.
    total : float or None
        ``||A||_F``; None where it cannot be had.
    is_exact : bool
        Whether V, s, W are singular vectors and values up to rounding.
    """

    V: Array
    W: Array
    s: np.ndarray[tuple[int], np.dtype[np.float64]]
    total: float | None
    is_exact: bool

    def tail(self, k: int) -> float | None:
        """Return an upper bound on what the first `k` vectors of either basis leave out, in the Frobenius norm.

        Exact bases: the root of the sum of the remaining squares. Else by Pythagoras, ``||A||^2 - sum of s_i^2``,
        with the rounding of that difference added (it floors near the root of the unit roundoff).

        Parameters
        ----------
        k : int
            The number of vectors that are used, at most those there are.
        """
        u = unit_roundoff(self.V.dtype, self.V)
        shape = (self.V.shape[0], self.W.shape[0])
        if self.is_exact:
            return math.hypot(*self.s[k:]) + pythagorean_rounding(shape, u) * float(self.s[0])
        if self.total is None:
            return None
        if self.total == 0.0:
            return 0.0
        if self.total == math.inf:
            return math.inf
        # in units of the norm, whose square may leave the range
        left = 1.0 - float(np.sum((self.s[:k] / self.total) ** 2))
        return math.sqrt(max(left, 0.0) + pythagorean_rounding(shape, u)) * self.total

    def sigma_next(self, k: int) -> float | None:
        """Return the (k+1)-th singular value where the subspace is exact.

        Parameters
        ----------
        k : int
            The number of singular values before it.
        """
        if not self.is_exact:
            return None
        return float(self.s[k]) if k < len(self.s) else 0.0

    def is_flat(self) -> bool:
        """Tell whether the singular values hardly fall where the subspace ends, and most of the matrix lies beyond.

        The bases then are as good as random, but for power iterations.

        Returns
        -------
        bool
            True where there are directions beyond the subspace, its last singular value is above :data:`FLAT` times the
            middle one, and it holds less than half of the squared norm, if that is known.
        """
        s = self.s
        if len(s) >= min(self.V.shape[0], self.W.shape[0]) or s[-1] <= FLAT * s[len(s) // 2]:
            return False
        return self.total is None or float(np.sum((s / self.total) ** 2)) < 0.5

    def numerical_rank(self, A: Array, /) -> int:
        """Return how many of the directions of the subspace of `A` stand above rounding; at least 1.

        All do whose singular value is above ``max(m, n) eps s_1``, the worst that roundoff makes. Along a side of a
        million single-precision numbers that is a tenth of the largest one, and what it really makes grows with the
        shorter side: a direction below is measured, by one product whose sums are as long as that side, and counts if
        what the matrix has there beyond the certain directions is above `rounding_level`.

        Parameters
        ----------
        A : matrix, shape (m, n)
            The matrix that the subspace belongs to.

        Raises
        ------
        TypeError, ValueError
            If it is no matrix of numbers, or has other sides than the bases.

        References
        ----------
        "Numerical rank" in the documentation's page on the mathematics.
        """
        s, most = self.s, min(self.V.shape[1], self.W.shape[1])
        eps = 2 * unit_roundoff(self.V.dtype, self.V)
        m, n = self.V.shape[0], self.W.shape[0]
        level = rounding_level(min(m, n)) * eps * s[0]
        # in ranks of the whole matrix, as far as its singular values are known
        certain = max(1, int(np.count_nonzero(s > max(m, n) * eps * s[0])))
        known = max(1, int(np.count_nonzero(s > level)))
        if certain >= most or known <= certain or not s[0] > 0:
            return certain
        short = self.W if m >= n else self.V
        A, exponent, _ = brought_near_one(check_promoted(A), total=self.total)
        Y = product(A if m >= n else adjoint(A), short[:, :known])
        Q, X = qr(Y[:, :certain])[0], Y[:, certain:]
        for _ in range(3):  # each time leaves what the rounding of long sums makes of the one before
            X = X - Q @ (adjoint(Q) @ X)
        found = to_numpy(svdvals(qr(X)[1]))
        return certain + int(np.count_nonzero(found > math.ldexp(level, -exponent)))

    def scaled(self, exponent: int) -> Subspace:
        """Return the subspace of the matrix times ``2^exponent``, whose norm may be beyond the range.

        Parameters
        ----------
        exponent : int
            The exponent, which may be beyond those of a double.
        """
        with np.errstate(over="ignore"):
            total = None if self.total is None else float(times_power(np.float64(self.total), exponent))
            return replace(self, s=times_power(self.s, exponent), total=total)


def rounding_level(length: int) -> float:
    """Return the size of singular values that sums of `length` terms make of nothing, in units of ``eps s_1``.

    Statistically the root of the length. Measured on matrices of rank one to a third of full, with repeated rows or
    columns and constant ones among them, up to a million rows: a third of this at most (`tests/test_subspace.py`).
    """
    return min(length, 20.0 + 2.0 * math.sqrt(length))


@through_numpy
def exact(A: Array, rank: int, /) -> Subspace:
    """Return singular vectors by a full SVD of a dense matrix; ``O(m n min(m, n))`` operations.

    Parameters
    ----------
    A : array, shape (m, n)
        The matrix, dense and in memory.
    rank : int
        The number of vectors wanted.

    Returns
    -------
    Subspace
        The vectors of both sides, with what is known of the singular values.

    Raises
    ------
    TypeError, ValueError
        If the matrix is not dense or not finite, or `rank` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import subspace
    >>> A = np.diag([3.0, 2.0, 1.0, 0.5])
    >>> subspace.exact(A, 2).V.shape
    (4, 2)
    """
    A = check_promoted(A)
    if is_sparse(A) or is_operator(A) or is_dask(A):
        raise TypeError("`subspace='exact'` needs a dense matrix in memory; use 'lanczos' or 'randomised' for this one")
    rank = _checked_rank(rank, A)
    A, exponent, _ = _near(A)
    V, s, Wh = svd(A)
    s = to_numpy(s).astype(np.float64)
    return Subspace(V[:, :rank], adjoint(Wh[:rank, :]), s, float(np.linalg.norm(s)), True).scaled(exponent)


@through_numpy
def sketch(A: Array, count: int, /, *, rng: np.random.Generator | int | None = 0) -> Array:
    """Return ``A @ Gaussian`` with `count` columns: one product.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense, sparse, lazy or an operator.
    count : int
        The number of random vectors.
    rng : Generator, int or None, default 0
        The seed of the vectors; None draws fresh entropy.

    Returns
    -------
    array, shape (m, count)
        The product.

    Raises
    ------
    TypeError, ValueError
        If the matrix is not finite, or `count` is not a positive integer.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import subspace
    >>> A = np.diag([3.0, 2.0, 1.0, 0.5])
    >>> subspace.sketch(A, 2).shape
    (4, 2)
    """
    A = check_promoted(A)
    count = check_count(count, default=1, most=sys.maxsize, what="vectors that can be")
    with np.errstate(over="ignore", invalid="ignore"):
        Y = product(A, gaussian((A.shape[1], count), A, working_dtype(A), as_generator(rng)))
    if not bool(namespace(Y).all(namespace(Y).isfinite(Y))):
        check_finite_norm(math.nan, A)
    return Y


@through_numpy
def randomised(
    A: Array,
    rank: int,
    /,
    *,
    power_iterations: int | None = 0,
    rng: np.random.Generator | int | None = 0,
    total: float | None = None,
) -> Subspace:
    """Return approximate leading singular vectors by a Gaussian sketch with power iterations.

    ``2 + 2 power_iterations`` products of `A` with ``rank + 10`` vectors.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense, sparse, lazy or an operator.
    rank : int
        The number of vectors wanted.
    power_iterations : int or None, default 0
        How many power iterations to take. Each one costs two products and damps what lies beyond the wanted
        vectors by the square of the ratio of the singular values. None takes four where `A` is sparse or an operator
        and the sketch shows a flat spectrum, else none.
    rng : Generator, int or None, default 0
        The seed of the sketch; None draws fresh entropy.
    total : float, optional
        The norm ``||A||_F``, if it is known.

    Returns
    -------
    Subspace
        The vectors of both sides, with what is known of the singular values.

    Raises
    ------
    TypeError, ValueError
        If the matrix is not finite, or `rank` is out of range.

    References
    ----------
    Halko, Martinsson and Tropp, SIAM Review 53 (2011), Algorithms 4.4 and 5.1.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import subspace
    >>> A = np.diag([3.0, 2.0, 1.0, 0.5])
    >>> found = subspace.randomised(A, 2)
    >>> found.V.shape, found.W.shape
    ((4, 2), (4, 2))
    """
    A = check_promoted(A)
    rank = _checked_rank(rank, A)
    A, exponent, total = _near(A, total)
    width = min(rank + OVERSAMPLING, *A.shape)
    Q, _ = qr(sketch(A, width, rng=rng))
    P, T = qr(adjoint_product(A, Q))
    if power_iterations is None:
        found = _rotated(Q, P, T, rank, total)
        if not ((is_sparse(A) or is_operator(A)) and found.is_flat()):
            return found.scaled(exponent)
        power_iterations = FLAT_ITERATIONS
    for _ in range(power_iterations):
        Q, _ = qr(product(A, P))
        P, T = qr(adjoint_product(A, Q))
    return _rotated(Q, P, T, rank, total).scaled(exponent)


def lanczos(
    A: Array, rank: int, /, *, rng: np.random.Generator | int | None = 0, total: float | None = None
) -> Subspace:
    """Return leading singular vectors of a sparse matrix or operator by implicitly restarted Lanczos (ARPACK).

    As accurate as `exact` for the vectors wanted; the number of products depends on the gaps between singular values.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, sparse or an operator.
    rank : int
        The number of vectors wanted.
    rng : Generator, int or None, default 0
        The seed of the first vector; None draws fresh entropy.
    total : float, optional
        The norm ``||A||_F``, if it is known.

    Returns
    -------
    Subspace
        The vectors of both sides, with what is known of the singular values.

    Raises
    ------
    TypeError, ValueError
        If the matrix is neither sparse nor an operator, or `rank` is out of range.
    NumericalError
        If Lanczos does not converge.

    Examples
    --------
    >>> import scipy.sparse
    >>> from cur import subspace
    >>> A = scipy.sparse.diags_array([3.0, 2.0, 1.0, 0.5]).tocsr()
    >>> found = subspace.lanczos(A, 2)
    >>> found.V.shape, found.W.shape
    ((4, 2), (4, 2))
    """
    A = check_promoted(A)
    if not (is_sparse(A) or is_operator(A)):
        raise TypeError(
            "`subspace='lanczos'` is for scipy.sparse matrices and LinearOperator; use 'exact' or 'randomised'"
        )
    generator = as_generator(rng)
    rank = _checked_rank(rank, A)
    near, exponent, total = _near(A, total)
    # ARPACK finds no vector of the zero matrix, and needs one to spare, of complex matrices even two
    if rank >= min(A.shape) - 1 or not np.any(sketch(near, 1, rng=generator)):
        return randomised(near, rank, rng=generator, total=total).scaled(exponent)
    try:
        V, _, _ = scipy.sparse.linalg.svds(near, k=rank, rng=generator)
    except scipy.sparse.linalg.ArpackError as error:
        # equal or vanishing singular values leave Lanczos without a direction to go
        raise NumericalError(
            f"Lanczos did not converge for `rank` {rank}: {error}; use subspace='randomised'"
        ) from error
    Q, _ = qr(np.ascontiguousarray(V[:, ::-1]))
    return _rotated(Q, *qr(adjoint_product(near, Q)), rank, total).scaled(exponent)


def _checked_rank(rank: Any, A: Array) -> int:
    return check_count(rank, default=1, most=min(A.shape), what="singular vectors", name="rank")


def _near(A: Array, total: float | None = None) -> tuple[Array, int, float | None]:
    """Return ``2^-e A``, of which squares stay in the range, `e` and its norm; refused if it is not finite."""
    near, exponent, norm = brought_near_one(A, total=total)
    if norm is not None:
        check_finite_norm(norm, A)
    return near, exponent, norm


def _rotated(Q: Array, P: Array, T: Array, rank: int, total: float | None) -> Subspace:
    """Rotate the bases of ``A^H Q = P T`` so that ``V^H A = diag(s) W^H`` holds for their leading columns."""
    # the SVD of Q^H A: only a small square matrix is left
    X, s, Yh = svd(T)
    # as adjoints, so that vectors are contiguous, as selection reads them
    V, W = adjoint(Yh[:rank, :] @ adjoint(Q)), adjoint(adjoint(X[:, :rank]) @ adjoint(P))
    return Subspace(V, W, to_numpy(s).astype(np.float64), total, False)


@dataclass(frozen=True, eq=False)
class RowSpace:
    """What one pass over the rows of a matrix leaves.

    The rows ``B = diag(s) W^H`` stand for the matrix: ``A^H A = B^H B + D`` with a positive semidefinite `D` whose
    trace, the squares of all that was dropped, is known.

    Attributes
    ----------
    W : ndarray, shape (n, l)
        Orthonormal basis of the leading row space, the most important direction first.
    s : ndarray of float64, shape (l,)
        Singular values of what was kept.
    dropped : float
        Norm of all that was dropped, the root of the trace of `D`.
    total : float
        The Frobenius norm ``||A||_F`` of all rows.
    rows : ndarray of int, shape (k,)
        Positions of the rows that won the elimination, in the order of importance.
    R : ndarray, shape (k, n)
        The rows that won, as they came.
    shape : tuple of int
        The number of rows seen and that of columns, (m, n).
    unit : float
        The coarsest unit roundoff of the precisions that the blocks came in.
    rounding : float
        Bound on what rounding changed in ``B^H B + D``, over the square of `total`.
    """

    W: np.ndarray[Any, Any]
    s: np.ndarray[Any, Any]
    dropped: float
    total: float
    rows: np.ndarray[Any, Any]
    R: np.ndarray[Any, Any]
    shape: tuple[int, int]
    unit: float
    rounding: float

    def left_by(self, Q: np.ndarray[Any, Any]) -> float:
        """Return a proven upper bound on ``||A - A Q Q^H||_F`` for any orthonormal `Q`, without the matrix.

        Parameters
        ----------
        Q : ndarray, shape (n, k)
            The basis, of orthonormal columns.
        """
        if self.total == 0.0:
            return 0.0
        # in units of the norm, whose square may leave the range
        B = (self.s / self.total)[:, None] * adjoint(self.W)
        missed = frobenius(B - (B @ Q) @ adjoint(Q)) ** 2
        slack = self.rounding + pythagorean_rounding(self.W.shape, self.unit)
        return math.sqrt(missed + (self.dropped / self.total) ** 2 + slack) * self.total

    def numerical_rank(self) -> int:
        """Return how many singular values stand above rounding; at least 1."""
        m, n = self.shape
        eps = 2 * self.unit
        # columns are summed by NumPy's LAPACK, which computes in double precision whatever it is given
        columns = 2 * math.sqrt(m) * float(np.finfo(np.float64).eps)
        cut = min(m, n, rounding_level(n)) * eps + columns
        return max(1, int(np.count_nonzero(self.s > cut * self.s[0])))


def stream(blocks: Any, rank: int, /, *, oversampling: int = OVERSAMPLING) -> RowSpace:
    """Return the leading row space of a matrix that comes as blocks of rows, and its best rows, in one pass.

    Memory is that of one block and of ``2 (rank + oversampling)`` rows, however many rows there are. The row space is
    an incremental SVD without left vectors; the rows are chosen in a tournament: those kept so far against those of the
    new block, by pivoted elimination of their coordinates.

    Parameters
    ----------
    blocks : array, callable or iterable
        Blocks of rows in order, dense or sparse; a callable that returns an iterator over them; or a whole
        matrix that need not fit into memory, which is cut into blocks.
    rank : int
        The number of rows to keep, and of vectors but for the oversampling.
    oversampling : int, default 10
        How many vectors are carried along beyond `rank`, so that what counts at the end is not dropped on the
        way.

    Returns
    -------
    RowSpace
        The vectors, the rows, and what was dropped on the way.

    Raises
    ------
    ValueError
        If there is no block, or the widths of two blocks differ, or a block holds NaN or inf.

    References
    ----------
    Baker, Gallivan and Van Dooren, Linear Algebra Appl. 436 (2012), for the incremental SVD; Grigori, Demmel and Xiang,
    SIAM J. Matrix Anal. Appl. 32 (2011), for tournament pivoting.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import subspace
    >>> A = np.diag([3.0, 2.0, 1.0, 0.5])
    >>> found = subspace.stream([A[:2], A[2:]], 2)
    >>> found.rows.tolist()
    [0, 1]
    """
    rank = check_count(rank, default=1, most=sys.maxsize, what="rows that can be", name="rank")
    W = R = np.zeros((0, 0))
    s = np.zeros(0)
    rows = np.zeros(0, dtype=np.int64)
    seen, squares, dropped, unit, rounding = 0, 0.0, 0.0, 0.0, 0.0
    exponent = 0  # s is in units of this power of two, the sums of squares in those of its square
    for block, given in read_blocks(blocks):
        unit = max(unit, unit_roundoff(block.dtype, block))
        block = block.astype(np.result_type(block, W) if seen else block.dtype, copy=False)
        near, own, norm = brought_near_one(block)
        if squares == 0.0:
            exponent = own
        elif own != exponent and norm and math.frexp(norm)[1] + own > exponent + math.frexp(math.sqrt(squares))[1]:
            shift = exponent - own
            s, squares, dropped = times_power(s, shift), *(math.ldexp(x, 2 * shift) for x in (squares, dropped))
            exponent = own
        if own != exponent:
            near = times_power(block, -exponent)
        squares += frobenius(near) ** 2
        stacked = np.concatenate([s.astype(near.real.dtype)[:, None] * adjoint(W), near]) if seen else near
        # the triangular factor has the same Gram matrix as the rows themselves
        T = qr(stacked)[1] if stacked.shape[0] > stacked.shape[1] else stacked
        _, found, Wh = np.linalg.svd(T, full_matrices=False)
        rounding += pythagorean_rounding(stacked.shape, unit)
        keep = min(rank + oversampling, len(found))
        s = found.astype(np.float64)
        dropped += float(np.sum(s[keep:] ** 2))
        s, W = s[:keep], adjoint(Wh[:keep])
        candidates = np.concatenate([R, given]) if seen else given
        positions = np.concatenate([rows, np.arange(seen, seen + block.shape[0])])
        near = promote(candidates)
        size = largest(near)
        coordinates = times_power(near, -math.frexp(size)[1]) if size > 0.0 else near
        best = lu_pivots(coordinates @ W[:, : min(rank, keep, candidates.shape[0])])
        R, rows = candidates[best], positions[best]
        seen += block.shape[0]
    return RowSpace(
        W=W,
        s=times_power(s, exponent),
        dropped=math.sqrt(dropped) * 2.0**exponent,
        total=math.sqrt(squares) * 2.0**exponent,
        rows=rows,
        R=R,
        shape=(seen, W.shape[0]),
        unit=unit,
        rounding=rounding,
    )
