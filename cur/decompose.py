"""The two-sided drivers: `deim_cur` and `cur`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cur import selection
from cur._driver.certify import certify, evaluation_rounding, leftover, measure, reduce
from cur._driver.entry import economical
from cur._driver.problem import (
    SUBSPACES,
    Choice,
    Problem,
    choose,
    near_slices,
    prepare,
    slices,
    weighted_slices,
)
from cur._driver.spectral import spectral_error
from cur._driver.tolerance import relative_curve, smallest_rank
from cur._lib.array import Array, adjoint, namespace, take, to_numpy
from cur._lib.products import columns_of, frobenius, thin
from cur._lib.scale import times_power
from cur._lib.validate import (
    as_generator,
    check_choice,
    check_count,
    check_finite_norm,
    check_power_iterations,
    check_probability,
    check_rank,
    check_rank_or_tol,
    check_tol,
)
from cur.factors import CUR
from cur.linking import Orthogonal, core
from cur.linking import cross as cross_core
from cur.selection import SELECTORS

__all__ = ["cur", "deim_cur"]

LINKS = ("optimal", "weighted", "cross")


def deim_cur(
    A: Array,
    /,
    *,
    rank: int | tuple[int, int] | None = None,
    tol: float | None = None,
    select: Literal["deim"] = "deim",
    link: str | None = None,
    subspace: str = "auto",
    importance: Array | None = None,
    row_weights: Any = None,
    column_weights: Any = None,
    oversample: int = 0,
    norm: Literal["fro", 2] = "fro",
    power_iterations: int | None = None,
    failure_probability: float = 1e-6,
    bounds: bool = True,
    rng: np.random.Generator | int | None = 0,
) -> CUR:
    """Factor a matrix into its own columns and rows chosen by DEIM, with the optimal core and a certificate.

    `cur.cur` with the selector of the paper, the discrete empirical interpolation method.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix: a NumPy, torch, CuPy, JAX, Dask or another array API array, a `scipy.sparse` matrix or a
        `LinearOperator`.
    rank : int or (int, int), optional
        The number of rows and columns to keep, or (rows, columns). Either this or `tol` is given.
    tol : float, optional
        The relative error to reach instead, with the smallest rank that is certified to.
    select : "deim"
        The selector, which is always this one here; `cur.cur` takes others.
    link, subspace, importance, row_weights, column_weights, oversample, norm
        How the core is made, where singular vectors come from, what counts as large, and in which norm, as for
        `cur.cur`.
    power_iterations, failure_probability, bounds, rng
        What the randomised parts do, as for `cur.cur`.

    Returns
    -------
    CUR
        The factors, which unpack as ``C, U, R``; ``result.certificate`` bounds the error.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as it must be; the text says what, the rule, the value and the remedy.
    NumericalError
        If `tol` cannot be certified in the working precision.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import deim_cur
    >>> i = np.arange(1.0, 201.0)
    >>> A = np.minimum.outer(i, i) / np.maximum.outer(i, i)
    >>> result = deim_cur(A, rank=20)
    >>> C, U, R = result
    >>> bool((C == A[:, result.columns]).all() and (R == A[result.rows, :]).all())
    True
    >>> error = np.linalg.norm(A - C @ U @ R)
    >>> bool(error <= result.certificate.value)
    True
    """
    if select != "deim":
        raise TypeError("`select` is fixed to 'deim' in deim_cur; use cur.cur to choose another selector")
    return cur(
        A,
        rank=rank,
        tol=tol,
        link=link,
        subspace=subspace,
        importance=importance,
        row_weights=row_weights,
        column_weights=column_weights,
        oversample=oversample,
        norm=norm,
        power_iterations=power_iterations,
        failure_probability=failure_probability,
        bounds=bounds,
        rng=rng,
    )


@economical
def cur(
    A: Array,
    /,
    *,
    rank: int | tuple[int, int] | None = None,
    tol: float | None = None,
    select: str = "deim",
    link: str | None = None,
    subspace: str = "auto",
    importance: Array | None = None,
    row_weights: Any = None,
    column_weights: Any = None,
    oversample: int = 0,
    norm: Literal["fro", 2] = "fro",
    power_iterations: int | None = None,
    failure_probability: float = 1e-6,
    bounds: bool = True,
    rng: np.random.Generator | int | None = 0,
) -> CUR:
    """Factor a matrix into its own columns and rows, ``A ~ C U R``, with a certificate.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix: a NumPy, torch, CuPy, JAX, Dask or another array API array, a `scipy.sparse` matrix or a
        `LinearOperator`. Half precisions are computed in single, integers in double precision. Inputs that require
        gradients are detached.
    rank : int or (int, int), optional
        The number of rows and columns to keep, or (rows, columns). A rank above the numerical rank of the matrix is
        truncated to it with a `RankWarning` (selectors that use singular vectors). Either this or `tol` is given.
    tol : float, optional
        In place of `rank`: the smallest rank of this selector with ``||A - CUR|| <= tol ||A||`` in `norm`, certified
        before it is returned. With weights, both sides are weighted.
    select : str, default "deim"
        What chooses rows and columns, by its name in `cur.selection.SELECTORS`. ``"lupp"`` is the fastest.
    link : {"optimal", "weighted", "cross"}, optional
        How U is made: see `cur.linking`. By default ``"weighted"`` where weights are given, else ``"optimal"``.
        ``"cross"`` chooses the rows from C, so that the core cannot blow up.
    subspace : {"auto", "exact", "randomised", "lanczos"}, default "auto"
        Where singular vectors come from; see `cur.subspace`. ``"auto"``: exact where `rank` is at least a third of the
        smaller side of a dense matrix, else randomised.
    importance : array, shape (m, n), optional
        Scores whose leading singular subspaces choose rows and columns in place of those of `A`.
    row_weights, column_weights : array or Weight, optional
        Positive semidefinite ``H`` and ``G``, as vectors (diagonals), matrices or `cur.weights.factor`: selection,
        core and certificate are those of ``||H^(1/2) (A - CUR) G^(1/2)||``.
    oversample : int, default 0
        How many rows to add beyond the number of columns, where the cross core is weakest (Park and Nakatsukasa).
    norm : {"fro", 2}, default "fro"
        The norm of the certificate and of `tol`. With ``norm=2`` the residual of a small dense matrix, and with `tol`
        of any, is checked by its singular values, which costs an SVD per check; of all others by Lanczos from random
        vectors (B6), some twenty products with 8 vectors: at most a few percent above the norm, except with
        `failure_probability`.
    power_iterations : int, optional
        How many power iterations the randomised subspace takes. By default none, since the optimal core makes up for
        what a rough basis loses: without any, errors were within 3 percent of those from exact singular vectors
        (``benchmarks/core.py``). But four for a sparse matrix or an operator whose sketch shows a flat spectrum, in
        which no direction leads.
    failure_probability : float, default 1e-6
        The chance that a certificate by sketches is wrong, which only operators, very large sparse matrices and
        ``norm=2`` get; with `tol`, that of the whole search.
    bounds : bool, default True
        Whether the certificate has (B1) also where that takes two products of its own, with `importance`. The error
        itself is certified in any case.
    rng : Generator, int or None, default 0
        The seed; the same seed chooses the same indices in every library, up to rounding. None draws fresh entropy.

    Returns
    -------
    CUR
        The factors, which unpack as ``C, U, R``; ``result.certificate`` bounds the error.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as it must be; the text says what, the rule, the value and the remedy.
    NumericalError
        If `tol` cannot be certified in the working precision.

    Notes
    -----
    For a dense matrix at rank k the cost is that of a few products of `A` with k vectors: the sketch, its power
    iteration and projection (``2 + 2 power_iterations``), and one for the core and the exact error together.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import cur
    >>> A = 1.0 / (np.arange(1, 51)[:, None] + np.arange(50))
    >>> result = cur(A, tol=1e-6, select="osinsky")
    >>> bool(np.linalg.norm(A - result.toarray()) <= 1e-6 * np.linalg.norm(A))
    True
    """
    check_rank_or_tol(rank, tol)
    check_choice(select, SELECTORS, "select")
    check_choice(norm, ("fro", 2), "norm")
    if link is not None:
        check_choice(link, LINKS, "link")
    problem = prepare(A, importance, row_weights, column_weights)
    problem = replace(problem, bounds=bounds)
    if problem.total is not None:
        check_finite_norm(problem.total, problem.A)
    link = link or ("weighted" if problem.weighted else "optimal")
    generator = as_generator(rng)
    check_count(oversample, default=0, most=problem.shape[0], what="the rows", least=0, name="oversample")
    check_power_iterations(power_iterations)
    check_probability(failure_probability)
    check_choice(subspace, SUBSPACES, "subspace")

    def choice_for(k: int) -> Choice:
        return choose(problem, (k, k), select, subspace, generator, power_iterations, truncate=False)

    def assemble(choice: Choice, failure: float = failure_probability) -> CUR:
        return _assemble(problem, choice, link, oversample, norm, failure, generator, tol is not None)

    if rank is not None:
        counts = check_rank(rank, problem.shape)
        if link == "cross" and counts[0] < counts[1]:
            raise ValueError(
                f"`rank` must ask for at least as many rows as columns with link='cross'; got {rank!r}; "
                "factor the transpose instead"
            )
        return assemble(choose(problem, counts, select, subspace, generator, power_iterations))
    return smallest_rank(
        choice_for,
        assemble,
        lambda choice: _error_curve(problem, choice),
        check_tol(tol),
        min(problem.shape),
        nested=SELECTORS[select].nested,
        norm=norm,
        failure=failure_probability,
        certain=problem.total is not None,
        select=select,
    )


def _assemble(
    problem: Problem,
    choice: Choice,
    link: str,
    oversample: int,
    norm: Literal["fro", 2],
    failure: float,
    rng: np.random.Generator,
    direct: bool,
) -> CUR:
    """Make U for a choice, and the certificate."""
    if link == "cross":
        choice = _rows_from_columns(problem, choice, oversample)
    elif oversample:
        if choice.V is None:
            raise ValueError(
                "`oversample` with this selector needs `link='cross'`: there is no basis to oversample from"
            )
        room = min(oversample, problem.shape[0] - choice.rows.shape[0])
        choice = replace(choice, rows=selection.oversample(choice.V, choice.rows, room))
    C, R = slices(problem, choice)
    near_C, near_R = near_slices(problem, C, R)
    Cw, Rw = weighted_slices(problem, near_C, near_R)
    reduced = reduce(problem, Cw, Rw)
    if link == "cross":
        U = cross_core(take(near_C, choice.rows, axis=0))
    elif link == "optimal" and problem.weighted:
        plain = reduce(replace(problem, B=problem.near, total=None), near_C, near_R)
        U = core(plain.C, plain.R, plain.M)
    else:
        U = core(reduced.C, reduced.R, reduced.M)
    returned = problem.core_of_the_matrix(U)
    U = times_power(returned, problem.exponent)  # without the digits that it lost below the normal numbers
    T, S = reduced.C.T, adjoint(reduced.R.T)
    gap = frobenius(reduced.M - T @ U @ S)
    inner = evaluation_rounding(T, U, S, u=problem.unit)
    inner += problem.rounding_of(inner)
    if norm == 2 and problem.total is None:
        failure /= 2  # of two sketches
    error = measure(
        problem,
        (near_C, U, near_R),
        kept=frobenius(reduced.M),
        gap=gap,
        inner=inner,
        failure=failure,
        rng=rng,
    )
    two = None
    if norm == 2:
        # of products with vectors: as many terms as the matrix and the factors have
        size = error.value + frobenius(reduced.M) if problem.total is None else problem.total
        rounding = 2 * (max(problem.shape) + 20) * problem.unit * size + inner
        two = spectral_error(problem.B, Cw @ U, Rw, direct=direct, rounding=rounding, failure=failure, rng=rng)
    certificate = certify(problem, choice, reduced, error, norm=norm, link=link, gap=gap, spectral=two, U=U)
    return CUR(C, returned, R, choice.rows, choice.columns, certificate)


def _rows_from_columns(problem: Problem, choice: Choice, oversample: int) -> Choice:
    """Choose the rows of a cross from an orthonormal basis of its columns, which bounds gamma."""
    columns = choice.columns
    k, wanted = columns.shape[0], max(choice.rows.shape[0], columns.shape[0])
    Q = Orthogonal(thin(columns_of(problem.near, columns))).Q
    rows = selection.deim(Q)
    extra = min(wanted - k + oversample, problem.shape[0] - k)
    if extra > 0:
        rows = selection.oversample(Q, rows, extra)
    return replace(choice, rows=rows)


def _error_curve(problem: Problem, choice: Choice) -> np.ndarray[Any, Any]:
    """Return the relative error of the optimal core at every rank of a nested choice, from one product.

    QR is nested too: at rank k the error is what the full choice leaves, and the part of ``M`` outside its leading
    k x k block, all sums of squares without cancellation.
    """
    Cw, Rw = weighted_slices(problem, *near_slices(problem, *slices(problem, choice)))
    k = min(Cw.shape[1], Rw.shape[0])
    reduced = reduce(problem, Cw[:, :k], Rw[:k, :])
    squares = to_numpy(namespace(reduced.M).abs(reduced.M)).astype(np.float64) ** 2
    shells = np.tril(squares).sum(axis=1) + np.triu(squares, 1).sum(axis=0)
    left = leftover(problem, frobenius(reduced.M), lambda: (reduced.C.Q @ reduced.M, adjoint(reduced.R.Q)))
    return relative_curve(shells, left)
