"""The exceptions and warnings of the package."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

__all__ = ["CURError", "NumericalError", "RankWarning", "collected", "warn"]


class CURError(Exception):
    """Base class of the errors that are particular to this package."""


class NumericalError(CURError, ArithmeticError):
    """A computation could not deliver what was asked in the arithmetic at hand."""


class RankWarning(UserWarning):
    """The requested rank exceeds the numerical rank of the matrix and was truncated."""


_PACKAGE = str(Path(__file__).parents[1])

_gathered: ContextVar[list[str] | None] = ContextVar("_gathered", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Gather what this package would warn of, in this thread alone: filters of warnings belong to the whole process.

    Yields
    ------
    list of str
        The texts of the warnings, in the order in which they came; it grows while the block runs.
    """
    found: list[str] = []
    token = _gathered.set(found)
    try:
        yield found
    finally:
        _gathered.reset(token)


def warn(message: str, category: type[Warning] = RankWarning) -> None:
    """Warn at the line of the user's that called the package, through however many functions of ours.

    Parameters
    ----------
    message : str
        The text of the warning.
    category : type, default RankWarning
        The class of the warning.
    """
    found = _gathered.get()
    if found is not None:
        found.append(message)
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
