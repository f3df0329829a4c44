"""Certificates: the error of the factors as they are returned, from one product with the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cur._driver.problem import Choice, Problem, etas
from cur._driver.spectral import SpectralError
from cur._lib.array import Array, adjoint, convert, gaussian, is_sparse, namespace
from cur._lib.linalg import svdvals
from cur._lib.products import BLOCK_ENTRIES, adjoint_product, frobenius, product, pythagorean_rounding, residual_norm
from cur._lib.validate import check_finite_norm
from cur._lib.wide import Residual, Weights
from cur.bounds import (
    Certificate,
    cross_bound,
    eta,
    projection_bound,
    sketch_factor,
    sketch_shrinkage,
    sketch_size,
    sorensen_embree,
)
from cur.linking import Orthogonal

DIRECT_ENTRIES = 1 << 27
"""Up to this many entries, zeros included, sparse matrices are subtracted in blocks where Pythagoras is too coarse."""

SMALL_PART = 0.02
"""Part of an error that a bound on rounding may be before a more accurate way is worth its time."""

LEAST_AT_ONCE = 16
"""Vectors of a sketch that an operator is always given at once, however long they are: products with few are slow."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A problem seen through the chosen columns and rows.

    Attributes
    ----------
    C, R : Orthogonal
        QR of the columns, and of the adjoint of the rows, in weighted coordinates.
    Z : array, shape (c, n)
        The matrix in the basis of the columns, ``Q_C^H B``.
    M : array, shape (c, r)
        The matrix in the bases of both, ``Z Q_R``.
    """

    C: Orthogonal
    R: Orthogonal
    Z: Array
    M: Array


def reduce(problem: Problem, Cw: Array, Rw: Array) -> Reduced:
    """Project the matrix on the chosen columns and rows: the one product that core and certificate need."""
    QC, QR = Orthogonal(Cw), Orthogonal(adjoint(Rw))
    Z = adjoint(adjoint_product(problem.B, QC.Q))
    if problem.total is None:
        check_finite_norm(frobenius(Z), problem.A)
    return Reduced(QC, QR, Z, Z @ QR.Q)


@dataclass(frozen=True)
class Error:
    """The Frobenius norm of a residual: its value, what of it is rounding, and how it was obtained.

    `evaluation` bounds the rounding with which the factors, multiplied in the working precision, miss their product,
    and `norm` is the norm of the matrix that the error belongs to, or a lower bound on it, the failure included.
    """

    value: float
    rounding: float
    evaluation: float
    norm: float
    kind: Literal["exact", "bound", "probabilistic"] = "exact"
    failure_probability: float = 0.0


def measure(
    problem: Problem,
    factors: tuple[Array, ...],
    *,
    kept: float,
    gap: float,
    inner: float,
    failure: float,
    rng: np.random.Generator,
) -> Error:
    """Return the weighted error of an approximation whose columns lie in the range of the chosen ones.

    Parameters
    ----------
    problem : Problem
        The problem, which has the matrix and its weights.
    factors : tuple of arrays
        The factors of `near`, as they are returned: C and U and R, or C and coefficients.
    kept : float
        Norm of the orthogonal projection of `B` that the best coefficients would reproduce.
    gap : float
        Norm of the difference between that projection and the approximation.
    inner : float
        Bound on the rounding of the evaluation of the product in the working precision, that of `gap` included.
    failure : float
        The chance that a sketch fails to bound the error, where one is needed.
    rng : Generator
        The source of chance of that sketch.

    Notes
    -----
    The residual splits into orthogonal parts, ``||B||^2 - kept^2 + gap^2``, all known without another pass. Where the
    rounding of that difference is more than a few percent of the result, the factors are subtracted from the matrix
    itself, block by block and in a wider precision. Operators, and sparse matrices too large for that, get a fresh
    sketch (B4).
    """
    error = _measured(problem, factors, kept, gap, inner, failure, rng)
    # weights are rounded to the working precision: roots of diagonal ones by a unit each
    extra = 4 * problem.unit * error.value if problem.weighted else 0.0
    extra += problem.rounding_of(inner)
    return replace(error, value=error.value + extra, rounding=error.rounding + extra)


def _measured(
    problem: Problem,
    factors: tuple[Array, ...],
    kept: float,
    gap: float,
    inner: float,
    failure: float,
    rng: np.random.Generator,
) -> Error:
    m, n = problem.shape
    if problem.total is not None:
        squares = problem.total**2
        missed = max(squares - kept**2, 0.0)
        slack = problem.pythagorean_rounding
        plain = math.hypot(math.sqrt(missed), gap)
        if (slack <= 0.05 * plain**2 and inner <= SMALL_PART * plain) or squares == 0.0:
            value = math.sqrt(missed + slack + gap**2) + inner
            return Error(value, value - plain, inner, problem.total)
        if not is_sparse(problem.B) or m * n <= DIRECT_ENTRIES:
            plain, rounding = _evaluated(problem, problem.near, factors, problem.weights)
            return Error(plain + rounding, rounding, inner, problem.total)
    return _sketched(problem, factors, kept, inner, failure, rng)


def _evaluated(
    problem: Problem, A: Array, factors: tuple[Array, ...], weights: Weights, sketch: Array = None
) -> tuple[float, float]:
    """Return the norm of a residual and a bound on its rounding: in double precision, and wider where that counts."""
    single = problem.unit > 1e-12
    for split in (False,) if single else (False, True):
        E = Residual(A, factors[0], factors[1:], weights, split=split, sketch=sketch)
        norm = E.norm()
        rounding = E.rounding(norm)
        if rounding <= SMALL_PART * norm:
            break
    return norm, rounding


def leftover(problem: Problem, kept: float, factors: Callable[[], tuple[Array, Array]]) -> float:
    """Return ``||B||^2 - kept^2``: by Pythagoras where that is accurate, else from the factors of the projection."""
    if problem.total is None:
        return 0.0  # an operator: the certificate of the final factors decides
    left = problem.total**2 - kept**2
    if left > 100 * max(problem.shape) * problem.unit * problem.total**2:
        return left
    return residual_norm(problem.B, *factors()) ** 2


def evaluation_rounding(*factors: Array, u: float) -> float:
    """Return a bound on the rounding with which a product of thin matrices is evaluated from the left.

    For ``C U R``: ``4 (c + r + 20) u ||C D_C^-1||_2 ||D_R^-1 R||_2 || D_C U D_R ||_F``, where the diagonals hold the
    norms of the columns of C and of the rows of R. It holds in the worst case, in any order of summation: a partial
    sum of ``C u`` is ``C D_C^-1`` times a part of ``D_C u``, and each of the c additions is off by u times one of
    these. The constant leaves room for the QR behind C and R, and for products that are rounded before they are added.
    """
    xp = namespace(*factors)
    first, *middle, last = factors
    left, right = xp.linalg.vector_norm(first, axis=0), xp.linalg.vector_norm(last, axis=1)
    weighed = convert(np.eye(1), first, first.dtype) if not middle else middle[0]
    for f in middle[1:]:
        weighed = weighed @ f
    size = (
        float(xp.linalg.vector_norm(left * right))
        if not middle
        else frobenius(left[:, None] * weighed * right[None, :])
    )
    lengths = sum(int(f.shape[0]) for f in factors[1:])
    return float(4 * (lengths + 20) * u * _spread(first, left) * _spread(adjoint(last), right) * size)


def _spread(X: Array, norms: Array) -> float:
    """Return a bound on the 2-norm of `X` with columns of norm one, at least 1."""
    xp = namespace(X)
    X = X / xp.where(norms > 0, norms, xp.ones_like(norms))[None, :]
    gram = adjoint(X) @ X
    return max(1.0, 1.01 * math.sqrt(math.sqrt(frobenius(gram @ gram))))


def _sketched(
    problem: Problem,
    factors: tuple[Array, ...],
    kept: float,
    inner: float,
    failure: float,
    rng: np.random.Generator,
) -> Error:
    m, n = problem.shape
    like = factors[0]
    chance = failure / 2  # half for the error, half for the norm of the matrix
    count = sketch_size(chance)
    whole = count >= m  # fewer rows than a sketch would need: the residual itself
    factor, shrinkage = (1.0, 1.0) if whole else (sketch_factor(count, chance), sketch_shrinkage(count, chance))
    weights = Weights(None, problem.column_weight, problem.shift)
    most = max(LEAST_AT_ONCE, BLOCK_ENTRIES // max(problem.shape))
    sizes, norms, roundings = [], [], []
    for start in range(0, m if whole else count, most):
        if whole:
            X = convert(np.eye(m, min(most, m - start), -start), like, like.dtype)
        else:
            X = gaussian((m, min(most, count - start)), like, like.dtype, rng) / math.sqrt(count)
        Y = X if problem.row_weight is None else problem.row_weight.adjoint_apply(X)
        Z = adjoint(adjoint_product(problem.near, Y))
        norm, rounding = _evaluated(problem, Z, factors, weights, sketch=adjoint(Y))
        sizes.append(frobenius(weights.apply(Z)))
        norms.append(norm)
        # of the products with the matrix: partial sums are of the size of the parts of the matrix that they see, since
        # the random numbers do not depend on it; what an operator does inside is not known, and taken to be the same
        roundings.append(rounding + 2 * (m + n) * problem.unit * sizes[-1])
    rounding = factor * math.hypot(*roundings)
    value = factor * math.hypot(*norms) + rounding
    lower = max(kept, shrinkage * math.hypot(*sizes) - rounding)
    size = lower if problem.total is None else problem.total
    return Error(value, rounding, inner, size, *(() if whole else ("probabilistic", failure)))


def certify(
    problem: Problem,
    choice: Choice,
    reduced: Reduced,
    error: Error,
    *,
    norm: Literal["fro", 2],
    link: str,
    gap: float,
    spectral: SpectralError | None = None,
    U: Array,
) -> Certificate:
    """Gather what is known of the error of a CUR factorization.

    `gap` is the Frobenius norm by which the core `U`, cut at the rounding level, misses the optimal one. The theorems
    speak of the core in exact arithmetic, so the cut is added to them; without it they fail where C or R is nearly
    rank-deficient.
    """
    eta_rows, eta_columns = etas(problem, choice)
    optimal = link != "cross" and (link == "weighted" or not problem.weighted)
    known: dict[str, Any] = {"eta_rows": eta_rows, "eta_columns": eta_columns}
    spectrum = choice.subspace if problem.target is problem.B else None
    # of the products with the bases, of their orthogonality and of the norms
    size = error.value + frobenius(reduced.M) if problem.total is None else problem.total
    rounding = pythagorean_rounding(problem.shape, problem.unit) * size
    if choice.V is not None and choice.W is not None and eta_rows is not None and eta_columns is not None:
        kr, kc = choice.V.shape[1], choice.W.shape[1]
        slack = (eta_rows + eta_columns) * rounding + error.evaluation + gap
        if spectrum is not None:
            known["sigma_next"] = spectrum.sigma_next(min(kr, kc))
        if optimal:
            if spectrum is not None and spectrum.is_exact:
                after = (spectrum.sigma_next(kr) or 0.0, spectrum.sigma_next(kc) or 0.0)
                # with as many rows as columns this is (eta_rows + eta_columns) sigma_{k+1}
                pair = sorensen_embree(eta_rows, 0.0, after[0]) + sorensen_embree(0.0, eta_columns, after[1])
                known["sorensen_embree"] = pair + slack
            known["projection"] = _projection(problem, choice, eta_rows, eta_columns, norm, slack)
    if link == "cross" and not problem.weighted:
        block = namespace(reduced.C.Q).take(reduced.C.Q, choice.rows, axis=0)
        gamma = eta(block)
        known["gamma"] = gamma
        if problem.total is not None:
            missed = problem.total**2 - frobenius(reduced.Z) ** 2
            slack = problem.pythagorean_rounding
            ideal = Orthogonal(block, cutoff=block.shape[1] * problem.unit)
            S = adjoint(reduced.R.T)
            cut = frobenius(reduced.C.T @ (U @ S) - ideal.left_divide(adjoint(ideal.Q) @ S))
            known["cross"] = cross_bound(gamma, math.sqrt(max(missed, 0.0) + slack) + rounding) + cut + error.evaluation
    value, kind, failure = error.value, error.kind, error.failure_probability
    scale = error.norm
    if spectral is not None:
        scale = float(svdvals(reduced.M)[0])
        if spectrum is not None and spectrum.is_exact:
            scale = float(spectrum.s[0])
        else:
            scale = max(scale, problem.spectral - rounding)
        theorems = [known[name] for name in ("sorensen_embree", "projection") if known.get(name) is not None]
        # the Frobenius norm is an upper bound of the 2-norm
        bounds: list[tuple[float, Literal["exact", "bound", "probabilistic"], float]]
        bounds = [(value, "bound" if kind == "exact" else kind, failure), *((b, "bound", 0.0) for b in theorems)]
        by_norm = spectral.failure_probability
        bounds.append((spectral.value, "probabilistic" if by_norm else "exact", by_norm))
        value, kind, _ = min(bounds, key=lambda bound: bound[0])
        # the least of them is wrong where any of them is
        failure = sum(failure for _, _, failure in bounds) if kind == "probabilistic" else 0.0
    dtype = str(_dtype_name(reduced.M))
    return Certificate(norm, value, kind, failure, dtype, scale, error.rounding, **known).shifted(problem.size)


def _projection(
    problem: Problem,
    choice: Choice,
    eta_rows: float,
    eta_columns: float,
    norm: Literal["fro", 2],
    slack: float,
) -> float | None:
    """Return (B1) with the residuals of the bases, which cost products only where another matrix guided the choice."""
    V, W, found = choice.V, choice.W, choice.subspace
    if V is None or W is None or found is None:
        return None
    if problem.target is problem.B:
        kr, kc = V.shape[1], W.shape[1]
        if norm == 2 and found.is_exact:
            lost: tuple[float | None, float | None] = (found.sigma_next(kc), found.sigma_next(kr))
        else:
            lost = (found.tail(kc), found.tail(kr))
    elif problem.total is None or not problem.bounds:
        return None
    else:
        squares = problem.total**2
        rounding = problem.pythagorean_rounding
        kept = (frobenius(product(problem.B, W)) ** 2, frobenius(adjoint_product(problem.B, V)) ** 2)
        lost = (
            math.sqrt(max(squares - kept[0], 0.0) + rounding),
            math.sqrt(max(squares - kept[1], 0.0) + rounding),
        )
    if lost[0] is None or lost[1] is None:
        return None
    return projection_bound(eta_rows, eta_columns, lost[0], lost[1]) + slack


def _dtype_name(X: Array) -> str:
    return str(X.dtype).rsplit(".", 1)[-1]
