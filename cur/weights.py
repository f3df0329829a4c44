"""Weights of rows and columns, which turn "close to A" into "close where it matters".

A weight of the rows `H` and of the columns `G` are positive semidefinite matrices; the weighted error of an
approximation `B` of `A` is ``||H^(1/2) (A - B) G^(1/2)||_F``. A vector stands for a diagonal matrix. With
``G = E[x x^T]`` of the inputs `x` of a linear layer, the weighted error is the root mean square change of its output.
What only says which rows and columns to choose, and changes no error, is an importance: see :mod:`cur.scores`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cur._lib import array as _array
from cur._lib import linalg, promotion
from cur._lib.array import Array, adjoint, namespace
from cur._lib.host import through_numpy
from cur._lib.products import frobenius, largest, scale, transform
from cur._lib.scale import times_power
from cur._lib.validate import check_companion, check_dense

__all__ = ["Weight", "diagonal", "factor", "matrix"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A positive semidefinite weight, ready to be applied.

    Attributes
    ----------
    size : int
        Number of rows or columns that it weighs.
    root : array or None
        Diagonal weights: the square roots of the entries, shape (size,). None otherwise.
    vectors : array or None
        Matrix weights: orthonormal eigenvectors, shape (size, size). None otherwise.
    roots : array or None
        Matrix weights: square roots of the eigenvalues after damping, all positive, shape (size,).
    """

    size: int
    root: Array | None = None
    vectors: Array = None
    roots: Array = None

    def apply(self, A: Array, axis: int) -> Array:
        """Return ``F^H A`` (axis 0) or ``A F`` (axis 1), where ``F F^H`` is the weight.

        Parameters
        ----------
        A : matrix, shape (m, n)
            The matrix, in any form; the result has the same, or is an operator for a sparse matrix and a matrix of
            weights.
        axis : int
            The side that is weighed: 0 for the rows, 1 for the columns.
        """
        if self.root is not None:
            return scale(A, self.root, axis)
        return transform(A, self.vectors * self.roots[None, :], axis)

    def adjoint_apply(self, X: Array) -> Array:
        """Return ``F X``, where ``F F^H`` is the weight.

        Parameters
        ----------
        X : array, shape (size, k)
            The vectors, as columns.
        """
        if self.root is not None:
            return scale(X, self.root, 0)
        return (self.vectors * self.roots[None, :]) @ X

    def candidates(self, basis: Array) -> Array:
        """Carry an orthonormal basis in weighted coordinates over to the rows or columns one can choose.

        The bound (B1) of the weighted problem has ``eta = ||L (basis^H L)^-1||`` with ``L = F^-1[:, indices]``. It is
        small when the rows of ``F^-H basis``, each divided by the norm of its column of ``F^-1``, are well conditioned;
        those are returned. For a diagonal weight they are the rows of the basis itself.

        Parameters
        ----------
        basis : array, shape (size, k)
            The basis of a leading singular subspace of the weighted matrix, orthonormal.

        Returns
        -------
        array, shape (size, k)
            What a selector is handed in the place of the basis.
        """
        if self.root is not None:
            return basis
        xp = namespace(basis)
        inverse = self.vectors / self.roots[None, :]
        lengths = xp.sqrt(xp.sum(xp.abs(inverse) ** 2, axis=1))
        return inverse @ basis / lengths[:, None]

    def interpolate(self, basis: Array, indices: Array) -> Array:
        """Return the matrix whose smallest singular value is ``1 / eta`` of the weighted problem.

        Parameters
        ----------
        basis : array, shape (size, k)
            The basis of a leading singular subspace of the weighted matrix, orthonormal.
        indices : array of int, shape (r,)
            The positions that were chosen.
        """
        if self.root is not None:
            return _array.take(basis, indices, axis=0)
        inverse = _array.take(self.vectors, indices, axis=0) / self.roots[None, :]
        Q, _ = linalg.qr(adjoint(inverse))
        return adjoint(Q) @ basis


