"""The linking matrix U between chosen columns C and chosen rows R."""

from __future__ import annotations

import math

import numpy as np

from cur._array import (
    Array,
    adjoint,
    is_dense,
    is_operator,
    namespace,
    qr,
    solve_triangular,
    svd,
    take_device,
    unit_roundoff,
)
from cur._host import through_numpy
from cur._products import adjoint_product, thin
from cur._validate import check_companion, check_matrix, check_promoted

__all__ = ["Orthogonal", "cross", "optimal", "weighted"]


class Orthogonal:
    """A thin matrix as ``X = Q T``, with the pseudo-inverse of `T` that rounding allows.

    `T` is inverted by triangular solves while its condition number stays below ``1 / cutoff``. Beyond, its SVD is cut
    there.

    Parameters
    ----------
    X : array, shape (m, k)
    cutoff : float, optional
        By default the root of the unit roundoff, which is right between columns and rows: a kept singular value ``s``
        contributes rounding of order ``u / s`` to the product C U R, a dropped one an error of order ``s``, and the
        sum of both is smallest there. Coefficients of one side alone lose nothing down to the unit roundoff.
    """

    def __init__(self, X: Array, cutoff: float | None = None) -> None:
        self.Q, self.T = qr(X)
        cutoff = math.sqrt(unit_roundoff(self.T.dtype, self.T)) if cutoff is None else cutoff
        self.pseudo_inverse = None if _condition(self.T) * cutoff < 1 else _truncated_inverse(self.T, cutoff)

    def left_divide(self, M: Array) -> Array:
        """Return ``T^+ M``."""
        if self.pseudo_inverse is None:
            return solve_triangular(self.T, M)
        return self.pseudo_inverse @ M


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


def core(QC: Orthogonal, QR: Orthogonal, M: Array) -> Array:
    """Return ``T_C^+ M T_R^{+H}`` for ``M = Q_C^H A Q_R``."""
    return adjoint(QR.left_divide(adjoint(QC.left_divide(M))))


@through_numpy
def optimal(A: Array, C: Array, R: Array, /) -> Array:
    """Return ``U = C^+ A R^+``, which minimises ``||A - C U R||_F``.

    By QR of C and of the adjoint of R, one product with A, and triangular solves; rank-revealing where C or R has
    nearly dependent columns or rows.

    Parameters
    ----------
    A : matrix, shape (m, n)
    C : matrix, shape (m, c)
    R : matrix, shape (r, n)

    Returns
    -------
    array, shape (c, r)

    References
    ----------
    Stewart, Numer. Math. 83 (1999); Sorensen and Embree, SIAM J. Sci. Comput. 38 (2016).
    """
    A = check_promoted(A)
    QC, QR = Orthogonal(_thin(C, "C", A)), Orthogonal(adjoint(_thin(R, "R", A)))
    return core(QC, QR, adjoint(adjoint_product(A, QC.Q)) @ QR.Q)


@through_numpy
def weighted(A: Array, C: Array, R: Array, row_weights: object, column_weights: object, /) -> Array:
    """Return the U that minimises ``||H^(1/2) (A - C U R) G^(1/2)||_F``.

    The weights are given as for `cur.cur`; the optimal core of the transformed matrices, ``F_H^H A F_G`` with
    ``H = F_H F_H^H``, is ``(C^H H C)^+ C^H H A G R^H (R G R^H)^+``.
    """
    from cur.importance import as_weight

    A = check_promoted(A)
    C, R = _thin(C, "C", A), _thin(R, "R", A)
    for axis, given in enumerate((row_weights, column_weights)):
        weight = as_weight(given, A, axis, A.dtype)
        if weight is not None:
            A = weight.apply(A, axis)
            C, R = (weight.apply(C, 0), R) if axis == 0 else (C, weight.apply(R, 1))
    return optimal(A, C, R)


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
    """
    block = thin(check_promoted(block, "block"))
    if block.shape[0] >= block.shape[1]:
        Q = Orthogonal(block)
        return Q.left_divide(adjoint(Q.Q))
    return adjoint(cross(adjoint(block)))
