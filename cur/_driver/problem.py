"""What the drivers share: the checked and promoted matrix with its weights, and the choice of rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cur import subspace as subspaces
from cur._driver.spectral import spectral_norm
from cur._lib import array as _array
from cur._lib import promotion
from cur._lib.array import Array, adjoint, convert, is_dask, is_dense, is_operator, is_sparse, namespace, to_numpy
from cur._lib.errors import NumericalError, warn
from cur._lib.products import columns_of, frobenius, pythagorean_rounding, rows_of, thin
from cur._lib.promotion import check_promoted
from cur._lib.scale import brought_near_one, of_the_size_of_reciprocals, times_power
from cur._lib.validate import check_choice, check_companion, check_finite_norm, check_matrix
from cur._lib.wide import Weights
from cur.bounds import eta
from cur.selection import SELECTORS, Selector
from cur.weights import Weight, unit_weight

SUBSPACES = ("auto", "exact", "randomised", "lanczos")


@dataclass(frozen=True, eq=False)
class Problem:
    """A matrix ready to be factored.

    Three sizes may be anything: those of the matrix, of the weights, and of both together. Powers of two bring all of
    them near one, so that squares and products stay in the range of the working precision.

    Attributes
    ----------
    A : matrix
        The user's, detached and promoted to the working dtype where that loses nothing: what rows and columns are taken
        from.
    near : matrix
        The matrix ``2^-exponent A``; `A` itself where squares of its entries stay in the range.
    exponent : int
        The power of two that was taken from the matrix.
    B : matrix
        The matrix `near` in weighted coordinates, ``2^shift F_H^H near F_G``; `near` itself without weights.
    target : matrix
        The matrix whose leading singular subspaces guide the choice: `B`, or the importance given.
    row_weight : Weight or None
        The weight `H` of the rows, of size one; None for the identity.
    column_weight : Weight or None
        The weight `G` of the columns, of size one; None for the identity.
    shift : int
        The power of two by which `B` was multiplied besides.
    weight_exponent : int
        The power of two that was taken from both weights.
    total : float or None
        The norm ``||B||_F``; None for an operator.
    bounds : bool
        Whether bounds that take products of their own are wanted.
    lost : float
        Bound on the weighted norm of what promotion rounded off, in units of `B`.
    """

    A: Array
    near: Array
    exponent: int
    B: Array
    target: Array
    row_weight: Weight | None
    column_weight: Weight | None
    shift: int
    weight_exponent: int
    total: float | None
    bounds: bool = True
    lost: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        m, n = self.A.shape
        return int(m), int(n)

    @property
    def weighted(self) -> bool:
        """Whether there are weights."""
        return self.row_weight is not None or self.column_weight is not None

    @property
    def unit(self) -> float:
        """Unit roundoff of the working precision."""
        return _array.unit_roundoff(_array.working_dtype(self.B), self.B)

    @cached_property
    def spectral(self) -> float:
        """A lower bound of ``||B||_2``, but for the rounding of products."""
        return spectral_norm(self.B, self.B if is_dense(self.B) else np.empty(0, dtype=self.B.dtype))

    @property
    def pythagorean_rounding(self) -> float:
        """Rounding of ``||B||^2 - ||Q^H B P||^2``, of the products and of the QRs that made Q and P."""
        return pythagorean_rounding(self.shape, self.unit) * (self.total or 0.0) ** 2

    @property
    def weights(self) -> Weights:
        """What turns the residual of `near` into that of `B`."""
        return Weights(self.row_weight, self.column_weight, self.shift)

    @property
    def size(self) -> int:
        """Power of two by which a norm of `B` is that of the weighted matrix of the user."""
        return self.exponent + self.weight_exponent - self.shift

    def adjoint(self) -> Problem:
        """Return the problem of the adjoint, whose rows are the columns of this one."""
        A, near, B, target = (adjoint(X) for X in (self.A, self.near, self.B, self.target))
        near, B = A if self.near is self.A else near, near if self.B is self.near else B
        return replace(
            self,
            A=A,
            near=near,
            B=B,
            target=B if self.target is self.B else target,
            row_weight=self.column_weight,
            column_weight=self.row_weight,
        )

    def rounding_of(self, evaluation: float) -> float:
        """Return what is to be added for the matrix, columns and rows as they were given, which promotion rounded.

        Each entry is off by a unit of roundoff at most: a small part of what `evaluation` allows the product.
        """
        return self.lost + 0.05 * evaluation if self.lost else 0.0

    def core_of_the_matrix(self, U: Array) -> Array:
        """Return the core between rows and columns of `A` for one between those of `near`."""
        return of_the_size_of_reciprocals(U, -self.exponent)


@dataclass(frozen=True, eq=False)
class Choice:
    """Chosen rows and columns, in the order of choice, and the bases they were chosen for."""

    rows: Array
    columns: Array
    V: Array | None = None
    W: Array | None = None
    subspace: subspaces.Subspace | None = None

    def leading(self, k: int) -> Choice:
        """Return the choice for rank k, for selectors that are nested."""
        V = None if self.V is None else self.V[:, :k]
        W = None if self.W is None else self.W[:, :k]
        return replace(self, rows=self.rows[:k], columns=self.columns[:k], V=V, W=W)


def prepare(A: Any, importance: Any, row_weights: Any, column_weights: Any) -> Problem:
    """Check and promote the arguments of a driver."""
    given, A = A, check_promoted(A)
    dtype = A.dtype
    near, exponent, total = brought_near_one(A)
    row_weight, row_exponent = unit_weight(row_weights, A, 0, dtype)
    column_weight, column_exponent = unit_weight(column_weights, A, 1, dtype)
    B, shift = near, 0
    if row_weight is not None or column_weight is not None:
        B = Weights(row_weight, column_weight).apply(near)
        B, shift, total = brought_near_one(B, lambda e: Weights(row_weight, column_weight, -e).apply(near))
        shift = -shift
        _check_nothing_vanished(A, B, Weights(row_weight, column_weight, shift), total)
    target = B
    if importance is not None:
        check_matrix(importance, "importance")
        check_companion(importance, A, "importance")
        if tuple(importance.shape) != tuple(A.shape):
            raise ValueError(
                f"`importance` must have the shape of `A`, {tuple(A.shape)}; got {tuple(importance.shape)}; "
                "one score per entry is needed"
            )
        target, _, size = brought_near_one(check_promoted(importance, "importance", dtype))
        if size is not None:
            check_finite_norm(size, importance, "importance")
    weights, lost = Weights(row_weight, column_weight, shift), 0.0
    if total is not None and promotion.is_rounded(given, A):
        lost = _lost(near, exponent, weights, total)
        A = promotion.as_given(given, A)
    size = row_exponent + column_exponent
    return Problem(A, near, exponent, B, target, row_weight, column_weight, shift, size, total, lost=lost)


def _lost(near: Array, exponent: int, weights: Weights, total: float) -> float:
    """Return a bound on what rounding each entry, to a number of this precision or below the least, changes."""
    u = _array.unit_roundoff(near.dtype, near)
    below = math.ldexp(math.sqrt(math.prod(near.shape)), -1074 - exponent) * weights.bound()
    full = any(weight is not None and weight.root is None for weight in (weights.rows, weights.columns))
    return 1.01 * u * (weights.bound() * frobenius(near) if full else total) + below


def _check_nothing_vanished(A: Array, B: Array, weights: Weights, total: float | None) -> None:
    """Refuse a weighted matrix of which a part that counts may have fallen below the smallest number."""
    if total is None:
        return
    info = namespace(B).finfo(B.dtype)
    lost = math.ldexp(2 * math.sqrt(math.prod(B.shape)) * float(info.smallest_normal), weights.exponent)
    if (lost > float(info.eps) * total) if total > 0.0 else weights.touch(A):
        raise NumericalError(
            f"`A` and its weights span so many sizes that products of both leave the range of {B.dtype}; "
            "use double precision, or weights closer to one another"
        )


def find_subspace(
    problem: Problem, rank: int, kind: str, rng: np.random.Generator, power_iterations: int | None
) -> subspaces.Subspace:
    """Return the leading singular subspaces of the target of the kind asked for, or the one that suits it."""
    check_choice(kind, SUBSPACES, "subspace")
    S = problem.target
    if kind == "auto":
        in_memory = not (is_sparse(S) or is_operator(S) or is_dask(S))
        # a full SVD costs as much as some 5 min(m, n) products with single vectors: no sketch pays near full rank
        kind = "exact" if in_memory and 3 * rank >= min(S.shape) else "randomised"
    if kind == "exact":
        return subspaces.exact(S, rank)
    total = problem.total if S is problem.B else None
    if kind == "lanczos":
        return subspaces.lanczos(S, rank, rng=rng, total=total)
    return subspaces.randomised(S, rank, power_iterations=power_iterations, rng=rng, total=total)


def choose(
    problem: Problem,
    counts: tuple[int, int],
    select: str,
    subspace: str,
    rng: np.random.Generator,
    power_iterations: int | None,
    *,
    truncate: bool = True,
) -> Choice:
    """Choose rows and columns of the target.

    `truncate` stops at the numerical rank, with a warning. A search for a tolerance goes on: on Kahan's matrix the
    rank is one short of full, and only all rows and columns reach a small tolerance.
    """
    selector = SELECTORS[select]
    _check_readable(problem.target, selector)
    if "sketch" in selector.reads:
        return _choose_from_sketch(problem, counts, selector, rng)
    if "basis" in selector.reads:
        return _choose_from_bases(problem, counts, selector, subspace, rng, power_iterations, truncate=truncate)
    sides = zip((problem.target, adjoint(problem.target)), counts, strict=True)
    rows, columns = (_positions(selector, _placeholder(X), k, X, rng) for X, k in sides)
    return Choice(rows, columns)


def _check_readable(S: Array, selector: Selector) -> None:
    """Refuse a selector that looks at what a matrix does not show."""
    if "entries" not in selector.reads:
        return
    others = [f"{other.name!r}" for other in SELECTORS.values() if other.reads and "entries" not in other.reads]
    use = f"use {', '.join(others[:-1])} or {others[-1]}"
    if is_operator(S):
        raise TypeError(
            f"`select={selector.name!r}` looks at the entries of the matrix, and a LinearOperator (or a sparse matrix "
            f"with a matrix weight) gives products only; {use}"
        )
    if selector.dense and is_sparse(S):
        raise TypeError(f"`select={selector.name!r}` takes dense arrays, got a sparse matrix; {use}")


def _positions(selector: Selector, basis: Array, count: int, S: Array, rng: np.random.Generator) -> Array:
    """Return what a selector chooses, which may be anybody's: repeated rows would be no choice for the rank."""
    found = selector.choose(basis, count, matrix=S, rng=rng)
    positions = to_numpy(found) if is_dense(found) else np.asarray(found)
    m = basis.shape[0]
    whole = positions.shape == (count,) and positions.dtype.kind in "iu" and len(set(positions.tolist())) == count
    if not whole or positions.min() < 0 or positions.max() >= m:
        raise ValueError(
            f"`select={selector.name!r}` must choose {count} distinct positions from 0 to {m - 1}, an array of "
            f"integers, got {found!r}; mend that selector, or use another"
        )
    return found if is_dense(found) else convert(positions, basis)


