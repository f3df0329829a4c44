"""What the drivers share: the checked and promoted matrix with its weights, and the choice of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cur import _array, selection
from cur import subspace as subspaces
from cur._array import Array, adjoint, is_dask, is_dense, is_operator, is_sparse, namespace
from cur._errors import warn
from cur._products import columns_of, frobenius, product, rows_of, thin
from cur._spectral import spectral_norm
from cur._validate import check_choice, check_companion, check_finite_norm, check_matrix, check_promoted
from cur.bounds import eta
from cur.importance import Weight, as_weight

BASIS_SELECTORS: dict[str, Callable[..., Array]] = {
    "deim": selection.deim,
    "qdeim": selection.qdeim,
    "arp": selection.arp,
    "osinsky": selection.osinsky,
    "ldeim": selection.ldeim,
    "leverage": selection.leverage,
}
PLAIN_SELECTORS: dict[str, Callable[..., Array]] = {
    "norm": selection.norm,
    "cmd": selection.cmd,
    "uniform": selection.uniform,
}
SELECTORS = (*BASIS_SELECTORS, "lupp", *PLAIN_SELECTORS)
NESTED = ("deim", "lupp", *PLAIN_SELECTORS)
"""Selectors whose first k indices are a choice for rank k."""

FLAT_ITERATIONS = 4
"""Power iterations by default for sparse matrices and operators of flat spectrum.

