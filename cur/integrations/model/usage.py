"""How a module is used that is not one of transformers' own: what it is called with, its loss, and its blocks.

Of a transformers model all of this is known. Of any other module a batch is taken as its arguments; what differs from
that is told by :func:`used_as`, and everything that runs a module asks here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cur.integrations.model.adapters import is_adapter

__all__ = ["Inputs", "Usage", "first_tensor", "is_transformer", "model_name", "told_blocks", "usage_of", "used_as"]

_MARK = "_cur_usage"

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
Loss: TypeAlias = Callable[[Any, Any], Tensor]
Blocks: TypeAlias = "str | Sequence[str] | Sequence[Sequence[str]]"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What is known of the use of a module beside what it says itself.

    Attributes
    ----------
    forward : callable or None
        Called as ``forward(module, batch)``; None where a batch is the arguments of the module.
    loss : callable or None
        Called as ``loss(output, batch)``; None where no loss is known.
    blocks : str, sequence of str, sequence of sequence of str, or None
        The name of the module that holds the blocks, their own names, or those of several stacks; None to look for
        them.
    """

    forward: Forward | None = None
    loss: Loss | None = None
    blocks: Blocks | None = None


@contextmanager
def used_as(
    model: nn.Module, /, *, forward: Forward | None = None, loss: Loss | None = None, blocks: Blocks | None = None
) -> Iterator[None]:
    """Tell how a module is used, to all functions that are called while this lasts.

    Parameters
    ----------
    model : nn.Module
        The module, which is as it was afterwards.
    forward : callable, optional
        Called as ``forward(module, batch)``; returns the output of the module. By default a batch that is a tensor is
        the argument of the module, a tuple or list are its arguments, and a mapping its keyword arguments.
    loss : callable, optional
        Called as ``loss(output, batch)``; returns the mean over the samples of the batch, or a vector with one entry
        for each. Where it is given, entries of a mapping that the module does not take are left to it.
    blocks : str, sequence of str or sequence of sequence of str, optional
        The name of the module whose children are the blocks; or the names of the blocks, in order; or those of several
        stacks. By default blocks are looked for.

    Yields
    ------
    None
        While this lasts.

    Raises
    ------
    TypeError
        If `forward` or `loss` cannot be called.

    Examples
    --------
    >>> from cur.integrations import collect
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with used_as(net, forward=lambda module, batch: module(batch["x"])):
    ...     found = collect(net, [{"x": torch.ones(5, 3), "y": torch.zeros(5)}], modules=["0"])
    >>> found.square_sums["0"].tolist()
    [5.0, 5.0, 5.0]
    """
    for name, given in (("forward", forward), ("loss", loss)):
        if given is not None and not callable(given):
            raise TypeError(f"`{name}` must be callable, got {type(given).__name__}; pass a function or None")
    told: dict[str, Any] = {"forward": forward, "loss": loss, "blocks": blocks}
    before = usage_of(model)
    state = vars(model)
    had = _MARK in state
    state[_MARK] = replace(before, **{name: given for name, given in told.items() if given is not None})
    try:
        yield
    finally:
        if had:
            state[_MARK] = before
        else:
            del state[_MARK]


def usage_of(model: nn.Module) -> Usage:
    """Return what :func:`used_as` has told of a module.

    Parameters
    ----------
    model : nn.Module
        The module to ask about.
    """
    found: Usage | None = vars(model).get(_MARK)
    return found or Usage()


def is_transformer(model: nn.Module) -> bool:
    """Say whether a model is one of transformers, so that its configuration says how it is used.

    Parameters
    ----------
    model : nn.Module
        The model to look at.

    Returns
    -------
    bool
        Whether it is one, and nobody has told of another forward pass.
    """
    return (isinstance(model, PreTrainedModel) or is_adapter(model)) and usage_of(model).forward is None