def _placeholder(S: Array) -> Array:
    """Return a basis for selectors that look at the matrix only: its backend and number of rows are all they read."""
    like = S if is_dense(S) else np.empty(0)
    return namespace(like).zeros((S.shape[0], 1), dtype=like.dtype, device=_array.take_device(like))


def _choose_from_sketch(
    problem: Problem, counts: tuple[int, int], selector: Selector, rng: np.random.Generator
) -> Choice:
    """Choose rows from a sketch, then columns from these rows: one product with the target."""
    S, k = problem.target, max(counts)
    Y = subspaces.sketch(S, k, rng=rng)
    left = Y if problem.row_weight is None else problem.row_weight.candidates(Y)
    rows = _positions(selector, left, k, S, rng)
    Z = thin(adjoint(rows_of(S, rows)))
    right = Z if problem.column_weight is None else problem.column_weight.candidates(Z)
    return Choice(rows[: counts[0]], _positions(selector, right, counts[1], adjoint(S), rng))


def _choose_from_bases(
    problem: Problem,
    counts: tuple[int, int],
    selector: Selector,
    subspace: str,
    rng: np.random.Generator,
    power_iterations: int | None,
    *,
    truncate: bool,
) -> Choice:
    """Choose rows and columns for the leading singular subspaces."""
    k_rows, k_columns = counts
    found = find_subspace(problem, max(counts), subspace, rng, power_iterations)
    numerical = found.numerical_rank(problem.target) if truncate else max(counts)
    if max(counts) > numerical:
        warn(
            f"rank {max(counts)} was asked for, but the numerical rank is {numerical}; "
            f"the factorization has rank {numerical}"
        )
        k_rows, k_columns = min(k_rows, numerical), min(k_columns, numerical)
    V, W = found.V[:, :k_rows], found.W[:, :k_columns]
    left = V if problem.row_weight is None else problem.row_weight.candidates(V)
    right = W if problem.column_weight is None else problem.column_weight.candidates(W)
    rows = _positions(selector, left, k_rows, problem.target, rng)
    columns = _positions(selector, right, k_columns, adjoint(problem.target), rng)
    return Choice(rows, columns, V, W, found)


