r"""Round a matrix to a grid of few bits so that it stays close where rows and columns count.

Rounding each entry to the nearest number of a grid looks at nothing else. Under weights `H` of the rows and `G` of the
columns the errors of entries add up, so what one entry cannot have is better given to others: nearest plane, Babai's
algorithm for lattices, does that from the last entry to the first. With second moments of a layer's inputs in `G` and
no `H` it is GPTQ; with those of the gradients of its outputs in `H` errors make up for each other along columns of the
matrix as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cur._driver.triangular import Measure, measure
from cur._lib.array import Array, convert, is_dense, namespace, to_numpy
from cur._lib.grid import Grid, nearest
from cur._lib.plane import Triangle, nearest_plane, square
from cur._lib.products import frobenius
from cur._lib.promotion import check_promoted, is_rounded
from cur._lib.scale import times_power
from cur._lib.semidefinite import UNIT
from cur._lib.steps import FACTORS, STORED, Store, least, ranges
from cur._lib.validate import as_integer, check_choice, check_damping, check_finite_norm
from cur.bounds import Certificate
from cur.weights import size_of

__all__ = ["Rounded", "round_to_grid"]

Matrix = np.ndarray[Any, Any]

BITS = (2, 8)
"""The fewest and the most bits of an integer."""


@dataclass(frozen=True, eq=False, repr=False)
class Rounded:
    """A matrix of integers, with a step for each group of a row.

    Attributes
    ----------
    integers : array, shape (m, n)
        From 0 to ``2^bits - 1``, uint8; of a symmetric grid from ``1 - 2^(bits - 1)`` to ``2^(bits - 1) - 1``, int8.
    steps : array, shape (m, n / group)
        The step of each group, in the dtype asked for, or in that of the matrix where its library does not have that.
    zeros : array or None, shape (m, n / group)
        The integer that stands for 0 in each group, uint8; None for a symmetric grid.
    bits : int
        How many bits an integer takes.
    group : int
        How many neighbours in a row share a step.
    dtype : dtype
        The dtype of `toarray`, in which the matrix was computed.
    clipped : int
        How many entries would have been nearer to a number beyond the ends of the grid.
    certificate : Certificate
        The weighted error as it was computed, with a bound on its rounding.
    bound : float or None
        A bound on the weighted error by theorem, what nearest plane can lose at most (N); None where entries were
        clipped.
    """

    integers: Array
    steps: Array
    zeros: Array | None
    bits: int
    group: int
    dtype: Any = field(repr=False)
    clipped: int
    certificate: Certificate
    bound: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix."""
        m, n = self.integers.shape
        return int(m), int(n)

    @property
    def error(self) -> float:
        """The weighted error as it was computed, without what is added for rounding."""
        return self.certificate.value - self.certificate.rounding

    def toarray(self) -> Array:
        """Return the matrix that the integers stand for, ``(integers - zeros) * steps``.

        Exact in the dtype of the result for steps in half precision, else rounded once.

        Returns
        -------
        array, shape (m, n)
            In the library and on the device of the integers.
        """
        xp = namespace(self.integers)
        m, n = self.shape
        X = xp.reshape(xp.astype(self.integers, self.dtype), (m, n // self.group, self.group))
        if self.zeros is not None:
            X = X - xp.astype(self.zeros, self.dtype)[:, :, None]
        return xp.reshape(X * xp.astype(self.steps, self.dtype)[:, :, None], (m, n))

    def __repr__(self) -> str:
        m, n = self.shape
        kind = "symmetric" if self.zeros is None else "asymmetric"
        return f"{m} x {n} matrix in {self.bits} bits, {kind}, groups of {self.group}; {self.certificate}"


def round_to_grid(
    A: Array,
    /,
    *,
    bits: int = 4,
    group: int | None = None,
    symmetric: bool = False,
    row_weights: Any = None,
    column_weights: Any = None,
    damping: float = 0.0,
    dtype: str = "float16",
) -> Rounded:
    r"""Round a matrix to a grid by nearest plane under weights of its rows and columns.

    Makes ``||H^(1/2) (A - Q) G^(1/2)||_F`` small over the matrices `Q` of a grid, never larger than rounding each entry
    to the nearest number does. A grid has the numbers ``(q - zero) step`` for integers `q` of a few bits, with a step
    and, unless it is symmetric, a zero for each group of a row. The range of each group is shortened where that loses
    less than reaching its largest entry; the result loses no more than with whole ranges, and no more than what is
    returned without weights.

    Computed by NumPy in double precision on the host, whatever the library and the device: most of the work is a long
    sequence of operations on a few hundred numbers, which other devices would wait for. Cost: ``O(m n (m + n))``
    besides the factorization of the weights; some ten arrays of the size of the matrix.

    Parameters
    ----------
    A : array, shape (m, n)
        A dense real matrix; half precisions are computed in single, integers in double precision.
    bits : int, default 4
        The bits of an integer, from 2 to 8.
    group : int, optional
        How many neighbours in a row share a step, a divisor of n. By default a row has one step.
    symmetric : bool, default False
        Whether 0 lies in the middle of the grid, which then has one number less and no zeros to store.
    row_weights, column_weights : array or Weight, optional
        `H` and `G` as for `cur.cur`: positive semidefinite matrices, or vectors for diagonal ones. What has no weight
        is rounded to the nearest number.
    damping : float, default 0
        The multiple of the mean eigenvalue that is added to all eigenvalues of weights that are matrices, as in
        `weights.matrix`. Error and certificate are those under the weights with that. Weights of fewer samples than
        inputs leave much to choose: there 0.01 loses a good deal less than 0.
    dtype : {"float16", "bfloat16", "float32", "float64"}, default "float16"
        The dtype in which steps are stored; no wider than that of the matrix. What is rounded is rounded to multiples
        of the stored steps.

    Returns
    -------
    Rounded
        Integers, steps and zeros, with a certificate of the weighted error.

    Raises
    ------
    TypeError, ValueError
        If the matrix is not dense, real and finite, a weight is not as `cur.cur` takes it or has a negative eigenvalue,
        bits or group do not fit, or the dtype of the steps does not reach their size.

    References
    ----------
    Babai, "On Lovasz' lattice reduction and the nearest lattice point problem", Combinatorica 6 (1986). That GPTQ is
    nearest plane: arXiv 2507.18553. Rounding by both sides: arXiv 2505.22988.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[0.3, 1.0, 0.4]])
    >>> G = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])  # the first and the last input are similar
    >>> round_to_grid(A, bits=2, symmetric=True).integers.tolist()
    [[0, 1, 0]]
    >>> round_to_grid(A, bits=2, symmetric=True, column_weights=G).integers.tolist()
    [[1, 1, 0]]
    """
    given, A = A, check_promoted(A)
    if not is_dense(A):
        raise TypeError(f"`A` must be a dense array; got {type(A).__name__}; round parts of it that fit into memory")
    xp = namespace(A)
    if xp.isdtype(A.dtype, "complex floating"):
        raise TypeError(
            f"`A` must be real to be rounded to a grid; got dtype {given.dtype}; round real and imaginary parts"
        )
    levels = _levels(bits, symmetric)
    group = _group(group, int(A.shape[1]))
    check_choice(dtype, STORED, "dtype")
    check_damping(damping)
    W = to_numpy(A).astype(np.float64)
    check_finite_norm(0.0 if np.isfinite(W).all() else math.nan, A)
    rows = measure(row_weights, A, 0, float(damping))
    columns = measure(column_weights, A, 1, float(damping))
    exponent = size_of(W)
    W = times_power(W, -exponent)
    store = Store.of(dtype, str(A.dtype).rsplit(".", 1)[-1], exponent)
    best = _choose(W, rows.triangle, columns.triangle, group, levels, store)
    certificate, bound = _certificate(W, best, rows, columns, store, is_rounded(given, A))
    kind = xp.int8 if symmetric else xp.uint8
    steps = np.ldexp(best.grid.steps, exponent)
    zeros = best.grid.zeros
    return Rounded(
        integers=convert(best.integers.astype("int8" if symmetric else "uint8"), A, kind),
        steps=convert(steps, A, getattr(xp, store.name, A.dtype)),
        zeros=None if zeros is None else convert(zeros.astype("uint8"), A, xp.uint8),
        bits=int(bits),
        group=group,
        dtype=A.dtype,
        clipped=best.clipped,
        certificate=certificate,
        bound=bound,
    )


def _certificate(
    W: Matrix, best: _Choice, rows: Measure, columns: Measure, store: Store, is_rounded: bool
) -> tuple[Certificate, float | None]:
    """State the error and the bound of nearest plane, with what rounding and the factors of the weights may hide."""
    m, n = W.shape
    E = W - _values(best.integers, best.grid)
    size, whole = frobenius(E), frobenius(W)
    weight = math.sqrt(rows.size * columns.size)
    # inner products of the triangles with E, in any order; and the entries of W, where they were rounded
    rounding = (m + n + 10) * UNIT * weight * size + (UNIT * weight * whole if is_rounded else 0.0)
    missed = (rows.missed * columns.size + columns.missed * (rows.size + rows.missed)) * size**2
    error = math.sqrt(best.loss)
    value = math.hypot(error + rounding, math.sqrt(missed))
    bound = best.bound
    if bound is not None:
        # the numbers of the grid are rounded once where they are not exact
        formed = 0.0 if store.exact else float(np.finfo(store.working).eps) * weight * (whole + size)
        bound = math.hypot(bound + rounding + formed, math.sqrt(missed))
    total = math.sqrt(square(W, rows.triangle, columns.triangle))
    scale = max(
        total
        - (m + n + 10) * UNIT * weight * whole
        - math.sqrt(rows.missed * columns.size + columns.missed * rows.size) * whole,
        0.0,
    )
    shift = store.exponent + rows.exponent + columns.exponent
    if bound is not None:
        with np.errstate(over="ignore", under="ignore"):
            bound = float(np.ldexp(bound, shift))
    return Certificate("fro", value, "exact", 0.0, store.working, scale, value - error).shifted(shift), bound


def _levels(bits: Any, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest integer of a grid."""
    bits = as_integer(bits, "bits")
    if not BITS[0] <= bits <= BITS[1]:
        raise ValueError(f"`bits` must be between {BITS[0]} and {BITS[1]}; got {bits}")
    half = 2 ** (bits - 1) - 1
    return (-half, half) if symmetric else (0, 2 * half + 1)


def _group(group: Any, n: int) -> int:
    """Return the length of a group."""
    if group is None:
        return n
    length = as_integer(group, "group")
    if length < 1 or n % length:
        raise ValueError(
            f"`group` must divide the {n} columns of `A`; got {length}; take a divisor, or None for a whole row"
        )
    return length


@dataclass(frozen=True, eq=False)
class _Choice:
    """A matrix of integers, what it loses, and what is known of nearest plane on its grid."""

    grid: Grid
    integers: Matrix
    loss: float
    clipped: int
    bound: float | None


def _choose(W: Matrix, rows: Triangle, columns: Triangle, group: int, levels: tuple[int, int], store: Store) -> _Choice:
    """Return the best of nearest plane and nearest rounding, with shortened and with whole ranges."""
    whole = ranges(W, group, *levels)
    store.check(whole[0], levels[1] - levels[0])
    plain = _grid(W, whole, columns, levels, group, store, FACTORS[:1])
    short = _grid(W, whole, columns, levels, group, store, FACTORS)
    best = _better(W, short, rows, columns, None)
    if not plain.equals(short):
        best = _better(W, plain, rows, columns, best)
    if _are_diagonal(rows, columns):
        return best
    even = replace(columns, pivots=np.ones(W.shape[1]))
    return _nearest(W, _grid(W, whole, even, levels, group, store, FACTORS), rows, columns, best)


def _grid(
    W: Matrix,
    whole: tuple[Matrix, Matrix | None],
    columns: Triangle,
    levels: tuple[int, int],
    group: int,
    store: Store,
    factors: Matrix,
) -> Grid:
    steps, zeros = least(W, whole, columns.pivots, *levels, store.round, factors)
    return Grid(steps, zeros, group, *levels, None if store.exact else store.form)


def _better(W: Matrix, grid: Grid, rows: Triangle, columns: Triangle, best: _Choice | None) -> _Choice:
    """Return what loses least: the best so far, nearest plane or nearest rounding on a grid."""
    by_plane = nearest_plane(W, grid, rows, columns)
    bound = None
    if not by_plane.clipped:
        # each entry is off by half a step at most, times the roots of both pivots
        per_group = columns.pivots.reshape(-1, grid.group).sum(axis=1)
        bound = 0.5 * math.sqrt(float(rows.pivots @ grid.steps**2 @ per_group))
    if best is None or by_plane.loss < best.loss:
        best = _Choice(grid, by_plane.integers, by_plane.loss, by_plane.clipped, bound)
    return best if _are_diagonal(rows, columns) else _nearest(W, grid, rows, columns, best, bound)


def _nearest(
    W: Matrix, grid: Grid, rows: Triangle, columns: Triangle, best: _Choice, bound: float | None = None
) -> _Choice:
    """Return the best so far, or rounding to the nearest number of a grid where that loses less."""
    integers, clipped = nearest(W, grid)
    loss = square(W - _values(integers, grid), rows, columns, best.loss)
    return _Choice(grid, integers, loss, clipped, bound) if loss < best.loss else best


def _are_diagonal(rows: Triangle, columns: Triangle) -> bool:
    return rows.lower is None and columns.lower is None


def _values(integers: Matrix, grid: Grid) -> Matrix:
    steps, zeros = grid.part(slice(0, len(integers)), slice(0, integers.shape[1]))
    return grid.value(integers.astype(np.float64), steps, zeros)
