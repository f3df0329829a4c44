"""Fields that configurations had, for one release: their former default is what there is now."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from cur._lib.errors import warn

__all__ = ["former"]

T = TypeVar("T")


def former(**constants: Any) -> Callable[[type[T]], type[T]]:
    """Let a class be made with fields that it has no more: with a warning if they have their value, else not at all.

    Parameters
    ----------
    **constants : Any
        The one value that each former field still has.

    Returns
    -------
    callable
        The decorator of the class, whose constructor then takes these fields, too.
    """

    def decorate(cls: type[T]) -> type[T]:
        make = cls.__init__

        @functools.wraps(make)
        def made(self: T, /, *args: Any, **values: Any) -> None:
            for name in constants.keys() & values.keys():
                value, only = values.pop(name), constants[name]
                if value != only:
                    raise ValueError(f"`{name}` is gone, it is always {only!r} now, got {value!r}; leave it out")
                warn(f"`{name}` is gone, it is always {only!r} now; leave it out", DeprecationWarning)
            make(self, *args, **values)

        cls.__init__ = made  # type: ignore[assignment]
        return cls

    return decorate
