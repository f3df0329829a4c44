"""The only file that knows array libraries.

Everything else is written against the Python array API standard, through the namespace that `namespace` returns. What
the standard lacks is supplied here: the native routine where the library has one, a formula in terms of the
standard where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

Array = Any
"""An array of a library that follows the array API standard, or a `scipy.sparse` array."""

_NUMPY = compat.array_namespace(np.empty(0))

take_device = compat.device
is_dask = compat.is_dask_array


def is_sparse(A: Any) -> bool:
    """Tell whether `A` is a `scipy.sparse` matrix or array."""
    return bool(scipy.sparse.issparse(A))


def is_sparse_tensor(A: Any) -> bool:
    """Tell whether `A` is one of torch's sparse tensors, which lack most of linear algebra."""
    return bool(compat.is_torch_array(A)) and str(A.layout) != "torch.strided"


def is_operator(A: Any) -> bool:
    """Tell whether `A` is known by its action only."""
    return isinstance(A, scipy.sparse.linalg.LinearOperator)


def is_dense(A: Any) -> bool:
    """Tell whether `A` is an array that lives in memory, on some device."""
    return bool(compat.is_array_api_obj(A)) and not is_sparse(A) and not is_dask(A)


def namespace(*arrays: Any) -> Any:
    """Return the common namespace; NumPy for sparse matrices and operators, whose thin factors are NumPy's."""
    # The usual case first: of small matrices, asking which library they are of takes a quarter of all the time.
    if all(type(A) is np.ndarray or is_sparse(A) or is_operator(A) for A in arrays):
        return _NUMPY
    return compat.array_namespace(*[A for A in arrays if not (is_sparse(A) or is_operator(A))])


def detach(A: Array) -> Array:
    """Cut `A` out of automatic differentiation: which indices are chosen has no useful derivative."""
    if compat.is_torch_array(A):
        return A.detach()
    if compat.is_jax_array(A):
        import jax

        return jax.lax.stop_gradient(A)
    return A


def is_abstract(A: Any) -> bool:
    """Tell whether `A` is an array without values: traced by a transformation, or a tensor of shape and dtype only."""
    if compat.is_jax_array(A):
        import jax

        return isinstance(detach(A), jax.core.Tracer)
    if compat.is_torch_array(A):
        import torch

        return A.is_meta or type(A).__name__ == "FakeTensor" or torch._C._functorch.is_functorch_wrapped_tensor(A)
    return False


def working_dtype(A: Any) -> Any:
    """Return the dtype to compute in: half precisions become single, all that is not floating point or wider double."""
    xp = namespace(A)
    dtype = A.dtype
    if is_dense(A) or is_dask(A):
        if xp.isdtype(dtype, ("integral", "bool")):
            # JAX without x64, and devices without doubles, have nothing better than single precision
            real = xp.__array_namespace_info__().default_dtypes(device=_device_or_none(A))["real floating"]
            doubles = "float64" in xp.__array_namespace_info__().dtypes(device=_device_or_none(A))
            return xp.float64 if doubles else real
        bits = xp.finfo(dtype).bits
        if bits > 64:  # NumPy's long doubles: LAPACK has none, and would round them in silence
            return xp.complex128 if xp.isdtype(dtype, "complex floating") else xp.float64
        if bits < 32:
            return xp.complex64 if "complex" in str(dtype) else xp.float32  # torch has half of them as well
        return dtype
    dtype = np.dtype(dtype)
    if dtype.kind in "fc" and np.finfo(dtype).bits > 64:
        return np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
    if dtype.kind in "iub":
        return np.dtype(np.float64)
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def promote(A: Any, name: str = "A", dtype: Any | None = None) -> Any:
    """Bring a checked matrix, cut out of differentiation, to the form and the dtype to compute in.

    Of SciPy's sparse formats only two can all that is asked of a matrix: products, slices and entries. `dtype` is that
    of a matrix it goes with, by default its own `working_dtype`.
    """
    if is_operator(A):
        from cur._operator import checked

        return checked(A, name, dtype)
    if isinstance(A, np.ndarray) and dtype is None and A.dtype.char in "fdFD":
        return A  # the usual case, and small matrices take no longer than such questions
    A, dtype = detach(A), working_dtype(A) if dtype is None else dtype
    with np.errstate(over="ignore"):  # what is beyond the range becomes infinite, which is told of
        if is_sparse(A):
            A = A if A.dtype == dtype else A.astype(dtype)
            return A if A.format in ("csr", "csc") else A.tocsr()
        return A if A.dtype == dtype else namespace(A).astype(A, dtype)


