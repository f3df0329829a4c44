"""What all factorizations share: they behave as the matrix that they stand for, and know it as thin factors only."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, ClassVar, Literal

import array_api_compat as compat
import numpy as np
import scipy.sparse.linalg

from cur._lib import array as _array
from cur._lib import promotion
from cur._lib.array import Array, adjoint, convert, is_dask, is_sparse, namespace, take, to_numpy
from cur._lib.atomic import replace_file
from cur._lib.indexing import positions
from cur._lib.linalg import qr, svdvals
from cur._lib.products import frobenius, thin
from cur._lib.validate import check_choice

__all__ = ["Factorization"]


class Factorization:
    """A chain of thin matrices whose product approximates a matrix."""

    ndim = 2
    _numbers: ClassVar[tuple[str, ...]] = ()
    """The attributes that hold numbers of the matrix, as against positions in it."""

    @property
    def factors(self) -> tuple[Array, ...]:
        """The matrices whose product is the approximation, left to right."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the approximation."""
        return (int(self.factors[0].shape[0]), int(self.factors[-1].shape[1]))

    @property
    def dtype(self) -> Any:
        """Dtype of the factors."""
        return self.factors[0].dtype

    @property
    def T(self) -> Factorization:
        """The transposed factorization."""
        raise NotImplementedError

    def conj(self) -> Any:
        """Return the factorization of the conjugate matrix."""
        return replace(self, **{name: adjoint(getattr(self, name)).T for name in self._numbers})  # type: ignore[type-var]

    @property
    def H(self) -> Any:
        """The factorization of the conjugate transpose."""
        return self.conj().T

    @property
    def parameters(self) -> int:
        """How many numbers are stored."""
        return sum(f.nnz if is_sparse(f) else int(np.prod(f.shape)) for f in self._stored())

    @property
    def nbytes(self) -> int:
        """Bytes of these numbers; for sparse factors, of their non-zero entries."""
        return sum(
            f.nnz * f.dtype.itemsize if is_sparse(f) else int(np.prod(f.shape)) * _itemsize(f) for f in self._stored()
        )

    def _stored(self) -> tuple[Array, ...]:
        return self.factors

    def _labels(self) -> dict[str, Any]:
        return {}

    def __matmul__(self, x: Array) -> Array:
        """Return ``approximation @ x`` for a vector or matrix, by products with thin matrices only."""
        for f in reversed(self.factors):
            x = f @ x
        return x

    def __rmatmul__(self, x: Array) -> Array:
        """Return ``x @ approximation``."""
        for f in self.factors:
            x = x @ f
        return x

    # NumPy must leave `array @ factorization` to us
    __array_ufunc__ = None

    def toarray(self) -> Array:
        """Return the m x n approximation as one array."""
        first, *rest = self.factors
        for f in rest:
            first = first @ f
        return first.toarray() if is_sparse(first) else first

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return the product as a NumPy array, so that NumPy's functions see the matrix and not its factors."""
        if copy is False:
            raise ValueError("`copy` must not be False: the product of the factors is a new array; use numpy.asarray")
        product = to_numpy(self.toarray())
        return product if dtype is None else product.astype(dtype, copy=False)

    def __add__(self, other: Any) -> Array:
        """Return ``approximation + other``, m x n numbers."""
        return self.toarray() + _full(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Array:
        """Return ``approximation - other``, m x n numbers."""
        return self.toarray() - _full(other)

    def __rsub__(self, other: Any) -> Array:
        """Return ``other - approximation``, the error where `other` is the matrix."""
        return _full(other) - self.toarray()

    def norm(self, ord: Literal["fro", 2] = "fro") -> float:
        """Return the Frobenius norm or the 2-norm of the approximation, from its factors by QR.

        Parameters
        ----------
        ord : {"fro", 2}, default "fro"
            The norm: ``"fro"`` for that of Frobenius, 2 for the largest singular value.

        Raises
        ------
        ValueError
            If `ord` is another one.
        """
        check_choice(ord, ("fro", 2), "ord")
        first, *middle, last = (promotion.promote(thin(f)) for f in self.factors)
        M = qr(first)[1]
        for f in middle:
            M = M @ f
        M = M @ adjoint(qr(adjoint(last))[1])
        largest = float(namespace(M).max(namespace(M).abs(M)))
        if largest == 0.0:
            return 0.0
        M = M / largest  # at any scale
        return largest * (frobenius(M) if ord == "fro" else float(svdvals(M)[0]))

    def astype(self, dtype: Any) -> Any:
        """Return the factorization in another floating dtype, without a certificate: that spoke of other numbers.

        Parameters
        ----------
        dtype : dtype or str
            The floating dtype, of the library of the factors, such as ``torch.float16``, or the name of one.

        Raises
        ------
        TypeError
            If the dtype is not floating, or real for a complex matrix.
        """
        first = self.factors[-1]
        xp = namespace(first) if _array.is_dense(first) else np
        wanted = np.dtype(dtype) if xp is np or isinstance(first, np.ndarray) else getattr(xp, str(dtype), dtype)
        is_complex = "complex" in str(wanted)
        if not (is_complex or ("float" in str(wanted) and "complex" not in str(self.dtype))):
            raise TypeError(
                f"`dtype` must be floating, and complex for a complex matrix; got {dtype!r} for {self.dtype}; "
                "convert toarray() for anything else"
            )
        if wanted == self.dtype:
            return self
        made: dict[str, Any] = {}
        for part in self._numbers:
            f = getattr(self, part)
            made[part] = f.astype(wanted) if is_sparse(f) or is_dask(f) else namespace(f).astype(f, wanted)
        return replace(self, **made, **({"certificate": None} if hasattr(self, "certificate") else {}))  # type: ignore[type-var]

    def to(self, device: Any) -> Any:
        """Return the factorization on another device of its library; NumPy, SciPy and Dask know the ``"cpu"`` only.

        Parameters
        ----------
        device : str or device
            The device, as the library of the factors names it.

        Raises
        ------
        TypeError
            If a dtype is given, which is for `astype`.
        ValueError
            If factors of NumPy, SciPy or Dask are to leave the host.
        """
        if "dtype" in type(device).__name__.lower() or isinstance(device, type):
            raise TypeError(f"`device` must be a device; got {device!r}; use astype for a dtype")
        arrays = {name: value for name, value in vars(self).items() if _is_array(value)}
        if any(is_sparse(x) or is_dask(x) or isinstance(x, np.ndarray) for x in arrays.values()):
            if str(device) != "cpu":
                raise ValueError(
                    f"`device` must be 'cpu' for factors of NumPy, SciPy or Dask; got {device!r}; build a new "
                    f"{type(self).__name__} from arrays of another library, such as torch.as_tensor makes"
                )
            return self
        moved = {name: compat.to_device(x, device) for name, x in arrays.items()}
        return replace(self, **moved)  # type: ignore[type-var]

    def __getitem__(self, key: Any) -> Array:
        """Return entries, rows, columns or a block as NumPy would, computed from the factors.

        ``result[[1, 2], [3, 4]]`` are two entries; ``result[numpy.ix_([1, 2], [3, 4])]`` is a block.
        """
        rows, columns, crossed, shape = positions(key, self.shape)
        first, *middle, last = self.factors
        x = thin(take(first, convert(rows, first), axis=0))
        for f in middle:
            x = x @ f
        y = thin(take(last, convert(columns, last), axis=1))
        xp = namespace(x)
        return xp.reshape(x @ y if crossed else xp.sum(x * y.T, axis=1), shape)

    def aslinearoperator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return SciPy's operator for the approximation, for its iterative solvers. NumPy and SciPy factors only.

        Raises
        ------
        TypeError
            If a factor is neither NumPy's nor SciPy's.
        """
        if not all(isinstance(f, np.ndarray) or is_sparse(f) for f in self.factors):
            raise TypeError("a LinearOperator needs NumPy or SciPy factors; move the factors to the host first")
        chain = [scipy.sparse.linalg.aslinearoperator(f) for f in self.factors]
        product: scipy.sparse.linalg.LinearOperator = chain[0]
        for operator in chain[1:]:
            product = product @ operator
        return product

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the factorization as ``.npz``; beside the target first, then renamed.

        Parameters
        ----------
        path : path
            The file to write; one that is there is replaced when all is written.
        """
        arrays: dict[str, Any] = {name: to_numpy(value) for name, value in vars(self).items() if _is_array(value)}
        with replace_file(path) as stream:
            np.savez(stream, kind=np.asarray(type(self).__name__), **arrays, **self._labels())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Read a factorization written by `save`, as NumPy arrays; nothing is unpickled.

        The certificate is not stored: it speaks of a matrix that is not in the file.

        Parameters
        ----------
        path : path
            The file that `save` wrote.

        Returns
        -------
        CUR, Folded or Interpolative
            The factorization, of the kind that was saved.

        Raises
        ------
        ValueError
            If the file was not written by `save`, or holds another kind than the class that it is loaded by.
        OSError
            If there is no such file.
        """
        with np.load(path, allow_pickle=False) as data:
            kind = str(data["kind"]) if "kind" in data else None
            types = {t.__name__: t for t in Factorization.__subclasses__()}
            if kind not in types:
                raise ValueError(f"`path` must be a file written by `save`; {os.fspath(path)!r} is not")
            if not issubclass(types[kind], cls):
                raise ValueError(f"`path` holds a factorization of kind {kind}; load it with {kind}.load")
            return types[kind](**{name: data[name] for name in data.files if name != "kind"})


def _is_array(value: Any) -> bool:
    return is_sparse(value) or is_dask(value) or _array.is_dense(value)


def _itemsize(x: Array) -> int:
    return int(getattr(x.dtype, "itemsize", 0)) or to_numpy(x[:1, :1]).dtype.itemsize


def _full(other: Any) -> Any:
    """Return a dense array from what can be added to one."""
    return other.toarray() if isinstance(other, Factorization) or is_sparse(other) else other
