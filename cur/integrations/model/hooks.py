"""Watching modules while a model runs: what they are called with, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["call_groups", "inputs_of"]


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Gather what the named modules are called with, the last time if several."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args:
                seen[name] = args[0]

        return before

    with _before(model, {name: keep(name) for name in names}):
        yield seen


def call_groups(model: nn.Module, names: Iterable[str], forward: Callable[[], object]) -> list[list[str]]:
    """Return names of modules in the order in which they are called, those called in turn with one tensor together."""
    groups: list[list[str]] = []
    last: list[torch.Tensor] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if last and args and args[0] is last[0]:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = args[:1]

        return before

    with _before(model, {name: note(name) for name in names}):
        forward()
    return groups


@contextmanager
def _before(model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, tuple[Any, ...]], None]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
