"""Powers of two that keep squares and products in the range of the working precision, without any rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cur._lib.array import Array, convert, is_dense, is_operator, namespace, to_numpy
from cur._lib.products import frobenius, largest, product

__all__ = ["brought_near_one", "times_power"]


def brought_near_one(A: Array, make: Callable[[int], Array] | None = None) -> tuple[Array, int, float | None]:
    """Return ``2^-e A``, `e` and the norm: `e` is 0 unless sums of squares of entries would leave the range.

    Parameters
    ----------
    make : callable, optional
        Makes ``2^-e A``, for an `A` that is a product in which small entries may have vanished.
    """
    total = None if is_operator(A) else frobenius(A)
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
    """Return the exponent of the largest entry, where the sum of the squares leaves the range; else None."""
    if total is None:  # an operator shows its size in a product
        x = np.random.default_rng(0).standard_normal((A.shape[1], 1)).astype(A.dtype)
        peak = largest(product(A, x))
        total = 10 * peak * math.sqrt(A.shape[0])
    else:
        peak = None
    info = namespace(A).finfo(A.dtype)
    low = math.sqrt(float(info.smallest_normal) / float(info.eps) ** 2)
    high = math.sqrt(float(info.max)) / A.shape[1]
    if low < total < high:
        return None
    peak = largest(A) if peak is None else peak
    if peak == 0.0 or not math.isfinite(peak):
        return None
    return min(max(math.frexp(peak)[1] - 1, -_most(A)), _most(A))


def _most(A: Array) -> int:
    """Return the largest exponent such that the power of two and its reciprocal are normal numbers."""
    return -math.frexp(float(namespace(A).finfo(A.dtype).smallest_normal))[1] - 1


def times_power(A: Array, exponent: int) -> Array:
    """Return ``2^exponent A``, whatever the exponent, in the dtype of `A`."""
    if exponent == 0:
        return A
    info = namespace(A).finfo(A.dtype)
    most = -math.frexp(float(info.smallest_normal))[1] - 1
    if abs(exponent) > most:
        step = most if exponent > 0 else -most
        return times_power(times_power(A, step), exponent - step)
    factor = math.ldexp(1.0, exponent)
    if is_operator(A):  # its product with a plain number may be of another dtype
        return A * A.dtype.type(factor)
    if is_dense(A) and not isinstance(A, np.ndarray):  # some libraries take numbers below the normal ones for zero
        X = to_numpy(A)
        return convert(X * X.dtype.type(factor), A)
    return A * factor
