"""The exceptions and warnings of the package."""

from __future__ import annotations

__all__ = ["CURError", "NumericalError", "RankWarning"]


class CURError(Exception):
    """Base class of the errors that are particular to this package."""


class NumericalError(CURError, ArithmeticError):
    """A computation could not deliver what was asked in the arithmetic at hand."""


class RankWarning(UserWarning):
    """The requested rank exceeds the numerical rank of the matrix and was truncated."""
