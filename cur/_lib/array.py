"""The only file that knows array libraries.

Everything else is written against the Python array API standard, through the namespace that `namespace` returns. What
the standard lacks is supplied here: the native routine where the library has one, a formula in terms of the
standard where it has none.
"""

from __future__ import annotations

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
