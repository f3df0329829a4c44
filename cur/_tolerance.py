"""The smallest rank whose certificate meets a tolerance."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from cur._errors import NumericalError, RankWarning
from cur._problem import Choice

FIRST_WIDTH = 32
"""Rank at which the search begins; doubled until the error is met."""

Result = TypeVar("Result", bound=Any)


def smallest_rank(
    choose_at: Callable[[int], Choice],
    assemble: Callable[[Choice, float], Result],
    curve: Callable[[Choice], np.ndarray[Any, Any]],
    tol: float,
    most: int,
    *,
    nested: bool,
    norm: object,
    failure: float,
    certain: bool,
) -> Result:
    """Return the factorization of the smallest rank whose certified relative error is at most `tol`.

    The first that passes is taken, so the chance that a sketch fails is shared out among all that are tried: the j-th
    gets ``failure / (j (j + 1))``, which add up to `failure` however many there are.

    Parameters
    ----------
    choose_at : callable
        Makes the choice for a rank.
    assemble : callable
        Makes the certified factorization of a choice, at a chance of failure.
    curve : callable
        Gives the relative Frobenius errors at ranks 1, 2, ... of a nested choice.
    tol, most
        The tolerance and the largest rank.
    nested : bool
        Whether the leading part of a choice is the choice for a smaller rank. Then one choice serves all ranks; else
        every rank that is tried costs a choice.
    norm : "fro" or 2
        Norm of the certificate. In the 2-norm the curve does not help, and nested choices are bisected.
    certain : bool
        Whether the errors of `curve` are those of the whole matrix, and not only of what was seen of an operator.
    failure : float
        Chance that the certificate of the result is wrong, where it comes from a sketch.

    Raises
    ------
    NumericalError
        If no rank is certified: rounding is in the way.
    """
    attempts = itertools.count(1)

    def attempt(choice: Choice) -> Result:
        j = next(attempts)
        result = assemble(choice, failure / (j * (j + 1)))
        if result.certificate.kind != "probabilistic":
            return result
        return replace(result, certificate=replace(result.certificate, failure_probability=failure))

    width = min(FIRST_WIDTH, most)
    below = 0
    best: Result | None = None
    while True:
        width = most if 2 * width > most else width  # near full width the search may as well see everything
        choice = _quietly(choose_at, width)
        found = min(choice.rows.shape[0], choice.columns.shape[0])
        last = width >= most or found < width
        errors = curve(choice) if norm == "fro" else np.ones(found)
        if nested:
            for k in _ranks(errors, tol):
                result = attempt(choice.leading(k))
                if result.certificate.relative <= tol:
                    return result
                best = _better(best, result)
                if certain and _stuck(result, errors[k - 1], tol):
                    raise _unreachable(tol, best)
        widest = attempt(choice)
        if widest.certificate.relative <= tol:
            at = choice.leading if nested else lambda k: _quietly(choose_at, k)
            return _bisect(at, attempt, tol, below, found, widest)
        best = _better(best, widest)
        if last or (certain and norm == "fro" and _stuck(widest, errors[-1], tol)):
            raise _unreachable(tol, best)
        below, width = (0 if nested else width), min(2 * width, most)


def _ranks(errors: np.ndarray[Any, Any], tol: float) -> Iterator[int]:
    """Yield the ranks to try, from the first whose best core meets the tolerance: rounding, or a sketch, asks for more.

    Closely while a few more indices may be all that is missing, then in larger steps.
    """
    fits = np.flatnonzero(errors <= tol)
    k = first = int(fits[0]) + 1 if fits.size else len(errors) + 1
    while k <= len(errors):
        yield k
        k += max(1, k // 50) if k < 1.15 * first else max(1, k // 10)


def _stuck(result: Any, best_core: float, tol: float) -> bool:
    """Tell whether larger ranks are of no use: the error is far above that of the best core, and above the tolerance.

    What is left then is the rounding of U. It grows with the rank until small singular values are cut, and no longer
    falls from there on: by less than the factors here, as measured on kernels and on graded matrices.
    """
    relative = result.certificate.relative
    return bool(result.certificate.kind == "exact" and relative > max(4 * tol, 5 * best_core))


def _better(best: Result | None, result: Result) -> Result:
    return result if best is None or result.certificate.relative < best.certificate.relative else best


def _bisect(
    choice_at: Callable[[int], Choice],
    assemble: Callable[[Choice], Result],
    tol: float,
    low: int,
    high: int,
    best: Result,
) -> Result:
    """Narrow ``low < k <= high`` where `high` meets the tolerance and `low` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        result = assemble(choice_at(middle))
        if result.certificate.relative <= tol:
            best, high = result, middle
        else:
            low = middle
    return best


def _quietly(choose_at: Callable[[int], Choice], width: int) -> Choice:
    """Choose without the warning about ranks: here the width is ours, not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        return choose_at(width)


def _unreachable(tol: float, best: Any) -> NumericalError:
    certificate = best.certificate
    return NumericalError(
        f"`tol`={tol:g} cannot be certified in {certificate.dtype}: the least relative error is "
        f"{certificate.relative:.2g}, at rank {best.rank}, and larger ranks do not lower it, because U divides by the "
        "small singular values of the columns and rows; use a larger `tol`, a wider dtype, or `interpolative`, which "
        "loses fewer digits"
    )


def relative_curve(shells: np.ndarray[Any, Any], left: float) -> np.ndarray[Any, Any]:
    """Return relative errors at ranks 1, 2, ... from what each rank adds, and what all of them leave, both squared.

    Summed from the small end, so that no digits cancel.
    """
    outside = np.append(np.cumsum(shells[::-1])[::-1][1:], 0.0)
    total = float(shells.sum()) + left
    return np.sqrt((outside + left) / total) if total > 0 else np.zeros(len(shells))
