"""Powers of two that keep squares and products in the range of the working precision, without any rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg

from cur._lib.array import Array, convert, is_dense, is_operator, namespace, to_numpy
from cur._lib.errors import NumericalError
from cur._lib.products import frobenius, largest
from cur._lib.validate import check_finite_product

__all__ = ["ScaledOperator", "brought_near_one", "of_the_size_of_reciprocals", "seen", "times_power"]

Vectors = np.ndarray[Any, Any]


def brought_near_one(
    A: Array, make: Callable[[int], Array] | None = None, *, total: float | None = None
) -> tuple[Array, int, float | None]:
    """Return ``2^-e A``, `e` and the norm: `e` is 0 unless sums of squares of entries would leave the range.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, in the dtype to compute in; of an operator the size is judged by one product.
    make : callable, optional
        A function that makes ``2^-e A`` anew, called with `e`, for an `A` that is a product in which small entries may
        have vanished.
    total : float, optional
        The Frobenius norm of `A`, where it is known.

    Examples
    --------
    >>> import numpy as np
    >>> near, exponent, total = brought_near_one(np.array([[2.0**-700]]))
    >>> near.tolist(), exponent, total
    ([[1.0]], -700, 1.0)
    """
    if total is None and not is_operator(A):
        total = frobenius(A)
    e = _exponent(A, total)
    if e is None:
        return A, 0, total
    if make is None:
        near = times_power(A, -e)
        return near, e, None if total is None else frobenius(near)
    most = _most(A)
    e = -most if largest(A) == 0.0 else e
    while True:
        near = make(e)
        total = None if is_operator(A) else frobenius(near)
        more = _exponent(near, total)
        if more is None or abs(e + more) > 2 * most:
            return near, e, total
        e += more


def _exponent(A: Array, total: float | None) -> int | None:
    """Return the exponent of the largest entry, where the sum of the squares leaves the range; else None.

    An operator shows its size in one product, which may be far smaller than its norm: it counts as near the ends of the
    range long before it is.
    """
    peak, shift, known = None, 0, total is not None
    if total is None:
        _, y, shift = seen(A, A.dtype)
        check_finite_product(y)
        peak = largest(y)
        total = 10 * peak * math.sqrt(A.shape[0])
    if 1e-9 < total < 1e12 / A.shape[1] and not shift:  # in any working precision, and quick for small matrices
        return None
    info = namespace(A).finfo(A.dtype)
    low = math.sqrt(float(info.smallest_normal) / float(info.eps) ** 2)
    high = math.sqrt(float(info.max)) / A.shape[1]
    if known and low < total < high:
        return None
    peak = largest(A) if peak is None else peak
    if peak == 0.0 or not math.isfinite(peak):
        return None
    return min(max(math.frexp(peak)[1] - 1 + shift, -_most(A)), _most(A))


def _most(A: Array) -> int:
    """Return the largest exponent such that the power of two and its reciprocal are normal numbers."""
    return -math.frexp(float(namespace(A).finfo(A.dtype).smallest_normal))[1] - 1


def times_power(A: Array, exponent: int) -> Array:
    """Return ``2^exponent A``, whatever the exponent, in the dtype of `A`.

    Parameters
    ----------
    A : matrix
        The matrix, in any form; a lazy one stays lazy, and an operator is wrapped.
    exponent : int
        The exponent, which may be beyond those of the dtype.

    Examples
    --------
    >>> import numpy as np
    >>> times_power(np.array([3.0]), -1).tolist()
    [1.5]
    """
    if exponent == 0:
        return A
    if is_operator(A):
        return ScaledOperator(A, exponent)
    most = _most(A)
    if abs(exponent) > most:
        step = most if exponent > 0 else -most
        return times_power(times_power(A, step), exponent - step)
    factor = math.ldexp(1.0, exponent)
    if is_dense(A) and not isinstance(A, np.ndarray):  # some libraries take numbers below the normal ones for zero
        X = to_numpy(A)
        return convert(X * X.dtype.type(factor), A)
    return A * factor


def of_the_size_of_reciprocals(U: Array, exponent: int, name: str = "A") -> Array:
    """Return the core ``2^exponent U`` of a matrix, which for very small ones is out of the range.

    Parameters
    ----------
    U : array
        The core of the matrix that was brought near one.
    exponent : int
        The power of two by which the core of the matrix itself is larger.
    name : str, default "A"
        The matrix's name in the error.

    Raises
    ------
    NumericalError
        If the core has entries beyond the range of its dtype.
    """
    if exponent == 0:
        return U
    xp = namespace(U)
    with np.errstate(over="ignore"):
        larger = times_power(U, exponent)
    if not bool(xp.all(xp.isfinite(larger))) and bool(xp.all(xp.isfinite(U))):
        raise NumericalError(
            f"`{name}` has entries so small that U, of the size of their reciprocals, overflows; scale it"
        )
    return larger


class ScaledOperator(scipy.sparse.linalg.LinearOperator):
    """A power of two times an operator, which sees half of it before the product and half of it afterwards.

    So neither the product inside leaves the range, whatever the size of the operator, nor do the vectors.

    Parameters
    ----------
    operator : LinearOperator
        The operator, in its working precision.
    exponent : int
        The exponent of the power of two, which may be beyond those of the dtype.
    """

    def __init__(self, operator: scipy.sparse.linalg.LinearOperator, exponent: int) -> None:
        super().__init__(operator.dtype, operator.shape)  # type: ignore[call-arg]
        self.args = (operator,)
        self.before = exponent // 2
        self.after = exponent - self.before

    def _matmat(self, X: Vectors) -> Vectors:
        return self._scaled(self.args[0].matmat, X)

    def _matvec(self, x: Vectors) -> Vectors:
        return self._scaled(self.args[0].matvec, x)

    def _rmatmat(self, Y: Vectors) -> Vectors:
        return self._scaled(self.args[0].rmatmat, Y)

    def _rmatvec(self, y: Vectors) -> Vectors:
        return self._scaled(self.args[0].rmatvec, y)

    def _scaled(self, multiply: Callable[[Vectors], Vectors], X: Vectors) -> Vectors:
        Y: Vectors = times_power(multiply(times_power(X, self.before)), self.after)
        return Y


def seen(operator: scipy.sparse.linalg.LinearOperator, dtype: np.dtype[Any]) -> tuple[Vectors, Vectors, int]:
    """Return a random `x`, ``2^-e A x`` and `e`, which is 0 where the product stays in the range.

    The product is not finite where no scale makes it so.

    Parameters
    ----------
    operator : LinearOperator
        The operator, of any scale.
    dtype : numpy.dtype
        The dtype of the random vector.
    """

    def multiply(x: Vectors) -> Vectors:
        y = np.asarray(operator.matmat(x))
        return y.astype({"g": "d", "G": "D"}.get(y.dtype.char, y.dtype), copy=False)

    x = np.random.default_rng(0).standard_normal((operator.shape[1], 1)).astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        y = multiply(x)
        like = y if y.dtype.kind in "fc" else x
        info, half = np.finfo(like.dtype), _most(like) // 2
        if np.isfinite(y).all():
            if largest(y) >= float(info.smallest_normal) / float(info.eps):
                return x, y, 0
            half = -half  # what vanished in the product may be all there is
        other = multiply(times_power(x, -half))
    # of an operator that rounds small vectors to zero nothing is known
    return (x, other, half) if np.isfinite(other).all() and other.any() else (x, y, 0)
