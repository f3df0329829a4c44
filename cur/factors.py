"""The result types: CUR, folded and interpolative factorizations.

All are immutable, live in the library and on the device of the matrix they came from, behave as the matrix that they
stand for (`cur._lib.factorization`), and convert into each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cur._lib import array as _array
from cur._lib import linalg
from cur._lib.array import Array, adjoint, convert, namespace, take, to_numpy
from cur._lib.factorization import Factorization
from cur._lib.linalg import lu_pivots, qr
from cur._lib.maxvol import dominant
from cur._lib.products import thin
from cur._lib.promotion import promote
from cur.bounds import Certificate
from cur.linking import cross

__all__ = ["CUR", "Folded", "Interpolative"]


@dataclass(frozen=True, eq=False, repr=False)
class CUR(Factorization):
    """A matrix by its own columns and rows, ``A ~ C U R``.

    Unpacks as ``C, U, R``.

    Attributes
    ----------
    C : array, shape (m, c)
        Columns of A, exactly.
    U : array, shape (c, r)
        The matrix that links them, in the precision that was computed in.
    R : array, shape (r, n)
        Rows of A, exactly.
    rows : array of int, shape (r,)
        Positions of the rows, in the order of choice.
    columns : array of int, shape (c,)
        Positions of the columns, in the order of choice.
    certificate : Certificate or None
        What is known of the error; None for one that was loaded or converted.
    """

    C: Array
    U: Array
    R: Array
    rows: Array
    columns: Array
    certificate: Certificate | None = None

    _numbers = ("C", "U", "R")

    @property
    def factors(self) -> tuple[Array, ...]:
        """The matrices whose product is the approximation, left to right."""
        return (self.C, self.U, self.R)

    @property
    def dtype(self) -> Any:
        """Dtype of U, in which the factorization was computed."""
        return self.U.dtype

    @property
    def rank(self) -> int:
        """The number of columns or rows, whichever is smaller: no larger rank is possible."""
        return int(min(self.U.shape))

    def __iter__(self) -> Iterator[Array]:
        return iter((self.C, self.U, self.R))

    def __len__(self) -> int:
        return 3

    @property
    def T(self) -> CUR:
        """The transposed factorization."""
        certificate = None if self.certificate is None else self.certificate.transposed()
        return CUR(self.R.T, self.U.T, self.C.T, self.columns, self.rows, certificate)

    def folded(self) -> Folded:
        """Return the same matrix in two factors, ``(C U) R``: fewer numbers, and the R kept."""
        C, R = (promote(thin(f)) for f in (self.C, self.R))
        return Folded(C @ self.U, R)

    def interpolative(self) -> Interpolative:
        """Return the same matrix as some of its rows and the coefficients of all others: the fewest numbers.

        The kept rows are those of the approximation, not of A.
        """
        return self.folded().interpolative()

    def __repr__(self) -> str:
        m, n = self.shape
        text = f"CUR of a {m} x {n} matrix: {self.C.shape[1]} columns, {self.R.shape[0]} rows, {self.dtype}"
        return text if self.certificate is None else f"{text}\n{self.certificate}"


@dataclass(frozen=True, eq=False, repr=False)
class Folded(Factorization):
    """A matrix as the product of two thin ones.

    Attributes
    ----------
    left : array, shape (m, k)
        The left factor; of :meth:`CUR.folded` the columns times the core.
    right : array, shape (k, n)
        The right factor; of :meth:`CUR.folded` the rows that were kept.
    """

    left: Array
    right: Array

    _numbers = ("left", "right")

    @property
    def factors(self) -> tuple[Array, ...]:
        """The matrices whose product is the approximation, left to right."""
        return (self.left, self.right)

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return int(self.left.shape[1])

    @property
    def T(self) -> Folded:
        """The transposed factorization."""
        return Folded(self.right.T, self.left.T)

    def interpolative(self) -> Interpolative:
        """Return the same matrix as k of its rows and the coefficients of the others.

        The rows are chosen by DEIM on a basis of the range, and exchanged until no coefficient is larger than 1.01
        (Goreinov et al., "How to find a good submatrix", 2010), so that rounding the rows harms the others little.

        Raises
        ------
        ValueError
            If the rank exceeds the number of rows.
        """
        if self.rank > self.shape[0]:
            raise ValueError(
                f"a factorization of rank {self.rank} cannot be stored as {self.shape[0]} rows; transpose it first"
            )
        Q, T = qr(self.left)
        rows = dominant(Q, lu_pivots(Q))
        skeleton = take(Q, rows, axis=0)
        others = _others(rows, self.shape[0])
        coefficients = adjoint(_divide(adjoint(skeleton), adjoint(take(Q, others, axis=0))))
        return Interpolative(skeleton @ (T @ self.right), coefficients, rows, others)

    def cur(self) -> CUR:
        """Return the same matrix as its own columns and rows, which are those of the approximation."""
        return self.interpolative().cur()

    def __repr__(self) -> str:
        return f"Folded {self.shape[0]} x {self.shape[1]} factorization of rank {self.rank}, {self.dtype}"


@dataclass(frozen=True, eq=False, repr=False)
class Interpolative(Factorization):
    """A matrix by some of its rows (or columns) and the coefficients that give all the others.

    Attributes
    ----------
    skeleton : array, shape (k, n), or (m, k) for ``side="columns"``
        The chosen rows or columns.
    coefficients : array, shape (m - k, k), or (k, n - k)
        Coefficients of the rows or columns that were not chosen, in the order of `others`.
    chosen : array of int, shape (k,)
        Positions of the chosen ones; their coefficients are the identity.
    others : array of int
        Positions of all the others, ascending.
    side : "rows" or "columns"
        Whether rows of the matrix are kept, or columns.
    certificate : Certificate or None
        The bound on the error; None for one that was loaded or converted.
    """

    skeleton: Array
    coefficients: Array
    chosen: Array
    others: Array
    side: str = "rows"
    certificate: Certificate | None = None

    _numbers = ("skeleton", "coefficients")

    def __post_init__(self) -> None:
        object.__setattr__(self, "side", str(self.side))  # an array of one string when read from a file

    @property
    def rank(self) -> int:
        """Number of chosen rows or columns."""
        return int(self.chosen.shape[0])

    @property
    def projection(self) -> Array:
        """All coefficients, shape (m, k) or (k, n), the identity at the chosen positions."""
        xp = namespace(self.coefficients)
        axis = 0 if self.side == "rows" else 1
        eye = xp.eye(self.rank, dtype=self.coefficients.dtype, device=_array.take_device(self.coefficients))
        order = xp.argsort(xp.concat([self.chosen, self.others]))
        return take(xp.concat([eye, self.coefficients], axis=axis), order, axis=axis)

    @property
    def factors(self) -> tuple[Array, ...]:
        """The matrices whose product is the approximation, left to right."""
        return (self.projection, self.skeleton) if self.side == "rows" else (self.skeleton, self.projection)

    def _stored(self) -> tuple[Array, ...]:
        return (self.skeleton, self.coefficients)

    def _labels(self) -> dict[str, Any]:
        return {"side": np.asarray(self.side)}

    @property
    def T(self) -> Interpolative:
        """The transposed factorization."""
        side = "columns" if self.side == "rows" else "rows"
        certificate = None if self.certificate is None else self.certificate.transposed()
        return Interpolative(self.skeleton.T, self.coefficients.T, self.chosen, self.others, side, certificate)

    def folded(self) -> Folded:
        """Return the same matrix as two full factors."""
        left, right = (promote(thin(f)) for f in self.factors)
        return Folded(left, right)

    def cur(self) -> CUR:
        """Return the same matrix as its own columns and rows."""
        if self.side == "columns":
            return self.T.cur().T
        R = promote(thin(self.skeleton))
        Q, _ = qr(adjoint(R))
        columns = lu_pivots(Q)
        block = take(R, columns, axis=1)
        return CUR(self.projection @ block, cross(block), R, self.chosen, columns)

    def __repr__(self) -> str:
        m, n = self.shape
        text = f"Interpolative factorization of a {m} x {n} matrix by {self.rank} of its {self.side}, {self.dtype}"
        return text if self.certificate is None else f"{text}\n{self.certificate}"

    @property
    def dtype(self) -> Any:
        """Dtype of the coefficients."""
        return self.coefficients.dtype


def _divide(T: Array, B: Array) -> Array:
    """Solve the square system ``T X = B`` by QR."""
    Q, R = qr(T)
    return linalg.solve_triangular(R, adjoint(Q) @ B)


def _others(chosen: Array, m: int) -> Array:
    """Return the positions that were not chosen, ascending."""
    return convert(np.setdiff1d(np.arange(m), to_numpy(chosen)), chosen)
