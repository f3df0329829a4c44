"""The 2-norm of a matrix that can only be multiplied with: certain lower and probable upper bounds, by Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from cur._lib.array import Array, adjoint, convert, is_dense, namespace, to_numpy
from cur._lib.linalg import svdvals
from cur._lib.products import adjoint_product, product

__all__ = ["SpectralError", "norm_bounds", "spectral_error", "spectral_norm"]

DIRECT_WORK = 1 << 24
"""Up to this many operations, rows times columns times the shorter of both, a dense matrix gets all singular values."""

STARTS = 8
"""Random vectors to begin with; each further one makes chance failures rarer and costs its share of every product."""

GAIN = 1.01
"""Ratio of upper to lower bound at which iterations end."""

STEPS = (10, 40)
"""Most iterations: fewer where vectors are so long that their bases would fill the memory."""

BASIS_ENTRIES = 1 << 26
"""Entries of all bases together, up to which `STEPS` iterations are made."""

Vectors = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SpectralError:
    """The 2-norm of a residual.

    Attributes
    ----------
    value : float
        An upper bound on the norm, rounding included.
    failure_probability : float
        The chance that the bound is none; 0 where it comes from singular values.
    """

    value: float
    failure_probability: float


def spectral_error(
    B: Array, L: Array, R: Array, *, direct: bool, rounding: float, failure: float, rng: np.random.Generator
) -> SpectralError:
    """Bound ``||B - L R||_2`` for thin dense `L` and `R`.

    By singular values where `B` is dense and either small or `direct` is asked for; else by `norm_bounds`.

    Parameters
    ----------
    B : matrix, shape (m, n)
        The matrix, in any form that can be multiplied with.
    L : array, shape (m, k)
        The left factor, dense and in memory.
    R : array, shape (k, n)
        The right factor, dense and in memory.
    direct : bool
        Whether a dense matrix gets all of its singular values, however large it is.
    rounding : float
        A bound on the rounding of the residual in the 2-norm, which is added to the result.
    failure : float
        The chance that a bound by products is below the norm, between 0 and 1.
    rng : Generator
        The source of the vectors that the products begin with, on which none of the matrices may depend.

    Returns
    -------
    SpectralError
        An upper bound on the norm, and the chance that it is none.
    """
    m, n = (int(side) for side in B.shape)
    if is_dense(B) and (direct or m * n * min(m, n) <= DIRECT_WORK):
        return SpectralError(float(svdvals(B - L @ R)[0]) + rounding, 0.0)
    wide = m < n

    def forward(X: Array) -> Array:
        return product(B, X) - L @ (R @ X)

    def backward(X: Array) -> Array:
        return adjoint_product(B, X) - adjoint(R) @ (adjoint(L) @ X)

    gram = _gram(backward, forward, L) if wide else _gram(forward, backward, L)
    _, upper = norm_bounds(gram, min(m, n), is_complex=_is_complex(L), failure=failure, rng=rng)
    return SpectralError(upper + rounding, failure)


def spectral_norm(B: Array, like: Array) -> float:
    """Return a lower bound of ``||B||_2``, but for the rounding of products, from the same iterations.

    Parameters
    ----------
    B : matrix, shape (m, n)
        The matrix, in any form that can be multiplied with.
    like : array
        An array of the library, device and dtype that the vectors are to have.
    """
    m, n = (int(side) for side in B.shape)

    def forward(X: Array) -> Array:
        return product(B, X)

    def backward(X: Array) -> Array:
        return adjoint_product(B, X)

    gram = _gram(backward, forward, like) if m < n else _gram(forward, backward, like)
    rng = np.random.default_rng(0)
    return norm_bounds(gram, min(m, n), is_complex=_is_complex(like), failure=1e-3, rng=rng)[0]


def _gram(
    first: Callable[[Array], Array], second: Callable[[Array], Array], like: Array
) -> Callable[[Vectors], Vectors]:
    """Return the product with both, one after the other, of vectors on the host."""

    def gram(X: Vectors) -> Vectors:
        Y = first(convert(np.ascontiguousarray(X), like, like.dtype))
        size = float(namespace(Y).max(namespace(Y).abs(Y))) or 1.0  # squares of small numbers would underflow
        Z: Vectors = to_numpy(second(Y / size)).astype(X.dtype) * size
        return Z

    return gram


def _is_complex(X: Array) -> bool:
    return bool(namespace(X).isdtype(X.dtype, "complex floating"))


def norm_bounds(
    gram: Callable[[Vectors], Vectors], size: int, *, is_complex: bool, failure: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Return a lower bound of ``||X||_2``, and one that is above it except with probability `failure`.

    Parameters
    ----------
    gram : callable
        Multiplies NumPy vectors, as columns, by ``X^H X`` (or ``X X^H``). `X` must not depend on `rng`.
    size : int
        Length of the vectors.
    is_complex : bool
        Whether the vectors are complex.
    failure : float
        Chance that the upper bound is below the norm.
    rng : Generator
        Source of the vectors to begin with.

    Returns
    -------
    tuple of float
        The lower bound, and the upper bound.

    Notes
    -----
    The theorem and its proof are in the documentation's page on the mathematics, (B6). Bases are made orthogonal to
    rounding, so that what Lanczos knows belongs to a matrix that differs from the Gram matrix by the rounding of the
    products alone.

    References
    ----------
    Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", J. Sci. Comput. 57 (2013).
    """
    x = rng.standard_normal((STARTS, size))
    if is_complex:
        x = x + 1j * rng.standard_normal((STARTS, size))
    lengths = np.linalg.norm(x, axis=1)
    # a component along any unit vector is below this in all starts with probability `failure` at most
    least = math.sqrt(math.pi / 2) * failure ** (1 / STARTS)
    most = min(size, max(STEPS[0], min(STEPS[1], BASIS_ENTRIES // (size * STARTS))))
    basis = (x / lengths[:, None])[:, None, :]
    alphas, betas = np.zeros((STARTS, 0)), np.zeros((STARTS, 0))
    lower, upper, unit = 0.0, math.inf, 0.0
    for _ in range(most):
        w = gram(basis[:, -1, :].T).T
        unit = unit or float(np.max(np.abs(w)))
        if unit == 0.0:
            return 0.0, 0.0
        w = w / unit
        alpha = np.sum(basis[:, -1, :].conj() * w, axis=1).real
        for _ in range(2):
            w = _orthogonal(w, basis)
        beta = np.linalg.norm(w, axis=1)
        alphas, betas = np.column_stack([alphas, alpha]), np.column_stack([betas, beta])
        ritz = np.array([_largest(a, b[:-1]) for a, b in zip(alphas, betas, strict=True)])
        lower = max(lower, float(ritz.max()))
        # an invariant subspace: what follows has no meaning, and the tiny number says that nothing is beyond
        floor = 1e-14 * lower
        ended = beta <= floor
        betas[ended, -1] = floor
        upper = min(upper, float(_crossing(alphas, betas, ritz, (lengths / least) ** 2).max()))
        if upper <= GAIN**2 * lower:
            break
        following = np.where(ended[:, None], 0.0, w / np.where(ended, 1.0, beta)[:, None])
        basis = np.concatenate([basis, following[:, None, :]], axis=1)
    return math.sqrt(lower) * math.sqrt(unit), math.sqrt(max(upper, lower)) * math.sqrt(unit)


def _orthogonal(w: Vectors, basis: Vectors) -> Vectors:
    """Take out of each vector what its basis holds."""
    inside = np.conj(basis) @ w[:, :, None]
    return np.asarray(w - (inside.transpose(0, 2, 1) @ basis)[:, 0, :])


def _largest(alpha: Vectors, beta: Vectors) -> float:
    return float(scipy.linalg.eigvalsh_tridiagonal(alpha, beta, select="i", select_range=(len(alpha) - 1,) * 2)[0])


def _crossing(alphas: Vectors, betas: Vectors, ritz: Vectors, limit: Vectors) -> Vectors:
    """Return where the sums of squares of the Lanczos polynomials, beyond their roots, reach `limit`; rounded up."""
    low, width = ritz, np.maximum(ritz, 0.0) + ritz.max()
    while (inside := _christoffel(alphas, betas, low + width) < limit).any():
        width = np.where(inside, 2 * width, width)
    high = low + width
    for _ in range(40):
        middle = (low + high) / 2
        inside = _christoffel(alphas, betas, middle) < limit
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.asarray(high)


def _christoffel(alphas: Vectors, betas: Vectors, theta: Vectors) -> Vectors:
    before, now, previous = np.zeros_like(theta), np.ones_like(theta), np.zeros_like(theta)
    total: Vectors = np.ones_like(theta)
    for alpha, beta in zip(alphas.T, betas.T, strict=True):
        # beyond 1e150 the sum is above any limit
        following = np.minimum(((theta - alpha) * now - previous * before) / beta, 1e150)
        before, now, previous = now, following, beta
        total += now**2
    return total
