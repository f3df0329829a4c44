"""Waiting for a package that is not needed, but has to be told something where it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]


class _Waiting(MetaPathFinder):
    """Lets the other finders find a module, and calls a function once it is there."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.then()

            # On the loader of this one module, which stays of its kind for those who ask it for files.
            vars(spec.loader)["exec_module"] = exec_module
        return spec


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call a function as soon as a module has been imported: at once, later, or never.

    Parameters
    ----------
    name : str
        The name of the module, which is not imported by this.
    then : callable
        The function, called without arguments.
    """
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then))