def is_rounded(A: Any, promoted: Any) -> bool:
    """Tell whether a matrix lost digits when it was promoted: integers that are too long, or extended precision."""
    if is_operator(A) or A.dtype == promoted.dtype:
        return False
    dtype = np.dtype(A.dtype) if is_sparse(A) or isinstance(A, np.ndarray) or is_dask(A) else None
    if dtype is not None and dtype.char in "gG":
        if isinstance(A, np.ndarray):
            return not np.array_equal(A, promoted, equal_nan=True)
        return True
    if dtype is None and not namespace(A).isdtype(A.dtype, "integral"):
        return False
    if dtype is not None and dtype.kind not in "iu":
        return False
    from cur._products import largest

    return largest(promoted) * unit_roundoff(promoted.dtype, promoted) >= 0.5


def as_given(A: Any, promoted: Any) -> Any:
    """Return the matrix that rows and columns are taken from: the promoted one, where nothing of it was lost.

    Of other libraries too, which multiply arrays of one dtype only.
    """
    own = isinstance(A, np.ndarray) or is_sparse(A) or is_dask(A)
    return promote(A, dtype=A.dtype) if own and is_rounded(A, promoted) else promoted


def _device_or_none(A: Any) -> Any:
    return None if is_dask(A) or is_sparse(A) else take_device(A)


def convert(A: Array, like: Array, dtype: Any | None = None) -> Array:
    """Bring host data `A` to the library and device of `like`."""
    xp = namespace(like)
    if is_dask(like) or is_sparse(like) or is_operator(like):
        return np.asarray(A, dtype=dtype)
    if compat.is_torch_array(like):
        # torch shares memory with NumPy and refuses read-only arrays with a warning: copy
        A = np.array(A)
    if compat.is_jax_array(like) and not compat.is_jax_array(A):
        import jax

        # its asarray compiles two functions for every shape
        return jax.device_put(np.array(A, dtype=dtype), take_device(like))
    return xp.asarray(A, dtype=dtype, device=take_device(like))


def to_numpy(A: Array) -> np.ndarray[Any, Any]:
    """Copy a small array to the host."""
    if compat.is_torch_array(A):
        return np.asarray(A.detach().cpu().resolve_conj().resolve_neg().numpy())
    if compat.is_cupy_array(A):
        return np.asarray(A.get())
    if is_sparse(A):
        return np.asarray(A.todense())
    if is_dask(A):
        lazy: Any = A
        return np.asarray(lazy.compute())
    if compat.array_namespace(A).__name__.startswith("array_api_strict"):
        A = compat.to_device(A, compat.array_namespace(A).Device("CPU_DEVICE"))
    return np.asarray(A)


def gaussian(shape: tuple[int, ...], like: Array, dtype: Any, rng: np.random.Generator) -> Array:
    """Draw real standard normal numbers on the host, so that a seed means the same on every library.

    In `dtype`, complex ones included: torch multiplies matrices of one dtype only.
    """
    return convert(rng.standard_normal(shape), like, dtype)


def real_dtype(dtype: Any, like: Array) -> Any:
    """Return the real floating dtype of the same precision."""
    if is_dense(like):
        xp = namespace(like)
        if dtype == xp.complex64:
            return xp.float32
        return xp.float64 if dtype == xp.complex128 else dtype
    return np.empty(0, dtype=dtype).real.dtype


def unit_roundoff(dtype: Any, like: Array) -> float:
    """Return the unit roundoff `u`, half the distance from 1 to the next number."""
    xp = namespace(like) if is_dense(like) else np
    return float(xp.finfo(dtype).eps) / 2


def adjoint(A: Array) -> Array:
    """Return the conjugate transpose of a two-dimensional array, sparse matrix or operator."""
    if is_operator(A):
        return A.H
    if is_sparse(A):
        return A.conj().T if A.dtype.kind == "c" else A.T
    xp = namespace(A)
    return xp.conj(A).T if xp.isdtype(A.dtype, "complex floating") else A.T


def take(A: Array, indices: Array, axis: int) -> Array:
    """Return the rows (axis 0) or columns (axis 1) of `A` in the given order."""
    if is_sparse(A):
        return A.tocsr()[indices, :] if axis == 0 else A.tocsc()[:, indices]
    return namespace(A).take(A, indices, axis=axis)


def qr(X: Array) -> tuple[Array, Array]:
    """Return the thin QR factorization of a tall matrix.

    NumPy and torch: by Cholesky factorization of the Gram matrix, which is all matrix products, and once more where the
    first time is not orthogonal to rounding; by Householder reflections, which take several times as long on any
    device, where the matrix is far from that. SciPy's LAPACK would be as fast alone, but its threads and NumPy's wait
    for each other: calls that alternate between the two took up to six times as long.
    """
    if (compat.is_numpy_array(X) or compat.is_torch_array(X)) and X.shape[0] >= X.shape[1]:
        Q, R, condition = _cholesky_qr(X)
        if condition < CHOLESKY_ONCE:
            return Q, R
        if condition < CHOLESKY_TWICE:
            Q, R_again, _ = _cholesky_qr(Q)
            return Q, R_again @ R
    Q, R = _finite(lambda xp, Y: xp.linalg.qr(Y), X)
    return Q, R


