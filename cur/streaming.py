"""CUR of a matrix that is read as blocks of rows: from disk, a network, or any source too large for memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from cur import subspace
from cur._array import adjoint, take, unit_roundoff
from cur._certify import evaluation_rounding
from cur._products import frobenius
from cur._stream import read_blocks
from cur._validate import check_rank
from cur.bounds import Certificate, eta, projection_bound
from cur.factors import CUR
from cur.linking import Orthogonal, core
from cur.selection import deim

__all__ = ["stream_cur"]


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
    u = unit_roundoff(found.W.dtype, found.W)
    W = found.W[:, :k_columns]
    columns = deim(W)
    rows, R = found.rows[:k_rows], found.R[:k_rows]
    QR = Orthogonal(adjoint(R))
    C, Y = _collect(blocks, columns, QR.Q, found.shape)
    QC = Orthogonal(C)
    M = adjoint(QC.Q) @ Y
    U = core(QC, QR, M)
    T, S = QC.T, adjoint(QR.T)
    inner = evaluation_rounding(T, U, S, u=u)
    missed = max(found.total**2 - frobenius(M) ** 2, 0.0)
    gap = frobenius(M - T @ U @ S)
    value = math.sqrt(missed + 2 * max(found.shape) * u * found.total**2 + gap**2) + inner
    eta_columns = eta(take(W, columns, axis=0))
    # (B1) with the space of the chosen rows in place of V, whose eta is 1
    projection = projection_bound(1.0, eta_columns, found.left_by(W), found.left_by(QR.Q)) + inner
    certificate = Certificate(
        norm="fro",
        value=min(value, projection),
        kind="exact" if value <= projection else "bound",
        failure_probability=0.0,
        dtype=str(C.dtype),
        scale=found.total,
        rounding=value - math.hypot(math.sqrt(missed), gap),
        eta_columns=eta_columns,
        projection=projection,
    )
    return CUR(C, U, R, rows, columns, certificate)


def _collect(
    blocks: Any, columns: np.ndarray[Any, Any], Q: np.ndarray[Any, Any], shape: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Read the chosen columns, and the product with an orthonormal basis of the chosen rows."""
    parts = [(block[:, columns], block @ Q) for block in read_blocks(blocks)]
    C, Y = (np.concatenate(part) for part in zip(*parts, strict=True))
    if C.shape[0] != shape[0]:
        raise ValueError(
            f"`blocks` must give the same rows each time; the first pass read {shape[0]} and the second {C.shape[0]}; "
            "let the source rest while it is read"
        )
    return C, Y
