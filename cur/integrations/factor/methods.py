"""How each method of a plan makes its layers: the function for each kind of entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cur.integrations.measure.moments import Moments
    from cur.integrations.measure.propagation import InputMoments
    from cur.integrations.nn import CompressedLinear
    from cur.integrations.plan.entry import PlanEntry
    from cur.integrations.report.data import LayerReport

__all__ = ["MAKERS", "Made", "Maker", "Task", "make_layers", "maker"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a method may use to make layers.

    Attributes
    ----------
    model : nn.Module
        The dense model; it is not changed.
    entries : mapping of str to PlanEntry
        All those of the plan, by name.
    moments : Moments
        The statistics of the plan's layers, as moments.
    dtype : torch.dtype
        Precision that the plan asks for.
    seed : int
        The seed of every random choice.
    correction : float
        How much of the inputs' earlier error is corrected, see :meth:`InputMoments.problem`.
    begun : dict
        What a method has to keep of a layer, by its name, until another, made later, completes it.
    """

    model: nn.Module
    entries: Mapping[str, PlanEntry]
    moments: Moments
    dtype: torch.dtype = torch.float32
    seed: int = 0
    correction: float = 0.0
    begun: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Made:
    """What became of an entry.

    Attributes
    ----------
    layers : mapping of str to (CompressedLinear, LayerReport)
        The layers that are complete now and the reports on them, by name; perhaps none, or several.
    replacement : callable
        A callable that replaces the entry's dense layer while later layers are made.
    """

    layers: Mapping[str, tuple[CompressedLinear, LayerReport]]
    replacement: Callable[[Tensor], Tensor]


Maker: TypeAlias = "Callable[[Task, Any, InputMoments | None], Made]"
"""Called with the task, an entry, and the moments of the inputs that the layer gets where it may be fitted to them."""

MAKERS: dict[type[PlanEntry], Maker] = {}
"""Maker of each kind of entry; one of your own is added by :func:`maker`."""

_Function = TypeVar("_Function", bound=Maker)


def maker(*entry_types: type[PlanEntry]) -> Callable[[_Function], _Function]:
    """Make a function known as the maker of some kinds of entries; a decorator.

    Parameters
    ----------
    *entry_types : type of PlanEntry
        The classes of the entries that the function makes layers of.

    Returns
    -------
    callable
        A decorator that returns the function as it is.

    Raises
    ------
    ValueError
        If one of them has another maker.
    """

    def register(function: _Function) -> _Function:
        for entry_type in entry_types:
            if MAKERS.setdefault(entry_type, function) is not function:
                raise ValueError(f"{entry_type.__name__} has a maker already, {MAKERS[entry_type].__name__}")
        return function

    return register


def make_layers(task: Task, entry: PlanEntry, propagated: InputMoments | None = None) -> Made:
    """Make the layers of an entry as its method does.

    Parameters
    ----------
    task : Task
        All that the layers of a plan are made from.
    entry : PlanEntry
        The entry of the plan.
    propagated : InputMoments, optional
        Moments of the inputs that compressed layers before it give; None to fit it to nothing.

    Returns
    -------
    Made
        The layers that are complete now, and the replacement to call.

    Raises
    ------
    NotImplementedError
        If no function is known for its kind.
    """
    if type(entry) not in MAKERS:
        raise NotImplementedError(
            f"no function makes the layers of {type(entry).__name__} ({entry.name}); add one by "
            "cur.integrations.factor.maker"
        )
    return MAKERS[type(entry)](task, entry, propagated)
