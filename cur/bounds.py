"""Bounds on the error of a CUR factorization, and the certificate that carries them.

The theorems (letters as in the documentation's page on the mathematics):

- (S) Sorensen and Embree, SIAM J. Sci. Comput. 38 (2016): exact leading singular vectors, optimal core.
- (B1) any orthonormal bases, optimal core, 2-norm and Frobenius norm.
- (B2) cross core with rows chosen so that ``gamma`` is finite.
- (B4) a Gaussian sketch drawn after the choice, by Chernoff's bound; the proof is on the page on the mathematics.
- (B5) rounding of the evaluation itself, added to every value.
- (B6) the 2-norm from products with random starts (after Hochstenbach, J. Sci. Comput. 57, 2013).
- (L) the output of a layer behind a Lipschitz activation (arXiv 2501.04211, Theorem 4.1).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cur._lib.array import Array
from cur._lib.host import through_numpy
from cur._lib.linalg import svdvals
from cur._lib.products import frobenius
from cur._lib.promotion import promote
from cur._lib.validate import check_dense, check_finite_norm

__all__ = [
    "LIPSCHITZ",
    "Certificate",
    "cross_bound",
    "eta",
    "layer_output_bound",
    "projection_bound",
    "sketch_factor",
    "sketch_shrinkage",
    "sketch_size",
    "sorensen_embree",
]


@dataclass(frozen=True)
class Certificate:
    """A statement about the error of a factorization.

    Attributes
    ----------
    norm : "fro" or 2
        The norm of the error that `value` bounds. With weights, the norm of the weighted error.
    value : float
        ``||A - C U R|| <= value``, rounding included.
    kind : "exact", "bound" or "probabilistic"
        ``"exact"``: the error itself, computed, plus a bound on the rounding of that computation. ``"bound"``: a
        theorem.
        ``"probabilistic"``: a theorem that fails with at most `failure_probability`.
    failure_probability : float
        0 unless `kind` is ``"probabilistic"``.
    dtype : str
        Arithmetic in which the factors and the value were computed.
    scale : float
        The norm of the (weighted) matrix in `norm`, or a lower bound on it, so that `relative` errs on the safe side.
    rounding : float
        The part of `value` that accounts for rounding (B5).
    eta_rows, eta_columns : float or None
        ``1 / smin(V[rows, :])`` and ``1 / smin(W[columns, :])``: what the choice of indices costs beyond the bases.
    gamma : float or None
        ``1 / smin(Q_C[rows, :])``, for the cross core; of the indices as they were chosen, also when it is transposed.
    sigma_next : float or None
        The first singular value left out, where singular values were computed exactly.
    sorensen_embree : float or None
        (S), a bound in the 2-norm, where it applies.
    projection : float or None
        (B1), a bound in `norm`, where it applies.
    cross : float or None
        (B2), a bound in `norm`, where it applies.
    ratio : float or None
        `relative`, as it was known before both norms were brought to a size that may be beyond the range of a double.
    """

    norm: Literal["fro", 2]
    value: float
    kind: Literal["exact", "bound", "probabilistic"]
    failure_probability: float
    dtype: str
    scale: float
    rounding: float = 0.0
    eta_rows: float | None = None
    eta_columns: float | None = None
    gamma: float | None = None
    sigma_next: float | None = None
    sorensen_embree: float | None = None
    projection: float | None = None
    cross: float | None = None
    ratio: float | None = field(default=None, repr=False, compare=False)

    @property
    def relative(self) -> float:
        """The value over the norm of the matrix; 0 for the zero matrix approximated exactly."""
        if self.ratio is not None and not (0 < self.value < math.inf and 0 < self.scale < math.inf):
            return self.ratio
        if self.scale > 0:
            return self.value / min(self.scale, sys.float_info.max)  # the norm itself may be beyond the range
        return 0.0 if self.value == 0 else math.inf

    def transposed(self) -> Certificate:
        """Return the certificate of the transposed factorization: rows and columns change places."""
        return replace(self, eta_rows=self.eta_columns, eta_columns=self.eta_rows)

    def scaled(self, factor: float) -> Certificate:
        """Return the certificate of the same factorization of the matrix times `factor`, a power of two.

        Parameters
        ----------
        factor : float
            The power of two, positive; another factor would round the values.
        """
        names = ("value", "scale", "rounding", "sigma_next", "sorensen_embree", "projection", "cross")
        values: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name) * factor for name in names
        }
        return replace(self, **values)

    def shifted(self, exponent: int) -> Certificate:
        """Return the certificate of the same factorization of the matrix times ``2^exponent``, whatever its size.

        Parameters
        ----------
        exponent : int
            The exponent, which may be beyond those of a double: values that leave the range become 0 or infinite, and
            `relative` stays.
        """
        if exponent == 0:
            return self
        step = max(-1000, min(exponent, 1000))
        return replace(self.scaled(2.0**step), ratio=self.relative).shifted(exponent - step)

    def __str__(self) -> str:
        norm = "Frobenius norm" if self.norm == "fro" else "2-norm"
        how = {
            "exact": "computed from the factors, rounding included",
            "bound": "by theorem, rounding included",
            "probabilistic": f"except with probability {self.failure_probability:.1e}",
        }[self.kind]
        return (
            f"The error in the {norm} is at most {self.value:.4g}, {self.relative:.3g} of the norm of the matrix "
            f"({how}; {self.dtype})."
        )


@through_numpy
def eta(chosen: Array, /) -> float:
    """Return ``1 / smin(chosen)`` for the chosen rows of an orthonormal basis, shape (r, k) with r >= k.

    The norm of the oblique projector that interpolates at these rows; infinite if they do not determine the basis.

    Parameters
    ----------
    chosen : array, shape (r, k)
        The chosen rows of an orthonormal basis.

    Returns
    -------
    float
        The norm, at least 1.

    Raises
    ------
    TypeError, ValueError
        If the rows are no finite array.

    Examples
    --------
    >>> import numpy as np
    >>> from cur import bounds
    >>> bounds.eta(np.eye(4)[:2, :2])
    1.0
    >>> bounds.eta(np.zeros((2, 2)))
    inf
    """
    check_dense(chosen, "chosen")
    if chosen.shape[0] < chosen.shape[1]:
        return math.inf
    chosen = promote(chosen)
    try:
        smallest = float(svdvals(chosen)[-1])
    except np.linalg.LinAlgError:
        smallest = math.nan
    if math.isnan(smallest):
        check_finite_norm(frobenius(chosen), chosen, "chosen")
    return 1.0 / smallest if smallest > 0 else math.inf


def sorensen_embree(eta_rows: float, eta_columns: float, sigma_next: float, /) -> float:
    """Return (S), ``||A - CUR||_2 <= (eta_rows + eta_columns) sigma_{k+1}``.

    Holds for DEIM or any other choice of rows and columns with finite eta from exact leading singular vectors, and the
    optimal core.

    Parameters
    ----------
    eta_rows, eta_columns : float
        The `eta` of the chosen rows and columns.
    sigma_next : float
        The singular value after the last one that is kept, or an upper bound on it.

    Returns
    -------
    float
        The bound, in the 2-norm.

    Examples
    --------
    >>> from cur import bounds
    >>> bounds.sorensen_embree(2.0, 3.0, 0.1)
    0.5
    """
    return (eta_rows + eta_columns) * sigma_next if sigma_next > 0 else 0.0


def projection_bound(eta_rows: float, eta_columns: float, row_residual: float, column_residual: float, /) -> float:
    """Return (B1), ``sqrt(eta_columns^2 ||A - A W W^H||^2 + eta_rows^2 ||A - V V^H A||^2)``.

    Holds for any orthonormal V and W and the optimal core, in the norm (2 or Frobenius) of the two residuals.

    Parameters
    ----------
    eta_rows, eta_columns : float
        ``1 / smin(V[rows, :])`` and ``1 / smin(W[columns, :])``.
    row_residual : float
        ``||A - A W W^H||``, or an upper bound on it: what the basis of the row space leaves.
    column_residual : float
        ``||A - V V^H A||``, or an upper bound on it: what the basis of the column space leaves.

    Returns
    -------
    float
        The bound, in the norm of the residuals.

    Examples
    --------
    >>> from cur import bounds
    >>> bounds.projection_bound(1.0, 1.0, 3.0, 4.0)
    5.0
    """
    first = eta_columns * row_residual if row_residual > 0 else 0.0
    second = eta_rows * column_residual if column_residual > 0 else 0.0
    return math.hypot(first, second)


def cross_bound(gamma: float, column_error: float, /) -> float:
    """Return (B2), ``||A - C U R|| <= gamma ||(I - C C^+) A||``, for the cross core and rows >= columns.

    Parameters
    ----------
    gamma : float
        ``1 / smin(Q[rows, :])`` for an orthonormal basis `Q` of the chosen columns.
    column_error : float
        The norm ``||(I - C C^+) A||``, or an upper bound on it.

    Returns
    -------
    float
        The bound, in the norm of the error.

    Examples
    --------
    >>> from cur import bounds
    >>> bounds.cross_bound(2.0, 0.25)
    0.5
    """
    return gamma * column_error if column_error > 0 else 0.0


def sketch_size(failure_probability: float, inflation: float = 1.25, /) -> int:
    """Return how many Gaussian rows make `sketch_factor` at most `inflation`.

    Parameters
    ----------
    failure_probability : float
        The chance that the bound fails, between 0 and 1.
    inflation : float, default 1.25
        How much larger than the norm the bound may be, above 1.

    Returns
    -------
    int
        The number of rows.

    Examples
    --------
    >>> from cur import bounds
    >>> bounds.sketch_size(1e-6)
    321
    """
    t = inflation**-2
    return math.ceil(-2.0 * math.log(failure_probability) / (t - 1.0 - math.log(t)))


def sketch_factor(count: int, failure_probability: float, /) -> float:
    """Return the f of (B4): ``||X||_F <= f ||G X||_F`` for `count` rows of iid N(0, 1/count) entries in G.

    Parameters
    ----------
    count : int
        The number of rows of the sketch.
    failure_probability : float
        The chance that the bound fails, between 0 and 1.

    Returns
    -------
    float
        The factor, above 1; infinite where it is beyond the range of a double.

    Raises
    ------
    ValueError
        If `count` is not positive.

    Examples
    --------
    >>> from cur import bounds
    >>> round(bounds.sketch_factor(500, 1e-6), 4)
    1.1924
    """
    level = _level(count, failure_probability)
    exponent = -_root(level, -1.0 - level) / 2.0
    return math.exp(exponent) if exponent < 709.0 else math.inf


def sketch_shrinkage(count: int, failure_probability: float, /) -> float:
    """Return the g of (B4): ``||X||_F >= g ||G X||_F`` for `count` rows of iid N(0, 1/count) entries in G.

    Parameters
    ----------
    count : int
        The number of rows of the sketch.
    failure_probability : float
        The chance that the bound fails, between 0 and 1.

    Returns
    -------
    float
        The factor, below 1.

    Raises
    ------
    ValueError
        If `count` is not positive.

    Examples
    --------
    >>> from cur import bounds
    >>> round(bounds.sketch_shrinkage(500, 1e-6), 4)
    0.8543
    """
    level = _level(count, failure_probability)
    return math.exp(-_root(level, math.sqrt(2.0 * level)) / 2.0)


def _level(count: int, failure_probability: float) -> float:
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}; it is the number of rows of the sketch")
    return -2.0 * math.log(failure_probability) / count


def _root(level: float, x: float) -> float:
    """Return the root of ``e^x - 1 - x = level`` on the side of zero of `x`, by Newton's iteration from beyond it.

    The function is convex, so that all iterates are beyond the root: but for rounding, the last errs on the safe side.
    """
    while True:
        following = x - (math.expm1(x) - x - level) / math.expm1(x)
        if not abs(following) < abs(x):
            return x
        x = following


LIPSCHITZ = {
    "identity": 1.0,
    "relu": 1.0,
    "tanh": 1.0,
    "silu": 1.09984,
    "gelu": 1.128905,
    "gelu_tanh": 1.12900,
}
"""Lipschitz constants of activations, the largest slope of each, rounded up.

