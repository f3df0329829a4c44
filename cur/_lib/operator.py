"""Operators of SciPy in the working precision, at any scale, with the adjoint compared with the operator itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse.linalg

from cur._lib.products import largest
from cur._lib.scale import seen, times_power
from cur._lib.validate import check_finite_product

__all__ = ["CheckedOperator", "checked"]

Vectors = np.ndarray[Any, Any]


class CheckedOperator(scipy.sparse.linalg.LinearOperator):
    """An operator whose products come in one working dtype and whose adjoint has to be one.

    Nothing else says whether the two products that a user wrote belong to the same matrix, and what is certified of an
    operator rests on both. One product with a random `x` is kept; every product with the adjoint is compared with it,
    ``<A x, y> = <x, A^H y>``, which takes no further product.

    Parameters
    ----------
    operator : LinearOperator
        The operator that a user gave.
    name : str, default "A"
        The argument's name in errors.
    dtype : numpy.dtype, optional
        The dtype that products are to have. By default the working precision of the operator.

    Raises
    ------
    TypeError
        If its products are complex beside a real dtype, in less than single precision, or its adjoint is missing.
    ValueError
        If a product is not finite, or the adjoint contradicts the operator; the latter at its first product.
    """

    def __init__(
        self, operator: scipy.sparse.linalg.LinearOperator, name: str = "A", dtype: np.dtype[Any] | None = None
    ) -> None:
        self.operator, self.name = operator, name
        declared = np.dtype(operator.dtype)
        x, y, exponent = seen(operator, _working(declared))
        check_finite_product(y, name)
        if dtype is not None and dtype.kind != "c" and y.dtype.kind == "c":
            raise TypeError(f"`{name}` must be real for a real `A`; its products have dtype {y.dtype}")
        working = _common(declared, y.dtype, name) if dtype is None else dtype
        super().__init__(working, operator.shape)  # type: ignore[call-arg]
        self.x = x.astype(self.dtype)
        # its squares must neither overflow nor vanish
        y, shift = _near_one(y.astype(np.result_type(y, np.float32)))
        self.y, self.exponent = y.astype(self.dtype), exponent + shift

    def _matmat(self, X: Vectors) -> Vectors:
        return self._in_dtype(self.operator.matmat(X))

    def _matvec(self, x: Vectors) -> Vectors:
        return self._in_dtype(self.operator.matvec(x))

    def _rmatmat(self, Y: Vectors) -> Vectors:
        try:
            Z = self._in_dtype(self.operator.rmatmat(Y))
        except (NotImplementedError, TypeError) as error:
            if self._has_adjoint(Y[:, 0]):
                raise
            raise TypeError(
                f"`{self.name}` must have an adjoint, and this LinearOperator has none; give it "
                "rmatvec=lambda y: ..., the product with the conjugate transpose"
            ) from error
        self._compare(Y, Z)
        return Z

    def _rmatvec(self, y: Vectors) -> Vectors:
        return self._rmatmat(y.reshape(-1, 1))[:, 0]

    def _has_adjoint(self, y: Vectors) -> bool:
        # SciPy says so of single vectors only; of several it fails in some other way
        try:
            self.operator.rmatvec(y)
        except NotImplementedError:
            return False
        return True

    def _in_dtype(self, Y: Any) -> Vectors:
        return np.asarray(Y).astype(self.dtype, copy=False)

    def _compare(self, Y: Vectors, Z: Vectors) -> None:
        """Refuse an adjoint whose product ``Z = A^H Y`` contradicts the product with `x`.

        What honest operators differ by is rounding: a few units of roundoff of the sizes compared here, more where they
        cancel inside. The cube root leaves room for a thousandfold in single, and a million in double precision. The
        entries of `x` are of size one, so that ``<x, z>`` errs by the norm of the error of `z`. Below the normal
        numbers rounding is absolute: half the smallest number in each product and sum.
        """
        info = np.finfo(self.dtype)
        Y, shift = _near_one(Y)
        with np.errstate(over="ignore", invalid="ignore"):
            Z = times_power(Z, -shift - self.exponent)
            distance = float(np.linalg.norm(self.y.conj().T @ Y - self.x.conj().T @ Z))
            length = float(np.linalg.norm(Y)) / np.sqrt(Y.shape[1])
            sizes = float(np.linalg.norm(self.y)) * length + float(np.linalg.norm(Z))
            smallest = 2.0 ** min(math.frexp(float(info.smallest_subnormal))[1] - self.exponent - min(shift, 0), 1000)
            underflow = smallest * sum(self.shape) ** 1.5 * max(length, 1.0)
            allowed = float(info.eps / 2) ** (1 / 3) * sizes + underflow
        if distance > allowed:
            raise ValueError(
                f"`{self.name}` must have the adjoint of its own products, but <A x, y> and <x, A^H y> differ by "
                f"{distance / sizes:.2g} of their size; look for a missing factor or conjugate in rmatvec (or "
                "rmatmat), or make both products more accurate"
            )


def _near_one(X: Vectors) -> tuple[Vectors, int]:
    """Return ``2^-e X``, with a largest entry near one, and `e`."""
    peak = largest(X)
    exponent = math.frexp(peak)[1] if 0.0 < peak < math.inf else 0
    return times_power(X, -exponent), exponent


def checked(
    operator: scipy.sparse.linalg.LinearOperator, name: str = "A", dtype: np.dtype[Any] | None = None
) -> scipy.sparse.linalg.LinearOperator:
    """Return the operator in its working precision, or in `dtype`, its adjoint checked.

    What was made of such an operator is returned as it is.

    Parameters
    ----------
    operator : LinearOperator
        The operator that a user gave, or one that was made of a checked one.
    name : str, default "A"
        The argument's name in errors.
    dtype : numpy.dtype, optional
        The dtype that products are to have. By default the working precision of the operator.

    Raises
    ------
    TypeError
        If its products are complex beside a real dtype, or in less than single precision.
    ValueError
        If a product is not finite. An adjoint that contradicts the operator is found later, at its products.
    """
    return operator if _is_checked(operator) else CheckedOperator(operator, name, dtype)


def _is_checked(part: Any) -> bool:
    # sums, products, multiples and adjoints keep what they were made of
    return isinstance(part, CheckedOperator) or any(map(_is_checked, getattr(part, "args", ())))


def _working(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype to compute in; LAPACK has none for half and extended precision."""
    if dtype.kind not in "fc":
        return np.dtype(np.float64)
    single = np.finfo(dtype).bits <= 32
    return np.dtype({("f", True): "f4", ("f", False): "f8", ("c", True): "c8", ("c", False): "c16"}[dtype.kind, single])


def _common(declared: np.dtype[Any], found: np.dtype[Any], name: str) -> np.dtype[Any]:
    """Return the working dtype of an operator that says one and gives another: the coarser, complex if either is."""
    if found.kind not in "fc":
        return _working(declared)
    if np.finfo(found).bits < 32:
        raise TypeError(
            f"`{name}` must have products of single precision at least; this {found} holds too few digits to certify "
            "anything; let matvec and rmatvec compute in float32"
        )
    one, other = _working(declared), _working(found)
    coarse = min(np.finfo(one).bits, np.finfo(other).bits) == 32
    return np.dtype(("c8" if coarse else "c16") if "c" in (one.kind, other.kind) else ("f4" if coarse else "f8"))
