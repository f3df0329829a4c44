"""Versions of Python and of the libraries that decide the figures."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["packages", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the figures, as installed."""
    return {"python": platform.python_version(), **packages("cur-decomposition", "numpy", "torch", "transformers")}


def packages(*names: str) -> dict[str, str]:
    """Return the versions of packages, of those that are installed.

    Parameters
    ----------
    *names : str
        The names of the distributions, as installers have them.
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from a source tree
            continue
    return found
