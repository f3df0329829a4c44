"""The array libraries that the core is tested on, and how a NumPy matrix gets into and out of each."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from cur._lib import array as _array

REQUIRED = ("torch", "jax", "array_api_strict", "dask.array", "distributed")
"""Every environment that tests must have these; CuPy needs a CUDA device and is skipped where there is none."""


@dataclass(frozen=True)
class Backend:
    """How to make a matrix of one library.

    Attributes
    ----------
    name : str
    asarray : callable
        Turn a NumPy array into the matrix under test.
    companion : callable
        Turn a NumPy array into what goes with it: vectors, weights, bases.
    precise : bool
        Whether double precision is kept.
    """

    name: str
    asarray: Callable[[np.ndarray], Any]
    companion: Callable[[np.ndarray], Any]
    precise: bool = True

    @property
    def is_dense(self) -> bool:
        return self.name not in ("dask", "sparse", "operator")

    def dtype(self, dtype: str) -> str:
        """The dtype in which this backend holds `dtype`."""
        return dtype if self.precise else {"float64": "float32", "complex128": "complex64"}.get(dtype, dtype)


def to_numpy(X: Any) -> np.ndarray:
    return _array.to_numpy(X)


def _numpy(A: np.ndarray) -> np.ndarray:
    return np.array(A)


def _torch(A: np.ndarray) -> Any:
    return importlib.import_module("torch").tensor(np.ascontiguousarray(A))


def _jax(A: np.ndarray) -> Any:
    jax = importlib.import_module("jax")
    # small matrices: compiling takes all the time
    jax.config.update("jax_disable_most_optimizations", True)
    if not jax.config.jax_enable_x64:  # asking for doubles without x64 warns
        A = A.astype({"d": "f", "D": "F", "l": "i"}.get(A.dtype.char, A.dtype))
    return jax.numpy.asarray(A)


def _strict(A: np.ndarray) -> Any:
    xp = importlib.import_module("array_api_strict")
    # not the default device: an array made without naming the device of its neighbours fails here as on a GPU
    return xp.asarray(np.array(A), device=xp.Device("device1"))


def _dask(A: np.ndarray) -> Any:
    chunks = tuple(max(1, -(-side // 3)) for side in A.shape)
    return importlib.import_module("dask.array").from_array(np.array(A), chunks=chunks)


def _cupy(A: np.ndarray) -> Any:
    return importlib.import_module("cupy").asarray(A)


BACKENDS = {
    b.name: b
    for b in (
        Backend("numpy", _numpy, _numpy),
        Backend("torch", _torch, _torch),
        Backend("jax", _jax, _jax, precise=False),
        Backend("jax-x64", _jax, _jax),
        Backend("array-api-strict", _strict, _strict),
        Backend("dask", _dask, _numpy),
        Backend("sparse", scipy.sparse.csr_array, _numpy),
        Backend("operator", scipy.sparse.linalg.aslinearoperator, _numpy),
        Backend("cupy", _cupy, _cupy),
    )
}


@contextlib.contextmanager
def use(name: str) -> Iterator[Backend]:
    """Enter what the backend needs, or skip the test with the reason why it cannot run."""
    backend = BACKENDS[name]
    if name == "cupy":
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed; it needs a CUDA device")
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:
            pytest.skip("there is no CUDA device")
    elif name == "jax-x64":
        with importlib.import_module("jax").enable_x64(True):
            yield backend
        return
    yield backend
