"""The smallest rank whose certificate meets a tolerance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from cur._driver.problem import Choice
from cur._lib.errors import NumericalError

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
    select: str,
) -> Result:
    """Return the factorization of the smallest rank whose certified relative error is at most `tol`.

    The first that passes is taken, so the chance that a sketch fails is shared out among all that are tried: the j-th
    gets ``failure / (j (j + 1))``, which add up to `failure` however many there are.

    Parameters
    ----------
    choose_at : callable
        Makes the choice for a rank, without a warning about it: the ranks tried are ours, not the user's.
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
    select : str
        The selector, for the error.
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
        choice = choose_at(width)
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
                    raise _unreachable(tol, best, select)
        widest = attempt(choice)
        if widest.certificate.relative <= tol:
            at = choice.leading if nested else choose_at
            return _bisect(at, attempt, tol, below, found, widest)
        best = _better(best, widest)
        if last or (certain and norm == "fro" and _stuck(widest, errors[-1], tol)):
            raise _unreachable(tol, best, select)
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


def _unreachable(tol: float, best: Any, select: str) -> NumericalError:
    """Return the error that says what stands in the way of a tolerance, and what there is to do about it."""
    certificate = best.certificate
    reason, remedies = "", ["use a larger `tol`"]
    if certificate.dtype in ("float32", "complex64"):
        remedies.append("double precision")
    if select != "deim":
        remedies.append(f"select='deim', whose columns and rows are less alike than those of {select!r}")
    if hasattr(best, "U"):
        reason = ", because U divides by the small singular values of the columns and rows chosen"
        remedies.append("`interpolative`, which has no U to lose digits")
    return NumericalError(
        f"`tol`={tol:g} cannot be certified in {certificate.dtype}: at rank {best.rank}, the best one tried, the "
        f"relative error is at most {certificate.relative:.2g}, and larger ranks do not lower it{reason}; "
        f"{', or '.join(remedies)}"
    )


def relative_curve(shells: np.ndarray[Any, Any], left: float) -> np.ndarray[Any, Any]:
    """Return relative errors at ranks 1, 2, ... from what each rank adds, and what all of them leave, both squared.

    Summed from the small end, so that no digits cancel.
    """
    outside = np.append(np.cumsum(shells[::-1])[::-1][1:], 0.0)
    total = float(shells.sum()) + left
    return np.sqrt((outside + left) / total) if total > 0 else np.zeros(len(shells))