@through_numpy
def diagonal(weights: Array, /, *, name: str = "weights") -> Weight:
    """Make a weight from the diagonal of `H` or `G`.

    Parameters
    ----------
    weights : array, shape (n,)
        The diagonal, non-negative and finite. WANDA's weight is the squared norm of each input feature.
    name : str, default "weights"
        What errors call the argument.

    Returns
    -------
    Weight
        The weight, as `cur.cur` takes it for `row_weights` and `column_weights`.

    Raises
    ------
    TypeError, ValueError
        If an entry is complex, negative or not finite, or the array is not one-dimensional.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import weights
    >>> weights.diagonal(np.array([4.0, 9.0])).root.tolist()
    [2.0, 3.0]
    """
    weights, xp = floating(weights, name)
    if weights.ndim != 1:
        raise ValueError(
            f"`{name}` must be a vector; got shape {tuple(weights.shape)}; use `cur.weights.matrix` for a matrix"
        )
    if xp.isdtype(weights.dtype, "complex floating"):
        raise TypeError(f"`{name}` must be real, as a diagonal; got dtype {weights.dtype}; pass squares or magnitudes")
    if not bool(xp.all(xp.isfinite(weights))):
        raise ValueError(f"`{name}` must be finite; it holds NaN or inf; replace or drop these entries first")
    smallest = float(xp.min(weights))
    if smallest < 0:
        raise ValueError(
            f"`{name}` must be non-negative; its smallest entry is {smallest:.3g}; pass squares or magnitudes"
        )
    return Weight(size=weights.shape[0], root=xp.sqrt(weights))


@through_numpy
def matrix(weights: Array, /, *, damping: float = 0.0, name: str = "weights") -> Weight:
    """Make a weight from a positive semidefinite matrix, singular ones included.

    Parameters
    ----------
    weights : array, shape (n, n)
        The weight, real symmetric or complex Hermitian.
    damping : float, default 0
        The multiple of the mean eigenvalue that is added to all eigenvalues. At least the rounding level ``n
        u`` of the largest eigenvalue is always added, which makes the weight invertible; the weighted norm only
        grows by that, and with it the certificate.
    name : str, default "weights"
        What errors call the argument.

    Returns
    -------
    Weight
        The weight, as `cur.cur` takes it for `row_weights` and `column_weights`.

    Raises
    ------
    ValueError
        If the matrix is not square, not finite, not Hermitian, or has an eigenvalue that is negative beyond rounding.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import weights
    >>> weight = weights.matrix(np.diag([4.0, 9.0]))
    >>> weight.roots.round(6).tolist()
    [2.0, 3.0]
    """
    weights, xp = floating(weights, name)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(
            f"`{name}` must be a square matrix; got shape {tuple(weights.shape)}; "
            "use `cur.weights.factor` for a factor of one"
        )
    if not bool(xp.all(xp.isfinite(weights))):
        raise ValueError(f"`{name}` must be finite; it holds NaN or inf; replace or drop these entries first")
    u = _array.unit_roundoff(weights.dtype, weights)
    n = weights.shape[0]
    asymmetry = float(xp.linalg.matrix_norm(weights - adjoint(weights)))
    if asymmetry > 100 * n * u * float(xp.linalg.matrix_norm(weights)):
        raise ValueError(
            f"`{name}` must be symmetric (Hermitian); it differs from its transpose by {asymmetry:.3g}; "
            "symmetrise it first"
        )
    values, vectors = xp.linalg.eigh((weights + adjoint(weights)) / 2)
    smallest, largest = float(values[0]), float(values[-1])
    if smallest < -100 * n * u * max(largest, 0.0) or largest < 0:
        raise ValueError(
            f"`{name}` must have no negative eigenvalue; its smallest is {smallest:.3g} beside {largest:.3g}; "
            "pass a matrix of second moments or another positive semidefinite one"
        )
    return _damped(xp.where(values > 0, values, xp.zeros_like(values)), vectors, damping)


