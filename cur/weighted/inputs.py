"""A matrix from a few of its inputs under weights, all counts at once.

The other way round from `cur.weighted.rows`: not which rows give the others, but which entries of `x` give ``A x``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cur._lib.array import Array, adjoint, convert, namespace, take, to_numpy, unit_roundoff
from cur._lib.errors import NumericalError
from cur._lib.host import through_numpy
from cur._lib.promotion import promote
from cur._lib.scale import brought_near_one, times_power
from cur._lib.validate import check_rank
from cur.weighted.truncation import beyond, prepared, weighed, within
from cur.weights import unit_weight

__all__ = ["STEPS", "OwnInputs", "own_inputs"]

STEPS = 96
"""Looks at what all inputs are worth; between two of them the choice is among those that cost least. More looks take
time in proportion."""


@dataclass(frozen=True, eq=False, repr=False)
class OwnInputs:
    """A matrix from r of its inputs, for every r.

    Attributes
    ----------
    matrix : array, shape (m, n)
        The matrix, in the precision that was computed in.
    moment : array, shape (n, n)
        The weight `G` of the columns with what was added to make it invertible, times a power of two.
    order : array of int, shape (n,)
        The inputs by importance: the first r are those kept.
    square_errors : array, shape (n + 1,)
        Squares of the weighted error with 0 to n inputs kept, float64, non-increasing; the last is 0. Zero or
        infinite where squares leave the range of doubles.
    """

    matrix: Array
    moment: Array
    order: Array
    square_errors: np.ndarray[Any, Any]

    def kept(self, count: int) -> Array:
        """Return the inputs that are kept, ascending.

        Parameters
        ----------
        count : int
            The number of inputs to keep, between 1 and n.

        Returns
        -------
        array of int, shape (count,)
            The positions of the inputs.

        Raises
        ------
        TypeError, ValueError
            If the count is not an integer between 1 and n.
        """
        n = int(self.matrix.shape[1])
        count, _ = check_rank(count, (n, n))
        return convert(np.sort(to_numpy(self.order[:count])), self.order)

    def truncate(self, count: int) -> Array:
        """Return the m x `count` matrix that gives ``A x`` from the kept entries of `x` with least error.

        Parameters
        ----------
        count : int
            The number of inputs to keep, between 1 and n.

        Raises
        ------
        TypeError, ValueError
            If the count is not an integer between 1 and n.
        """
        near, exponent, _ = brought_near_one(self.matrix)
        moment, _, _ = brought_near_one(self.moment)
        return times_power(fit(near @ moment, moment, self.kept(count)), exponent)

    def __repr__(self) -> str:
        m, n = self.matrix.shape
        return f"A {m} x {n} matrix from its own inputs, {self.matrix.dtype}"


@through_numpy
def fit(cross: Array, moment: Array, kept: Array) -> Array:
    """Return the `B` that minimises ``E |y - B x[kept]|^2``, for ``cross = E[y x^H]`` and ``moment = E[x x^H]``.

    Parameters
    ----------
    cross : array, shape (m, n)
        The second moments of outputs and inputs.
    moment : array, shape (n, n)
        The second moments of the inputs, positive definite on the kept entries.
    kept : array of int, shape (r,)
        The positions of the inputs that are kept.

    Returns
    -------
    array, shape (m, r)
        The matrix `B`.
    """
    block = take(take(moment, kept, axis=0), kept, axis=1)
    return adjoint(namespace(moment).linalg.solve(block, adjoint(take(cross, kept, axis=1))))


@through_numpy
def own_inputs(A: Array, /, *, row_weights: Any = None, column_weights: Any = None) -> OwnInputs:
    r"""Order the inputs of a matrix so that the first r give what it does, for every r.

    Minimises ``||H^(1/2) (A - B S) G^(1/2)||_F``, where the rows of `S` are unit vectors at the kept inputs and `B` is
    free: with `G` the second moment of inputs `x`, the outputs ``A x`` are predicted from the kept entries of `x`. A
    layer of neurons behind another can so give up neurons. Unlike a factorization of `A` this lives from correlations
    among the inputs, and more than ``min(m, n)`` inputs may be kept.

    Backward: starting with all, the inputs that cost least are given up, in :data:`STEPS` steps, and the rest is
    fitted again. Cost: ``O(n^2 (m + n))``.

    Parameters
    ----------
    A : array, shape (m, n)
        Dense; half precisions are computed in single, integers in double precision.
    row_weights, column_weights : array or `weights.Weight`, optional
        `H` and `G`, as for `cur.weighted.truncation.weighted_svd`. To the eigenvalues of `G` the root of the unit
        roundoff, relative to their mean, is added, which makes it invertible.

    Returns
    -------
    OwnInputs

    Raises
    ------
    TypeError, ValueError
        If the matrix or its weights are not as `cur.weighted.truncation.weighted_svd` takes them.
    NumericalError
        If `G` has a negative eigenvalue beyond rounding.

    References
    ----------
    The cost of giving up one input and the fit of the others are those of Hassibi and Stork, "Second order derivatives
    for network pruning: optimal brain surgeon", NeurIPS 5 (1992).

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[1.0, 1.0, 1.0]])
    >>> G = np.array([[4.1, 3.9, 0.0], [3.9, 4.0, 0.0], [0.0, 0.0, 1.0]])  # the second input nearly repeats the first
    >>> found = own_inputs(A, column_weights=G)
    >>> found.kept(2).tolist(), found.truncate(2).round(3).tolist()
    ([0, 2], [[1.951, 1.0]])
    """
    near, exponent = prepared(A)
    A, xp = promote(A), namespace(near)
    weight, size = unit_weight(row_weights, A, 0, A.dtype)
    V = near if weight is None else weight.apply(near, 0)
    n = int(A.shape[1])
    eye = xp.eye(n, dtype=A.dtype, device=A.device)
    G, more = weighed(eye, column_weights, A, 1)
    G = (G + adjoint(G)) / 2
    trace = float(xp.sum(xp.abs(xp.linalg.diagonal(G))))
    if trace == 0.0:  # no input ever counts
        return OwnInputs(A, eye, convert(np.arange(n), A), np.zeros(n + 1))
    G = G + math.sqrt(unit_roundoff(A.dtype, A)) / n * trace * eye
    whole, inverse = V, xp.linalg.inv(G)
    left = np.arange(n)  # the inputs that V and the inverse still hold
    scale = reference = _diagonal(inverse)
    block = -(-n // STEPS)
    digits = 1e4 * unit_roundoff(A.dtype, A) ** 0.5
    gone: list[int] = []
    costs: list[float] = []
    while len(left):
        if not (scale > digits * reference).all():  # digits are lost in what was taken off: both are formed anew
            rest = convert(left, A)
            inverse = xp.linalg.inv(take(take(G, rest, axis=0), rest, axis=1))
            V = take(whole @ G, rest, axis=1) @ inverse
            scale = reference = _diagonal(inverse)
            if not (scale > 0).all():
                raise NumericalError(
                    "`column_weights` must have no negative eigenvalue; damp it, or pass second moments"
                )
        cheap = np.argsort(to_numpy(xp.sum(xp.abs(V) ** 2, axis=0)) / scale, kind="stable")[: 4 * block]
        at = convert(cheap, A)
        order = cheap[
            _one_by_one(to_numpy(take(take(inverse, at, axis=0), at, axis=1)), to_numpy(take(V, at, axis=1)), block)
        ]
        stay = np.setdiff1d(np.arange(len(left)), order)
        chosen, rest = convert(order, A), convert(stay, A)
        columns = take(inverse, chosen, axis=1)
        L = xp.linalg.cholesky(take(columns, chosen, axis=0))
        spread = xp.linalg.solve(L, adjoint(take(columns, rest, axis=0)))
        lost = xp.linalg.solve(L, adjoint(take(V, chosen, axis=1)))
        inverse = take(take(inverse, rest, axis=0), rest, axis=1)
        inverse -= adjoint(spread) @ spread
        V = take(V, rest, axis=1) - adjoint(lost) @ spread
        gone += left[order].tolist()
        left, reference = left[stay], reference[stay]
        scale = _diagonal(inverse)
        # one after the other within the block, as the rows of a Cholesky factor are
        costs += to_numpy(xp.sum(xp.abs(lost) ** 2, axis=1)).astype(np.float64).tolist()
    square_errors = beyond(np.append(np.cumsum(costs)[::-1], 0.0), 2 * (exponent + size + more))
    return OwnInputs(A, within(G, 2 * more, (column_weights,)), convert(np.asarray(gone[::-1]), A), square_errors)


def _diagonal(X: Array) -> np.ndarray[Any, Any]:
    return np.asarray(to_numpy(namespace(X).linalg.diagonal(X)).real)


def _one_by_one(K: np.ndarray[Any, Any], Y: np.ndarray[Any, Any], count: int) -> list[int]:
    """Choose inputs that cost little together, from the inverse moment and the columns of some that are cheap alone.

    Two that repeat each other are both cheap, but not both of them.
    """
    K, Y = K.copy(), Y.copy()
    chosen: list[int] = []
    free = np.ones(len(K), dtype=bool)
    for _ in range(min(count, len(K))):
        scale = np.where(free, K.diagonal().real, 1.0)
        price = np.where(free, np.sum(np.abs(Y) ** 2, axis=0) / np.maximum(scale, np.finfo(K.dtype).tiny), np.inf)
        i = int(np.argmin(price))
        chosen.append(i)
        free[i] = False
        k = K[i] / K[i, i]
        Y -= Y[:, i : i + 1] * k[None, :]
        K -= K[:, i : i + 1] * k[None, :]
    return chosen
