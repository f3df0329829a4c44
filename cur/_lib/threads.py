"""Threads of the linear algebra libraries: one alone where products are too small to be shared."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["one_thread"]


@functools.cache
def _libraries() -> ThreadpoolController:
    # looking for the libraries that are loaded takes milliseconds
    return ThreadpoolController().select(user_api="blas")


def one_thread() -> AbstractContextManager[Any]:
    """Return a context in which BLAS does not share products among threads.

    Threads that wait for each other's parts of a small product take the time of all processors and save none; beside
    another busy process they wait many times as long.

    Returns
    -------
    context manager
        What restores the number of threads at its end.
    """
    limited: AbstractContextManager[Any] = _libraries().limit(limits=1)
    return limited