@through_numpy
def factor(weights: Array, /, *, damping: float = 0.0, name: str = "weights") -> Weight:
    """Make a weight ``F F^H`` from its factor, more accurately than from the product.

    Parameters
    ----------
    weights : array, shape (n, p)
        The factor `F`; for second moments, the inputs as columns divided by the square root of their number.
    damping : float, default 0
        The multiple of the mean eigenvalue that is added to all eigenvalues, as for `matrix`.
    name : str, default "weights"
        What errors call the argument.

    Returns
    -------
    Weight
        The weight, as `cur.cur` takes it for `row_weights` and `column_weights`.

    Raises
    ------
    TypeError, ValueError
        If the factor is no finite matrix, or `damping` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import weights
    >>> weight = weights.factor(np.diag([2.0, 3.0]))
    >>> sorted(weight.roots.round(6).tolist())
    [2.0, 3.0]
    """
    weights, xp = floating(weights, name)
    if weights.ndim != 2:
        raise ValueError(f"`{name}` must be a matrix with one row per weighted index; got shape {tuple(weights.shape)}")
    if not bool(xp.all(xp.isfinite(weights))):
        raise ValueError(f"`{name}` must be finite; it holds NaN or inf; replace or drop these entries first")
    n = weights.shape[0]
    if weights.shape[1] > n:  # only the range matters
        weights = adjoint(linalg.qr(adjoint(weights))[1])
    vectors, s, _ = linalg.svd(weights, full_matrices=True)
    values = xp.concat([s**2, xp.zeros((n - s.shape[0],), dtype=s.dtype, device=_array.take_device(s))])
    return _damped(values, vectors, damping)


def floating(weights: Any, name: str) -> tuple[Array, Any]:
    """Return a plain array in the precision to compute in, and its namespace."""
    if not _array.is_dense(weights):
        remedy = "convert it with numpy.asarray" if isinstance(weights, (list, tuple)) else "convert it to an array"
        raise TypeError(
            f"`{name}` must be an array (vector, positive semidefinite matrix) or a `cur.weights.Weight`; "
            f"got {type(weights).__name__}; {remedy}"
        )
    check_dense(weights, name, (1, 2), "a vector or a square matrix")
    return promotion.promote(weights), namespace(weights)


def _damped(values: Array, vectors: Array, damping: float) -> Weight:
    xp = namespace(values)
    if not damping >= 0:
        raise ValueError(f"`damping` must be non-negative; got {damping!r}")
    n = values.shape[0]
    u = _array.unit_roundoff(values.dtype, values)
    largest = float(xp.max(values))
    added = damping * float(xp.mean(values)) + n * u * largest
    if largest == 0.0:
        added = 1.0  # the zero weight: every choice is as good, and any invertible matrix stands for it
    return Weight(size=n, vectors=vectors, roots=xp.sqrt(values + added))


def unit_weight(weights: Any, A: Array, axis: int, dtype: Any) -> tuple[Weight | None, int]:
    """Return a weight whose factor has norm one, nearly, and the power of two by which the one given is larger.

    Scaled before it is brought to `dtype`: in the range of that, small weights of large matrices would vanish.
    """
    name = ("row_weights", "column_weights")[axis]
    if weights is None:
        return None, 0
    exponent = 0
    if isinstance(weights, Weight):
        weight = weights
    else:
        weights, _ = floating(weights, name)
        check_companion(weights, A, name)
        weights = namespace(weights).astype(weights, _wider(weights.dtype, dtype, weights))
        if weights.ndim == 1:
            weight = diagonal(weights, name=name)
        else:
            # an even power, whose root is a power of two; in the precision of A, whose rounding is the least that
            # eigenvalues are damped by
            exponent = size_of(weights) // 2
            weight = matrix(in_dtype(times_power(weights, -2 * exponent), dtype, name), name=name)
    for part in ("root", "vectors", "roots"):
        if getattr(weight, part) is not None:
            check_companion(getattr(weight, part), A, name)
    if weight.size != A.shape[axis]:
        raise ValueError(
            f"`{name}` must have one weight per {'row' if axis == 0 else 'column'} of `A`, {A.shape[axis]}; "
            f"got {weight.size}"
        )
    more = size_of(weight.roots if weight.root is None else weight.root)
    weight = _times(weight, -more)
    if weight.root is not None:
        real = _array.real_dtype(dtype, A)
        return replace(weight, root=_lifted(weight.root, real)), exponent + more
    vectors, roots = in_dtype(weight.vectors, dtype, name), weight.roots
    xp = namespace(roots)
    if vectors.dtype != weight.vectors.dtype:  # raised above what rounding the vectors does to the small ones
        roots = xp.sqrt(roots**2 + 4 * weight.size * _array.unit_roundoff(dtype, A) * xp.max(roots) ** 2)
    roots = xp.astype(roots, _array.real_dtype(dtype, A))
    return replace(weight, vectors=vectors, roots=roots), exponent + more