Without, DEIM of a random sparse matrix kept a third of the energy that `lupp` keeps; two iterations were not enough
(20,000 x 5,000 with 5 entries a row, rank 60: 0.40, 0.98, 1.01 and 1.40 percent with 0, 1, 2 and 4, `lupp` 1.29).
"""

SUBSPACES = ("auto", "exact", "randomised", "lanczos")


@dataclass(frozen=True, eq=False)
class Problem:
    """A matrix ready to be factored.

    Attributes
    ----------
    A : matrix
        The user's, detached and promoted to the working dtype.
    B : matrix
        `A` in weighted coordinates, ``F_H^H A F_G``; `A` itself without weights.
    target : matrix
        Whose leading singular subspaces guide the choice: `B`, or the importance given.
    row_weight, column_weight : Weight or None
    total : float or None
        ``||B||_F``; None for an operator.
    bounds : bool
        Whether bounds that take products of their own are wanted.
    """

    A: Array
    B: Array
    target: Array
    row_weight: Weight | None
    column_weight: Weight | None
    total: float | None
    bounds: bool = True

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
        """Rounding of ``||B||^2 - ||Q^H B||^2``, of the products and of the QR that made Q.

        The constant 20 is for very small matrices, where that of the QR outweighs the dimensions.
        """
        return 2 * (max(self.shape) + 20) * self.unit * (self.total or 0.0) ** 2


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
    A = check_promoted(A)
    dtype = A.dtype
    row_weight = as_weight(row_weights, A, 0, dtype)
    column_weight = as_weight(column_weights, A, 1, dtype)
    B = A
    if row_weight is not None:
        B = row_weight.apply(B, 0)
    if column_weight is not None:
        B = column_weight.apply(B, 1)
    target = B
    if importance is not None:
        check_matrix(importance, "importance")
        check_companion(importance, A, "importance")
        if tuple(importance.shape) != tuple(A.shape):
            raise ValueError(
                f"`importance` must have the shape of `A`, {tuple(A.shape)}; got {tuple(importance.shape)}; "
                "one score per entry is needed"
            )
        target = check_promoted(importance, "importance", dtype)
        if not is_operator(target):
            check_finite_norm(frobenius(target), importance, "importance")
    return Problem(A, B, target, row_weight, column_weight, None if is_operator(B) else frobenius(B))


def find_subspace(
    problem: Problem, rank: int, method: str, rng: np.random.Generator, power_iterations: int | None
) -> subspaces.Subspace:
    """Return the leading singular subspaces of the target by the method asked for, or the one that suits it."""
    check_choice(method, SUBSPACES, "subspace")
    S = problem.target
    if method == "auto":
        in_memory = not (is_sparse(S) or is_operator(S) or is_dask(S))
        # a full SVD costs as much as some 5 min(m, n) products with single vectors: no sketch pays near full rank
        method = "exact" if in_memory and 3 * rank >= min(S.shape) else "randomised"
    if method == "exact":
        return subspaces.exact(S, rank)
    total = problem.total if S is problem.B else None
    if method == "lanczos":
        return subspaces.lanczos(S, rank, rng=rng, total=total)
    found = subspaces.randomised(S, rank, power_iterations=power_iterations or 0, rng=rng, total=total)
    if power_iterations is None and (is_sparse(S) or is_operator(S)) and found.is_flat():
        return subspaces.randomised(S, rank, power_iterations=FLAT_ITERATIONS, rng=rng, total=total)
    return found


def choose(
    problem: Problem,
    counts: tuple[int, int],
    select: str,
    method: str,
    rng: np.random.Generator,
    power_iterations: int | None,
    *,
    truncate: bool = True,
) -> Choice:
    """Choose rows and columns of the target.

    `truncate` stops at the numerical rank, with a warning. A search for a tolerance goes on: on Kahan's matrix the
    rank is one short of full, and only all rows and columns reach a small tolerance.
    """
    k_rows, k_columns = counts
    if is_operator(problem.target) and select in ("norm", "cmd", "osinsky"):
        raise TypeError(
            f"`select={select!r}` looks at the entries of the matrix, and a LinearOperator (or a sparse matrix with a "
            "matrix weight) gives products only; use 'deim', 'lupp' or 'arp'"
        )
    if select in PLAIN_SELECTORS:
        pick = PLAIN_SELECTORS[select]
        S = problem.target
        sides = ((S, k_rows), (adjoint(S), k_columns))
        rows, columns = (pick(_placeholder(X), k, matrix=X, rng=rng) for X, k in sides)
        return Choice(rows, columns)
    if select == "lupp":
        return _choose_from_sketch(problem, counts, rng)
    found = find_subspace(problem, max(counts), method, rng, power_iterations)
    numerical = found.numerical_rank(problem.target) if truncate else max(counts)
    if max(counts) > numerical:
        warn(
            f"rank {max(counts)} was asked for, but the numerical rank is {numerical}; "
            f"the factorization has rank {numerical}"
        )
        k_rows, k_columns = min(k_rows, numerical), min(k_columns, numerical)
    pick = BASIS_SELECTORS[select]
    V, W = found.V[:, :k_rows], found.W[:, :k_columns]
    left = V if problem.row_weight is None else problem.row_weight.candidates(V)
    right = W if problem.column_weight is None else problem.column_weight.candidates(W)
    rows = pick(left, k_rows, matrix=problem.target, rng=rng)
    columns = pick(right, k_columns, matrix=adjoint(problem.target), rng=rng)
    return Choice(rows, columns, V, W, found)


def _placeholder(S: Array) -> Array:
    """Return a basis for selectors that look at the matrix only: its backend and number of rows are all they read."""
    like = S if is_dense(S) else np.empty(0)
    return namespace(like).zeros((S.shape[0], 1), dtype=like.dtype, device=_array.take_device(like))


def _choose_from_sketch(problem: Problem, counts: tuple[int, int], rng: np.random.Generator) -> Choice:
    """Choose rows by LU of a sketch, then columns by LU of these rows: one product with the target."""
    S = problem.target
    Y = subspaces.sketch(S, max(counts), rng=rng)
    left = Y if problem.row_weight is None else problem.row_weight.candidates(Y)
    rows = selection.lupp(left)
    Z = thin(adjoint(rows_of(S, rows)))
    right = Z if problem.column_weight is None else problem.column_weight.candidates(Z)
    return Choice(rows[: counts[0]], selection.lupp(right, counts[1]))


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


def slices(problem: Problem, choice: Choice) -> tuple[Array, Array, Array, Array]:
    """Return C and R of the matrix, and both in weighted coordinates."""
    C, R = columns_of(problem.A, choice.columns), rows_of(problem.A, choice.rows)
    Cw = thin(C) if problem.row_weight is None else problem.row_weight.apply(thin(C), 0)
    Rw = thin(R) if problem.column_weight is None else problem.column_weight.apply(thin(R), 1)
    return C, R, Cw, Rw


def safe_scale(A: Array, total: float | None) -> float:
    """Return a power of two to divide a matrix by where squares of its entries would leave the range; else 1."""
    if total is None:  # an operator shows its size in a product
        x = np.random.default_rng(0).standard_normal((A.shape[1], 1)).astype(A.dtype)
        total = largest = float(np.max(np.abs(product(A, x))))
    else:
        largest = None
    xp = namespace(A)
    info = xp.finfo(A.dtype)
    low = math.sqrt(float(info.smallest_normal) / float(info.eps) ** 2)
    high = math.sqrt(float(info.max)) / A.shape[1]
    if low < total < high or math.isnan(total):
        return 1.0
    if largest is None:
        largest = float(abs(A).max()) if is_sparse(A) or is_dask(A) else float(xp.max(xp.abs(A)))
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    # its reciprocal must not overflow, which that of a subnormal number would
    return max(math.ldexp(1.0, math.frexp(largest)[1]), float(info.smallest_normal))


def scaled(A: Array, factor: float) -> Array:
    """Return `A` times a power of two; in its dtype, which the product of an operator with a plain number may leave."""
    return A * A.dtype.type(factor) if is_operator(A) else A * factor
