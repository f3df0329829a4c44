"""The linking matrix U between chosen columns C and chosen rows R."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cur._lib.array import Array, adjoint, is_dense, is_operator, namespace, take_device, to_numpy, unit_roundoff
from cur._lib.host import through_numpy
from cur._lib.linalg import qr, solve_triangular, svd
from cur._lib.products import adjoint_product, frobenius, thin
from cur._lib.promotion import check_promoted
from cur._lib.scale import brought_near_one, of_the_size_of_reciprocals
from cur._lib.validate import check_companion, check_finite_norm, check_matrix
from cur._lib.wide import Residual, Weights

__all__ = ["Orthogonal", "cross", "optimal", "weighted"]


WELL = 10.0
"""Condition number, in the Frobenius norm over its least value, of triangles that are inverted without a look."""


class Orthogonal:
    """A thin matrix as ``X = Q T``, with the pseudo-inverse of `T` that rounding allows.

    `T` is inverted by triangular solves while its condition number is certainly below ``1 / cutoff``. Beyond, its SVD
    is cut there.

    Parameters
    ----------
    X : array, shape (m, k)
        The matrix, with no fewer rows than columns.
    cutoff : float, optional
        The ratio to the largest singular value of `T` up to which others are dropped. By default the root of the unit
        roundoff, where one side of a core begins to lose more by rounding than by cutting; see `core`. Coefficients of
        one side alone lose nothing down to the unit roundoff.
    """

    def __init__(self, X: Array, cutoff: float | None = None) -> None:
        self.Q, self.T = qr(X)
        self.cutoff = math.sqrt(unit_roundoff(self.T.dtype, self.T)) if cutoff is None else cutoff
        condition = _condition(self.T)
        # in the 2-norm it is up to k times as large, where singular values decay
        self.is_regular = condition < WELL or 4 * self.T.shape[0] * condition * self.cutoff < 1

    def left_divide(self, M: Array) -> Array:
        """Return ``T^+ M``.

        Parameters
        ----------
        M : array, shape (k, p)
            The right-hand sides, as columns.
        """
        if self.is_regular:
            return solve_triangular(self.T, M)
        return _truncated_inverse(self.T, self.cutoff) @ M


def _condition(T: Array) -> float:
    """Return the condition number of a triangular matrix in the Frobenius norm, divided by its least value."""
    xp = namespace(T)
    k = T.shape[0]
    if k != T.shape[1] or float(xp.min(xp.abs(xp.linalg.diagonal(T)))) == 0.0:
        return math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        inverse = solve_triangular(T, xp.eye(k, dtype=T.dtype, device=take_device(T)))
        condition = float(xp.linalg.matrix_norm(T)) * float(xp.linalg.matrix_norm(inverse)) / k
    return condition if math.isfinite(condition) else math.inf


def _truncated_inverse(T: Array, cutoff: float) -> Array:
    xp = namespace(T)
    X, s, Yh = svd(T)
    kept = s > cutoff * xp.max(s)
    reciprocal = xp.where(kept, 1 / xp.where(kept, s, xp.ones_like(s)), xp.zeros_like(s))
    return (adjoint(Yh) * reciprocal[None, :]) @ adjoint(X)


def _thin(X: Array, name: str, A: Array) -> Array:
    """Return columns or rows of `A` as a dense array of its dtype."""
    check_matrix(X, name)
    if is_dense(X):
        check_companion(X, A, name)
    axis = 0 if name == "C" else 1
    if is_operator(X) or X.shape[axis] != A.shape[axis]:
        raise ValueError(
            f"`{name}` must hold {('columns', 'rows')[axis]} of `A`, each of {A.shape[axis]} entries; "
            f"got {type(X).__name__} of shape {tuple(X.shape)}"
        )
    return thin(check_promoted(X, name, A.dtype))


def _near(A: Array, name: str) -> tuple[Array, int]:
    """Return ``2^-e A``, of which squares stay in the range, and `e`; refused if it is not finite."""
    near, exponent, total = brought_near_one(A)
    if total is not None:
        check_finite_norm(total, A, name)
    return near, exponent


def core(QC: Orthogonal, QR: Orthogonal, M: Array, dtype: Any = None) -> Array:
    """Return ``T_C^+ M T_R^{+H}`` for ``M = Q_C^H A Q_R``, rounded to `dtype`, that of `M` by default.

    A kept singular value ``s`` of either side contributes rounding of order ``u / s`` to the product C U R, a dropped
    one an error of order ``s``. The sum of both is smallest somewhat below the root of u: where exactly depends on how
    the roundings fall, so the cuts with the least estimates are tried, and measured in a wider precision.
    """
    xp = namespace(M)
    dtype = M.dtype if dtype is None else dtype
    if QC.is_regular and QR.is_regular:
        return xp.astype(adjoint(QR.left_divide(adjoint(QC.left_divide(M)))), dtype, copy=False)
    u = unit_roundoff(dtype, M)
    T, S = QC.T, adjoint(QR.T)
    lengths = xp.linalg.vector_norm(T, axis=0)[:, None] * xp.linalg.vector_norm(S, axis=1)[None, :]
    X, s, Yh = svd(T)
    V, t, Zh = svd(S)
    sizes = to_numpy(s), to_numpy(t)
    K = adjoint(X) @ M @ adjoint(Zh)
    entire = frobenius(K) ** 2
    found: dict[tuple[int, int], tuple[float, Array]] = {}
    for halvings in range(CUTS):
        cut = math.sqrt(u) * 2.0**-halvings
        p, q = (int(np.count_nonzero(values > cut * values[0])) for values in sizes)
        if min(p, q) == 0 or (p, q) in found:
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # a cut that leaves too small a value is passed over
            inner = K[:p, :q] / s[:p, None] / t[None, :q]
            U = xp.astype(adjoint(Yh[:p, :]) @ inner @ adjoint(V[:, :q]), dtype, copy=False)
            rounding = u * frobenius(lengths * U)
        if math.isfinite(rounding):
            found[p, q] = math.sqrt(max(entire - frobenius(K[:p, :q]) ** 2, 0.0) + rounding**2), U
    if not found:
        return xp.astype(xp.zeros_like(adjoint(Yh) @ K @ adjoint(V)), dtype, copy=False)
    best = sorted(found.values(), key=lambda pair: pair[0])[:MEASURED]
    if len(best) == 1:
        return best[0][1]
    split = u < 2.0**-50
    return min((U for _, U in best), key=lambda U: Residual(M, T, (U, S), Weights(), split=split).norm())


CUTS = 11
"""Cuts that are tried: the root of the unit roundoff, and its halves down to a thousandth."""
MEASURED = 4
"""Of these, how many are measured. The estimates were off by a factor of four, and the best was among as many."""


@through_numpy
def optimal(A: Array, C: Array, R: Array, /) -> Array:
    """Return ``U = C^+ A R^+``, which minimises ``||A - C U R||_F``.

    By QR of C and of the adjoint of R, one product with A, and triangular solves; rank-revealing where C or R has
    nearly dependent columns or rows.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense or sparse, or an operator.
    C : matrix, shape (m, c)
        The columns that are kept of it.
    R : matrix, shape (r, n)
        The rows that are kept of it.

    Returns
    -------
    array, shape (c, r)
        The core, in the library of `A`.

    Raises
    ------
    TypeError, ValueError
        If an argument is no finite matrix, or shapes and libraries do not match.

    References
    ----------
    Stewart, Numer. Math. 83 (1999); Sorensen and Embree, SIAM J. Sci. Comput. 38 (2016).

    Examples
    --------
    >>> import numpy as np
    >>> from cur import linking
    >>> A = 1.0 / (np.arange(1, 7)[:, None] + np.arange(5))
    >>> C, R = A[:, :2], A[:3]
    >>> U = linking.optimal(A, C, R)
    >>> bool(np.allclose(U, np.linalg.pinv(C) @ A @ np.linalg.pinv(R)))
    True
    """
    A = check_promoted(A)
    (near, e), (C, c), (R, r) = _near(A, "A"), _near(_thin(C, "C", A), "C"), _near(_thin(R, "R", A), "R")
    QC, QR = Orthogonal(C), Orthogonal(adjoint(R))
    U = core(QC, QR, adjoint(adjoint_product(near, QC.Q)) @ QR.Q)
    return of_the_size_of_reciprocals(U, e - c - r)


@through_numpy
def weighted(A: Array, C: Array, R: Array, row_weights: object, column_weights: object, /) -> Array:
    """Return the U that minimises ``||H^(1/2) (A - C U R) G^(1/2)||_F``.

    The weights are given as for `cur.cur`; the optimal core of the transformed matrices, ``F_H^H A F_G`` with
    ``H = F_H F_H^H``, is ``(C^H H C)^+ C^H H A G R^H (R G R^H)^+``.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense or sparse, or an operator.
    C : matrix, shape (m, c)
        The columns that are kept of it.
    R : matrix, shape (r, n)
        The rows that are kept of it.
    row_weights, column_weights : array, Weight or None
        Positive semidefinite ``H`` and ``G``, as for `cur.cur`; None for the identity.

    Returns
    -------
    array, shape (c, r)
        The core, in the library of `A`.

    Raises
    ------
    TypeError, ValueError
        If an argument is no finite matrix, or shapes and libraries do not match.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import linking
    >>> A = 1.0 / (np.arange(1, 7)[:, None] + np.arange(5))
    >>> C, R = A[:, :2], A[:3]
    >>> same = linking.weighted(A, C, R, None, np.ones(5))
    >>> bool(np.allclose(same, linking.optimal(A, C, R)))
    True
    """
    from cur.weights import unit_weight

    A = check_promoted(A)
    dtype = A.dtype
    (A, e), (C, c), (R, r) = _near(A, "A"), _near(_thin(C, "C", A), "C"), _near(_thin(R, "R", A), "R")
    for axis, given in enumerate((row_weights, column_weights)):
        weight, _ = unit_weight(given, A, axis, dtype)  # whose size the core does not depend on
        if weight is not None:
            A = weight.apply(A, axis)
            C, R = (weight.apply(C, 0), R) if axis == 0 else (C, weight.apply(R, 1))
    return of_the_size_of_reciprocals(optimal(A, C, R), e - c - r)


@through_numpy
def cross(block: Array, /) -> Array:
    """Return ``U = A[rows, columns]^+``, which reads no more of the matrix; interpolates A on the cross.

    With rows and columns chosen independently it can fail totally. `cur.cur` therefore chooses the rows from C, and
    reports ``gamma``.

    Parameters
    ----------
    block : matrix, shape (r, c)
        The entries of A where the chosen rows and columns meet.

    Returns
    -------
    array, shape (c, r)
        The core, in the library of `block`.

    Raises
    ------
    TypeError, ValueError
        If the block is no finite matrix, or an operator, which shows no entries.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import linking
    >>> A = 1.0 / (np.arange(1, 7)[:, None] + np.arange(5))
    >>> U = linking.cross(A[:2, :2])
    >>> bool(np.allclose(U, np.linalg.inv(A[:2, :2])))
    True
    """
    if is_operator(block):
        raise TypeError("`block` must be the entries where rows and columns meet; got a LinearOperator; pass an array")
    block, exponent = _near(thin(check_promoted(block, "block")), "block")
    Q = Orthogonal(block if block.shape[0] >= block.shape[1] else adjoint(block))
    U = Q.left_divide(adjoint(Q.Q))
    U = U if block.shape[0] >= block.shape[1] else adjoint(U)
    return of_the_size_of_reciprocals(U, -exponent, "block")