def unit_matrix(weights: Any, A: Array, axis: int, dtype: Any) -> tuple[Array, int]:
    """Return a full weight near one, which is checked but not factored, and an exponent.

    The one given is larger by 2 to twice that exponent.
    """
    name = ("row_weights", "column_weights")[axis]
    weights, _ = floating(weights, name)
    check_companion(weights, A, name)
    n = A.shape[axis]
    if tuple(weights.shape) != (n, n):
        raise ValueError(
            f"`{name}` must have one weight per {'row' if axis == 0 else 'column'} of `A`, shape ({n}, {n}); "
            f"got shape {tuple(weights.shape)}"
        )
    exponent = size_of(weights) // 2
    weights = in_dtype(times_power(weights, -2 * exponent), dtype, name)
    size, asymmetry = frobenius(weights), frobenius(weights - adjoint(weights))
    if not math.isfinite(size):
        raise ValueError(f"`{name}` must be finite; it holds NaN or inf; replace or drop these entries first")
    if asymmetry > 100 * n * _array.unit_roundoff(dtype, A) * size:
        raise ValueError(
            f"`{name}` must be symmetric (Hermitian); it differs from its transpose by {asymmetry:.3g}; "
            "symmetrise it first"
        )
    return weights, exponent


def _lifted(root: Array, dtype: Any) -> Array:
    """Return roots in `dtype`, those below its normal numbers as the smallest of these: weights do not vanish."""
    xp = namespace(root)
    rounded = xp.astype(root, dtype)
    least = xp.full_like(rounded, float(xp.finfo(dtype).smallest_normal))
    return xp.where((root > 0) & (rounded < least), least, rounded)


def _wider(own: Any, dtype: Any, like: Array) -> Any:
    """Return the dtype of a weight, or the real one of the matrix where that is more precise."""
    real = _array.real_dtype(dtype, like)
    return real if _array.unit_roundoff(real, like) < _array.unit_roundoff(own, like) else own


def size_of(X: Array) -> int:
    """Return the exponent of the largest entry; 0 where there is none, or none that is finite."""
    peak = largest(X)
    return math.frexp(peak)[1] if 0.0 < peak < math.inf else 0


def _times(weight: Weight, exponent: int) -> Weight:
    """Return a weight whose factor is ``2^exponent`` times that of another."""
    name = "roots" if weight.root is None else "root"
    return replace(weight, **{name: times_power(getattr(weight, name), exponent)})


def in_dtype(X: Array, dtype: Any, name: str) -> Array:
    xp = namespace(X)
    if xp.isdtype(X.dtype, "complex floating") and not xp.isdtype(dtype, "complex floating"):
        raise TypeError(f"`{name}` must be real for a real `A`; got dtype {X.dtype}; convert `A` to complex")
    if X.dtype == dtype:
        return X
    with np.errstate(over="ignore"):
        Y = xp.astype(X, dtype)
    if not bool(xp.all(xp.isfinite(Y))) and bool(xp.all(xp.isfinite(X))):
        raise ValueError(
            f"`{name}` has entries beyond the range of {Y.dtype}, in which `A` is computed; divide it by its largest "
            "entry, or convert `A` to double precision"
        )
    return Y
