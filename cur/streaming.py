"""CUR of a matrix that is read as blocks of rows: from disk, a network, or any source too large for memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from cur import subspace
from cur._array import adjoint, take
from cur._certify import evaluation_rounding
from cur._errors import NumericalError
from cur._products import frobenius, pythagorean_rounding
from cur._scale import times_power
from cur._stream import read_blocks
from cur._validate import check_rank
from cur.bounds import Certificate, eta, projection_bound
from cur.factors import CUR
from cur.linking import Orthogonal, core
from cur.selection import deim

__all__ = ["stream_cur"]

DOUBLE = 2.0**-53
"""Unit roundoff of the arithmetic of the second pass."""


def stream_cur(blocks: Any, /, *, rank: int | tuple[int, int]) -> CUR:
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
        Number of rows and columns, or (rows, columns).

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
    pair = check_rank(rank, (sys.maxsize, sys.maxsize))  # its kind now; its size when the shape is known
    found = subspace.stream(blocks, max(pair))
    k_rows, k_columns = (min(k, found.numerical_rank()) for k in check_rank(rank, found.shape))
    W, u = found.W[:, :k_columns], DOUBLE
    columns = deim(W)
    rows, R = found.rows[:k_rows], found.R[:k_rows]
    # what the certificate rests on is in double precision, whatever the blocks are
    exponent = math.frexp(found.total)[1]
    near_R = times_power(_double(R), -exponent)
    cutoff = math.sqrt(found.unit)
    QR = Orthogonal(adjoint(near_R), cutoff=cutoff)
    C, Y, total = _collect(blocks, columns, QR.Q, found.shape, exponent)
    QC = Orthogonal(times_power(_double(C), -exponent), cutoff=cutoff)
    M = adjoint(QC.Q) @ Y
    with np.errstate(over="ignore"):
        returned = times_power(core(QC, QR, M, np.result_type(C, R, W)), -exponent)
    if not np.isfinite(returned).all():
        raise NumericalError(
            "`blocks` have entries so small that U, of the size of their reciprocals, overflows; scale them"
        )
    U = times_power(_double(returned), exponent)  # as it is returned
    T, S = QC.T, adjoint(QR.T)
    inner = evaluation_rounding(T, U, S, u=u)
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
    return CUR(C, returned, R, rows, columns, certificate.shifted(exponent))


def _double(X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return X.astype(np.complex128 if np.iscomplexobj(X) else np.float64, copy=False)


def _collect(
    blocks: Any, columns: np.ndarray[Any, Any], Q: np.ndarray[Any, Any], shape: tuple[int, int], exponent: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Read the chosen columns, the product with an orthonormal basis of the chosen rows, and the norm, scaled."""
    parts, norms = [], []
    for block in read_blocks(blocks):
        near = times_power(_double(block), -exponent)
        parts.append((block[:, columns], near @ Q))
        norms.append(frobenius(near))
    C, Y = (np.concatenate(part) for part in zip(*parts, strict=True))
    if C.shape[0] != shape[0]:
        raise ValueError(
            f"`blocks` must give the same rows each time; the first pass read {shape[0]} and the second {C.shape[0]}; "
            "let the source rest while it is read"
        )
    return C, Y, math.hypot(*norms)
