"""Weights in triangular form, as algorithms that go from entry to entry need them, in double precision on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cur._lib.array import Array, to_numpy
from cur._lib.plane import Triangle
from cur._lib.semidefinite import UNIT, unit_lower
from cur._lib.validate import check_companion
from cur.weights import Weight, floating, unit_matrix, unit_weight

__all__ = ["Measure", "measure"]

Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Measure:
    """A weight near one, factored.

    Attributes
    ----------
    triangle : Triangle
        The factors and the pivots of the weight.
    exponent : int
        The power of two by whose square the weight given is larger.
    size : float
        A bound on the squared 2-norm of the factor, and of its matrix of moduli.
    missed : float
        A bound on the norm of what factorization left out.
    """

    triangle: Triangle
    exponent: int = 0
    size: float = 1.0
    missed: float = 0.0


def measure(weights: Any, A: Array, axis: int, damping: float) -> Measure:
    """Check a weight and factor it, on the host.

    Parameters
    ----------
    weights : array, Weight or None
        The weight of rows or columns as the user gave it.
    A : array, shape (m, n)
        The matrix whose rows or columns are weighed.
    axis : int
        The side that is weighed, 0 for the rows.
    damping : float
        The multiple of the mean eigenvalue that is added to a matrix of weights.

    Returns
    -------
    Measure
        The factored weight.

    Raises
    ------
    TypeError, ValueError
        If the weight is no positive semidefinite one of the right size, in the library of the matrix.
    """
    name, size = ("row_weights", "column_weights")[axis], int(A.shape[axis])
    if weights is None:
        return Measure(Triangle(np.ones(size)))
    like = np.empty(tuple(A.shape), dtype=np.float64)
    if isinstance(weights, Weight):
        parts: dict[str, Any] = {part: getattr(weights, part) for part in ("root", "vectors", "roots")}
        for key, part in parts.items():
            if part is not None:
                check_companion(part, A, name)
                parts[key] = to_numpy(part)
        weights = replace(weights, **parts)
    else:
        weights, _ = floating(weights, name)
        check_companion(weights, A, name)
        weights = to_numpy(weights)
        if weights.ndim == 2:
            if weights.dtype.kind == "c":
                raise TypeError(f"`{name}` must be real for a real `A`; got dtype {weights.dtype}; take its real part")
            G, exponent = unit_matrix(weights, like, axis, weights.dtype)
            return _factored(G.astype(np.float64), exponent, float(np.finfo(G.dtype).eps) / 2, damping, name)
    weight, exponent = unit_weight(weights, like, axis, like.dtype)
    assert weight is not None
    if not all(np.isfinite(part).all() for part in (weight.root, weight.roots, weight.vectors) if part is not None):
        raise ValueError(f"`{name}` must be finite; it holds NaN or inf; look where it was made")
    if weight.root is not None:
        pivots = weight.root**2
        return Measure(Triangle(pivots), exponent, float(pivots.max()))
    F = weight.vectors * weight.roots[None, :]
    return _factored(F @ F.T, exponent, UNIT, damping, name)


def _factored(G: Matrix, exponent: int, u: float, damping: float, name: str) -> Measure:
    """Factor a matrix of weights, of a unit roundoff, after damping."""
    n = len(G)
    G = (G + G.T) / 2
    G[np.arange(n), np.arange(n)] += damping * float(G.trace()) / n
    factors = unit_lower(G, u)
    if factors is None:
        raise ValueError(
            f"`{name}` must have no negative eigenvalue; pass a matrix of second moments or another positive "
            "semidefinite one, or raise `damping`"
        )
    lower, pivots, missed = factors
    # as much again for forming the matrix from a factor
    trace = float(G.trace()) * 1.01
    return Measure(Triangle(pivots, lower), exponent, trace, missed + (n + 2) * UNIT * trace)