def model_name(model: nn.Module) -> str:
    """Return the place that a transformers model came from, empty for any other module.

    Parameters
    ----------
    model : nn.Module
        The model to name.
    """
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def told_blocks(model: nn.Module) -> list[list[tuple[str, nn.Module]]] | None:
    """Return name and module of the blocks of each stack that :func:`used_as` has told of; None if it has not.

    Parameters
    ----------
    model : nn.Module
        The module to ask about.

    Raises
    ------
    TypeError
        If what was told are no names.
    ValueError
        If the module lacks one of them, or names are none that can be those of blocks.
    """
    told: Any = usage_of(model).blocks  # a user's
    if told is None:
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(told, str):
        children = modules[told].named_children() if told in modules else ()
        named = [[f"{told}.{child}" if told else child for child, _ in children]]
    else:
        parts = list(told) if isinstance(told, Sequence) else [told]
        named = [parts] if all(isinstance(part, str) for part in parts) else [_names(part) for part in parts]
    missing = [name for stack in named for name in stack if name not in modules]
    if not named or not all(named) or missing:
        raise ValueError(
            f"`blocks` must name a module that holds blocks, or blocks, of {type(model).__name__}, got {told!r}; "
            + (f"it has no {missing[0]!r}" if missing else "there is nothing inside")
        )
    return [[(name, modules[name]) for name in stack] for stack in named]


def _names(stack: Any) -> list[str]:
    if isinstance(stack, str) or not isinstance(stack, Sequence) or not all(isinstance(name, str) for name in stack):
        raise TypeError(
            "`blocks` must be the name of a module, names of blocks, or a sequence of names for each stack, got "
            f"{stack!r} among them; pass dotted names, as `named_modules` gives them"
        )
    return list(stack)


class Inputs(dict[str, Any]):
    """The tensors of a batch by name, and how a module is called with it.

    Parameters
    ----------
    module : nn.Module
        The module that is to be called.
    batch : Any
        A tensor, or tensors in a tuple, a list or a mapping.
    place : torch.device
        The device that the tensors are brought to.

    Attributes
    ----------
    given : Any
        The batch, on the device.

    Raises
    ------
    TypeError
        If the batch holds no tensor.
    """

    def __init__(self, module: nn.Module, batch: Any, place: torch.device) -> None:
        self.given = _brought(batch, place)
        self._usage = usage_of(module)
        super().__init__(_tensors(self.given))
        if not self:
            raise TypeError(
                "a batch must be a tensor, or hold tensors in a tuple, a list or a mapping, got "
                f"{type(batch).__name__}; make such a batch, and put it together in `forward(module, batch)`"
            )

    def call(self, module: nn.Module) -> Any:
        """Call a module with the batch.

        Parameters
        ----------
        module : nn.Module
            The module to call.

        Returns
        -------
        Any
            The output of the module, or of the user's function.
        """
        if self._usage.forward is not None:
            return self._usage.forward(module, self.given)
        if isinstance(self.given, Mapping):
            return module(**self.keywords(module))
        return module(*self.given) if isinstance(self.given, (tuple, list)) else module(self.given)

    def keywords(self, module: nn.Module) -> dict[str, Any]:
        """Return the entries of the batch that a module is called with, by name.

        Labels that the module does not take are left out, and where there is a loss whatever else may be for that.

        Parameters
        ----------
        module : nn.Module
            The module to call.
        """
        accepted = inspect.signature(module.forward).parameters
        if any(one.kind is one.VAR_KEYWORD for one in accepted.values()):
            return dict(self.given)
        left = {key for key in self.given if key not in accepted and (key == "labels" or self._usage.loss is not None)}
        return {key: value for key, value in self.given.items() if key not in left}


def first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor of a batch, whose first axis is that of the samples; None if there is none.

    Parameters
    ----------
    batch : Any
        A tensor, or tensors in a tuple, a list or a mapping.
    """
    return next(iter(_tensors(batch).values()), None)


def _tensors(batch: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a batch, those inside of others by dotted names."""
    if isinstance(batch, Tensor):
        return {prefix or "0": batch}
    parts = batch if isinstance(batch, Mapping) else {}
    if isinstance(batch, (tuple, list)):
        parts = {str(place): part for place, part in enumerate(batch)}
    found: dict[str, Tensor] = {}
    for key, part in parts.items():
        found |= _tensors(part, f"{prefix}.{key}" if prefix else str(key))
    return found


def _brought(batch: Any, place: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(place)
    if isinstance(batch, Mapping):
        return {key: _brought(part, place) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_brought(part, place) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
