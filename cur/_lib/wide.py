"""Residuals in about twice the working precision: what factors, as they are returned, leave of a matrix.

Single precision is evaluated in double. In double precision each factor is split into a leading part of so few bits
that products of leading parts are exact in any order of summation, and a remainder whose products may be rounded
(Ozaki, Ogita, Oishi and Rump, Numer. Algorithms 59, 2012): four products where one would do, of a relative accuracy
near 2^-75. All bounds on the rounding hold in the worst case, whatever the order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat as compat
import numpy as np

from cur._lib.array import Array, convert, is_dask, is_sparse, namespace, to_numpy
from cur._lib.products import BLOCK_ENTRIES, RUN, frobenius, largest, thin
from cur._lib.scale import times_power

__all__ = ["Residual", "Weights"]

UNIT = 2.0**-53
"""Unit roundoff of double precision, in which everything here is computed."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the rows and columns of a residual, each a `Weight` or None, and a power of two to multiply it by.

    Attributes
    ----------
    rows : Weight or None
        The weight of the rows; None for the identity.
    columns : Weight or None
        The weight of the columns; None for the identity.
    exponent : int
        The power of two that the residual is multiplied by.
    """

    rows: Any = None
    columns: Any = None
    exponent: int = 0

    def apply(self, E: Array) -> Array:
        """Return the residual in weighted coordinates.

        Parameters
        ----------
        E : array, shape (m, n)
            The residual, dense or lazy.
        """
        if self.rows is not None:
            E = self.rows.apply(E, 0)
        E = times_power(E, self.exponent)
        return E if self.columns is None else self.columns.apply(E, 1)

    def touch(self, A: Array) -> bool:
        """Tell whether any entry of a matrix has a weight in both directions, however small all of them are.

        Parameters
        ----------
        A : matrix, shape (m, n)
            The matrix, in any form that has entries.

        Returns
        -------
        bool
            False where every entry that is not zero has the weight zero.
        """
        xp = namespace(A)
        signs = replace(self, exponent=0)
        for name in ("rows", "columns"):
            weight = getattr(self, name)
            if weight is not None and weight.root is not None:
                root = namespace(weight.root).astype(weight.root > 0, weight.root.dtype)
                signs = replace(signs, **{name: replace(weight, root=root)})
        ones = (A != 0).astype(A.dtype) if is_sparse(A) else xp.astype(A != 0, A.dtype)
        return largest(signs.apply(ones)) > 0.0

    def bound(self) -> float:
        """Return a bound on the 2-norm of both together."""
        peaks = [largest(w.roots if w.root is None else w.root) for w in (self.rows, self.columns) if w is not None]
        return math.ldexp(1.01 * math.prod(peaks), self.exponent)


@dataclass(frozen=True, eq=False)
class Product:
    """A thin real product as ``high + low``, exact up to `error` in the Frobenius norm behind the column weights."""

    high: Array
    low: Array | None
    error: float


class Residual:
    """The weighted matrix ``A - C W``, made block by block.

    Parameters
    ----------
    A : matrix
        Dense, sparse or lazy.
    C : array, shape (m, c)
        The left factor, the columns that are kept.
    W : sequence of arrays
        The right factor: one array, or two of which it is the product.
    weights : Weights
        The weights under which the residual is measured.
    split : bool
        Whether products are to be more accurate than in double precision.
    sketch : array, optional
        `Y`, where `A` stands for ``Y A`` and `C` for ``Y C``.
    """

    def __init__(
        self, A: Array, C: Array, W: Sequence[Array], weights: Weights, *, split: bool, sketch: Array = None
    ) -> None:
        on_device = bool(compat.is_torch_array(A)) and A.device.type in ("cpu", "cuda")
        if not (on_device or is_sparse(A) or is_dask(A)):
            A = to_numpy(A)
        self.A = A.tocsr() if is_sparse(A) else A
        self.is_complex = namespace(C).isdtype(C.dtype, "complex floating")
        rows, columns = (_in_double(weight, on_device) for weight in (weights.rows, weights.columns))
        self.weights = replace(weights, rows=rows, columns=columns)
        self.split = split
        C, *chain = (_embedded(_double(X, on_device)) for X in (C, *W))
        xp = namespace(C)
        missed = 0.0
        if sketch is not None:
            seen = _product(_embedded(_double(sketch, on_device)), C, self.split, None)
            C, missed = seen.high, seen.error
            if seen.low is not None:
                C = xp.concat([C, seen.low], axis=1)
                chain[0] = xp.concat([chain[0], chain[0]], axis=0)
        self.C = C[: A.shape[0], :]
        product = Product(chain[0], None, 0.0) if len(chain) == 1 else _product(chain[0], chain[1], self.split, columns)
        terms = self.C.shape[1]
        if self.split:
            C1, C2 = _split(self.C, 1, terms)
            W1, W2 = _split(product.high, 0, terms)
            self.leading = (C1, W1)
            self.rest = [(C1, W2), (C2, product.high)] + ([] if product.low is None else [(self.C, product.low)])
        else:
            self.leading, self.rest = (self.C, product.high), []
        rounded = self.rest if self.split else [self.leading]
        inherited = product.error * frobenius(_weighed(self.C, rows, 0))
        inherited += missed * frobenius(_weighed(product.high, columns, 1))
        evaluated = sum(_coupled(X, Y, rows, columns) for X, Y in rounded)
        self.absolute = math.ldexp((terms + 6) * UNIT * evaluated + 1.01 * inherited, weights.exponent)

    def norm(self) -> float:
        """Return the Frobenius norm of the weighted residual, as computed."""
        m, n = self.A.shape
        rows = self.weights.rows
        if is_dask(self.A) or (rows is not None and rows.root is None):
            return frobenius(self.weights.apply(self.block(0, m)))
        step = max(1, BLOCK_ENTRIES // (4 * n))
        ends = ((i, min(i + step, m)) for i in range(0, m, step))
        return math.hypot(*(frobenius(self._weights_of(i, j).apply(self.block(i, j))) for i, j in ends))

    def _weights_of(self, i: int, j: int) -> Weights:
        rows = self.weights.rows
        return self.weights if rows is None else replace(self.weights, rows=replace(rows, root=rows.root[i:j]))

    def rounding(self, value: float) -> float:
        """Return a bound on the rounding of `norm`, which gave `value`.

        Parameters
        ----------
        value : float
            The norm, as it was computed.
        """
        relative = 10.0 * RUN  # of the norm
        if any(w is not None and w.root is None for w in (self.weights.rows, self.weights.columns)):
            # a product with a full matrix of weights may cancel
            m, n = self.A.shape
            E = self.block(0, m)
            relative_to_all = 4 * (m + n) * self.weights.bound() * frobenius(E)
            return float(self.absolute + UNIT * (relative * value + relative_to_all))
        return float(self.absolute + relative * UNIT * value)

    def block(self, i: int, j: int) -> Array:
        """Return rows `i` to `j` of the residual, in double precision.

        Parameters
        ----------
        i : int
            The position of the first row.
        j : int
            The position behind the last row; of a lazy matrix all rows come back.
        """
        A = self.A
        if is_dask(A):
            xp = namespace(A)
            A = xp.astype(A, xp.complex128 if self.is_complex else xp.float64)
        else:
            A = A[i:j, :]
            A = _double(A, not isinstance(A, np.ndarray) and not is_sparse(A))
        E = _parts(A) - self._times(self.leading, i, j)
        if self.rest:
            rest = self._times(self.rest[0], i, j)
            for pair in self.rest[1:]:
                rest = rest + self._times(pair, i, j)
            E = E - rest
        n = self.A.shape[1]
        return E if not self.is_complex else E[:, :n] + 1j * E[:, n:]

    def _times(self, pair: tuple[Array, Array], i: int, j: int) -> Array:
        X, Y = pair
        if is_dask(self.A):
            return namespace(self.A).asarray(X, chunks=(self.A.chunks[0], -1)) @ Y
        return X[i:j, :] @ Y


def _parts(A: Array) -> Array:
    """Return real and imaginary parts side by side."""
    xp = namespace(A)
    return xp.concat([xp.real(A), xp.imag(A)], axis=1) if xp.isdtype(A.dtype, "complex floating") else A


def _double(X: Array, on_device: bool) -> Array:
    """Return `X` in double precision, on its device or on the host."""
    X = thin(X)
    if not on_device:
        X = to_numpy(X)
    xp = namespace(X)
    return xp.astype(X, xp.complex128 if xp.isdtype(X.dtype, "complex floating") else xp.float64)


def _in_double(weight: Any, on_device: bool) -> Any:
    if weight is None:
        return None
    names = [name for name in ("root", "vectors", "roots") if getattr(weight, name) is not None]
    return replace(weight, **{name: _double(getattr(weight, name), on_device) for name in names})


def _product(U: Array, R: Array, split: bool, columns: Any) -> Product:
    """Return ``U R`` for thin real matrices in double precision; `split` for the accuracy of two doubles."""
    k = U.shape[1]
    if not split:
        return Product(U @ R, None, (k + 2) * UNIT * _coupled(U, R, None, columns))
    U1, U2 = _split(U, 1, k)
    R1, R2 = _split(R, 0, k)
    main, rest = U1 @ R1, U1 @ R2 + U2 @ R
    high = main + rest
    virtual = high - main
    low = (main - (high - virtual)) + (rest - virtual)
    error = (k + 3) * UNIT * (_coupled(U1, R2, None, columns) + _coupled(U2, R, None, columns))
    return Product(high, low, error)


def _split(X: Array, axis: int, terms: int) -> tuple[Array, Array]:
    """Split into a leading part and the rest, exactly; `axis` is the one that products sum over, `terms` long.

    Leading parts are multiples of one number in each row (or column), and so short that any sum of `terms` products of
    two of them is a double.
    """
    xp = namespace(X)
    bits = (53 - max(terms - 1, 1).bit_length()) // 2
    exponent = np.frexp(to_numpy(xp.max(xp.abs(X), axis=axis, keepdims=True)))[1]
    # adding and taking away a number so large that what lies below the last bit kept is rounded off
    anchor = convert(np.ldexp(1.5, np.minimum(exponent - bits + 52, 1020)), X)
    leading = (X + anchor) - anchor
    return leading, X - leading


def _coupled(X: Array, Y: Array, rows: Any, columns: Any) -> float:
    """Return a bound on ``|| |X| |Y| ||_F`` behind the weights: the sum of the products of norms that meet."""
    xp = namespace(X)
    left, right = _weighed(X, rows, 0), _weighed(Y, columns, 1)
    return float(xp.sum(xp.linalg.vector_norm(left, axis=0) * xp.linalg.vector_norm(right, axis=1)))


def _weighed(X: Array, weight: Any, axis: int) -> Array:
    """Return `X`, whose side may hold real and imaginary parts, behind a diagonal weight or a bound on a full one."""
    if weight is None:
        return X
    if weight.root is None:
        return X * float(namespace(X).max(weight.roots))
    root = weight.root
    if X.shape[axis] == 2 * root.shape[0]:
        root = namespace(X).concat([root, root])
    return X * (root[:, None] if axis == 0 else root[None, :])


def _embedded(X: Array) -> Array:
    """Return the real matrix ``[[Re, Im], [-Im, Re]]`` of a complex one: products carry over."""
    xp = namespace(X)
    if not xp.isdtype(X.dtype, "complex floating"):
        return X
    real, imag = xp.real(X), xp.imag(X)
    return xp.concat([xp.concat([real, imag], axis=1), xp.concat([-imag, real], axis=1)], axis=0)