def etas(problem: Problem, choice: Choice) -> tuple[float | None, float | None]:
    """Return eta of rows and columns in weighted coordinates."""
    values: list[float | None] = []
    for basis, indices, weight in (
        (choice.V, choice.rows, problem.row_weight),
        (choice.W, choice.columns, problem.column_weight),
    ):
        if basis is None:
            values.append(None)
        else:
            chosen = _array.take(basis, indices, axis=0) if weight is None else weight.interpolate(basis, indices)
            values.append(eta(chosen))
    return values[0], values[1]


def slices(problem: Problem, choice: Choice) -> tuple[Array, Array]:
    """Return the chosen columns and rows of the user's matrix, entry by entry."""
    return columns_of(problem.A, choice.columns), rows_of(problem.A, choice.rows)


def near_slices(problem: Problem, C: Array, R: Array) -> tuple[Array, Array]:
    """Return columns and rows of the matrix as those of `near`, dense."""
    C, R = (promotion.promote(thin(X)) for X in (C, R))
    return times_power(C, -problem.exponent), times_power(R, -problem.exponent)


def weighted_slices(problem: Problem, C: Array, R: Array) -> tuple[Array, Array]:
    """Return columns and rows of `near` in weighted coordinates."""
    rows, columns = problem.row_weight, problem.column_weight
    return Weights(rows).apply(C), Weights(None, columns, problem.shift).apply(R)
