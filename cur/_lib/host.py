"""JAX arrays in the memory of the host are computed with by NumPy.

JAX compiles every operation for every shape, some 70 of them for a factorization, which takes seconds and memory that
it keeps. NumPy reads the same memory, and so does JAX what NumPy returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import array_api_compat as compat
import numpy as np

from cur._lib.array import convert, detach, to_numpy
from cur._lib.promotion import promote

__all__ = ["is_host_jax", "on_device", "on_host", "through_numpy"]

Function = TypeVar("Function", bound=Callable[..., Any])


def through_numpy(function: Function) -> Function:
    """Let a function whose first argument is an array compute on the host what lives there.

    Parameters
    ----------
    function : callable
        A function of arrays, the first of which says where the others live.

    Returns
    -------
    callable
        The function, which for JAX arrays in the memory of the host is called with NumPy's and gives JAX's back.
    """

    @functools.wraps(function)
    def entry(first: Any, *others: Any, **options: Any) -> Any:
        if not (is_host_jax(first) and _is_native(first)):
            return function(first, *others, **options)
        arguments = [on_host(x) for x in (first, *others)]
        return on_device(function(*arguments, **{k: on_host(v) for k, v in options.items()}), first)

    return cast(Function, entry)


def is_host_jax(A: Any) -> bool:
    """Tell whether `A` is such an array; a tracer has no values.

    Parameters
    ----------
    A : object
        What may be such an array.

    Returns
    -------
    bool
        True for an array of JAX that has values, all of them in the memory of the host.
    """
    if not compat.is_jax_array(A):
        return False
    import jax

    value = detach(A)
    return not isinstance(value, jax.core.Tracer) and all(d.platform == "cpu" for d in value.devices())


def _is_native(value: Any) -> bool:
    """Tell whether the dtype is NumPy's own, as bfloat16 is not."""
    return bool(np.dtype(value.dtype).isbuiltin == 1)


def on_host(value: Any) -> Any:
    """Return arrays of JAX, alone or as the parts of a weight, as those of NumPy.

    Parameters
    ----------
    value : object
        An array, a dataclass whose fields are arrays, or anything else, which is returned as it is.
    """
    if is_host_jax(value):
        return to_numpy(detach(value) if _is_native(value) else promote(value))
    return _mapped(value, on_host) if is_dataclass(value) else value


def on_device(result: Any, like: Any) -> Any:
    """Bring the arrays of a result to the library of the matrix.

    Parameters
    ----------
    result : object
        An array of NumPy, or a tuple or a dataclass of them; anything else is returned as it is.
    like : array
        The matrix, to whose library and device the arrays are brought.

    Returns
    -------
    object
        The result with all of its arrays in that library.
    """
    if isinstance(result, np.ndarray):
        return convert(result, like)
    if isinstance(result, tuple):
        return tuple(on_device(part, like) for part in result)
    return _mapped(result, lambda part: convert(part, like)) if is_dataclass(result) else result


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    parts = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    return replace(value, **{k: change(v) for k, v in parts.items() if is_host_jax(v) or isinstance(v, np.ndarray)})
