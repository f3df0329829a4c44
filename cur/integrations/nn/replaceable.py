"""What of a module would be lost with it: its hooks, a forward pass of its own, and places outside of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["STAND_IN", "carry_hooks_", "has_own_forward", "held_beside"]

STAND_IN = "_cur_stand_in"
"""The attribute of functions that stand in for the forward pass of a module for a while, and are taken away again."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_DISPATCH = "_hf_hook"


def has_own_forward(module: nn.Module) -> bool:
    """Say whether a module computes something else than its class does, by a forward pass of the object.

    Parameters
    ----------
    module : nn.Module
        The module to look at.

    Returns
    -------
    bool
        Whether it has one; what accelerate sets to bring inputs to a device is none, as it is carried over.
    """
    own = vars(module).get("forward")
    return own is not None and not hasattr(own, STAND_IN) and not hasattr(module, _DISPATCH)


def carry_hooks_(new: nn.Module, old: nn.Module) -> None:
    """Let a module call the hooks of the one that it stands in for, whose handles take them away as before.

    Parameters
    ----------
    new : nn.Module
        The module, which is changed in place.
    old : nn.Module
        The module that it stands in for.
    """
    if new is not old and any(getattr(old, name) for name in _HOOKS):
        for name in _HOOKS:
            own, theirs = getattr(new, name), getattr(old, name)
            if own is not theirs:
                theirs.update(own)
                setattr(new, name, theirs)
        state: Any = new
        state._is_full_backward_hook = old._is_full_backward_hook
    dispatch = getattr(old, _DISPATCH, None)
    if dispatch is not None and not hasattr(new, _DISPATCH):
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

        add_hook_to_module(new, dispatch)


def held_beside(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the attributes of modules in which named ones lie as well, outside of the tree of modules.

    Parameters
    ----------
    model : nn.Module
        The model to look through.
    names : iterable of str
        The names of the modules to look for.

    Returns
    -------
    dict of str to str
        The dotted name of a list, tuple, set, mapping or other attribute, by the name of each module that is there.
    """
    modules = dict(model.named_modules())
    wanted = {id(modules[name]): name for name in names if name in modules}
    found: dict[str, str] = {}
    for owner, module in modules.items():
        for key, value in vars(module).items():
            if key != "_modules":
                for part in _parts(value):
                    if id(part) in wanted:
                        found[wanted[id(part)]] = f"{owner}.{key}" if owner else key
    return found


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    return value.values() if isinstance(value, dict) else (value,)
