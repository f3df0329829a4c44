"""The one-sided driver: a matrix by some of its columns, or rows, and coefficients; and indices alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from cur._driver.certify import evaluation_rounding, leftover, measure
from cur._driver.entry import economical
from cur._driver.problem import SUBSPACES, Choice, Problem, choose, etas, prepare
from cur._driver.tolerance import relative_curve, smallest_rank
from cur._lib import array as _array
from cur._lib import promotion
from cur._lib.array import Array, adjoint, convert, namespace, take, to_numpy
from cur._lib.moved import renamed
from cur._lib.products import adjoint_product, columns_of, frobenius, thin
from cur._lib.scale import times_power
from cur._lib.validate import (
    as_generator,
    check_choice,
    check_finite_norm,
    check_power_iterations,
    check_probability,
    check_rank,
    check_rank_or_tol,
    check_tol,
)
from cur._lib.wide import Weights
from cur.bounds import Certificate
from cur.factors import Interpolative
from cur.linking import Orthogonal
from cur.selection import SELECTORS

__all__ = ["interpolative", "select"]


@economical
def interpolative(
    A: Array,
    /,
    *,
    rank: int | None = None,
    tol: float | None = None,
    side: Literal["rows", "columns"] = "columns",
    select: str = "deim",
    subspace: str = "auto",
    importance: Array | None = None,
    row_weights: Any = None,
    column_weights: Any = None,
    power_iterations: int | None = None,
    failure_probability: float = 1e-6,
    rng: np.random.Generator | int | None = 0,
) -> Interpolative:
    """Write a matrix by some of its columns (or rows) and the coefficients that give all the others.

    ``A ~ A[:, chosen] @ projection`` with the least-squares coefficients, the identity at the chosen columns.
    One-sided, so that no linking matrix loses digits: tolerances near the unit roundoff can be certified.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, of any of the kinds that `cur.cur` takes.
    rank : int, optional
        The number of columns (or rows) to keep. Either this or `tol` is given.
    tol : float, optional
        In place of `rank`: the relative error to reach in the Frobenius norm, with the smallest rank that is certified
        to.
    side : {"columns", "rows"}, default "columns"
        Whether columns are kept, or rows.
    select, subspace, importance, row_weights, column_weights, power_iterations, failure_probability, rng
        The selector, where singular vectors come from, what counts as large, and what the randomised parts do, as for
        `cur.cur`.

    Returns
    -------
    Interpolative
        The kept columns (or rows) and coefficients, with a certificate in the Frobenius norm.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as it must be; the text says what, the rule, the value and the remedy.
    NumericalError
        If `tol` cannot be certified in the working precision.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import interpolative
    >>> A = 1.0 / (np.arange(1, 51)[:, None] + np.arange(50))
    >>> result = interpolative(A, tol=1e-10)
    >>> bool(np.linalg.norm(A - result.toarray()) <= 1e-10 * np.linalg.norm(A))
    True
    """
    check_choice(side, ("rows", "columns"), "side")
    check_rank_or_tol(rank, tol)
    check_choice(select, SELECTORS, "select")
    check_choice(subspace, SUBSPACES, "subspace")
    check_power_iterations(power_iterations)
    check_probability(failure_probability)
    problem = prepare(A, importance, row_weights, column_weights)
    if side == "rows":
        problem = problem.adjoint()
    if problem.total is not None:
        check_finite_norm(problem.total, problem.A)
    generator = as_generator(rng)
    most = min(problem.shape)

    def choose_at(k: int) -> Choice:
        return choose(problem, (k, k), select, subspace, generator, power_iterations, truncate=tol is None)

    def assemble(choice: Choice, failure: float = failure_probability) -> Interpolative:
        return _assemble(problem, choice, failure, generator)

    if rank is not None:
        k_rows, k = check_rank(rank, problem.shape)
        if k_rows != k:
            raise ValueError(f"`rank` must be one number for a one-sided factorization; got {rank!r}")
        result = assemble(choose_at(k))
    else:
        result = smallest_rank(
            choose_at,
            assemble,
            lambda choice: _error_curve(problem, choice),
            check_tol(tol),
            most,
            nested=SELECTORS[select].nested,
            norm="fro",
            failure=failure_probability,
            certain=problem.total is not None,
            select=select,
        )
    if side == "rows":
        result = result.H
    return result


def _project(problem: Problem, columns: Array) -> tuple[Array, Array, Orthogonal, Array]:
    """Return the columns, those of `near`, their QR in row-weighted coordinates, and that of all columns in it."""
    C = columns_of(problem.A, columns)
    near = times_power(promotion.promote(thin(C)), -problem.exponent)
    rows = Weights(problem.row_weight)
    Q = Orthogonal(rows.apply(near), cutoff=near.shape[1] * problem.unit)
    return C, near, Q, adjoint(adjoint_product(rows.apply(problem.near), Q.Q))


def _column_weighted(problem: Problem, X: Array) -> Array:
    return Weights(None, problem.column_weight, problem.shift).apply(X)


def _assemble(problem: Problem, choice: Choice, failure: float, rng: np.random.Generator) -> Interpolative:
    chosen = choice.columns
    C, near, Q, Z = _project(problem, chosen)
    xp = namespace(Z)
    n = problem.shape[1]
    taken = to_numpy(chosen)
    others = np.setdiff1d(np.arange(n), taken)
    coefficients = Q.left_divide(take(Z, convert(others, Z), axis=1))
    order = convert(np.argsort(np.concatenate([taken, others])), Z)
    eye = xp.eye(len(taken), dtype=Z.dtype, device=_array.take_device(Z))
    projection = take(xp.concat([eye, coefficients], axis=1), order, axis=1)
    projection_weighted = _column_weighted(problem, projection)
    Zw = _column_weighted(problem, Z)
    if problem.total is None:
        check_finite_norm(frobenius(Z), problem.A)
    inner = evaluation_rounding(Q.T, projection_weighted, u=problem.unit)
    gap = frobenius(Zw - Q.T @ projection_weighted)
    error = measure(
        problem,
        (near, projection),
        kept=frobenius(Zw),
        gap=gap,
        inner=inner + problem.rounding_of(inner),
        failure=failure,
        rng=rng,
    )
    _, eta_columns = etas(problem, choice)
    found = choice.subspace if problem.target is problem.B else None
    projected = sigma_next = None
    if found is not None and choice.W is not None and eta_columns is not None:
        k = choice.W.shape[1]
        tail, sigma_next = found.tail(k), found.sigma_next(k)
        # the half of (B1) that speaks of columns
        # speaks of the best coefficients in exact arithmetic, which those returned miss by the gap
        projected = None if tail is None else eta_columns * tail + error.evaluation + gap
    certificate = Certificate(
        "fro",
        error.value,
        error.kind,
        error.failure_probability,
        str(Z.dtype).rsplit(".", 1)[-1],
        error.norm,
        error.rounding,
        eta_columns=eta_columns,
        sigma_next=sigma_next,
        projection=projected,
    ).shifted(problem.size)
    return Interpolative(C, coefficients, chosen, convert(others, chosen), "columns", certificate)


def _error_curve(problem: Problem, choice: Choice) -> np.ndarray[Any, Any]:
    """Return the relative error at every rank of a nested choice."""
    _, _, Q, Z = _project(problem, choice.columns)
    Zw = _column_weighted(problem, Z)
    xp = namespace(Zw)
    shells = to_numpy(xp.sum(xp.abs(Zw) ** 2, axis=1)).astype(np.float64)
    return relative_curve(shells, leftover(problem, frobenius(Zw), lambda: (Q.Q, Zw)))


@renamed(method="select")
@economical
def select(
    A: Array,
    /,
    *,
    rank: int | tuple[int, int],
    select: str = "lupp",
    subspace: str = "auto",
    importance: Array | None = None,
    row_weights: Any = None,
    column_weights: Any = None,
    power_iterations: int | None = None,
    rng: np.random.Generator | int | None = 0,
) -> tuple[Array, Array]:
    """Choose rows and columns of a matrix without factoring it.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, of any of the kinds that `cur.cur` takes.
    rank : int or (int, int)
        The number of rows and columns to choose, or (rows, columns).
    select : str, default "lupp"
        What chooses rows and columns, by its name in `cur.selection.SELECTORS`. The default reads the matrix once.
    subspace, importance, row_weights, column_weights, power_iterations, rng
        Where singular vectors come from, what counts as large, and the source of chance, as for `cur.cur`.

    Returns
    -------
    rows, columns : array of int
        The chosen positions in the order of choice.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as it must be; the text says what, the rule, the value and the remedy.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import select
    >>> rows, columns = select(np.diag([1.0, 5.0, 3.0, 0.0]), rank=2)
    >>> sorted(rows.tolist()), sorted(columns.tolist())
    ([1, 2], [1, 2])
    """
    check_choice(select, SELECTORS, "select")
    check_choice(subspace, SUBSPACES, "subspace")
    check_power_iterations(power_iterations)
    problem = prepare(A, importance, row_weights, column_weights)
    if problem.total is not None:
        check_finite_norm(problem.total, problem.A)
    counts = check_rank(rank, problem.shape)
    choice = choose(problem, counts, select, subspace, as_generator(rng), power_iterations)
    return choice.rows, choice.columns