def svd(X: Array, *, full_matrices: bool = False) -> tuple[Array, Array, Array]:
    """Return ``V, s, W^H`` of the singular value decomposition."""
    V, s, Wh = _finite(lambda xp, Y: xp.linalg.svd(Y, full_matrices=full_matrices), X)
    return V, s, Wh


def svdvals(X: Array) -> Array:
    """Return the singular values, non-increasing."""
    return _finite(lambda xp, Y: (xp.linalg.svdvals(Y),), X)[0]


def _finite(decompose: Callable[[Any, Any], tuple[Any, ...]], X: Any) -> tuple[Any, ...]:
    """Return factors, NumPy's where those of torch hold NaN.

    MKL's QR of single-precision complex matrices, which its SVD begins with, divides by zero where columns repeat.
    """
    if not compat.is_torch_array(X):
        return tuple(decompose(namespace(X), X))
    import torch

    try:
        factors = tuple(decompose(torch, X))
        if all(bool(torch.isfinite(F).all()) for F in factors):
            return factors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    return tuple(convert(F, X) for F in decompose(np, to_numpy(X)))


CHOLESKY_ONCE = 1.1
"""Condition number, in the Frobenius norm over its least value, up to which Cholesky is orthogonal to rounding.

Such a `c` for `k` columns leaves the square of the condition number in the 2-norm below about ``k c^2``, by which the
roundoff is multiplied. Measured on processors of two makers: ``||Q^H Q - I||_F`` stays below ``k u``, where Householder
leaves half of that; up to 1.5 it does on one of them alone.
"""
CHOLESKY_TWICE = 100.0
"""Condition number, in the same measure, up to which Cholesky loses at most two digits in ``Q R``."""


def _cholesky_qr(X: Any) -> tuple[Any, Any, float]:
    """Return Q, R and the condition number; infinity, or NaN, where columns are numerically dependent."""
    if compat.is_torch_array(X):
        import torch

        # cholesky would raise where a failure shows in the condition number as well
        L = torch.linalg.cholesky_ex(X.mH @ X)[0]
        eye = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False).mH
        condition = float(torch.linalg.norm(L) * torch.linalg.norm(inverse)) / L.shape[0]
        return X @ inverse, L.mH, condition
    # a nearly singular X may overflow, which shows in the condition number
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            L = np.linalg.cholesky(X.conj().T @ X)
            inverse = np.linalg.inv(L).conj().T
        except np.linalg.LinAlgError:
            return X, X, math.inf
        condition = float(np.linalg.norm(L)) * float(np.linalg.norm(inverse)) / L.shape[0]
        return X @ inverse, L.conj().T, condition


def solve_triangular(T: Array, B: Array) -> Array:
    """Solve `T X = B` for an upper triangular `T`."""
    if compat.is_torch_array(T):
        import torch

        return torch.linalg.solve_triangular(T, B, upper=True)
    if compat.is_jax_array(T):
        import jax.scipy.linalg

        return jax.scipy.linalg.solve_triangular(T, B)
    if compat.is_cupy_array(T):
        import cupyx.scipy.linalg

        return cupyx.scipy.linalg.solve_triangular(T, B)
    return namespace(T).linalg.solve(T, B)


def lu_pivots(X: Array) -> Array:
    """Return the original positions of the first `k` row pivots of LU on an `m x k` matrix.

    The pivot is the entry of largest modulus, and ties go to the lowest row. LAPACK compares ``|Re| + |Im|`` for
    complex numbers, so those take our own elimination; so does NumPy, which has no LU, since SciPy's threads would
    get in the way of NumPy's (see `qr`).
    """
    from cur._elimination import eliminate

    m, k = X.shape
    if not namespace(X).isdtype(X.dtype, "complex floating"):
        if compat.is_torch_array(X) and X.device.type in ("cpu", "cuda"):
            import torch

            # lu_factor refuses singular matrices
            exchanges = torch.linalg.lu_factor_ex(X)[1].to(torch.int64) - 1
            return convert(_exchange(to_numpy(exchanges), m, k), X)
        if compat.is_jax_array(X):
            import jax.lax.linalg

            return jax.lax.linalg.lu(X)[2][:k]
        if compat.is_cupy_array(X):
            import cupyx.scipy.linalg

            return convert(_exchange(to_numpy(cupyx.scipy.linalg.lu_factor(X)[1]), m, k), X)
    # elimination walks along columns: half the time where they are contiguous
    return eliminate(np.asfortranarray(X) if compat.is_numpy_array(X) else X)


def _exchange(exchanges: np.ndarray[Any, Any], m: int, k: int) -> np.ndarray[Any, Any]:
    """Turn LAPACK's successive row exchanges into the positions of the first `k` rows."""
    order = np.arange(m)
    for i, j in enumerate(exchanges[:k]):
        order[i], order[j] = order[j], order[i]
    return order[:k]
