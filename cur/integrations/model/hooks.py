"""Hooks of modules and what stands in for their `forward`, set and taken away again in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from cur.integrations.nn.replaceable import STAND_IN

__all__ = ["Hook", "call_groups", "forwards_replaced", "hooked", "inputs_of", "outputs_of"]

Hook: TypeAlias = "tuple[nn.Module, Literal['before', 'after'], Callable[..., Any]]"
"""A module, when to call a function, and the function: ``before(module, args, kwargs)``, which may return other
arguments as ``(args, kwargs)``, or ``after(module, args, output)``, which may return another output."""

Forward: TypeAlias = Callable[..., Any]


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Call functions before or after modules while this lasts, in the order in which they are given.

    Parameters
    ----------
    hooks : iterable of Hook
        The hooks to set, see :data:`Hook`. All of them are removed afterwards, whatever happens in between.

    Examples
    --------
    >>> from torch import nn
    >>> layer, shapes = nn.Linear(3, 2), []
    >>> with hooked([(layer, "after", lambda module, args, output: shapes.append(tuple(output.shape)))]):
    ...     _ = layer(torch.zeros(5, 3))
    >>> _ = layer(torch.zeros(5, 3))
    >>> shapes
    [(5, 2)]
    """
    with ExitStack() as stack:
        for module, when, function in hooks:
            if when == "before":
                handle = module.register_forward_pre_hook(function, with_kwargs=True)
            else:
                handle = module.register_forward_hook(function)
            stack.callback(handle.remove)
        yield


@contextmanager
def forwards_replaced(replacing: Iterable[tuple[nn.Module, Callable[[Forward], Forward]]]) -> Iterator[None]:
    """Run other functions in the place of what modules compute while this lasts; their hooks are called as ever.

    To who asks what a module takes, such as whether there is a key-value cache to switch off, the functions look like
    what they stand in for.

    Parameters
    ----------
    replacing : iterable of (nn.Module, callable)
        Modules, each with a function from its present `forward` to the one that takes its place.
    """
    with ExitStack() as stack:
        for module, wrap in replacing:
            replaced: Any = module
            stack.callback(_put_back, replaced, vars(module).get("forward"))
            replaced.forward = _like(replaced.forward, wrap(replaced.forward))
        yield


def _like(original: Forward, other: Forward) -> Forward:
    """Return a function that has the signature of the first, by which is told what a model is called with."""

    @wraps(original)
    def forward(*args: Any, **options: Any) -> Any:
        return other(*args, **options)

    setattr(forward, STAND_IN, True)
    return forward


def _put_back(module: Any, own: Forward | None) -> None:
    vars(module).pop("forward", None)
    if own is not None:  # of the object, not of its class: a hook of accelerate, for one
        module.forward = own


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Gather what the named modules are called with, the last time if several.

    Parameters
    ----------
    model : nn.Module
        The model that the names belong to.
    names : iterable of str
        The names of the modules to watch.

    Yields
    ------
    dict of str to Tensor
        The inputs by name, which fill up as the model runs.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            if args:
                seen[name] = args[0]

        return before

    with hooked([(model.get_submodule(name), "before", keep(name)) for name in names]):
        yield seen


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Gather what the named modules return, the last time if several.

    Parameters
    ----------
    model : nn.Module
        The model that the names belong to.
    names : iterable of str
        The names of the modules to watch.

    Yields
    ------
    dict of str to Tensor
        The outputs by name, which fill up as the model runs.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: seen.__setitem__(name, output)

    with hooked([(model.get_submodule(name), "after", keep(name)) for name in names]):
        yield seen


def call_groups(model: nn.Module, names: Iterable[str], forward: Callable[[], object]) -> list[list[str]]:
    """Return names of modules in the order in which they are called, those called in turn with one tensor together.

    Parameters
    ----------
    model : nn.Module
        The model that the names belong to.
    names : iterable of str
        The names of the modules to watch.
    forward : callable
        Called once to run the model.
    """
    groups: list[list[str]] = []
    last: list[torch.Tensor] = []

    def note(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            if last and args and args[0] is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = args[:1]

        return before

    with hooked([(model.get_submodule(name), "before", note(name)) for name in names]):
        forward()
    return groups
