"""CUR of a matrix that is read as blocks of rows: from disk, a network, or any source too large for memory."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cur import subspace
from cur._driver.certify import evaluation_rounding
from cur._driver.spectral import norm_bounds
from cur._lib.array import adjoint, take, working_dtype
from cur._lib.errors import warn
from cur._lib.products import frobenius, pythagorean_rounding
from cur._lib.scale import of_the_size_of_reciprocals, times_power
from cur._lib.stream import read_blocks
from cur._lib.validate import as_generator, check_choice, check_probability, check_rank
from cur.bounds import Certificate, eta, projection_bound
from cur.factors import CUR
from cur.linking import Orthogonal, core
from cur.selection import deim

__all__ = ["stream_cur"]

DOUBLE = 2.0**-53
"""Unit roundoff of the arithmetic of the second pass."""


def stream_cur(
    blocks: Any,
    /,
    *,
    rank: int | tuple[int, int],
    norm: Literal["fro", 2] = "fro",
    failure_probability: float = 1e-6,
    rng: np.random.Generator | int | None = 0,
) -> CUR:
    """Factor a matrix that comes as blocks of rows, in two passes.

    The first pass finds the row space and the rows (`cur.subspace.stream`): its memory does not depend on the number
    of rows. The columns are DEIM's for that row space. The second pass collects them, and what the optimal core and
    the exact error need: two columns of numbers per rank, as long as C itself.

    Parameters
    ----------
    blocks : array, sequence or callable
        A whole matrix that need not fit into memory (`numpy.memmap`, Dask, h5py or zarr array), a sequence of blocks
        of rows, or a callable that returns a new iterator over the blocks. A plain iterator can be read only once and
        is refused.
    rank : int or (int, int)
        Number of rows and columns, or (rows, columns). A rank above the numerical rank of the matrix is truncated to it
        with a `RankWarning`.
    norm : {"fro", 2}, default "fro"
        Norm of the certificate. The 2-norm takes one more pass for every step of Lanczos, some twenty.
    failure_probability : float, default 1e-6
        The chance that a certificate in the 2-norm is wrong.
    rng : Generator, int or None, default 0
        Source of the random vectors that Lanczos begins with; nothing else is random.

    Returns
    -------
    CUR
        NumPy factors in the working dtype of the blocks. The error in the certificate is computed by Pythagoras, so
        that it floors near the root of the unit roundoff.

    Raises
    ------
    TypeError
        If `blocks` cannot be read twice.
    ValueError
        If the blocks disagree in width, hold NaN or inf, end at once, or change between the passes.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import stream_cur
    >>> A = 1.0 / (np.arange(1, 1001)[:, None] + np.arange(40))
    >>> result = stream_cur(lambda: (A[i : i + 100] for i in range(0, 1000, 100)), rank=6)
    >>> bool(np.linalg.norm(A - result.toarray()) <= result.certificate.value)
    True
    """
    if isinstance(blocks, Iterator):
        raise TypeError(
            "`blocks` must be readable twice, and an iterator is not; pass the array, a list of blocks, or a "
            "callable that returns a new iterator each time"
        )
    check_choice(norm, ("fro", 2), "norm")
    check_probability(failure_probability)
    generator = as_generator(rng)
    pair = check_rank(rank, (sys.maxsize, sys.maxsize))  # its kind now; its size when the shape is known
    found = subspace.stream(blocks, max(pair))
    k_rows, k_columns = check_rank(rank, found.shape)
    numerical = found.numerical_rank()
    if max(k_rows, k_columns) > numerical:
        warn(
            f"rank {max(k_rows, k_columns)} was asked for, but the numerical rank is {numerical}; "
            f"the factorization has rank {numerical}"
        )
        k_rows, k_columns = min(k_rows, numerical), min(k_columns, numerical)
    W, u = found.W[:, :k_columns], DOUBLE
    columns = deim(W)
    rows, R = found.rows[:k_rows], found.R[:k_rows]
    # what the certificate rests on is in double precision, whatever the blocks are
    exponent = math.frexp(found.total)[1]
    near_R = times_power(_double(R), -exponent)
    cutoff = math.sqrt(found.unit)
    QR = Orthogonal(adjoint(near_R), cutoff=cutoff)
    C, Y, total, rounded = _collect(blocks, columns, QR.Q, found.shape, exponent)
    QC = Orthogonal(times_power(_double(C), -exponent), cutoff=cutoff)
    M = adjoint(QC.Q) @ Y
    returned = of_the_size_of_reciprocals(
        core(QC, QR, M, working_dtype(np.empty(0, np.result_type(C, R, W)))), -exponent, "blocks"
    )
    U = times_power(_double(returned), exponent)  # as it is returned
    T, S = QC.T, adjoint(QR.T)
    inner = evaluation_rounding(T, U, S, u=u)
    inner += rounded + 0.05 * inner if rounded else 0.0  # of the matrix as it was given
    missed = max(total**2 - frobenius(M) ** 2, 0.0)
    gap = frobenius(M - T @ U @ S)
    value = math.sqrt(missed + pythagorean_rounding(found.shape, u) * total**2 + gap**2) + inner
    eta_columns = eta(take(W, columns, axis=0))
    # (B1) with the space of the chosen rows in place of V, whose eta is 1, for the best core in exact arithmetic
    lost = (found.left_by(W), found.left_by(QR.Q))
    projection = (
        projection_bound(1.0, eta_columns, *(times_power(np.float64(x), -exponent) for x in lost)) + inner + gap
    )
    certificate = Certificate(
        norm="fro",
        value=min(value, projection),
        kind="exact" if value <= projection else "bound",
        failure_probability=0.0,
        dtype=str(returned.dtype),
        scale=total,
        rounding=value - math.hypot(math.sqrt(missed), gap),
        eta_columns=eta_columns,
        projection=projection,
    )
    if norm == 2:
        rounding = pythagorean_rounding(found.shape, u) * total
        factors = (times_power(_double(C), -exponent) @ U, near_R)
        certificate = _in_2_norm(
            blocks, exponent, factors, certificate, inner, rounding, failure_probability, generator
        )
    return CUR(C, returned, R, rows, columns, certificate.shifted(exponent))


def _double(X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return X.astype(np.complex128 if np.iscomplexobj(X) else np.float64, copy=False)


def _scaled_blocks(blocks: Any, exponent: int) -> Iterator[np.ndarray[Any, Any]]:
    """Read the blocks in double precision, divided by a power of two."""
    return (times_power(_double(block), -exponent) for block, _ in read_blocks(blocks))


def _in_2_norm(
    blocks: Any,
    exponent: int,
    factors: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
    certificate: Certificate,
    inner: float,
    rounding: float,
    failure: float,
    rng: np.random.Generator,
) -> Certificate:
    """Return the certificate of the same factors in the 2-norm, by products with the blocks, pass after pass."""
    left, right = factors
    n = right.shape[1]

    def gram(X: np.ndarray[Any, Any], *, residual: bool) -> np.ndarray[Any, Any]:
        total, seen = np.zeros_like(X), 0
        inside = right @ X
        for block in _scaled_blocks(blocks, exponent):
            Y, L = block @ X, left[seen : seen + block.shape[0]]
            if residual:
                Y = Y - L @ inside
            total += adjoint(block) @ Y
            if residual:
                total -= adjoint(right) @ (adjoint(L) @ Y)
            seen += block.shape[0]
        return total

    options: dict[str, Any] = {"is_complex": right.dtype.kind == "c", "rng": rng}
    _, upper = norm_bounds(functools.partial(gram, residual=True), n, failure=failure, **options)
    lower, _ = norm_bounds(functools.partial(gram, residual=False), n, failure=failure, **options)
    value = upper + rounding + inner
    return replace(
        certificate,
        norm=2,
        value=min(value, certificate.value),
        kind="probabilistic" if value < certificate.value else "bound",
        failure_probability=failure if value < certificate.value else 0.0,
        scale=max(lower - rounding, 0.0),
        rounding=rounding + inner,
    )


def _collect(
    blocks: Any, columns: np.ndarray[Any, Any], Q: np.ndarray[Any, Any], shape: tuple[int, int], exponent: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float, float]:
    """Read the chosen columns, the product with a basis of the chosen rows, the norm, and that of what was rounded."""
    parts, norms, lost = [], [], 0.0
    for block, given in read_blocks(blocks):
        near = times_power(_double(block), -exponent)
        parts.append((given[:, columns], near @ Q))
        norms.append(frobenius(near))
        if given is not block:
            lost = math.hypot(lost, 1.01 * DOUBLE * norms[-1], math.ldexp(math.sqrt(block.size), -1074 - exponent))
    C, Y = (np.concatenate(part) for part in zip(*parts, strict=True))
    if C.shape[0] != shape[0]:
        raise ValueError(
            f"`blocks` must give the same rows each time; the first pass read {shape[0]} and the second {C.shape[0]}; "
            "let the source rest while it is read"
        )
    return C, Y, math.hypot(*norms), lost
