"""Threads of the linear algebra libraries: one alone where products are too small to be shared."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["one_thread"]


@functools.cache
def _libraries() -> Any:
    """Return the libraries that are loaded, which takes milliseconds to find; None without the package for it."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController().select(user_api="blas")


def one_thread() -> AbstractContextManager[Any]:
    """Return a context in which BLAS does not share products among threads.

    Threads that wait for each other's parts of a small product take the time of all processors and save none; beside
    another busy process they wait many times as long.

    Returns
    -------
    context manager
        What restores the number of threads at its end. Without threadpoolctl it does nothing: results are the same.
    """
    found = _libraries()
    limited: AbstractContextManager[Any] = nullcontext() if found is None else found.limit(limits=1)
    return limited