``x s(x)`` with ``s(-x) = 1 - s(x)`` (SiLU, GELU and its tanh form) has slopes ``f'(x) + f'(-x) = 1``, so that the
smallest is one less the largest, and smaller in size. SiLU is steepest where ``x tanh(x / 2) = 2``; GELU at the root of
2, with slope ``Phi(sqrt(2)) + exp(-1) / sqrt(pi)``.
"""


def layer_output_bound(error: float, size: float = 1.0, /, *, activation: str | float = "identity") -> float:
    """Return (L), a bound on the change of ``act(W x)`` when another matrix stands for `W`.

    ``||act(W x) - act(B x)|| <= L ||W - B|| ||x||`` in the 2-norm, for an activation of Lipschitz constant `L` that
    acts on each entry. With ``error = ||(W - B) G^(1/2)||_F``, where ``G = E[x x^T]``, and ``size = 1`` it bounds the
    root mean square over the inputs, and is exact for the identity.

    Parameters
    ----------
    error : float
        The norm ``||W - B||_2`` or an upper bound on it, such as a certificate in either norm; or the weighted
        error.
    size : float, default 1
        The norm ``||x||``, or a root mean square of it for one of the change.
    activation : str or float, default "identity"
        The activation, as a key of `LIPSCHITZ`, or its Lipschitz constant.

    Returns
    -------
    float
        The bound, in the 2-norm.

    Raises
    ------
    ValueError
        If the activation is unknown, or a number is negative or NaN.

    References
    ----------
    arXiv 2501.04211, Theorem 4.1.

    Examples
    --------
    >>> round(layer_output_bound(0.1, 2.0, activation="silu"), 4)
    0.22
    """
    if isinstance(activation, str):
        if activation not in LIPSCHITZ:
            raise ValueError(
                f"`activation` must be one of {', '.join(LIPSCHITZ)}, or a Lipschitz constant; got {activation!r}"
            )
        constant = LIPSCHITZ[activation]
    else:
        constant = activation
    for name, value in (("error", error), ("size", size), ("activation", constant)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be a number that is at least 0; got {value!r}; pass a norm")
    return constant * error * size if error > 0 and size > 0 else 0.0
